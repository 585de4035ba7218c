"""Find the parts of an unmodified Hugging Face model that are read and edited, without tables of names.

transformers declares per decoder which class makes a hidden state (`_can_record_outputs`); we collect the
instances of that class and check their number against the config. Older modelling code falls back to the one
`nn.ModuleList` of that length. Anything else is refused with an explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from demur.errors import CapabilityError, InputError


class Edit(Protocol):
    """A reversible change of the forward pass. `install` hooks the model and its exit takes the hooks off.

    Edits must be out of place and must treat every row of a batch alike: a prefix that all prompts share is
    computed once, as one row.
    """

    def install(self, model: Any) -> AbstractContextManager[None]:
        """Hook `model`; leaving the context takes the hooks off."""
        ...


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove torch hook handles on exit, whatever happens inside."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def text_config(model: Any) -> Any:
    """The config of the text decoder (the model's own where there is no other)."""
    return model.config.get_text_config(decoder=True)


def find_layers(model: Any) -> list[nn.Module]:
    """The decoder blocks in order, block k being the one whose output is the residual stream after layer k.

    Raises:
        CapabilityError: the blocks cannot be told apart from other modules.

    >>> layers = find_layers(model)  # doctest: +SKIP
    >>> len(layers) == model.config.num_hidden_layers  # doctest: +SKIP
    True
    """
    config = text_config(model)
    wanted = config.num_hidden_layers
    for module in model.modules():
        if isinstance(getattr(module, "config", None), type(config)):  # not a vision tower
            found = [m for m in module.modules() if isinstance(m, _recorded(module, "hidden_states"))]
            if wanted and len(found) == wanted:
                return found
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted and wanted > 0]
    lists = [m for m in lists if len({type(block) for block in m}) == 1]
    if len(lists) == 1:
        return list(lists[0])
    raise CapabilityError(
        f"{type(model).__name__}: the config says {wanted} decoder layers, and the model has {len(lists)} "
        "module lists of that length and no transformers record of which class makes the hidden states. "
        "Scores and answers still work; states and interventions do not."
    )


def _recorded(module: nn.Module, what: str) -> tuple[type, ...]:
    """The classes that transformers names as makers of "hidden_states" or "attentions" in this module."""
    entry = (getattr(module, "_can_record_outputs", None) or {}).get(what)
    entries = entry if isinstance(entry, (list, tuple)) else [entry]
    return tuple(k for k in (getattr(e, "target_class", e) for e in entries) if isinstance(k, type))


def first_tensor(output: Any) -> Tensor:
    """The hidden state in a block's output: a tensor, or the first entry of a tuple in older code."""
    state = output[0] if isinstance(output, tuple) else output
    if not isinstance(state, Tensor):
        raise CapabilityError(
            f"a decoder layer returned {type(state).__name__}, expected a tensor or a tuple of them"
        )
    return state


def with_first(output: Any, state: Tensor) -> Any:
    """`output` with its hidden state replaced."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


def find_projections(model: Any, layers: list[nn.Module]) -> list[nn.Module]:
    """The attention output projection of each block: the last weighted module its attention calls.

    Found by watching one forward pass of one token, so names and shapes do not matter. Its input holds the
    attention heads side by side, width n_heads * head_dim.
    """
    attention = [_attention(layer, model) for layer in layers]
    last: dict[int, nn.Module] = {}

    def watch(k: int) -> Callable[..., None]:
        return lambda module, *_: last.__setitem__(k, module)

    handles = [
        leaf.register_forward_hook(watch(k))
        for k, block in enumerate(attention)
        for leaf in block.modules()
        if getattr(getattr(leaf, "weight", None), "ndim", 0) == 2 and not list(leaf.children())
    ]
    with hooked(*handles), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
    return [last[k] for k in range(len(layers))]


def _attention(layer: nn.Module, model: Any) -> nn.Module:
    kinds = tuple(k for module in model.modules() for k in _recorded(module, "attentions"))
    found = [m for m in layer.modules() if isinstance(m, kinds)]
    found = found or [m for n, m in layer.named_children() if "attn" in n or "attention" in n]
    if len(found) != 1:
        raise CapabilityError(
            f"{type(layer).__name__} has {len(found)} attention modules that we can tell; part='heads' "
            "needs exactly one per layer. Read part='block' instead."
        )
    return found[0]


def input_device(model: Any) -> torch.device:
    """Where token ids must be for the model's first module."""
    weight = model.get_input_embeddings().weight
    return torch.device(weight.device)


class BlockEdit:
    """Replace the output of one decoder block by `fn(h_BTD, positions_BT)`.

    Args:
        layer: 0..n-1.
        fn: gets the residual stream after the block, shape (B, T, D) in the model's dtype, and the token
            positions (B, T) counted from the start of each prompt (decode steps see T = 1 and the position of
            the new token; padding has arbitrary positions). Returns a new tensor of the same shape. It must
            not change `h_BTD` in place and must treat all rows alike.

    >>> edit = BlockEdit(3, lambda h, positions: h + direction)  # doctest: +SKIP
    >>> steered = runtime.with_edits(edit)  # doctest: +SKIP
    """

    def __init__(self, layer: int, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.layer, self.fn = layer, fn

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the block; the hook is gone on exit."""
        layers = find_layers(model)
        if not 0 <= self.layer < len(layers):
            raise InputError(f"layer {self.layer}: this model has layers 0 to {len(layers) - 1}")
        seen: dict[str, Any] = {}

        def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(
                positions=kwargs.get("position_ids"), past=_past_length(kwargs.get("past_key_values"))
            )

        def edit(_module: nn.Module, _args: Any, output: Any) -> Any:
            h_BTD = first_tensor(output)
            new = self.fn(h_BTD, _positions(seen, h_BTD))
            if new.shape != h_BTD.shape:
                raise InputError(
                    f"the edit of layer {self.layer} turned shape {tuple(h_BTD.shape)} into "
                    f"{tuple(new.shape)}"
                )
            return with_first(output, new.to(h_BTD.dtype))

        with hooked(
            model.register_forward_pre_hook(look, with_kwargs=True),
            layers[self.layer].register_forward_hook(edit),
        ):
            yield


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _positions(seen: dict[str, Any], h_BTD: Tensor) -> Tensor:
    B, T = h_BTD.shape[:2]
    given = seen.get("positions")
    if given is None:
        return (torch.arange(T, device=h_BTD.device) + seen.get("past", 0)).expand(B, T)
    given = given[0] if given.ndim == 3 else given  # multimodal rotary positions: the text axis comes first
    return given[..., -T:].to(h_BTD.device).expand(B, T)


class HeadEdit:
    """Scale attention heads, at all positions, where they enter the attention's output projection.

    Args:
        scales: (layer, head) -> factor; 0 takes a head out, 1 leaves it. Both count from 0.

    >>> without = runtime.with_edits(HeadEdit({(12, 3): 0.0}))  # doctest: +SKIP
    """

    def __init__(self, scales: Mapping[tuple[int, int], float]) -> None:
        self.scales = dict(scales)

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the output projections of the heads' layers; the hooks are gone on exit."""
        layers, n_heads = find_layers(model), text_config(model).num_attention_heads
        for layer, head in self.scales:
            if not (0 <= layer < len(layers) and 0 <= head < n_heads):
                raise InputError(
                    f"head {head} of layer {layer}: this model has layers 0 to {len(layers) - 1} with heads 0 "
                    f"to {n_heads - 1}"
                )
        projections = find_projections(model, layers)
        by_layer: dict[int, dict[int, float]] = {}
        for (layer, head), scale in self.scales.items():
            by_layer.setdefault(layer, {})[head] = scale
        hooks = [
            projections[layer].register_forward_pre_hook(_scaler([of.get(h, 1.0) for h in range(n_heads)]))
            for layer, of in by_layer.items()
        ]
        with hooked(*hooks):
            yield


def _scaler(factors: list[float]) -> Callable[..., tuple[Any, ...]]:
    def scale(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        o_BTW = args[0]
        f_H1 = torch.tensor(factors, dtype=o_BTW.dtype, device=o_BTW.device)[:, None]
        return ((o_BTW.unflatten(-1, (len(factors), -1)) * f_H1).flatten(-2), *args[1:])

    return scale

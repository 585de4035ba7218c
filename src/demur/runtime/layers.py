"""Find the parts of an unmodified Hugging Face model that are read and edited, without tables of names.

transformers declares per decoder which class makes a hidden state (`_can_record_outputs`); we collect the
instances of that class and check their number against the config. Older modelling code falls back to the one
`nn.ModuleList` of that length. Anything else is refused with an explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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


# --- experts of mixture models ------------------------------------------------------------------------------------

ExpertMode = Literal["post_topk_renorm", "pre_topk", "output_gain", "force"]
"""What `ExpertEdit` does to the experts it names, see there."""


@dataclass(frozen=True, slots=True)
class Router:
    """What sends tokens to the routed experts of one block.

    Attributes:
        layer: of the block. module: gives (logits (N, E), weights (N, k), indices (N, k)) for N tokens; the weights
            are those that the experts' outputs are multiplied with, after the model's own normalisation.
        experts, chosen: E and k.
    """

    layer: int
    module: nn.Module
    experts: int
    chosen: int


def find_routers(model: Any) -> list[Router]:
    """The routers in order of their blocks, found by transformers' own record and one pass of one token.

    Blocks without experts (the first ones of DeepSeek-V3, say) have none; shared experts have no router.

    Raises:
        CapabilityError: no mixture of experts, or routers of another form (dense weights, several in a block).
    """
    kinds = tuple({k for module in model.modules() for k in _recorded(module, "router_logits")})
    places: list[tuple[int, nn.Module]]
    places = [(k, m) for k, b in enumerate(find_layers(model)) for m in b.modules() if isinstance(m, kinds)]
    if not places:
        raise CapabilityError(
            f"{type(model).__name__} has no router that transformers records, so it is no mixture of experts, or "
            "not one that can be read here"
        )
    seen: dict[int, Any] = {}
    hooks = [m.register_forward_hook(lambda _m, _a, out, k=k: seen.__setitem__(k, out)) for k, m in places]
    with hooked(*hooks), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
    if len(seen) < len(places) or not all(map(_is_routing, seen.values())):
        raise CapabilityError(
            f"the {type(places[0][1]).__name__} of {type(model).__name__} gives something else than (logits, "
            "weights, indices of the chosen experts) once a block; such routers are not read here"
        )
    return [Router(k, m, seen[k][0].shape[-1], seen[k][2].shape[-1]) for k, m in places]


def _is_routing(output: Any) -> bool:
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(t, Tensor) for t in output)):
        return False
    logits, weights, indices = output
    whole = not indices.dtype.is_floating_point
    return whole and weights.shape == indices.shape and weights.ndim == logits.ndim == 2


class ExpertEdit:
    """Turn routed experts off, up or on by editing what the routers give out, at all positions.

    Args:
        experts: (layer, expert) pairs, both from 0.
        mode: "post_topk_renorm": weight 0 after the choice; the others of the token share what it had.
            "pre_topk": the router cannot choose it; the next best moves in, by the router's own rules.
            "output_gain": weight times `gain`, nothing else changes.
            "force": chosen with the token's largest weight, for the one with the smallest.
            The weights of a token sum to what they did before, but for `output_gain`, and for `pre_topk` where
            the model itself does not normalise. Where all chosen experts are off, the routed part is 0.

    >>> without = runtime.with_edits(ExpertEdit([(12, 3)]))  # doctest: +SKIP
    """

    def __init__(
        self,
        experts: Sequence[tuple[int, int]],
        mode: ExpertMode = "post_topk_renorm",
        gain: float = 0.0,
    ) -> None:
        self.experts, self.mode, self.gain = tuple(experts), mode, gain

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the routers of the experts' layers; the hooks are gone on exit."""
        routers = {r.layer: r for r in find_routers(model)}
        by_layer: dict[int, list[int]] = {}
        for layer, expert in self.experts:
            if layer not in routers or not 0 <= expert < routers[layer].experts:
                raise InputError(
                    f"an expert of layer {layer} is named that this model does not have; its layers "
                    f"{min(routers)} to {max(routers)} have {next(iter(routers.values())).experts} each"
                )
            by_layer.setdefault(layer, []).append(expert)
        for layer, of in by_layer.items():
            r = routers[layer]
            room = {"force": r.chosen, "pre_topk": r.experts - r.chosen}.get(self.mode, r.experts)
            if len(of) > room:
                raise InputError(
                    f"{len(of)} experts of one layer under mode {self.mode!r}: it has {r.experts} and gives each "
                    f"token {r.chosen}, so at most {room} can be"
                )
        with hooked(*(self._hook(routers[k], of) for k, of in by_layer.items())):
            yield

    def _hook(self, router: Router, experts: list[int]) -> Any:
        named_E = torch.zeros(router.experts, dtype=torch.bool)
        named_E[experts] = True

        def edit(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            logits, weights, indices = output
            mine = named_E.to(indices.device)
            if self.mode == "pre_topk":
                with _Barred(mine) as barred:
                    new, indices = module.forward(*args, **kwargs)[1:]
                barred.check(module)
            elif self.mode == "force":
                new, indices = force(weights, indices, mine)
            elif self.mode == "output_gain":
                new = torch.where(mine[indices], weights * self.gain, weights)
            else:
                new = _sum_as(weights.masked_fill(mine[indices], 0), weights)
            return logits, new.to(weights.dtype), indices

        return router.module.register_forward_hook(edit, with_kwargs=True)


def force(weights_Nk: Tensor, indices_Nk: Tensor, forced_E: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices with the forced experts among those chosen, each with the token's largest weight."""
    w_NE = weights_Nk.new_zeros(len(weights_Nk), len(forced_E)).scatter(1, indices_Nk, weights_Nk)
    w_NE = torch.where(forced_E, weights_Nk.amax(-1, keepdim=True), w_NE)
    indices = w_NE.masked_fill(forced_E, torch.inf).topk(indices_Nk.shape[-1], -1).indices
    return _sum_as(w_NE.gather(1, indices), weights_Nk), indices.to(indices_Nk.dtype)


def _sum_as(new: Tensor, old: Tensor) -> Tensor:
    """`new` (N, k) scaled so that each row sums to what `old` sums to; rows that did not change keep their bits."""
    was, now = (t.float().sum(-1, keepdim=True) for t in (old, new))
    scaled = torch.where(now > 0, new * (was / now.clamp_min(1e-20)), new)
    return torch.where((new == old).all(-1, keepdim=True), new, scaled)


class _Barred(TorchFunctionMode):
    """Inside a router's forward: logit -inf for some experts, and no choice of them where a bias is added later."""

    def __init__(self, barred_E: Tensor) -> None:
        super().__init__()
        self.barred, self.seen = barred_E, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, Tensor.topk) and args and args[0].shape[-1] == len(self.barred):
            args = (args[0].masked_fill(self.barred, -torch.inf), *args[1:])
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == len(self.barred):
            self.seen, out = True, out.masked_fill(self.barred, -torch.inf)
        return out

    def check(self, router: nn.Module) -> None:
        """Raise `CapabilityError` unless the logits went by."""
        if not self.seen:
            raise CapabilityError(
                f"{type(router).__name__} does not make its logits by a linear layer, so no expert can be kept "
                "from being chosen; use mode='post_topk_renorm'"
            )

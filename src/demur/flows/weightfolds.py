"""What an export puts into weights: the adapter, control rows, and steering where that is exact.

Functions over a model's state dict, out of place: the runtime's own weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from demur.control.steering import Ablate, Add
from demur.errors import CapabilityError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from demur.runtime.local import LocalRuntime

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""What writes into the residual stream of the architectures whose directions can be taken out of weights."""


def lora(runtime: LocalRuntime) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(module name, A, B, scale) of the adapter; any other edit cannot be written down as weights."""
    from demur.runtime.control_rows import ControlRows
    from demur.train.adapter import LoraEdit

    for edit in runtime.edits:
        if isinstance(edit, LoraEdit):
            yield from ((name, A, B, edit.scale) for name, (A, B) in edit.lora.items())
        elif not isinstance(edit, ControlRows):
            raise InputError(
                f"{runtime.name!r} has a {type(edit).__name__} in force, which is no adapter; export the model "
                "without it and pass directions to fold in (add, ablate)"
            )


def state_of(runtime: LocalRuntime) -> dict[str, Tensor]:
    """The model's tensors by name, shared with it."""
    return dict(runtime.model.state_dict())


def merge_lora(runtime: LocalRuntime) -> dict[str, Tensor]:
    """W + scale * B A in float32, rounded once to the model's dtype."""
    weights = dict(runtime.model.named_parameters())
    out: dict[str, Any] = {}
    for name, A, B, scale in lora(runtime):
        key = f"{name}.weight"
        W: Any = out.get(key, weights[key])
        out[key] = (W.float() + scale * (B.float() @ A.float())).to(W.dtype)
    return out


def append_rows(runtime: LocalRuntime, state: dict[str, Tensor], config: Any) -> None:
    """Control rows behind (or inside the padding of) embedding and unembedding."""
    import torch

    from demur.runtime.control_rows import ControlRows

    model, names = runtime.model, _names(runtime.model)
    embed, head = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    for edit in runtime.edits:
        if not isinstance(edit, ControlRows):
            continue
        first, K = edit.first_id, len(edit.input_rows)
        if not torch.equal(edit.input_rows, edit.output_rows):
            for part in (config, config.get_text_config(decoder=True)):
                part.tie_word_embeddings = False  # a token that is read and written by different rows

        def extended(W: Tensor, rows: Tensor, first: int = first, K: int = K) -> Tensor:
            return torch.cat([W[:first], rows.to(W), W[first + K :]])

        state[f"{embed}.weight"] = extended(state[f"{embed}.weight"], edit.input_rows)
        state[f"{head}.weight"] = extended(state[f"{head}.weight"], edit.output_rows)
        if f"{head}.bias" in state:
            state[f"{head}.bias"] = extended(state[f"{head}.bias"], torch.zeros(K))
        config.get_text_config(decoder=True).vocab_size = len(state[f"{embed}.weight"])


def fold_bias(runtime: LocalRuntime, state: dict[str, Tensor], config: Any, add: Add) -> None:
    """A vector behind a layer as the bias of its down-projection; all other biases are 0."""
    import torch

    from demur.runtime.layers import find_layers

    text, names = config.get_text_config(decoder=True), _names(runtime.model)
    layers = [names[layer] for layer in find_layers(runtime.model)]
    if not hasattr(text, "mlp_bias") or f"{layers[0]}.mlp.down_proj.weight" not in state:
        raise CapabilityError(
            f"{type(runtime.model).__name__} has no place for a bias behind its down-projection, so a vector "
            "cannot be folded into its weights exactly. Use the local runtime, or a control vector (--to gguf)"
        )
    if not text.mlp_bias:
        text.mlp_bias = True
        for layer in layers:
            for part in ("gate_proj", "up_proj", "down_proj"):
                W = state[f"{layer}.mlp.{part}.weight"]
                state[f"{layer}.mlp.{part}.bias"] = torch.zeros(len(W), dtype=W.dtype)
    assert add.layer is not None
    key = f"{layers[add.layer]}.mlp.down_proj.bias"
    vector = torch.from_numpy(add.coefficient * add.direction.vector)
    state[key] = (state[key].double() + vector).to(state[key].dtype)


def _writers(runtime: LocalRuntime, layers: Sequence[int] | None) -> list[str]:
    """Names of the linear modules that write into the residual stream."""
    from demur.runtime.layers import find_layers

    names, found = _names(runtime.model), find_layers(runtime.model)
    if layers is not None and sorted(layers) != list(range(len(found))):
        raise InputError(
            "weights take a direction out of all layers; an Ablate of some of them cannot be folded"
        )
    out = [f"{names[layer]}.{part}" for layer in found for part in WRITERS]
    linear = {name for name, m in runtime.model.named_modules() if getattr(m, "bias", 0) is None}
    if not linear.issuperset(out) or any(hasattr(f, "post_feedforward_layernorm") for f in found):
        raise CapabilityError(
            f"{type(runtime.model).__name__}: its layers do not write into the residual stream by "
            f"{' and '.join(WRITERS)} alone, so taking a direction out of its weights would not be exact; use "
            "the local runtime"
        )
    return out


def project(runtime: LocalRuntime, state: dict[str, Tensor], config: Any, ablate: Ablate) -> None:
    """W - u (u^T W) for every matrix that writes, and the embedding's rows without u."""
    import torch

    u = torch.from_numpy(ablate.direction.vector)
    for name in _writers(runtime, ablate.layers):
        W = state[f"{name}.weight"]
        state[f"{name}.weight"] = (W.double() - torch.outer(u, u @ W.double())).to(W.dtype)
    names, model = _names(runtime.model), runtime.model
    embed = names[model.get_input_embeddings()]
    E = state[f"{embed}.weight"]
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False  # what is read loses the direction, the unembedding keeps it
    state[f"{embed}.weight"] = (E.double() - torch.outer(E.double() @ u, u)).to(E.dtype)


def with_projection(
    runtime: LocalRuntime, pairs: Mapping[str, tuple[Tensor, Tensor]], ablate: Ablate
) -> dict[str, tuple[Tensor, Tensor]]:
    """The LoRA pairs (A, B) such that W + B A has no part along u: one rank more."""
    import torch

    u = torch.from_numpy(ablate.direction.vector)
    weights, out = dict(runtime.model.named_parameters()), dict(pairs)
    for name in _writers(runtime, ablate.layers):
        W = weights[f"{name}.weight"].double()
        A, B = out.get(name, (torch.zeros(0, W.shape[1]), torch.zeros(len(W), 0)))
        B = B.double() - torch.outer(u, u @ B.double())
        out[name] = (
            torch.cat([A.double(), (u @ W)[None]]).float(),
            torch.cat([B, -u[:, None]], dim=1).float(),
        )
    rank = max(len(A) for A, _ in out.values())
    pad = torch.nn.functional.pad
    return {n: (pad(A, (0, 0, 0, rank - len(A))), pad(B, (0, rank - len(A)))) for n, (A, B) in out.items()}


def _names(model: Any) -> dict[Any, str]:
    return {module: name for name, module in model.named_modules()}

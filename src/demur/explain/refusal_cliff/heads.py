"""Which attention heads write for or against refusal at the last token before the answer.

The direct contribution of head h of layer l is a = <W_O o_h, w> / ||w||: what the head alone adds to the residual
stream there, along the probe's direction w, without any bias. It misses what a head does through later layers; the
causal variant (`rises`) has that too, at the price of one pass over the thoughts for each head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demur.errors import CapabilityError, InputError
from demur.explain.refusal_cliff.text import Thought, cut, encode, states
from demur.explain.refusal_cliff.tracing import CliffProbes, check_model
from demur.stats import bootstrap_interval
from demur.types import Condition

if TYPE_CHECKING:
    from demur.runtime.layers import Edit, HeadEdit
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]
Head = tuple[int, int]
"""Layer and head, both from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """One head: mean direct contribution over thoughts with its 95 % interval, in units of the residual stream.

    Attributes:
        contribution: below 0 for a head that writes against refusal. size: mean length of all that it writes.
        rise: by how much the mean log-odds of refusing rise when the head is taken out, where that was measured.
    """

    layer: int
    head: int
    contribution: float
    low: float
    high: float
    size: float
    rise: float | None = None

    @property
    def place(self) -> Head:
        """(layer, head)."""
        return self.layer, self.head


class KeptNorm:
    """A `HeadEdit` under which the changed layers' attention writes as much as without it: the norm is kept.

    At each token the attention's output (behind its output projection) is rescaled to the norm that it has without
    the scaling, all other edits in place. Where nothing is left to rescale, nothing is written. The published code
    takes one norm over batch, tokens and padding, so there what a token gets depends on those beside it.

    >>> edit = KeptNorm(HeadEdit({(12, 3): 0.0}))  # doctest: +SKIP
    """

    def __init__(self, edit: HeadEdit) -> None:
        self.edit = edit

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the output projections of the heads' layers; the hooks are gone on exit."""
        from demur.runtime.layers import find_layers, find_projections, hooked

        modules = find_projections(model, find_layers(model))
        named = {layer for layer, _ in self.edit.scales}
        each = [_Kept(module) for k, module in enumerate(modules) if k in named]
        # the projection runs without the scaling before it runs for good, so that others' hooks see that last
        with (
            hooked(*(e.module.register_forward_pre_hook(e.measure, prepend=True) for e in each)),
            hooked(*(e.module.register_forward_pre_hook(e.keep) for e in each)),
            self.edit.install(model),
            hooked(*(e.module.register_forward_pre_hook(e.restore) for e in each)),
            hooked(*(e.module.register_forward_hook(e.rescale) for e in each)),
        ):
            yield


class _Kept:
    """The hooks of `KeptNorm` at one projection."""

    def __init__(self, module: Any) -> None:
        self.module, self.measuring = module, False
        self.unscaled: Any = None
        self.norm: Any = None

    def measure(self, module: Any, args: tuple[Any, ...]) -> None:
        if not self.measuring:
            self.measuring = True
            try:
                self.norm = _norm(module(*args))
            finally:
                self.measuring, self.unscaled = False, None

    def keep(self, _module: Any, args: tuple[Any, ...]) -> None:
        if self.measuring:
            self.unscaled = args

    def restore(self, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.unscaled if self.measuring else args

    def rescale(self, _module: Any, _args: Any, out: Any) -> Any:
        if self.measuring:
            return out
        return (out * (self.norm / _norm(out).clamp_min(1e-20))).to(out.dtype)


def _norm(out: Any) -> Any:
    return out.float().norm(dim=-1, keepdim=True)


def contributions(
    runtime: LocalRuntime,
    probes: CliffProbes,
    thoughts: Sequence[Thought],
    *,
    condition: Condition | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Direct contributions (n, layers, heads) at the last token before the answer, and lengths of what heads write.

    Layers up to the probe's are counted; those behind it cannot write to where it reads.

    Raises:
        CapabilityError: a model that norms or scales what attention writes before it is added.
        InputError: no thoughts, or heads that are scaled already.
    """
    from demur.runtime.layers import HeadEdit, find_layers, find_projections, text_config

    check_model(runtime, probes)
    if any(isinstance(edit, (HeadEdit, KeptNorm)) for edit in runtime.edits):
        raise InputError(f"{runtime.name!r} has scaled heads; take contributions from the model without them")
    model = runtime.model
    blocks, n_heads = find_layers(model), int(text_config(model).num_attention_heads)
    layers = list(range(probes.layer + 1))
    rows = [cut(encode(runtime, t, probes.markup, condition)) for t in thoughts]
    if not rows:
        raise InputError("no thoughts; contributions are means over at least one")
    projections = find_projections(model, blocks)
    with runtime.edited():
        _check_added(model, blocks, projections)
        matrices = [_matrix(projections[k], model) for k in layers]
    w = probes.final.direction
    along = np.stack([m @ (w / np.linalg.norm(w)) for m in matrices])  # (layers, width of the heads)
    a, size = [], []
    for H in states(runtime, rows, layers, part="heads"):
        o = H[:, -1].astype(float)
        a.append((o * along).reshape(len(layers), n_heads, -1).sum(-1))
        parts = o.reshape(len(layers), n_heads, -1)
        split = [m.reshape(n_heads, parts.shape[-1], -1) for m in matrices]
        size.append(
            [np.linalg.norm(np.einsum("hk,hkd->hd", p, m), axis=1) for p, m in zip(parts, split, strict=True)]
        )
    return np.array(a), np.array(size)


def _matrix(projection: Any, model: Any) -> FloatArray:
    """The linear map of a projection, (inputs, outputs), whatever class it has: unit vectors less their zero."""
    import torch

    weight = next(p for p in projection.parameters() if p.ndim == 2)
    n = getattr(projection, "in_features", None) or weight.shape[0]
    units = torch.cat([torch.zeros(1, n), torch.eye(n)]).to(weight.device, model.dtype)
    with torch.inference_mode():
        out = projection(units[None])[0].double().cpu().numpy()
    return np.asarray(out[1:] - out[0], float)


def _check_added(model: Any, blocks: Sequence[Any], projections: Sequence[Any]) -> None:
    """Refuse models in which a weighted module reads attention's output itself (a norm behind it, say)."""
    import torch

    from demur.runtime.layers import hooked, input_device

    written: dict[int, Any] = {}
    normed: list[str] = []

    def wrote(k: int) -> Any:
        return lambda _m, _a, out: written.__setitem__(k, out)

    def reads(k: int) -> Any:
        def look(module: Any, args: tuple[Any, ...]) -> None:
            if args and args[0] is written.get(k):
                normed.append(type(module).__name__)

        return look

    handles = [p.register_forward_hook(wrote(k)) for k, p in enumerate(projections)]
    for k, block in enumerate(blocks):
        weighted = [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]
        handles += [m.register_forward_pre_hook(reads(k)) for m in weighted]
    with hooked(*handles), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
    if normed:
        raise CapabilityError(
            f"{type(model).__name__} passes what its attention writes through {normed[0]} before adding it, so a "
            "head's direct contribution is not its own. Use the causal variant (rises), which needs no such sum"
        )


def head_table(
    runtime: LocalRuntime,
    probes: CliffProbes,
    thoughts: Sequence[Thought],
    *,
    condition: Condition | None = None,
    seed: int = 0,
) -> list[HeadRow]:
    """All heads up to the probe's layer, most negative contribution first: the suppression heads are on top.

    Args:
        thoughts: harmful requests, others than those that the probes were fitted on.
    """
    a, size = contributions(runtime, probes, thoughts, condition=condition)
    out = []
    for layer, head in np.ndindex(a.shape[1:]):
        values = a[:, layer, head]
        low, high = bootstrap_interval(lambda v: float(np.mean(v)), values, n_boot=500, seed=seed)
        mean, length = float(values.mean()), float(size[:, layer, head].mean())
        out.append(HeadRow(layer=layer, head=head, contribution=mean, low=low, high=high, size=length))
    return sorted(out, key=lambda r: r.contribution)


def rises(
    runtime: LocalRuntime,
    probes: CliffProbes,
    thoughts: Sequence[Thought],
    heads: Iterable[Head],
    *,
    condition: Condition | None = None,
    keep_norm: bool = False,
) -> dict[Head, float]:
    """How much the mean log-odds of refusing rise, before the answer, when each head alone is taken out.

    A measurement of states: nothing is generated.

    Args:
        keep_norm: let the rest of the head's layer write as much as all of it did (`KeptNorm`).
    """
    from demur.runtime.layers import HeadEdit

    check_model(runtime, probes)
    rows = [cut(encode(runtime, t, probes.markup, condition)) for t in thoughts]
    if not rows:
        raise InputError("no thoughts; a rise is a mean over at least one")

    def mean(r: LocalRuntime) -> float:
        last = np.stack([H[0, -1] for H in states(r, rows, [probes.layer])])
        return float(probes.final.score(last).mean())

    def without(place: Head) -> Edit:
        edit = HeadEdit({place: 0.0})
        return KeptNorm(edit) if keep_norm else edit

    before = mean(runtime)
    return {place: mean(runtime.with_edits(without(place))) - before for place in heads}


def similar_heads(table: Sequence[HeadRow], chosen: Iterable[Head]) -> list[Head]:
    """For each chosen head the head not chosen that writes most nearly as much, each once: a null by magnitude.

    >>> rows = [HeadRow(layer=0, head=h, contribution=0, low=0, high=0, size=s) for h, s in enumerate((1, 5, 4))]
    >>> similar_heads(rows, [(0, 1)])
    [(0, 2)]
    """
    size = {row.place: row.size for row in table}
    mine = list(chosen)
    left = {place for place in size if place not in mine}
    if len(left) < len(mine):
        raise InputError(f"{len(mine)} heads chosen of {len(size)}; there are too few others to compare with")
    out = []
    for place in mine:
        best = min(left, key=lambda other: (abs(size[other] - size[place]), other))
        left.remove(best)
        out.append(best)
    return out

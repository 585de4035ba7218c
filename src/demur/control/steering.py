"""Push states along a direction, or take a direction out of them.

with Add(beliefs.direction("refuse", 12)).on(runtime) as steered:
    replies = list(steered.generate(prompts))

A vector that was read behind a layer is added behind that layer. `Ablate` takes the component along a direction
out of every layer's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.errors import InputError, MismatchError, RefusalLowering
from demur.explain.artefact import Direction
from demur.runtime.base import Runtime

if TYPE_CHECKING:
    from torch import Tensor

Where = Literal["prompt", "all"]


class Add:
    """Add `coefficient * direction` to the output of one layer.

    Args:
        direction: a `Direction`, in the length it has, or a vector (d,).
        layer: default where the direction was read. coefficient: negative ones push the other way.
        where: "prompt": at every token of the prompt and none of the answer; "all": at the answer's tokens too.
        allow_refusal_lowering: consent to a negative coefficient; it is logged and noted at the runtime.

    Raises:
        RefusalLowering: a negative coefficient without consent. InputError: no layer, no finite vector.

    >>> with Add(beliefs.direction("harmful", 12)).on(runtime) as steered:  # doctest: +SKIP
    ...     replies = list(steered.generate(prompts))
    """

    def __init__(
        self,
        direction: Direction | npt.ArrayLike,
        *,
        layer: int | None = None,
        coefficient: float = 1.0,
        where: Where = "prompt",
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.direction = as_direction(direction)
        site = self.direction.site
        if layer is None and site is None:
            raise InputError("this direction does not say where it was read; name the layer to add it at")
        self.layer = site[0] if layer is None and site is not None else layer
        self.coefficient, self.where = coefficient, where
        if where not in ("prompt", "all") or not np.isfinite(coefficient):
            raise InputError(
                f"coefficient={coefficient}, where={where!r}: a finite number, and prompt or all"
            )
        what = f"{coefficient:g} times {self.direction.origin!r} added behind layer {self.layer}"
        self.lowers = consent(what, allow_refusal_lowering) if coefficient < 0 else None

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """The runtime with the vector added; the given one stays as it was.

        Raises:
            CapabilityError: no local model. MismatchError: a direction of another model.
            InputError: another width, a layer that the model does not have.
        """
        assert self.layer is not None
        vector = _tensor(self.coefficient * self.direction.vector)
        check_fits(runtime, self.direction, [self.layer])
        edit = _Push(self.layer, lambda h: h + vector.to(h), prompt_only=self.where == "prompt")
        yield view(runtime, [edit], f"{self.direction.origin}*{self.coefficient:g}@{self.layer}", self.lowers)


class Ablate:
    """Take the component along a direction out of the output of each layer, at all tokens.

    Args:
        direction: a `Direction` or a vector (d,); only where it points matters.
        layers: default all. allow_refusal_lowering: consent, which every ablation needs; logged and noted.

    Raises:
        RefusalLowering: no consent.
    """

    def __init__(
        self,
        direction: Direction | npt.ArrayLike,
        *,
        layers: Sequence[int] | None = None,
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.direction, self.layers = as_direction(direction).scaled(1.0), layers
        self.lowers = consent(f"{self.direction.origin!r} taken out of the states", allow_refusal_lowering)

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """The runtime without the direction; errors as in `Add.on`."""
        n = check_fits(runtime, self.direction, self.layers or ())
        layers = range(n) if self.layers is None else self.layers
        unit = _tensor(self.direction.vector)

        def without(h: Tensor) -> Tensor:
            u = unit.to(h)
            return h - (h @ u)[..., None] * u

        edits = [_Push(layer, without, prompt_only=False) for layer in layers]
        yield view(runtime, edits, f"without {self.direction.origin}", self.lowers)


def as_direction(given: Direction | npt.ArrayLike) -> Direction:
    """A direction from a vector, or as it is."""
    if isinstance(given, Direction):
        return given
    vector = np.asarray(given, float)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise InputError(f"a direction is a vector (d,) of finite numbers, got shape {vector.shape}")
    return Direction(vector=vector, origin="vector")


def consent(what: str, allowed: bool) -> str:
    """What to note about a change that may lower refusal.

    Raises:
        RefusalLowering: nobody consented.
    """
    if not allowed:
        raise RefusalLowering(
            f"{what} may lower refusal. If that is what you want, say so: allow_refusal_lowering=True, or on the "
            "command line --allow-refusal-lowering; it is logged"
        )
    logging.getLogger("demur").warning("allowed: %s", what)
    return what


def check_fits(runtime: Runtime, direction: Direction, layers: Sequence[int]) -> int:
    """The number of layers of a runtime that the direction belongs to; errors as in `Add.on`."""
    runtime.require("states", "intervene")
    from demur.runtime.layers import find_layers, text_config

    if direction.fingerprint and runtime.fingerprint and direction.fingerprint != runtime.fingerprint:
        raise MismatchError(
            f"the direction {direction.origin!r} was read from the model {direction.fingerprint}, "
            f"{runtime.name!r} is {runtime.fingerprint}: the axes of one "
            "network mean nothing in another. Fit it anew here"
        )
    model: Any = getattr(runtime, "model", None)  # only local runtimes intervene
    n, width = len(find_layers(model)), text_config(model).hidden_size
    if direction.vector.shape != (width,):
        raise InputError(
            f"a direction of shape {direction.vector.shape} in {runtime.name!r}, whose states have width {width}"
        )
    if bad := [k for k in layers if not 0 <= k < n]:
        raise InputError(f"layer {bad[0]}: {runtime.name!r} has layers 0 to {n - 1}")
    return n


def view(runtime: Runtime, edits: Sequence[Any], name: str, note: str | None) -> Runtime:
    """The local runtime with edits, under a name that says so."""
    local: Any = runtime
    steered: Runtime = local.with_edits(*edits, name=f"{runtime.name}+{name}")
    steered.shipped_point = runtime.shipped_point
    if note is not None:
        steered.notes.append(f"refusal lowering allowed: {note}")  # type: ignore[attr-defined]
    return steered


def _tensor(vector: npt.NDArray[np.float64]) -> Tensor:
    import torch

    return torch.from_numpy(vector.astype(np.float32))


class _Push:
    """Change the output of one layer, in passes over the prompt only or in all.

    A pass that continues a cache which the pass before has filled decodes the answer; a fresh cache, one filled
    with a shared prefix, or none at all means the prompt. Where `ANSWERS` is set, it says which tokens are whose.
    """

    def __init__(self, layer: int, change: Callable[[Tensor], Tensor], *, prompt_only: bool) -> None:
        self.layer, self.change, self.prompt_only = layer, change, prompt_only

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        import torch

        from demur.runtime.forward import ANSWERS
        from demur.runtime.layers import BlockEdit, hooked

        last: Any = None
        decoding = False

        def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal last, decoding
            cache = kwargs.get("past_key_values")
            decoding, last = cache is not None and cache is last, cache

        def push(h: Tensor, positions_BT: Tensor) -> Tensor:
            begins = ANSWERS.get()
            if not self.prompt_only or (begins is None and not decoding):
                return self.change(h)
            if begins is None:
                return h
            prompt_BT = positions_BT < torch.tensor(begins, device=h.device)[:, None]
            return torch.where(prompt_BT[..., None], self.change(h), h)

        with ExitStack() as stack:
            stack.enter_context(hooked(model.register_forward_pre_hook(look, with_kwargs=True)))
            stack.enter_context(BlockEdit(self.layer, push).install(model))
            yield

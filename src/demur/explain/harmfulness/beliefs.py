"""The beliefs of one model: fitted, read, saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError, MismatchError
from demur.explain.artefact import Direction, FloatArray, described, read_artefact, write_artefact
from demur.explain.harmfulness import fitting
from demur.explain.harmfulness.fitting import AXES, NOT_IDENTIFIABLE, Sets, cosine, leaning
from demur.runtime.base import Progress, Runtime
from demur.types import Condition, Prompt

WHAT = "set of beliefs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """The two beliefs about one prompt; `refuse` is None where only harmfulness was fitted."""

    id: str
    harmful: float
    refuse: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leanings:
    """Leanings of n prompts at L layers, each array (n, L); `refuse` is None where it was not fitted."""

    ids: tuple[str, ...]
    harmful: FloatArray
    refuse: FloatArray | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Axis:
    """One belief.

    Attributes:
        position: where it is read. toward, away: centres (L, d). n: prompts behind each of the two.
        window: layers whose mean leaning is the belief. cut: at or above it the belief says yes.
        select_auroc: what the window was chosen by, if it was chosen; optimistic.
    """

    position: str
    toward: FloatArray
    away: FloatArray
    n: tuple[int, int]
    window: tuple[int, ...]
    cut: float = 0.0
    select_auroc: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Beliefs:
    """Centres of one model, and what they say about prompts.

    Attributes:
        layers: the layers that were read, L of them.
        harmful, refuse: the two axes; `refuse` is None where no refused and accepted prompts were given.
        fingerprint: of the model, None when unknown.
        unclear: why the two beliefs cannot be told apart here, or None.

    >>> sets = {"harmful": bad, "harmless": fine, **by_behaviour(runtime, [*bad, *fine])}  # doctest: +SKIP
    >>> beliefs = Beliefs.fit(runtime, sets)  # doctest: +SKIP
    >>> [beliefs.quadrant(b) for b in beliefs.score(runtime, prompts)]  # doctest: +SKIP
    ['believed harmless, will refuse']
    """

    layers: tuple[int, ...]
    harmful: Axis
    refuse: Axis | None
    fingerprint: str | None = None
    unclear: str | None = None

    # --- fitting --------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        runtime: Runtime,
        sets: Sets,
        layers: Sequence[int] | None = None,
        select: Sets | None = None,
        *,
        condition: Condition | None = None,
        progress: Progress | None = None,
    ) -> Beliefs:
        """Centres from named prompts; each prompt is read once, and states are not kept.

        Args:
            sets: `harmful` and `harmless`, and `refused` and `accepted` (see `by_behaviour`) unless only
                harmfulness is wanted. A prompt may carry one label of each pair.
            layers: layers to read; default all.
            select: prompts under the same names, none of them in `sets`, that choose for each belief the run of
                layers whose mean leaning ranks them best (AUROC; the longest of equals). Default: all layers.

        Raises:
            InputError: names or sets that are missing, fewer than 20 prompts in one, a prompt with both labels of
                a pair, a prompt of `select` that was fitted on.
            CapabilityError: the runtime gives no states.
        """
        runtime.require("states")
        lists = {name: tuple(rows) for name, rows in sets.items()}
        fitting.check_sets(lists)
        read = tuple(range(fitting.depth(runtime))) if layers is None else tuple(layers)
        axes = [name for name, (_, yes, _no) in AXES.items() if yes in lists]
        centres = fitting.centres(runtime, lists, read, axes, condition, progress)
        made: dict[str, Axis] = {}
        for name in axes:
            position, yes, no = AXES[name]
            n = len(lists[yes]), len(lists[no])
            made[name] = Axis(position=position, toward=centres[yes], away=centres[no], n=n, window=read)
        out = cls(
            layers=read,
            harmful=made["harmful"],
            refuse=made.get("refuse"),
            fingerprint=runtime.fingerprint,
            unclear=fitting.unclear(lists),
        )
        return out if select is None else out._windowed(runtime, lists, select, condition)

    def _windowed(
        self,
        runtime: Runtime,
        fitted: Mapping[str, Sequence[Prompt]],
        select: Sets,
        condition: Condition | None,
    ) -> Beliefs:
        lists = {name: tuple(rows) for name, rows in select.items()}
        seen = {fitting.key(p) for rows in fitted.values() for p in rows}
        if both := [p.id for rows in lists.values() for p in rows if fitting.key(p) in seen]:
            raise InputError(
                f"{len(both)} prompts of `select` were fitted on ({both[0]!r} first): centres suit those too well; "
                "pass other prompts"
            )
        out = self
        for name, scores, y in self._labelled(runtime, lists, condition):
            axis = getattr(self, name)
            window, area = fitting.best_window(scores, y, self.layers)
            out = dataclasses.replace(
                out, **{name: dataclasses.replace(axis, window=window, select_auroc=area)}
            )
        return out

    def with_cuts(self, runtime: Runtime, sets: Sets, condition: Condition | None = None) -> Beliefs:
        """The same beliefs with cuts between yes and no from calibration prompts (names as in `fit`).

        A cut is the midpoint between scores at which the share of yes-prompts at or above it less that of
        no-prompts is largest. For a stated rate of false alarms see `demur.control.latent_guard`.
        """
        out = self
        lists = {name: tuple(rows) for name, rows in sets.items()}
        for name, per_layer, y in self._labelled(runtime, lists, condition):
            axis = getattr(self, name)
            cut = fitting.best_cut(self._mean(axis, per_layer), y)
            out = dataclasses.replace(out, **{name: dataclasses.replace(axis, cut=cut)})
        return out

    def _labelled(
        self, runtime: Runtime, lists: Mapping[str, Sequence[Prompt]], condition: Condition | None
    ) -> Iterator[tuple[str, FloatArray, npt.NDArray[np.bool_]]]:
        """(belief, leanings (n, L), labels (n,)) for each belief that the sets have prompts of."""
        asked = [
            (name, lists[yes], lists[no])
            for name, (_, yes, no) in AXES.items()
            if getattr(self, name) is not None and lists.get(yes) and lists.get(no)
        ]
        if not asked:
            raise InputError("no belief has prompts of both its sides here, so there is nothing to choose by")
        every = {fitting.key(p): p for _, *sides in asked for side in sides for p in side}  # read each once
        found, at = (
            self.per_layer(runtime, list(every.values()), condition),
            {k: i for i, k in enumerate(every)},
        )
        for name, yes, no in asked:
            rows = [at[fitting.key(p)] for p in (*yes, *no)]
            yield name, getattr(found, name)[rows], np.arange(len(rows)) < len(yes)

    # --- reading --------------------------------------------------------------------------------------------

    def per_layer(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        progress: Progress | None = None,
    ) -> Leanings:
        """Leanings of each prompt at each layer; one forward pass a prompt, states are not kept.

        Raises:
            MismatchError: the beliefs were fitted on another model.
        """
        self.check(runtime)
        axes = [a for a in (self.harmful, self.refuse) if a is not None]
        ids: list[str] = []
        parts: list[list[FloatArray]] = [[] for _ in axes]
        for rows, states in fitting.read(
            runtime, prompts, self.layers, [a.position for a in axes], condition, progress
        ):
            ids += [p.id for p in rows]
            for axis, part in zip(axes, parts, strict=True):
                part.append(leaning(states[axis.position], axis.toward, axis.away))
        if not ids:
            raise InputError("no prompts to read beliefs from")
        arrays = [np.concatenate(part) for part in parts]
        return Leanings(ids=tuple(ids), harmful=arrays[0], refuse=arrays[1] if self.refuse else None)

    def score(
        self,
        runtime: Runtime,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Belief]:
        """Both beliefs about each prompt, in order: means of `per_layer` over each belief's window."""
        rows = self.per_layer(runtime, prompts, condition, progress=progress)
        harm = self._mean(self.harmful, rows.harmful)
        refuse = None if self.refuse is None or rows.refuse is None else self._mean(self.refuse, rows.refuse)
        return [
            Belief(id=i, harmful=float(harm[k]), refuse=None if refuse is None else float(refuse[k]))
            for k, i in enumerate(rows.ids)
        ]

    def _mean(self, axis: Axis, per_layer: FloatArray) -> FloatArray:
        where = [self.layers.index(k) for k in axis.window]
        return np.asarray(per_layer[:, where].mean(1))

    def quadrant(self, belief: Belief) -> str:
        """In words: "believed harmless, will refuse" and its three neighbours, or "not identifiable".

        It is not identifiable where only harmfulness was fitted, or the labels agreed on nearly all prompts.
        """
        if self.unclear is not None or self.refuse is None or belief.refuse is None:
            return NOT_IDENTIFIABLE
        harm = "harmful" if belief.harmful >= self.harmful.cut else "harmless"
        return f"believed {harm}, will {'refuse' if belief.refuse >= self.refuse.cut else 'answer'}"

    def direction(self, which: str, layer: int) -> Direction:
        """`harmful` or `refuse`: the difference of the two centres at a layer, in the length it has.

        Raises:
            InputError: another name, a belief or layer that was not fitted.
        """
        axis = getattr(self, which) if which in AXES else None
        if axis is None or layer not in self.layers:
            raise InputError(f"direction {which!r} at layer {layer}: fitted are {self._fitted()}")
        k = self.layers.index(layer)
        return Direction(
            vector=axis.toward[k] - axis.away[k],
            origin=which,
            site=(layer, axis.position),
            fingerprint=self.fingerprint,
            n=sum(axis.n),
        )

    def _fitted(self) -> str:
        names = [name for name in AXES if getattr(self, name) is not None]
        return f"{' and '.join(names)}, layers {self.layers[0]} to {self.layers[-1]}"

    def narrowed(self) -> Beliefs:
        """The belief `harmful` alone, with the layers of its window: all that a guard has to read."""
        axis, keep = self.harmful, [self.layers.index(k) for k in self.harmful.window]
        axis = dataclasses.replace(axis, toward=axis.toward[keep], away=axis.away[keep])
        return dataclasses.replace(self, layers=axis.window, harmful=axis, refuse=None)

    @property
    def cosines(self) -> FloatArray:
        """Cosine (L,) of the two directions at each layer.

        Raises:
            InputError: only harmfulness was fitted.
        """
        if self.refuse is None:
            raise InputError(
                "only harmfulness was fitted; two directions need refused and accepted prompts too"
            )
        return cosine(self.harmful.toward - self.harmful.away, self.refuse.toward - self.refuse.away)

    def check(self, runtime: Runtime) -> None:
        """Raise `MismatchError` if the beliefs are known to belong to another model."""
        mine, other = self.fingerprint, runtime.fingerprint
        if mine and other and mine != other:
            raise MismatchError(
                f"these beliefs were fitted on the model {mine}, {runtime.name!r} is {other}; fit them anew here"
            )

    # --- on disk --------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the beliefs as one safetensors file with a JSON header, atomically."""
        tensors, about = self.plain()
        write_artefact(path, WHAT, tensors, about)

    def plain(self) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        """Tensors and header, from which `from_plain` makes the beliefs again."""
        tensors: dict[str, FloatArray] = {}
        about: dict[str, Any] = {
            "layers": self.layers,
            "fingerprint": self.fingerprint,
            "unclear": self.unclear,
        }
        for name in AXES:
            axis = getattr(self, name)
            if axis is not None:
                tensors |= {f"{name}.toward": axis.toward, f"{name}.away": axis.away}
                about[name] = {k: getattr(axis, k) for k in ("n", "window", "cut", "select_auroc")}
        return tensors, about

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> Beliefs:
        """Read beliefs for the model with this fingerprint; errors as in `demur.explain.Probe.load`."""
        tensors, about = read_artefact(path, WHAT, fingerprint, allow_unknown)
        with described(path):
            return cls.from_plain(tensors, about)

    @classmethod
    def from_plain(cls, tensors: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> Beliefs:
        """Beliefs from what `plain` gave."""
        axes = {}
        for name, (position, _, _) in AXES.items():
            if (row := about.get(name)) is not None:
                axes[name] = Axis(
                    position=position,
                    toward=tensors[f"{name}.toward"].astype(float),
                    away=tensors[f"{name}.away"].astype(float),
                    n=(int(row["n"][0]), int(row["n"][1])),
                    window=tuple(int(k) for k in row["window"]),
                    cut=float(row["cut"]),
                    select_auroc=row["select_auroc"],
                )
        return cls(
            layers=tuple(int(k) for k in about["layers"]),
            harmful=axes["harmful"],
            refuse=axes.get("refuse"),
            fingerprint=about["fingerprint"],
            unclear=about["unclear"],
        )

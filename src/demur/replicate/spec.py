"""What a replication check states before it runs: claims, controls, baselines, anchors, and how one seed is run.

One system is one file in this folder, named like its slug (`-` becomes `_`), with `SPEC = Spec(...)` at module
level and heavy imports inside `run`. Nothing else has to be registered.

>>> Claim(key="auroc", text="the probe reads it", at_least=0.8, null=0.5).effect  # doctest: +ELLIPSIS
0.3...
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from demur.errors import InputError

PACKAGE = Path(__file__).parents[1]
FOLDER = Path(__file__).parent
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What one seed measured.

    Attributes:
        value: the number; None when it is undefined (NaN is read as None).
        items: per-item values whose mean is `value`, where it is a mean; they give an interval over items too.
        n: how many items; taken from `items` when those are given.
        se: standard error over items of a value that is no mean (an AUROC, say), where it is known.
        same_items: the items are the same ones, in the same order, for every seed (a public test set, say).
            Then more seeds do not make them more.
        bounds: what the value cannot go beyond, and so no interval of it: (0, 1) for an AUROC, say. An interval
            of items that are all 0 or 1 has them anyway.

    Raises:
        InputError: an infinite value, or items whose mean is another number.

    >>> Value.of([1, 0, 1, 1]).value
    0.75
    """

    value: float | None
    items: Sequence[float] | None = None
    n: int | None = None
    se: float | None = None
    same_items: bool = False
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        value = None if self.value is None else float(self.value)
        if value is not None and math.isnan(value):
            value = None
        if value is not None and math.isinf(value):
            raise InputError("Value(value=inf): a measured value is finite, or None where it is undefined")
        if self.se is not None and not 0 <= self.se < math.inf:
            raise InputError(f"Value(se={self.se}): a standard error is finite and not negative")
        if self.bounds and value is not None and not self.bounds[0] - 1e-9 <= value <= self.bounds[1] + 1e-9:
            raise InputError(f"Value(value={value}): beyond its bounds {self.bounds}")
        object.__setattr__(self, "value", value)
        if self.items is None:
            return
        items = tuple(float(x) for x in self.items)
        mean = float(np.mean(items)) if items else None
        if mean is not None and not math.isfinite(mean):
            raise InputError("Value(items=...): an item is NaN or infinite; leave undefined items out")
        close = 1e-6 * max([1.0, *map(abs, items)])
        if (mean is None) != (value is None) or abs((mean or 0) - (value or 0)) > close:
            raise InputError(f"Value(value={value}): the mean of its {len(items)} items is {mean}")
        object.__setattr__(self, "items", items or None)
        object.__setattr__(self, "n", len(items))

    @classmethod
    def of(cls, items: Sequence[float], *, same_items: bool = False) -> Value:
        """The mean of some items (hits as 0 and 1, say); undefined when there are none."""
        values = tuple(float(x) for x in items)
        mean = float(np.mean(values)) if values else None
        return cls(value=mean, items=values, same_items=same_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A value that must reach a goal. `null` is its value if there were no effect.

    Met when the point estimate meets the goal and, where `null` is given, the 95 % interval excludes `null`.
    """

    key: str
    text: str
    at_least: float | None = None
    at_most: float | None = None
    null: float | None = None

    def reached(self, value: float) -> bool:
        """Whether a value meets the goal."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    @property
    def effect(self) -> float | None:
        """The required effect |goal - null|; None without a null."""
        if self.null is None:
            return None
        return min(abs(goal - self.null) for goal in (self.at_least, self.at_most) if goal is not None)

    @property
    def goal(self) -> str:
        """The goal in words."""
        parts = [("at least", self.at_least), ("at most", self.at_most)]
        return ", ".join(f"{word} {x:g}" for word, x in parts if x is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A value that must stay at `null`. Silent when its interval over items and seeds lies in null +- margin.

    `against` names the claim whose required effect the margin is a third of at most; None means the smallest
    required effect of all claims. Over the controls of a spec the levels follow Holm.
    """

    key: str
    text: str
    null: float
    margin: float
    against: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A trivial rule, compared with the claim that `against` names: beaten when the claim's value is better
    and the 95 % interval of the difference excludes 0.
    """

    key: str
    text: str
    against: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A published number that is counted again from public rows. `needs` are files as `demur.data.get` has them."""

    key: str
    text: str
    expected: float
    tolerance: float = 0.0
    needs: tuple[str, ...] = ()

    def holds(self, found: float) -> bool:
        """Whether a recount equals the published number within the tolerance (and float noise)."""
        return abs(found - self.expected) <= self.tolerance + _SLACK * max(1.0, abs(self.expected))


@dataclass(kw_only=True)
class Context:
    """What the harness gives one seed.

    Attributes:
        seed: 0, 1, ...; everything random follows from it.
        full: True under `--full`. The keys must mean the same either way, since stored seeds are merged.
        folder: scratch of this seed. It survives a killed run and is removed when the seed is done.
        progress: called with (what, done, total or None).
    """

    seed: int
    full: bool
    folder: Path
    progress: Callable[[str, int, int | None], None]


Run = Callable[[Context], Mapping[str, Value]]
Recount = Callable[[], Mapping[str, float | Callable[[], float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One system's check.

    Attributes:
        claims, controls, baselines, entry: their keys are read from the one mapping that `run` returns.
        entry: entry conditions of the organism. Where one fails, nothing is concluded from that seed, and the
            other keys may be missing.
        run: measures one seed. recount: the anchors' values by key, or functions that give them; such a
            function is called only when the files that the anchor needs are there.
        seeds: how many by default. minutes: what one seed takes on two cores, roughly.
        files: source files, relative to the package (or to the spec file), whose bytes make a result stale.

    Raises:
        InputError: keys that stand twice, empty texts, goals that the null meets, or a control whose margin is
            more than a third of the required effect.
    """

    slug: str
    claims: tuple[Claim, ...] = ()
    controls: tuple[Control, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    entry: tuple[Claim, ...] = ()
    run: Run | None = None
    recount: Recount | None = None
    seeds: int = 5
    files: tuple[str, ...] = ()
    minutes: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise InputError(f"replication spec {self.slug!r}: {problem}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that `run` must return for a fit organism."""
        parts: tuple[Claim | Control | Baseline, ...] = (*self.claims, *self.controls, *self.baselines)
        return tuple(p.key for p in parts)


def _problems(spec: Spec) -> Iterator[str]:
    parts: tuple[Claim | Control | Baseline | Anchor, ...]
    parts = (*spec.entry, *spec.claims, *spec.controls, *spec.baselines, *spec.anchors)
    keys = [p.key for p in parts]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spec.slug):
        yield "a slug is lower-case words joined by -"
    if twice := sorted({k for k in keys if keys.count(k) > 1}):
        yield f"key {', '.join(twice)} stands twice; keys are unique over all parts"
    for part in parts:
        if not part.key.strip() or not part.text.strip():
            yield f"key {part.key!r} with text {part.text!r}: both must say something"
    if spec.seeds < 1 or not spec.minutes > 0:
        yield f"seeds={spec.seeds}, minutes={spec.minutes}: at least 1 seed, and more than 0 minutes"
    if not spec.claims and not spec.anchors:
        yield "it has neither claims nor anchors, so there is nothing to check"
    if (spec.run is None) != (not (spec.claims or spec.entry or spec.controls or spec.baselines)):
        yield "claims, controls, baselines and entry conditions need `run`, and `run` needs claims"
    if (spec.recount is None) != (not spec.anchors):
        yield "anchors need `recount`, and `recount` needs anchors"
    for claim in (*spec.entry, *spec.claims):
        yield from _claim_problems(claim)
    for control in spec.controls:
        yield from _control_problems(spec, control)
    for baseline in spec.baselines:
        claim_of = {c.key: c for c in spec.claims}.get(baseline.against)
        if claim_of is None or (claim_of.at_least is None) == (claim_of.at_most is None):
            yield f"baseline {baseline.key}: against={baseline.against!r} is no claim with one goal"


def _claim_problems(claim: Claim) -> Iterator[str]:
    given = [x for x in (claim.at_least, claim.at_most, claim.null) if x is not None]
    if claim.at_least is None and claim.at_most is None:
        yield f"{claim.key}: needs at_least or at_most"
    elif not all(map(math.isfinite, given)):
        yield f"{claim.key}: goals and null are finite numbers"
    elif claim.at_least is not None and claim.at_most is not None and claim.at_least > claim.at_most:
        yield f"{claim.key}: at_least {claim.at_least:g} lies above at_most {claim.at_most:g}"
    elif claim.null is not None and claim.reached(claim.null):
        yield f"{claim.key}: its null {claim.null:g} meets the goal ({claim.goal}), so it claims nothing"


def _control_problems(spec: Spec, control: Control) -> Iterator[str]:
    effects = {c.key: c.effect for c in spec.claims if c.effect is not None}
    if control.against is not None:
        effects = {k: e for k, e in effects.items() if k == control.against}
    if not effects:
        which = "no claim" if control.against is None else f"claim {control.against!r} is not there or"
        yield f"control {control.key}: {which} names a null, so its margin has no effect to be a third of"
    elif not 0 < control.margin <= min(effects.values()) / 3 + _SLACK:
        key = min(effects, key=lambda k: effects[k])
        yield (
            f"control {control.key}: margin {control.margin:g} must be above 0 and at most a third of the "
            f"required effect {effects[key]:g} of {key}"
        )


# --- finding specs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A spec with the file it stands in and the hashes of all files whose bytes matter."""

    spec: Spec
    path: Path
    sources: Mapping[str, str]


def slugs() -> tuple[str, ...]:
    """Slugs that have a check, sorted; read from the file names, nothing is imported."""
    files = (f for f in FOLDER.glob("*.py") if "\nSPEC" in f.read_text(encoding="utf-8"))
    return tuple(sorted(f.stem.replace("_", "-") for f in files))


def find(name: str | Path) -> Found:
    """The check of a slug, or of a spec file of one's own (a path that ends in .py).

    Raises:
        InputError: no such check, no `SPEC` in the file, or a source file that is not there.
    """
    if str(name).endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise InputError(f"{name}: no such file")
    else:
        path = FOLDER / f"{str(name).replace('-', '_')}.py"
        if name not in slugs():
            raise InputError(_unknown(str(name)))
    spec = getattr(_module(path), "SPEC", None)
    if not isinstance(spec, Spec):
        raise InputError(f"{path}: has no SPEC = Spec(...) at module level")
    if path.stem != spec.slug.replace("-", "_"):
        raise InputError(f"{path}: holds the spec of {spec.slug!r}; name it {spec.slug.replace('-', '_')}.py")
    return Found(spec=spec, path=path, sources=_sources(spec, path))


def _unknown(name: str) -> str:
    from demur import methods

    if name in {c.slug for c in methods.cards()}:
        return f"{name} has no replication check yet; there are: {', '.join(slugs()) or 'none'}"
    near = [s for s in slugs() if name.lower() in s] or list(slugs())
    return (
        f"no replication check is called {name!r}; there are: {', '.join(near) or 'none'}. A file of your own is "
        "named by its path, which ends in .py"
    )


def _module(path: Path) -> ModuleType:
    if path.parent == FOLDER:
        return importlib.import_module(f"demur.replicate.{path.stem}")
    made = importlib.util.spec_from_file_location(f"demur_replicate_{path.stem}", path)
    if made is None or made.loader is None:
        raise InputError(f"{path}: cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(made)
    sys.modules[made.name] = module  # dataclasses look their module up there
    made.loader.exec_module(module)
    return module


def _sources(spec: Spec, path: Path) -> dict[str, str]:
    out = {f"replicate/{path.name}" if path.parent == FOLDER else path.name: source_hash(path)}
    for name in spec.files:
        file = next((f for f in (PACKAGE / name, path.parent / name) if f.is_file()), None)
        if file is None:
            raise InputError(
                f"replication spec {spec.slug!r}: files names {name}, which is not in the package"
            )
        out[name] = source_hash(file)
    return out


def source_hash(path: Path) -> str:
    """First 16 hex digits of a source file's sha256, CRLF read as LF."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]

"""Run a replication check: seeds in this process or in several, each kept as soon as it is done.

result = replicate("inference-scaling-flaws", out="replication")
result["outcome"], result["reason"]
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import demur
from demur import data
from demur.errors import DataUnavailable, DemurError, InputError, MissingExtra
from demur.replicate import store
from demur.replicate.spec import FOLDER, Anchor, Context, Found, Spec, Value, find
from demur.replicate.store import Seed
from demur.replicate.summary import conclude, unfit
from demur.types import SCHEMA_VERSION

BUDGET_MINUTES = 10.0
"""A check that takes longer than this runs one fresh seed by default and takes the others as stored."""

Say = Callable[[str], None]
Progress = Callable[[int, str, int, int | None], None]
"""Called with (seed, what, done, total or None)."""

_LIBRARIES = ("numpy", "scipy", "torch", "transformers", "sklearn", "peft")


def replicate(
    name: str | Path,
    *,
    seeds: int | None = None,
    full: bool = False,
    jobs: int = 1,
    out: str | Path = "replication",
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Run one system's check and keep its result in `out/<slug>.json`.

    Seeds that are in `out` under the same source files are not run again. A check of more than 10 minutes
    runs one seed and takes the others from the results that come with the package, unless `full`.

    Args:
        name: a slug, or the path of a spec file of one's own.
        seeds: how many; default as the spec says. jobs: seeds that run at the same time, in processes.

    Returns:
        The result document: slug, outcome ("reproduced", "partly", "not at this scale", "anchor off" or "not
        checked"), reason, claims, controls, baselines, anchors, entry, per_seed, provenance.

    Raises:
        InputError: no such check, a number below 1, or a `run` whose mapping lacks a key.
    """
    found = find(name)
    spec, folder = found.spec, Path(out)
    if (seeds is not None and seeds < 1) or jobs < 1:
        raise InputError(f"seeds={seeds}, jobs={jobs}: both must be at least 1")
    tell = say or (lambda _: None)
    here: dict[int, Seed] = {}
    stored: dict[int, Seed] = {}
    if spec.run is not None:
        wanted = range(seeds or spec.seeds)
        here = {s: v for s, v in store.read_seeds(folder, found).items() if s in wanted}
        if full or spec.minutes * len(wanted) <= BUDGET_MINUTES:
            todo = [s for s in wanted if s not in here]
        else:
            shipped = store.read_seeds(store.RESULTS, found)
            stored = {s: v for s, v in shipped.items() if s in wanted and s not in here}
            todo = _one_fresh(wanted, here, stored)
        if here:
            tell(f"{spec.slug}: seeds {_list(here)} are in {folder} already")
        for seed in _run(found, todo, full, jobs, folder, progress, tell):
            here[seed.seed] = seed
        stored = {s: v for s, v in stored.items() if s not in here}
        if stored:
            tell(f"{spec.slug}: seeds {_list(stored)} are the stored ones (--full runs them)")
    anchors = check_anchors(spec, tell)
    document = _document(found, here, stored, anchors)
    store.write_result(folder, document)
    return document


def _one_fresh(wanted: range, here: Mapping[int, Seed], stored: Mapping[int, Seed]) -> list[int]:
    missing = [s for s in wanted if s not in here and s not in stored]
    return missing[:1] or ([] if here else [0])


def _list(seeds: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(seeds)))


# --- one seed ---------------------------------------------------------------------------------------------------


def run_seed(found: Found, seed: int, full: bool, out: Path, progress: Progress | None = None) -> Seed:
    """Measure one seed and keep it at once.

    Raises:
        InputError: `run` returned something else than a mapping with all keys of the spec.
    """
    spec = found.spec
    # another version of the code must not go on from half-done work of this one
    state = hashlib.sha256("".join(found.sources.values()).encode()).hexdigest()[:16]
    scratch = out / spec.slug / f"seed-{seed}-{state}"
    scratch.mkdir(parents=True, exist_ok=True)

    def tell(what: str, done: int, total: int | None) -> None:
        if progress is not None:
            progress(seed, what, done, total)

    start = time.monotonic()
    assert spec.run is not None
    got = spec.run(Context(seed=seed, full=full, folder=scratch, progress=tell))
    values = {k: store.kept(v) for k, v in _checked(spec, got).items()}
    done = Seed(
        seed=seed, values=values, minutes=round((time.monotonic() - start) / 60, 3), versions=_versions()
    )
    store.write_seed(out, found, done)
    shutil.rmtree(scratch, ignore_errors=True)
    return done


def _checked(spec: Spec, got: Any) -> dict[str, Value]:
    if not isinstance(got, Mapping):
        raise InputError(
            f"{spec.slug}: run returned {type(got).__name__}; it must return a mapping of Values"
        )
    _require(spec, got, [c.key for c in spec.entry])
    if unfit(spec, got) is None:
        _require(spec, got, spec.keys)
    known = {c.key for c in spec.entry} | set(spec.keys)
    return {str(k): v for k, v in got.items() if k in known}


def _require(spec: Spec, got: Mapping[str, Any], keys: Sequence[str]) -> None:
    if missing := [k for k in keys if k not in got]:
        raise InputError(
            f"{spec.slug}: run returned no value for {', '.join(missing)}; it has {', '.join(map(str, got))}"
        )
    for key in keys:
        if not isinstance(got[key], Value):
            raise InputError(f"{spec.slug}: {key} is a {type(got[key]).__name__}; give Value(value=...)")


def _versions() -> dict[str, str]:
    names = {"sklearn": "scikit-learn"}
    out = {"python": platform.python_version()}
    for module in _LIBRARIES:
        if module in sys.modules:
            try:
                out[names.get(module, module)] = version(names.get(module, module))
            except PackageNotFoundError:
                continue
    return out


# --- all seeds --------------------------------------------------------------------------------------------------


def _run(
    found: Found, todo: list[int], full: bool, jobs: int, out: Path, progress: Progress | None, say: Say
) -> Iterator[Seed]:
    """Run seeds and yield them as they end, with a line on the time left."""
    if not todo:
        return
    jobs = min(jobs, len(todo))
    guess = found.spec.minutes * -(-len(todo) // jobs)
    say(f"{found.spec.slug}: {len(todo)} seed{'s' * (len(todo) > 1)} to run, about {guess:.1f} min")
    one_by_one = (run_seed(found, s, full, out, progress) for s in todo)
    done: list[Seed] = []
    for seed in one_by_one if jobs < 2 else _parallel(found, todo, full, jobs, out, progress):
        done.append(seed)
        each = sum(s.minutes for s in done) / len(done)
        left = len(todo) - len(done)
        more = f", about {each * -(-left // jobs):.1f} min left" if left else ""
        say(
            f"{found.spec.slug}: seed {seed.seed} took {seed.minutes:.1f} min ({len(done)} of {len(todo)}){more}"
        )
        yield seed


def _parallel(
    found: Found, todo: list[int], full: bool, jobs: int, out: Path, progress: Progress | None
) -> Iterator[Seed]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    listener = threading.Thread(target=_listen, args=(queue, progress), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_in_worker, initargs=(queue,))
    try:
        with _threads(jobs):  # processes start when work is handed in, with the environment of that moment
            left = {pool.submit(_work, str(_name(found)), s, full, str(out)) for s in todo}
        while left:
            ended, left = wait(left, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    except BrokenProcessPool:
        raise DemurError(
            f"{found.spec.slug}: a process ended from outside (out of memory, say). Finished seeds are kept; run "
            "the same command again with fewer --jobs"
        ) from None
    except (KeyboardInterrupt, GeneratorExit):
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        queue.put(None)
        listener.join(timeout=5)


def _name(found: Found) -> str | Path:
    return found.spec.slug if found.path.parent == FOLDER else found.path


@contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """Processes started here share the cores, unless the user has set the number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


_queue: Any = None


def _in_worker(queue: Any) -> None:
    global _queue
    _queue = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means


def _work(name: str, seed: int, full: bool, out: str) -> Seed:
    return run_seed(find(name), seed, full, Path(out), lambda *event: _queue.put(event))


def _listen(queue: Any, progress: Progress | None) -> None:
    while (event := queue.get()) is not None:
        if progress is not None:
            progress(*event)


# --- anchors and the document -----------------------------------------------------------------------------------


def check_anchors(spec: Spec, say: Say | None = None) -> list[dict[str, Any]]:
    """Count the anchors again; those whose files cannot be had are skipped with the reason.

    Raises:
        InputError: the recount has no value for an anchor whose files are there.
    """
    if spec.recount is None:
        return []
    missing = {a.key: _missing(a, say) for a in spec.anchors}
    got: Mapping[str, Any] = {}
    if not all(missing.values()):
        try:
            got = spec.recount()
        except DataUnavailable as e:
            if say is not None:
                say(str(e))
            missing = {k: why or "a file it needs cannot be had here" for k, why in missing.items()}
    return [_anchor_row(spec, a, missing[a.key], got) for a in spec.anchors]


def _missing(anchor: Anchor, say: Say | None) -> str | None:
    for need in anchor.needs:
        slug, _, filename = need.partition("/")
        try:
            data.get(slug, filename, say=say)
        except (DataUnavailable, InputError) as e:  # not here, or no set that could be fetched
            if say is not None:
                say(str(e))
            return f"{need} cannot be had here"  # the whole reason names folders of this machine
    return None


def _anchor_row(spec: Spec, anchor: Anchor, why: str | None, got: Mapping[str, Any]) -> dict[str, Any]:
    row = {"key": anchor.key, "text": anchor.text, "expected": anchor.expected, "tolerance": anchor.tolerance}
    row["needs"] = list(anchor.needs)
    if why is not None:
        return {**row, "found": None, "status": "skipped", "why": why}
    if anchor.key not in got:
        raise InputError(f"{spec.slug}: recount gave no value for {anchor.key}; it has {', '.join(got)}")
    value = got[anchor.key]
    try:
        value = float(value() if callable(value) else value)
    except MissingExtra as e:
        return {**row, "found": None, "status": "skipped", "why": str(e)}
    if not math.isfinite(value):
        return {**row, "found": None, "status": "off", "why": f"the recount gave {value}"}
    return {**row, "found": value, "status": "exact" if anchor.holds(value) else "off", "why": ""}


def _document(
    found: Found, here: Mapping[int, Seed], stored: Mapping[int, Seed], anchors: list[dict[str, Any]]
) -> dict[str, Any]:
    spec = found.spec
    seeds = {**stored, **here}
    said = conclude(spec, {s: v.values for s, v in seeds.items()}, anchors)
    versions: dict[str, set[str]] = {}
    for seed in seeds.values():
        for name, number in seed.versions.items():
            versions.setdefault(name, set()).add(number)
    return {
        "schema_version": SCHEMA_VERSION,
        "slug": spec.slug,
        "outcome": said.pop("outcome"),
        "reason": said.pop("reason"),
        "seeds": sorted(seeds),
        "stored_seeds": sorted(stored),
        "minutes": round(sum(s.minutes for s in seeds.values()), 3),
        **said,
        "notes": list(spec.notes),
        "provenance": {
            "demur": demur.__version__,
            "versions": {k: ", ".join(sorted(v)) for k, v in sorted(versions.items())},
            "sources": dict(found.sources),
        },
        "per_seed": [store.seed_row(seeds[s]) for s in sorted(seeds)],
    }

"""What is kept of a replication: one file for each seed, one for each system, and whether they are stale.

`DIR/<slug>/seed-<n>.json` is written the moment a seed is done; `DIR/<slug>.json` holds the conclusion and all
its seeds. Neither holds a clock or a host name. Items are kept as one line of numbers, up to 2000 of them; beyond
that their number and standard error are kept, and intervals are made from what is kept, so that fresh and stored
seeds count alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from demur.files import write_atomic
from demur.replicate.spec import PACKAGE, Found, Value, source_hash
from demur.types import SCHEMA_VERSION

RESULTS = Path(__file__).parent / "results"
"""The results that come with the package."""

MAX_ITEMS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """One finished seed. `versions` are those of the libraries that had been loaded."""

    seed: int
    values: Mapping[str, Value]
    minutes: float
    versions: Mapping[str, str]


def kept(value: Value) -> Value:
    """A value as it will be read back: items rounded to nine digits, and left out when they are too many."""
    if value.items is None:
        return value
    if len(value.items) > MAX_ITEMS:
        se = float(np.std(value.items, ddof=1) / math.sqrt(len(value.items)))
        bounds = (0.0, 1.0) if set(value.items) <= {0.0, 1.0} else value.bounds
        return replace(value, items=None, n=len(value.items), se=se, bounds=bounds)
    return replace(value, items=tuple(float(f"{x:.9g}") for x in value.items))


def _value_row(value: Value) -> dict[str, Any]:
    row: dict[str, Any] = {"value": value.value}
    if value.n is not None:
        row["n"] = value.n
    if value.se is not None:
        row["se"] = value.se
    if value.items is not None:
        row["items"] = " ".join(f"{x:.9g}" for x in value.items)
    if value.same_items:
        row["same_items"] = True
    if value.bounds:
        row["bounds"] = list(value.bounds)
    return row


def _value(row: Mapping[str, Any]) -> Value:
    items = tuple(map(float, row["items"].split())) if "items" in row else None
    return Value(
        value=row["value"],
        items=items,
        n=row.get("n"),
        se=row.get("se"),
        same_items=row.get("same_items", False),
        bounds=tuple(row["bounds"]) if "bounds" in row else None,
    )


def seed_row(seed: Seed) -> dict[str, Any]:
    """A seed as JSON."""
    values = {k: _value_row(v) for k, v in seed.values.items()}
    return {"seed": seed.seed, "minutes": seed.minutes, "versions": dict(seed.versions), "values": values}


def _seed(row: Mapping[str, Any]) -> Seed:
    values = {k: _value(v) for k, v in row["values"].items()}
    return Seed(seed=row["seed"], values=values, minutes=row["minutes"], versions=row["versions"])


def dumps(document: Mapping[str, Any]) -> str:
    """A document as JSON text."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def seed_file(out: Path, slug: str, seed: int) -> Path:
    """Where a seed is kept."""
    return out / slug / f"seed-{seed}.json"


def write_seed(out: Path, found: Found, seed: Seed) -> None:
    """Keep a seed, with the hashes it was measured under."""
    head = {"schema_version": SCHEMA_VERSION, "slug": found.spec.slug, "sources": dict(found.sources)}
    write_atomic(seed_file(out, found.spec.slug, seed.seed), dumps({**head, **seed_row(seed)}))


def read_seeds(out: Path, found: Found) -> dict[int, Seed]:
    """The kept seeds of a system that are not stale: those of single files, then those of its result file."""
    seeds: dict[int, Seed] = {}
    for row in (_read(f) for f in sorted((out / found.spec.slug).glob("seed-*.json"))):
        if row is not None and row.get("sources") == found.sources:
            seeds[row["seed"]] = _seed(row)
    result = read_result(out, found.spec.slug)
    if result is not None and not is_stale(result, found):
        for row in result["per_seed"]:
            if row["seed"] not in result["stored_seeds"]:  # those were measured elsewhere
                seeds.setdefault(row["seed"], _seed(row))
    return seeds


def _read(path: Path) -> dict[str, Any] | None:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or edited into something else: measured again
    right = isinstance(row, dict) and row.get("schema_version") == SCHEMA_VERSION
    return row if right else None


def write_result(out: Path, document: Mapping[str, Any]) -> Path:
    """Keep a system's result; gives its path."""
    path = out / f"{document['slug']}.json"
    write_atomic(path, dumps(document))
    return path


def read_result(out: Path, slug: str) -> dict[str, Any] | None:
    """A system's result, or None."""
    return _read(out / f"{slug}.json")


def read_results(out: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results of a folder, by slug."""
    rows = {f.stem: _read(f) for f in sorted(out.glob("*.json"))}
    return {slug: row for slug, row in rows.items() if row is not None}


def is_stale(document: Mapping[str, Any], found: Found) -> bool:
    """Whether the spec, method or recipe files changed since a result was made."""
    return bool(document["provenance"]["sources"] != found.sources)


def stale(document: Mapping[str, Any]) -> bool:
    """The same for a result that comes with the package, without importing its check."""
    sources = document["provenance"]["sources"].items()
    return any(not (PACKAGE / f).is_file() or source_hash(PACKAGE / f) != was for f, was in sources)

"""Suites: named prompt sets for `demur measure`, from `suites.yaml` or a YAML file of the user's own.

    prompts = load(["over-refusal", "my-prompts.jsonl"])
    prompts = load(["twins"])            # group = pair id

A suite's parts are packaged prompts, public sets (fetched by `demur.data`), or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from demur import prompts as sets
from demur.errors import DataUnavailable, InputError
from demur.files import load_prompts, read_text
from demur.types import Prompt, PromptSet, expand_expected

PUBLIC: Mapping[str, Callable[[], PromptSet]] = {
    "coconot": sets.coconot,
    "xstest": sets.xstest,
    "refusal_tokens_eval": sets.refusal_tokens_eval,
    "temporal": sets.temporal,
    "benign_alpaca": sets.benign_alpaca,
}
"""Public sets that a suite or `--suite` may name."""

_FIELDS = {"set", "file", "expected", "kind", "pairs"}


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of parts, each a mapping as in `suites.yaml`; `folder` is where its files are looked for."""

    name: str
    title: str
    parts: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None


def available() -> dict[str, Suite]:
    """The suites that ship with demur.

    >>> list(available())
    ['over-refusal', 'should-refuse', 'twins']
    """
    text = resources.files("demur.flows").joinpath("suites.yaml").read_text("utf-8")
    return _parse(text, "suites.yaml", None)


def load(names: Sequence[str]) -> PromptSet:
    """The prompts of several suites in one set. A prompt that several hold is asked once.

    Args:
        names: suites (`over-refusal`), parts of one (`over-refusal:core`), named sets (`core:test`, `xstest`),
            prompt files (JSONL, CSV, `-`), or YAML files of suites.

    Raises:
        InputError: an unknown name, an empty part, or one id for two different prompts.
        DataUnavailable: a public set cannot be had here; the message says how to leave it out.

    >>> len(load(["should-refuse:core"])) > 100
    True
    """
    found: dict[str, Prompt] = {}
    for name in names:
        for p in _load(name):
            same = found.setdefault(p.id, p)
            if same.messages != p.messages:
                raise InputError(
                    f"--suite {name}: id {p.id!r} is another prompt in an earlier suite; ids join the results, so "
                    "give each prompt its own"
                )
    shown = [Path(name).name if Path(name).suffix else name for name in names]  # no machine paths in run.json
    return PromptSet("+".join(shown), tuple(found.values()))


def _load(name: str) -> PromptSet:
    suites, (head, _, part) = available(), name.partition(":")
    if head in suites:
        return _of_suite(suites[head], part)
    if head == "core":
        return sets.core(part)
    if name.replace("-", "_") in PUBLIC:
        return PUBLIC[name.replace("-", "_")]()
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        own = _parse(read_text(name), name, Path(name).parent)
        return PromptSet(Path(name).stem, tuple(p for suite in own.values() for p in _of_suite(suite, "")))
    if name != "-" and not Path(name).suffix and not Path(name).exists():
        known = ", ".join([*suites, "core:test", *PUBLIC])
        raise InputError(f"--suite {name}: no such suite or file; there are {known}")
    return load_prompts(name)


def _of_suite(suite: Suite, part: str) -> PromptSet:
    if part and part not in suite.parts:
        raise InputError(f"suite {suite.name} has no part {part!r}; it has {', '.join(suite.parts)}")
    kept: list[Prompt] = []
    for name in [part] if part else suite.parts:
        try:
            kept += _of_part(suite, name)
        except DataUnavailable as e:
            others = [f"--suite {suite.name}:{p}" for p in suite.parts if p != name]
            hint = f" To go without it: {' '.join(others)}." if others else ""
            raise DataUnavailable(f"suite {suite.name}, part {name}: {e}{hint}") from None
    return PromptSet(suite.name, tuple(kept))


def _of_part(suite: Suite, name: str) -> list[Prompt]:
    part, where = suite.parts[name], f"suite {suite.name}, part {name}"
    if "file" in part:
        source = load_prompts((suite.folder or Path()) / str(part["file"]))
    else:
        source = _load(str(part["set"]))
    prompts = list(source)
    if "expected" in part:
        wanted = {"refuse": True, "comply": False}.get(str(part["expected"]))
        if wanted is None:
            raise InputError(f"{where}: expected is {part['expected']!r}; write refuse or comply")
        if "file" in part:
            given = expand_expected(str(part["expected"]))
            prompts = [p if p.expected else replace(p, expected=given) for p in prompts]
        prompts = [p for p in prompts if p.should_refuse is wanted]
    if "kind" in part:
        prompts = [p for p in prompts if p.meta.get("kind") == part["kind"]]
    if part.get("pairs"):
        prompts = paired(prompts)
    if not prompts:
        rules = ", ".join(f"{k}: {part[k]}" for k in ("expected", "kind", "pairs") if k in part)
        raise InputError(
            f"{where}: none of its {len(source)} prompts is left by {rules or 'it'}; change or drop that"
        )
    return prompts


def _parse(text: str, path: str, folder: Path | None) -> dict[str, Suite]:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not YAML ({e})") from None
    out = {}
    for name, body in raw.items() if isinstance(raw, dict) else ():
        parts = body.get("parts") if isinstance(body, dict) else None
        if not isinstance(parts, dict) or not all(
            isinstance(p, dict) and ("set" in p) != ("file" in p) and set(p) <= _FIELDS
            for p in parts.values()
        ):
            raise InputError(
                f"{path}: suite {name}: needs `parts`, each with `set` or `file`, maybe `expected`, `kind`, `pairs`"
            )
        out[str(name)] = Suite(str(name), str(body.get("title", name)), parts, folder)
    if not out:
        raise InputError(f"{path}: holds no suite (name: {{title, parts}})")
    return out


# --- twins ---


def twins(prompts: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Minimal pairs (to refuse, to answer): the prompts of one group and type, where there is one of each.

    XSTest calls the unsafe twins of type "homonyms" "contrast_homonyms"; a group with several of a kind gives
    no pair.
    """
    cells: dict[tuple[str, str], list[Prompt]] = {}
    for p in prompts:
        if p.group and p.should_refuse is not None:
            cells.setdefault(((p.subcategory or "").removeprefix("contrast_"), p.group), []).append(p)
    pairs = [sorted(some, key=lambda p: not p.should_refuse) for some in cells.values() if len(some) == 2]
    return [(a, b) for a, b in pairs if a.should_refuse and not b.should_refuse]


def paired(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that stand in a minimal pair, with `group` as the pair's id."""
    out = []
    for pair in twins(prompts):
        kind = pair[1].subcategory
        out += [replace(p, group=f"{p.group}/{kind}" if kind else p.group) for p in pair]
    return out


def limited(prompts: PromptSet, n: int, seed: int = 0) -> PromptSet:
    """About `n` prompts (never more), spread evenly over category and expectation; pairs stay whole."""
    if n >= len(prompts):
        return prompts
    pairs = twins(prompts.prompts)
    inside = {p.id for pair in pairs for p in pair}
    k = round(n * len(inside) / len(prompts)) // 2
    few = PromptSet("pairs", tuple(a for a, _ in pairs))
    keep = {p.id for p in sets.stratified(few, k, seed)}
    keep |= {b.id for a, b in pairs if a.id in keep}
    rest = PromptSet("rest", tuple(p for p in prompts if p.id not in inside))
    keep |= {p.id for p in sets.stratified(rest, n - len(keep), seed)}
    return PromptSet(prompts.name, tuple(p for p in prompts if p.id in keep))

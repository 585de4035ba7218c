"""House taxonomies: a user's own category names, mapped to those that a model or a calibration knows.

A file (`taxonomy.yaml`):

    name: acme
    categories:
      weapons: safety                             # the control category
      legal advice: {control: unsupported, mlcommons: S6}
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from demur.errors import InputError
from demur.files import read_text
from demur.types import Prompt, PromptSet

CONTROL = "control"
HOUSE = "house_category"
"""Where a mapped prompt keeps its own category in `meta`."""


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """A named mapping {house category: {target taxonomy: category there}}.

    >>> house = Taxonomy("acme", {"weapons": {"control": "safety"}})
    >>> house.category("weapons")
    'safety'
    """

    name: str
    categories: Mapping[str, Mapping[str, str]]

    @classmethod
    def load(cls, path: str | Path) -> Taxonomy:
        """Read a taxonomy file; a plain string as value is the control category.

        Raises:
            InputError: not YAML, no `categories`, or a value that is neither text nor a mapping of texts.
        """
        try:
            raw = yaml.safe_load(read_text(path))
        except yaml.YAMLError as e:
            raise InputError(f"{path}: not YAML ({e})") from None
        rows = raw.get("categories") if isinstance(raw, dict) else None
        if not isinstance(rows, dict) or not rows:
            raise InputError(f"{path}: expected `categories: {{house category: control category, ...}}`")
        categories = {}
        for house, value in rows.items():
            targets = {CONTROL: value} if isinstance(value, str) else value
            if (
                not isinstance(targets, dict)
                or not targets
                or not all(isinstance(v, str) for v in targets.values())
            ):
                raise InputError(
                    f"{path}: {house!r} must map to a category or to {{taxonomy: category}}, got {value!r}"
                )
            categories[str(house)] = {str(k): v for k, v in targets.items()}
        return cls(str(raw.get("name") or Path(path).stem), categories)

    def category(self, house: str, target: str = CONTROL) -> str:
        """The category of `target` that a house category stands for.

        Raises:
            InputError: unknown house category (the known ones are named), or no entry for `target`.
        """
        if house not in self.categories:
            near = difflib.get_close_matches(house, self.categories, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"taxonomy {self.name!r} has no category {house!r}; it has "
                f"{', '.join(self.categories)}.{hint}"
            )
        targets = self.categories[house]
        if target not in targets:
            raise InputError(
                f"taxonomy {self.name!r}: {house!r} has no entry for {target!r}, only {', '.join(targets)}"
            )
        return targets[target]

    def apply(self, prompts: PromptSet, target: str = CONTROL) -> PromptSet:
        """The prompts under the target's categories; the house category moves to `meta["house_category"]`.

        A prompt without category stays without.

        Raises:
            InputError: a prompt carries a category that the taxonomy does not know; its id is named.
        """
        out = []
        for p in prompts:
            if p.category is None:
                out.append(p)
                continue
            try:
                category = self.category(p.category, target)
            except InputError as e:
                raise InputError(f"{prompts.name}, prompt {p.id!r}: {e}") from None
            out.append(replace(p, category=category, meta={**p.meta, HOUSE: p.category}))
        return PromptSet(prompts.name, tuple(out))


def in_house(prompts: Iterable[Prompt]) -> list[Prompt] | None:
    """The prompts under the house categories they came with; None where none was mapped.

    >>> mapped = Taxonomy("acme", {"weapons": {"control": "safety"}}).apply(
    ...     PromptSet("mine", (Prompt.of("Hi", category="weapons"),))
    ... )
    >>> mapped[0].category, in_house(mapped)[0].category
    ('safety', 'weapons')
    """
    every = list(prompts)
    if not any(HOUSE in p.meta for p in every):
        return None
    return [replace(p, category=p.meta.get(HOUSE, p.category)) for p in every]

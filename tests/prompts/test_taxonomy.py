from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from demur.errors import InputError
from demur.prompts import Taxonomy, in_house
from demur.types import Prompt, PromptSet


@pytest.fixture
def house(tmp_path: Path) -> Taxonomy:
    path = tmp_path / "acme.yaml"
    path.write_text(
        "name: acme\ncategories:\n  weapons: safety\n  legal advice: {control: unsupported, mlcommons: S6}\n"
    )
    return Taxonomy.load(path)


def prompts(*categories: str | None) -> PromptSet:
    return PromptSet("s", tuple(Prompt.of("x", id=str(i), category=c) for i, c in enumerate(categories)))


def test_apply_maps_and_remembers(house: Taxonomy) -> None:
    out = house.apply(prompts("weapons", "legal advice", None))
    assert [p.category for p in out] == ["safety", "unsupported", None]
    assert out[1].meta == {"house_category": "legal advice"}
    assert out.name == "s"


def test_other_targets(house: Taxonomy) -> None:
    assert house.apply(prompts("legal advice"), target="mlcommons")[0].category == "S6"
    with pytest.raises(InputError, match="no entry for 'mlcommons', only control"):
        house.category("weapons", "mlcommons")


def test_unknown_category_names_prompt_known_ones_and_a_guess(house: Taxonomy) -> None:
    with pytest.raises(
        InputError, match=r"prompt '1'.*'weapon'.*weapons, legal advice.*Did you mean 'weapons'"
    ):
        house.apply(prompts("weapons", "weapon"))


@pytest.mark.parametrize(
    "text", ["", "- a", "categories: {}", "categories: {a: 1}", "categories: {a: {b: 2}}", "a: ["]
)
def test_broken_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"t\.yaml"):
        Taxonomy.load(path)


def test_in_house_is_the_way_back(house: Taxonomy) -> None:
    mine = prompts("weapons", "legal advice", None)
    found = in_house(house.apply(mine))
    assert found is not None
    assert [p.category for p in found] == [p.category for p in mine]
    assert in_house(mine) is None, "nothing was mapped"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("categories: {weapons: safety}", True),
        ("name: acme\ncategories: {legal: {control: unsupported, mlcommons: S6}}", True),
        ("categories: {}", False),
        ("name: acme", False),
        ("categories: {weapons: 3}", False),
        ("categories: {weapons: {control: [safety]}}", False),
        ("categories: {weapons: {}}", False),
    ],
)
def test_the_published_schema_takes_what_the_reader_takes(tmp_path: Path, text: str, good: bool) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs/schemas/taxonomy.json").read_text("utf-8"))
    path = tmp_path / "t.yaml"
    path.write_text(text)
    check = jsonschema.Draft202012Validator(schema)
    assert check.is_valid(yaml.safe_load(text)) is good
    if good:
        Taxonomy.load(path)
    else:
        with pytest.raises(InputError, match=r"t\.yaml"):
            Taxonomy.load(path)

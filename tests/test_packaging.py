"""What is published beside the code: schemas, pinned versions, and commands in the docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement

from demur import files
from demur.types import Condition, OperatingPoint, Prompt, Reply, Score, Threshold, Verdict

REPO = Path(__file__).parents[1]
SCHEMAS = REPO / "docs" / "schemas"

EXAMPLES = {
    "prompt": Prompt.of("What is a fjord?", id="a", category="safety"),
    "reply": Reply(prompt_id="a", content="A bay.", logprobs={"respond": -0.1}),
    "verdict": Verdict(prompt_id="a", label="compliance", judge="rules/demur-v1"),
    "score": Score(id="a", p_refuse=0.2, probabilities={"safety": 0.2, "respond": 0.8}, off_control_mass=0.0),
    "condition": Condition(system="Be brief."),
    "operating_point": OperatingPoint(id="op", thresholds={"safety": Threshold(tau=0.4)}),
}


@pytest.mark.parametrize("name", sorted(files.FILE_NOUNS))
def test_published_schema_is_the_generated_one(name: str) -> None:
    published = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    assert published == json.loads(json.dumps(files.schemas()[name])), "run: make schemas"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_what_is_written_follows_its_schema(name: str) -> None:
    schema = files.schemas()[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(files.to_row(EXAMPLES[name]), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema_version": 99}, schema)


def test_short_prompt_form_follows_the_schema() -> None:
    jsonschema.validate(
        {"id": "a", "prompt": "x", "expected": "refuse", "house_column": 1}, files.schemas()["prompt"]
    )


def requirements() -> dict[str, Requirement]:
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    found = {r.name.lower().replace("_", "-"): r for r in map(Requirement, lines)}
    return {k: v for k, v in found.items() if not k.startswith("demur")}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    text = (REPO / "constraints.txt").read_text(encoding="utf-8")
    pins = {
        n.lower().replace("_", "-"): v
        for n, v in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", text, re.MULTILINE)
    }
    for name, requirement in requirements().items():
        assert name in pins, f"constraints.txt pins no {name}"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement}"


def test_base_install_has_no_heavy_package() -> None:
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {Requirement(x).name.lower() for x in project["dependencies"]}
    assert not names & {"torch", "transformers", "pandas", "scikit-learn", "datasets"}

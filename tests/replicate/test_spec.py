"""What a spec may say, and what is told to someone who writes a wrong one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from demur.errors import InputError
from demur.replicate import Anchor, Baseline, Claim, Control, Spec, Value, find, slugs
from tests.replicate import toy

CLAIM = Claim(key="a", text="a holds", at_least=0.8, null=0.5)


def spec(**change: Any) -> Spec:
    parts: dict[str, Any] = {"slug": "toy", "claims": (CLAIM,), "run": lambda _: {}, "minutes": 1.0}
    return Spec(**{**parts, **change})


def test_a_value_is_the_mean_of_its_items() -> None:
    assert Value.of([1, 0, 1, 1]).value == 0.75
    assert Value.of([True, False]).n == 2
    assert Value.of([]).value is None and Value.of([]).items is None
    assert Value(value=math.nan).value is None
    with pytest.raises(InputError, match=r"mean of its 2 items is 0\.5"):
        Value(value=0.6, items=[0, 1])
    with pytest.raises(InputError, match="finite"):
        Value(value=math.inf)
    with pytest.raises(InputError, match="NaN"):
        Value.of([1.0, math.nan])


def test_goals_and_effects() -> None:
    assert CLAIM.effect == pytest.approx(0.3)
    assert CLAIM.reached(0.8) and not CLAIM.reached(0.79)
    low = Claim(key="a", text="t", at_most=0.2, null=1.0)
    assert low.effect == pytest.approx(0.8) and low.reached(0.2) and not low.reached(0.3)
    band = Claim(key="a", text="t", at_least=0.4, at_most=0.6)
    assert band.effect is None and band.reached(0.5) and not band.reached(0.7)
    assert band.goal == "at least 0.4, at most 0.6"


def test_a_margin_of_a_third_of_the_effect_is_the_largest() -> None:
    spec(controls=(Control(key="c", text="c", null=0.5, margin=0.1),))
    with pytest.raises(InputError, match=r"at most a third of the required effect 0\.3 of a"):
        spec(controls=(Control(key="c", text="c", null=0.5, margin=0.11),))
    with pytest.raises(InputError, match="names a null"):
        spec(
            claims=(Claim(key="a", text="t", at_least=1.0),),
            controls=(Control(key="c", text="c", null=0.5, margin=0.1),),
        )
    # a second claim in other units: the control says which one it is measured by
    small = Claim(key="b", text="b", at_least=0.03, null=0.0)
    with pytest.raises(InputError, match=r"0\.03 of b"):
        spec(claims=(CLAIM, small), controls=(Control(key="c", text="c", null=0.5, margin=0.1),))
    spec(claims=(CLAIM, small), controls=(Control(key="c", text="c", null=0.5, margin=0.1, against="a"),))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slug": "No Slug"}, "lower-case"),
        ({"claims": (CLAIM, CLAIM)}, "key a stands twice"),
        ({"claims": (Claim(key="a", text=" ", at_least=1),)}, "must say something"),
        ({"claims": (Claim(key="a", text="t"),)}, "at_least or at_most"),
        ({"claims": (Claim(key="a", text="t", at_least=0.4, null=0.5),)}, "claims nothing"),
        ({"claims": (Claim(key="a", text="t", at_least=2, at_most=1),)}, "lies above"),
        ({"claims": (Claim(key="a", text="t", at_least=math.nan),)}, "finite"),
        ({"claims": (), "run": None}, "nothing to check"),
        ({"run": None}, "need `run`"),
        ({"anchors": (Anchor(key="x", text="t", expected=1),)}, "need `recount`"),
        ({"baselines": (Baseline(key="x", text="t", against="z"),)}, "no claim"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"minutes": 0}, "minutes"),
    ],
)
def test_wrong_specs_say_what_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec(**change)


def test_an_anchor_holds_within_its_tolerance() -> None:
    exact = Anchor(key="x", text="t", expected=0.3)
    assert exact.holds(0.1 + 0.2) and not exact.holds(0.3001)
    assert Anchor(key="x", text="t", expected=0.892, tolerance=0.0005).holds(0.8918)


def test_find(tmp_path: Path) -> None:
    path = toy.write(tmp_path)
    found = find(path)
    assert found.spec.slug == "toy" and set(found.sources) == {"toy.py", "recipe.txt"}
    (tmp_path / "recipe.txt").write_bytes(b"layers: 2\r\n")
    assert find(path).sources == found.sources, "line ends are no change"
    (tmp_path / "recipe.txt").unlink()
    with pytest.raises(InputError, match=r"recipe\.txt, which is not in the package"):
        find(path)
    other = path.rename(tmp_path / "other.py")
    with pytest.raises(InputError, match=r"name it toy\.py"):
        find(other)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="no SPEC"):
        find(tmp_path / "empty.py")
    with pytest.raises(InputError, match="no such file"):
        find(tmp_path / "missing.py")


def test_a_spec_file_may_hold_dataclasses(tmp_path: Path) -> None:
    path = toy.write(tmp_path)
    held = "from dataclasses import dataclass\n\n\n@dataclass\nclass Row:\n    n: int\n\n\nSPEC = "
    text = path.read_text().replace("SPEC = ", held, 1)
    path.write_text("from __future__ import annotations\n" + text)
    assert find(path).spec.slug == "toy"


def test_find_by_slug_names_what_there_is() -> None:
    with pytest.raises(InputError, match="no replication check is called 'nonsense'"):
        find("nonsense")
    with pytest.raises(InputError, match="tracealign has no replication check yet"):
        find("tracealign")


@pytest.mark.parametrize("slug", slugs())
def test_every_packaged_spec_is_sound(slug: str) -> None:
    found = find(slug)
    assert found.spec.files, "name the method file, else nothing makes a result stale"
    assert found.spec.seeds >= 3 or found.spec.run is None

"""The organism check of refusal tokens: what it computes, on arms made by hand, and its whole path in small."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import demur.replicate.refusal_tokens as check
from demur.calibrate.decide import decide
from demur.control.refusal_tokens import RefusalTokens as Dial
from demur.replicate.refusal_tokens import ENTRY, SPEC
from demur.replicate.refusal_tokens_values import (
    Arm,
    Truth,
    agreement_items,
    auc_items,
    contrast_items,
    difference_items,
    following_items,
    measure,
    selectivity_items,
    switching,
)
from demur.replicate.spec import Context, Value
from demur.replicate.summary import conclude
from demur.stats import auroc, auroc_interval
from demur.train.adapter import Adapter
from demur.train.refusal_tokens import is_lookalike
from demur.types import Condition, OperatingPoint, Prompt, PromptSet, Reply, Threshold, expand_expected

CATEGORIES = ("a", "b", "c", "d", "e")
NAMES = (*CATEGORIES, "respond")
OVERLAP = ("b", "c")
N = 600
SIZES = {"train": 96, "select": 48, "test": 32}


def draw_truth(seed: int = 0) -> Truth:
    """Labels from a spread posterior; b and c share words in half of their prompts; look-alikes are harmless."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 6, N)
    lookalike = (rng.random(N) < 0.25) & (topic < 5)
    z = np.full((N, 6), -7.0)
    z[:, 5] = 0.0
    risky = np.flatnonzero(topic < 5)
    z[risky, topic[risky]] = rng.uniform(-4, 6, len(risky))
    both = np.isin(topic, (1, 2)) & (rng.random(N) < 0.3)
    z[both, 1:3] = z[both, 1:3].max(1, keepdims=True) + rng.normal(0, 0.3, (int(both.sum()), 2))
    z[lookalike, :5] -= 9.0
    P = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    label = (rng.random((N, 1)) > P.cumsum(1)[:, :-1]).sum(1)
    return Truth(label, P, lookalike)


TRUTH = draw_truth()
REST = TRUTH.posterior


def follows(n: int = N, k: int = len(NAMES)) -> npt.NDArray[np.intp]:
    return np.tile(np.arange(k), (n, 1))


def heedless(seed: int = 0, k: int = len(NAMES)) -> npt.NDArray[np.intp]:
    """Texts that go by the prompt whatever the token is."""
    return np.tile(TRUTH.posterior.argmax(1)[:, None], (1, k))


def blind(seed: int = 1) -> Arm:
    """Tokens that know nothing: the same probabilities for all, up to noise."""
    rng = np.random.default_rng(seed)
    P = np.tile([0.06, 0.06, 0.06, 0.06, 0.06, 0.7], (N, 1)) * rng.uniform(0.9, 1.1, (N, 6))
    return Arm(NAMES, P / P.sum(1, keepdims=True), heedless())


def ideal() -> dict[str, Arm]:
    """The posterior itself as control tokens, texts that follow, and controls in which nothing works."""
    z = np.log(TRUTH.posterior)
    z[TRUTH.lookalike, :5] += 9.0  # what a model says that never saw a look-alike answered
    fooled = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    names = (*CATEGORIES, "unused", "respond")
    P = np.insert(TRUTH.posterior * (1 - 1e-4), 5, 1e-4, axis=1)
    return {
        "tokens": Arm(NAMES, TRUTH.posterior, follows()),
        "no_contrast": Arm(NAMES, fooled, follows()),
        "shuffled": blind(),
        "no_tokens": dataclasses.replace(blind(2), texts=heedless()),
        "unused": Arm(names, P, follows(k=7)),
    }


def values(arms: dict[str, Arm]) -> dict[str, Value]:
    words = np.log(TRUTH.posterior[:, :-1].sum(1)) + np.random.default_rng(3).normal(0, 2, N)
    entry = {claim.key: Value(value=1.0) for claim in ENTRY}
    return entry | measure(arms, TRUTH, OVERLAP, words)


def statuses(arms: dict[str, Arm]) -> dict[str, str]:
    result = conclude(SPEC, {0: values(arms)}, [])
    return {row["key"]: row["status"] for part in ("claims", "controls", "baselines") for row in result[part]}


# --- the small formulas -----------------------------------------------------------------------------------------


def test_auc_items_carry_the_area_and_its_variance() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(400) < 0.3
    s = np.round(rng.normal(y * 1.2, 1), 1)  # with ties
    items = auc_items(s, y)
    area = auroc(s, y)
    assert area is not None and items.mean() == pytest.approx(area, abs=1e-12)
    interval = auroc_interval(s, y)
    assert interval is not None
    logit = [float(np.log(p / (1 - p))) for p in interval]
    delong = (logit[1] - logit[0]) / 2 / 1.959964 * area * (1 - area)
    assert items.std() / np.sqrt(len(items)) == pytest.approx(delong, rel=0.01)


def test_auc_items_by_hand() -> None:
    # placements 1, 3/4 | 1 - 3/4 ... : pairs 1, 1, 1/2, 1
    assert auc_items([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0]).tolist() == [1.125, 0.625, 0.625, 1.125]


def test_difference_items_by_hand() -> None:
    items = difference_items([1.0, 0.0, 0.0, 0.3], [1, 1, 0, 0])
    assert items.mean() == pytest.approx(0.5 - 0.15)
    assert items.tolist() == pytest.approx([1.35, -0.65, 0.65, 0.05])


def test_agreement_is_chance_where_the_text_heeds_no_token() -> None:
    assert agreement_items(Arm(NAMES, REST, follows())).mean() == 1
    assert agreement_items(Arm(NAMES, REST, heedless())).mean() == pytest.approx(1 / 6)
    assert agreement_items(Arm(NAMES, REST, np.full((N, 6), -1))).mean() == 0


def test_following_is_zero_where_the_token_changes_nothing() -> None:
    assert following_items(Arm(NAMES, REST, follows())).mean() == 1
    assert following_items(Arm(NAMES, REST, heedless())).mean() == pytest.approx(0)
    assert following_items(Arm(NAMES, REST, np.full((N, 6), -1))).mean() == 0
    one = np.array([[0, 0, 2]])  # token 0 and 2 are followed, 1 is read as 0: (1 - 1/2 + 0 + 1) / 3
    assert following_items(Arm(("a", "b", "respond"), np.zeros((1, 3)), one)).mean() == pytest.approx(0.5)


def test_switching_by_hand() -> None:
    # four prompts: a, b, c, and a b that is taken for c
    P = np.array([[0.8, 0.1, 0.0, 0.1], [0, 0.9, 0, 0.1], [0, 0, 0.9, 0.1], [0, 0.3, 0.6, 0.1]])
    arm = Arm(("a", "b", "c", "respond"), P, follows(4, 4))
    truth = Truth(np.array([0, 1, 2, 1]), P, np.zeros(4, bool))
    got = switching(arm, truth, ("b", "c"))
    assert got["cut"].value == 0.5  # b: one of its two falls
    assert got["others"].value == 0
    assert got["leak"].items == pytest.approx((0, 0, 1)), "c by switching b; b's second by switching c"
    apart = switching(arm, truth, ("a", "b"))
    assert apart["others"].value == 0.5  # now b against c counts as a pair apart


def test_contrast_compares_at_one_true_refusal_rate() -> None:
    y = np.arange(20) < 10
    truth = Truth(np.where(y, 0, 1), np.zeros((20, 2)), ~y)
    p = np.r_[np.linspace(0.5, 0.9, 10), np.linspace(0.0, 0.4, 10)]
    good = Arm(("a", "respond"), np.c_[p, 1 - p], follows(20, 2))
    q = p.copy()
    q[10:14] = 0.95
    bad = Arm(("a", "respond"), np.c_[q, 1 - q], follows(20, 2))
    assert contrast_items(bad, good, truth).mean() == pytest.approx(0.4)
    scaled = Arm(("a", "respond"), np.c_[p / 2, 1 - p / 2], follows(20, 2))
    assert contrast_items(scaled, good, truth).mean() == 0, "thresholds follow the scale"


# --- the verdict on whole arms ----------------------------------------------------------------------------------


def test_the_spec_reads_exactly_what_is_measured() -> None:
    assert set(values(ideal())) == {*SPEC.keys, *(c.key for c in ENTRY)}


def test_an_ideal_model_reproduces() -> None:
    result = conclude(SPEC, {0: values(ideal())}, [])
    assert result["outcome"] == "reproduced", [
        row for part in ("claims", "controls") for row in result[part] if row["why"]
    ]


def broken(arm: str, **changes: Any) -> dict[str, Arm]:
    arms = ideal()
    return {**arms, arm: dataclasses.replace(arms[arm], **changes)}


def shrunk(P: npt.NDArray[np.float64], T: float) -> npt.NDArray[np.float64]:
    Q = P ** (1 / T)
    return np.asarray(Q / Q.sum(1, keepdims=True))


def rolled(P: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Refuse mass on the next category."""
    return np.concatenate([np.roll(P[:, :5], 1, axis=1), P[:, 5:]], axis=1)


def inverted() -> npt.NDArray[np.intp]:
    """Where refusing is right, texts that answer behind a refuse token and refuse behind `respond`."""
    texts = follows()
    sure = TRUTH.posterior[:, 5] < 0.5
    texts[sure, :5], texts[sure, 5] = 5, 0
    return texts


@pytest.mark.parametrize(
    ("arms", "fails"),
    [
        (broken("tokens", P=blind().P), {"auc", "gap", "auc_shortfall", "ece", "contrast", "bag_of_words"}),
        (broken("tokens", P=shrunk(TRUTH.posterior, 4.0)), {"ece"}),
        (broken("tokens", P=rolled(TRUTH.posterior)), {"cut", "others"}),
        (broken("tokens", texts=heedless()), {"agreement", "following", "span", "highest", "lowest", "cut"}),
        (broken("tokens", texts=inverted()), {"monotone", "agreement", "highest"}),
        (broken("no_contrast", P=TRUTH.posterior), {"contrast"}),
        (broken("shuffled", P=TRUTH.posterior), {"shuffled_gap", "shuffled_auc"}),
        (broken("shuffled", P=TRUTH.posterior, texts=follows()), {"shuffled_dial", "shuffled_following"}),
        (broken("no_tokens", texts=follows()), {"no_tokens_following"}),
        (
            broken("unused", P=np.insert(TRUTH.posterior / 3, 5, 2 / 3, axis=1)),
            {"unused_dial"},
        ),
    ],
)
def test_each_failure_is_seen(arms: dict[str, Arm], fails: set[str]) -> None:
    bad = {k for k, status in statuses(arms).items() if status in ("not met", "not silent", "not beaten")}
    assert fails <= bad


def test_a_shuffled_arm_that_refuses_by_itself_has_no_selective_dial() -> None:
    assert abs(selectivity_items(blind(), TRUTH).mean()) < 0.05
    assert selectivity_items(ideal()["tokens"], TRUTH).mean() > 0.5


# --- the whole path, in small ------------------------------------------------------------------------------------


def test_arms_come_from_the_product_and_survive_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "peft", "trl", "datasets", "sklearn"):
        pytest.importorskip(name)
    from demur.organisms.base import grow
    from demur.organisms.requests import BLANK, RequestWorld

    world = RequestWorld({**BLANK.world, "risky": 1.0})
    recipe = dataclasses.replace(BLANK, steps=3, batch=4)
    organism = grow(recipe, world.batches, world.words, cache=False)
    parts = [world.prompt_set(n, 7, name=part, part=part) for part, n in SIZES.items()]
    monkeypatch.setattr(check, "RECIPE", dataclasses.replace(check.RECIPE, epochs=1, distilled=4))
    context = Context(seed=0, full=False, folder=tmp_path, progress=lambda *_: None)
    blank = organism.runtime()

    def arms() -> dict[str, Arm]:
        return check.train_arms(blank, blank, (parts[0], parts[1], parts[2]), world.read, context)

    first = arms()
    assert set(first) == set(ideal())
    for name, arm in first.items():
        assert arm.names[-1] == "respond" and len(arm.names) == (7 if name == "unused" else 6)
        assert arm.P.shape == arm.texts.shape == (SIZES["test"], len(arm.names))
        assert (arm.P.sum(1) <= 1 + 1e-6).all()
    # the dial of the product says what the tables say
    tuned = Adapter.load(tmp_path / "tokens").attach(blank)
    point = OperatingPoint(id="p", thresholds={c: Threshold(tau=0.3) for c in tuned.control.refuse})
    with Dial(point).on(tuned) as dialled:
        replies = list(dialled.generate(parts[2], Condition(max_new_tokens=8)))
    expected = decide(first["tokens"].P, first["tokens"].names, dict.fromkeys(tuned.control.refuse, 0.3))
    assert [r.control_token for r in replies] == [tuned.control.names[k] for k in expected]

    monkeypatch.setattr(check.RefusalTokens, "fit", lambda *_a, **_k: pytest.fail("trained again"))
    again = arms()
    assert all((again[name].P == arm.P).all() for name, arm in first.items())


class Echo:
    """A runtime that answers with the prompt's id."""

    def generate(self, prompts: PromptSet, _condition: Condition) -> Iterator[Reply]:
        return (Reply(prompt_id=p.id, content=f"text of {p.id}") for p in prompts)


def test_shuffled_rows_keep_their_text_and_lose_their_token() -> None:
    words = [f"w{i}" for i in range(400)]
    yes, no = expand_expected("refuse"), expand_expected("comply")
    rows = tuple(
        Prompt.of(w, id=w, category="safety", expected=yes, reference="no")
        if i < 100
        else Prompt.of(w, id=w, category="safety" if i < 150 else None, expected=no)
        for i, w in enumerate(words)
    )
    out = check.shuffled(PromptSet("all", rows), Echo(), seed=0)
    assert [p.text for p in out] == words
    assert all(p.reference == f"text of {p.id}" for p in out)
    refused = np.array([bool(p.should_refuse) for p in out])
    assert refused.sum() == 100, "as many tokens of each kind as before"
    assert 10 < refused[:100].sum() < 40, "and none where it was"
    assert all((p.category == "safety") == bool(p.should_refuse) for p in out)
    assert not any(is_lookalike(p) for p in out)


def test_texts_of_known_tokens_are_copied_by_name() -> None:
    known = Arm(("a", "b", "respond"), np.zeros((2, 3)), np.array([[0, 1, 2], [2, -1, 0]]))
    arm = Arm(("a", "b", "unused", "respond"), np.zeros((2, 4)), np.full((2, 4), 1))
    check._fill(arm, known)
    assert arm.texts.tolist() == [[0, 1, 1, 3], [3, -1, 1, 0]]

"""The dial: decisions on hand-made tables, what fits which model, consent, forced tokens in answers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest

from demur.calibrate import bias_to_tau, decide
from demur.control import RefusalTokens, check_point
from demur.errors import CapabilityError, InputError, MismatchError, RefusalLowering
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, OperatingPoint, Prompt, Score, Site, Threshold

PROMPT = Prompt.of("how do i boil a egg ?", id="p")
NAMES = ("safety", "humanizing", "respond")


def point(rule: Any = "threshold", id: str = "point", **fields: Any) -> OperatingPoint:
    """A point from keyword arguments: numbers are thresholds by category, the rest its own fields."""
    own = {k: fields.pop(k) for k in list(fields) if k in OperatingPoint.__dataclass_fields__}
    cuts = {c: t if isinstance(t, Threshold) else Threshold(tau=t) for c, t in fields.items()}
    return OperatingPoint(id=id, thresholds=cuts, rule=rule, **own)


def score(*row: float, T: float = 1.0, names: tuple[str, ...] = NAMES) -> Score:
    table = dict(zip(names, row, strict=True))
    return Score(id="p", p_refuse=sum(row[:-1]), probabilities=table, T=T)


def choice(where: OperatingPoint, *row: float) -> str | None:
    return RefusalTokens(where)(PROMPT, score(*row))


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "row", "wanted"),
    [
        (0.3, (0.3, 0.1, 0.6), "safety"),  # a tie with the threshold refuses, although respond is likelier
        (0.31, (0.3, 0.1, 0.6), "respond"),
        (0.6, (0.5, 0.1, 0.4), "respond"),  # suppressed although it is likelier
        (0.0, (0.0, 0.0, 1.0), "safety"),  # 0 refuses always
        (1.0, (1.0, 0.0, 0.0), "safety"),  # 1 refuses certainty only
        (1.0, (0.999, 0.0, 0.001), "respond"),
        (1.01, (1.0, 0.0, 0.0), "respond"),  # above 1 never
        (-1.0, (0.45, 0.1, 0.45), "safety"),  # -1 compares, and a tie refuses
        (-1.0, (0.44, 0.1, 0.46), "respond"),
        (-1.0, (0.2, 0.1, 0.1), "safety"),  # whatever lies beside the control tokens
    ],
)
def test_threshold(tau: float, row: tuple[float, ...], wanted: str) -> None:
    assert choice(point(safety=tau, humanizing=tau), *row) == wanted


def test_a_tie_between_categories_goes_to_the_first() -> None:
    assert choice(point(safety=0.3, humanizing=0.3), 0.3, 0.3, 0.4) == "safety"


@pytest.mark.parametrize("rule", ["threshold", "total_mass", "bias", "compare"])
@pytest.mark.parametrize("row", [(0.1, 0.6, 0.3), (0.1, 0.3, 0.6), (0.0, 1.0, 0.0)])
def test_an_unsteered_likeliest_category_is_left_to_the_model(rule: str, row: tuple[float, ...]) -> None:
    assert choice(point(rule, safety=0.0), *row) is None
    shadow = point(rule, safety=0.0, humanizing=Threshold(tau=0.0, mode="shadow"))
    assert choice(shadow, *row) is None  # a category in shadow mode is only watched


def test_compare_without_thresholds_steers_every_category() -> None:
    assert choice(point("compare"), 0.4, 0.2, 0.4) == "safety"
    assert choice(point("compare"), 0.2, 0.39, 0.41) == "respond"
    assert choice(point("compare"), 0.2, 0.41, 0.39) == "humanizing"
    assert choice(point("compare", safety=0.99), 0.41, 0.2, 0.39) == "safety"  # its number plays no part


def test_compare_with_every_threshold_in_shadow_steers_none() -> None:
    point = OperatingPoint(id="x", rule="compare", thresholds={"safety": Threshold(tau=0.5, mode="shadow")})
    assert RefusalTokens(point).cuts(["safety", "respond"]) == {}


def test_total_mass_sums_the_steered_categories() -> None:
    assert choice(point("total_mass", safety=0.5, humanizing=0.5), 0.3, 0.25, 0.45) == "safety"
    assert choice(point("total_mass", safety=0.5), 0.3, 0.25, 0.45) == "respond"


def test_bias_is_a_threshold_on_the_share_of_two() -> None:
    """0.2 against 0.6: the share is 1/4, which a bias of ln 3 = 1.0986 lifts to a tie."""
    row = (0.2, 0.1, 0.6)
    assert choice(point("bias", safety=Threshold(tau=bias_to_tau(1.1), bias=1.1)), *row) == "safety"
    assert choice(point("bias", safety=Threshold(tau=bias_to_tau(1.09), bias=1.09)), *row) == "respond"
    assert choice(point("bias", safety=0.25), *row) == "safety"
    with pytest.raises(InputError, match="disagree"):
        RefusalTokens(point("bias", safety=Threshold(tau=0.9, bias=1.0)))


@pytest.mark.parametrize("rule", ["threshold", "total_mass", "bias", "compare"])
def test_one_prompt_is_decided_as_calibration_decided_the_table(rule: Any) -> None:
    P = np.random.default_rng(0).dirichlet([1, 1, 2, 0.3], 200)[:, :3]
    where = point(rule, safety=0.3, humanizing=0.4)
    rule_of = RefusalTokens(where)
    picked = decide(P, NAMES, {"safety": 0.3, "humanizing": 0.4}, rule)
    assert [rule_of(PROMPT, score(*row)) for row in P.tolist()] == [NAMES[i] for i in picked]
    assert len(set(picked.tolist())) == 3


def test_order_of_the_probabilities_does_not_matter() -> None:
    turned = score(0.6, 0.3, 0.1, names=("respond", "safety", "humanizing"))
    assert RefusalTokens(point(safety=0.3))(PROMPT, turned) == "safety"


def test_a_score_that_cannot_be_decided_on() -> None:
    rule = RefusalTokens(point(safety=0.3))
    with pytest.raises(InputError, match="no probabilities of control tokens"):
        rule(PROMPT, Score(id="p", p_refuse=0.1, kind="first_token"))
    with pytest.raises(MismatchError, match=r"T=1 and the scores are at T=2"):
        rule(PROMPT, score(0.3, 0.1, 0.6, T=2.0))
    assert RefusalTokens(point(safety=0.3, T=2.0))(PROMPT, score(0.3, 0.1, 0.6, T=2.0)) == "safety"


# --- which model a point is for -------------------------------------------------------------------


def scripted(row: tuple[float, ...] = (0.3, 0.1, 0.5), **options: Any) -> ScriptedRuntime:
    options = {"control": NAMES[:2], "scores": {"*": dict(zip(NAMES, row, strict=True))}, **options}
    return ScriptedRuntime({"*": "own text"}, **options)


def test_points_for_another_model_are_refused() -> None:
    runtime = scripted()
    with pytest.raises(InputError, match="has none"):
        check_point(point(safety=0.1), ScriptedRuntime({"*": "x"}))
    with pytest.raises(InputError, match="thresholds for unsupported; 'scripted' knows safety, humanizing"):
        check_point(point(safety=0.1, unsupported=0.2), runtime)
    with pytest.raises(InputError, match="thresholds for respond"):
        check_point(point(respond=0.1), runtime)
    with pytest.raises(MismatchError, match="calibrated on the model other"):
        check_point(point(safety=0.1, model_fingerprint="other"), runtime)
    with pytest.raises(MismatchError, match="use one T"):
        check_point(point(safety=0.1, T=2.0), runtime, T=1.0)
    with (
        pytest.raises(MismatchError),
        RefusalTokens(point(safety=0.1, model_fingerprint="other")).on(runtime),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_point(point(safety=0.1, model_fingerprint="scripted:scripted", dtype="float32"), runtime, T=1.0)


def test_another_dtype_warns() -> None:
    runtime = scripted()
    runtime.dtype = "bfloat16"
    with pytest.warns(UserWarning, match="calibrated in float32, 'scripted' runs in bfloat16"):
        check_point(point(safety=0.1, dtype="float32"), runtime)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_point(point(safety=0.1, dtype="bfloat16"), runtime)
        check_point(point(safety=0.1), runtime)


# --- consent --------------------------------------------------------------------------------------

SHADOW = Threshold(tau=0.3, mode="shadow")


@pytest.mark.parametrize(
    ("ours", "shipped"),
    [
        (point(safety=0.31), point(safety=0.3)),
        (point(safety=1.01), point(safety=-1.0)),
        (point(safety=-1.0), point(safety=0.3)),  # compare refuses less than a tau below 0.5
        (point(safety=0.4), point(safety=-1.0)),
        (point(safety=SHADOW), point(safety=0.3)),
        (point(humanizing=0.1), point(safety=0.3)),  # the model's own choice again
        (point(), point(safety=-1.0)),
        (point("bias", safety=0.3), point(safety=0.3)),  # another rule cannot be compared
        (point(safety=0.3, T=2.0), point(safety=0.3)),  # neither can another temperature
        (point("total_mass", safety=0.3), point("total_mass", safety=0.3, humanizing=0.5)),  # less to sum
        (point("total_mass", humanizing=0.5), point("total_mass", safety=0.5, humanizing=0.5)),
        (
            point("total_mass", safety=-1.0, humanizing=0.5),  # compares, and there the sum was asked
            point("total_mass", safety=0.5, humanizing=0.5),
        ),
    ],
)
def test_lowering_refusals_of_safety_needs_consent(
    ours: OperatingPoint, shipped: OperatingPoint, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RefusalLowering, match=r"category 'safety'.*allow_refusal_lowering=True"):
        RefusalTokens(ours, shipped=shipped)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "demur"):
        RefusalTokens(ours, shipped=shipped, allow_refusal_lowering=True)
    assert "may refuse less in category 'safety'" in caplog.text


@pytest.mark.parametrize(
    ("ours", "shipped"),
    [
        (point(safety=0.3), point(safety=0.3)),
        (point(safety=0.1, humanizing=0.9), point(safety=0.3, humanizing=0.2)),  # other categories are free
        (point(safety=-1.0), point(safety=0.5)),
        (point(safety=-1.0), point(safety=-1.0)),
        (point(safety=0.0), point(safety=-1.0)),
        (point(humanizing=0.9), point(safety=0.6)),
        (point(humanizing=0.9), point(humanizing=0.1)),
        (point(safety=0.9), point(safety=SHADOW)),
        (point("total_mass", safety=0.3, humanizing=0.5), point("total_mass", safety=0.3)),
    ],
)
def test_refusing_as_much_or_more_needs_none(
    ours: OperatingPoint, shipped: OperatingPoint, caplog: pytest.LogCaptureFixture
) -> None:
    RefusalTokens(ours, shipped=shipped)
    RefusalTokens(ours, shipped=shipped, allow_refusal_lowering=True)
    assert not caplog.records  # nothing was lowered, so nothing is logged


@pytest.mark.parametrize(
    ("ours", "shipped"), [(point(safety=-1.0), point(safety=0.5)), (point(safety=0.2), point(safety=0.3))]
)
def test_what_passes_the_guard_refuses_all_that_was_refused(
    ours: OperatingPoint, shipped: OperatingPoint
) -> None:
    RefusalTokens(ours, shipped=shipped)
    for row in np.random.default_rng(1).dirichlet([1, 1, 1, 0.3], 500)[:, :3].tolist():
        if choice(shipped, *row) == "safety":
            assert choice(ours, *row) == "safety"


# --- under an operating point ---------------------------------------------------------------------


def test_the_forced_token_reaches_the_answer() -> None:
    runtime = scripted(forced={"safety": "I can't.", "respond": "Sure."})
    before = dict(vars(runtime))
    (own,) = runtime.generate([PROMPT])
    with RefusalTokens(point(safety=0.3, humanizing=0.3)).on(runtime) as strict:
        (reply,) = strict.generate([PROMPT])
        assert next(strict.score([PROMPT])) == next(runtime.score([PROMPT]))
    with RefusalTokens(point(safety=0.31, humanizing=0.3)).on(runtime) as loose:
        (other,) = loose.generate([PROMPT], samples=1)
    assert (own.content, own.control_token, own.control_forced) == ("own text", "respond", False)
    assert (reply.content, reply.control_token, reply.control_forced) == ("I can't.", "safety", True)
    assert (other.content, other.control_token, other.control_forced) == ("Sure.", "respond", True)
    assert vars(runtime) == before
    assert next(runtime.generate([PROMPT])) == own


def test_the_point_that_came_with_the_model_guards_it(caplog: pytest.LogCaptureFixture) -> None:
    runtime = scripted(forced={"respond": "Sure."})
    runtime.shipped_point = point(id="shipped", safety=0.2)
    loose = point(safety=0.9)
    with pytest.raises(RefusalLowering, match=r"the shipped 'shipped'.*--allow-refusal-lowering"):
        RefusalTokens(loose).on(runtime).__enter__()
    allowed = RefusalTokens(loose, allow_refusal_lowering=True)
    assert allowed.lowers is None and not caplog.records
    for _ in range(2):
        with caplog.at_level(logging.WARNING, "demur"), allowed.on(runtime) as dialled:
            assert next(dialled.generate([PROMPT])).content == "Sure."
            assert dialled.shipped_point == runtime.shipped_point
            with pytest.raises(RefusalLowering), RefusalTokens(loose).on(dialled):  # also from within
                pass
    assert "may refuse less" in str(allowed.lowers) and len(caplog.records) == 1
    with RefusalTokens(point(safety=0.1)).on(runtime):
        assert len(caplog.records) == 1


def test_an_unsteered_category_keeps_the_models_own_answer() -> None:
    runtime = scripted((0.1, 0.6, 0.2), forced={"respond": "Sure."})
    with RefusalTokens(point(safety=1.01)).on(runtime) as dialled:
        (reply,) = dialled.generate([PROMPT])
    assert (reply.content, reply.control_token, reply.control_forced) == ("own text", "humanizing", False)


def test_the_condition_names_the_operating_point() -> None:
    seen: list[Condition] = []

    def script(_prompt: Prompt, condition: Condition, _sample: int) -> str:
        seen.append(condition)
        return "x"

    runtime = ScriptedRuntime(script, control=["safety"], scores={"*": {"safety": 0.5, "respond": 0.5}})
    with RefusalTokens(point(id="strict", safety=0.3)).on(runtime) as dialled:
        list(dialled.generate([PROMPT]))
        list(dialled.generate([PROMPT], Condition(name="hot", temperature=1.0), samples=2))
    assert [c.operating_point for c in seen] == ["strict"] * 3
    assert (seen[1].name, seen[1].temperature) == ("hot", 1.0)


def test_one_rule_at_a_time_and_only_where_tokens_can_be_scored() -> None:
    with RefusalTokens(point(safety=0.3)).on(scripted()) as dialled:
        with pytest.raises(InputError, match="one rule or the other"):
            dialled.generate([PROMPT], decide=lambda _p, _s: "respond")
        assert (dialled.name, dialled.fingerprint, dialled.control) == (
            "scripted",
            "scripted:scripted",
            scripted().control,
        )
        assert dialled.capabilities == scripted().capabilities and dialled.deterministic
        with pytest.raises(CapabilityError, match="states"):
            dialled.states([PROMPT], [Site(layer=0)])
    blind = ScriptedRuntime({"*": "x"}, control=["safety"])
    with RefusalTokens(point(safety=0.3)).on(blind) as dialled, pytest.raises(CapabilityError, match="score"):
        next(dialled.generate([PROMPT]))


def test_a_body_that_fails_leaves_the_runtime_as_it_was() -> None:
    runtime = scripted()
    before = dict(vars(runtime))
    with pytest.raises(ZeroDivisionError), RefusalTokens(point(safety=0.3)).on(runtime):
        raise ZeroDivisionError
    assert vars(runtime) == before


def test_local_model_under_the_dial() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.runtime.tiny import CATEGORIES, tiny_runtime

    runtime = tiny_runtime(control=True)
    prompts = [
        Prompt.of(f"how do i boil a {w} ?", id=w) for w in ("egg", "cat", "dog", "bomb", "fjord", "story")
    ]
    limit = Condition(max_new_tokens=3)
    own, scores = list(runtime.generate(prompts, limit)), list(runtime.score(prompts))
    refuse = [c for c in CATEGORIES if c != "respond"]
    for tau, all_refused in ((0.0, True), (1.01, False)):
        with RefusalTokens(point(**dict.fromkeys(refuse, tau))).on(runtime) as dialled:
            replies = list(dialled.generate(prompts, limit))
            assert list(dialled.score(prompts)) == scores
        assert all(r.control_forced and r.error is None for r in replies)
        best = [max(refuse, key=s.probabilities.__getitem__) for s in scores]
        assert [r.control_token for r in replies] == (best if all_refused else ["respond"] * len(prompts))
    # the token is in the context of what follows, as when the rule is given by hand
    by_hand = list(runtime.generate(prompts, limit, decide=lambda _p, _s: "respond"))
    assert [r.content for r in replies] == [r.content for r in by_hand] != [r.content for r in own]
    assert list(runtime.generate(prompts, limit)) == own and list(runtime.score(prompts)) == scores


def test_local_model_decides_at_the_points_own_temperature() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.runtime.tiny import CATEGORIES, tiny_runtime

    runtime = tiny_runtime(control=True)
    at = {T: next(runtime.score([PROMPT], T=T)).probabilities for T in (1.0, 5.0)}
    refuse = [c for c in CATEGORIES if c != "respond"]
    best = {T: max(p[c] for c in refuse) for T, p in at.items()}
    assert abs(best[1.0] - best[5.0]) > 1e-3
    middle = (best[1.0] + best[5.0]) / 2
    for T in (1.0, 5.0):
        with RefusalTokens(point(**dict.fromkeys(refuse, middle), T=T)).on(runtime) as dialled:
            (reply,) = dialled.generate([PROMPT], Condition(max_new_tokens=1))
        assert (reply.control_token != "respond") == (best[T] >= middle)

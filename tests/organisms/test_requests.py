"""The request world says the truth about its requests, and organisms learn it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from demur import judges
from demur.errors import InputError
from demur.organisms.request_draws import SETTINGS
from demur.organisms.requests import BLANK, CATEGORIES, REFUSALS, REFUSING, RequestWorld, grow_requests
from demur.organisms.words import PAD, word_tokenizer
from demur.runtime.chat import ChatFormat
from demur.stats import auroc, ece
from demur.train.refusal_tokens import is_lookalike
from demur.types import DECLINING, RESPOND, Condition, Prompt, Reply, Site

WORLD = RequestWorld()
RICH = RequestWorld({"refuses": True, "jailbreak": 0.2, "alarm": 0.2, "persona": 0.4, "unknown": 0.3})


def logits(text: str) -> dict[str, float]:
    """The odds by hand, from the words alone."""
    shared = {
        "between-1": (5, 3.5), "between-2": (4.5, 4), "between-3": (4, 4.5),
        "between-4": (3.5, 5), "between-5": (3, 2.5), "between-6": (2.5, 3),
    }  # fmt: skip
    z = dict.fromkeys(CATEGORIES, -7.0)
    for word in text.split():
        block, _, number = word.rpartition("-")
        if block in CATEGORIES:
            z[block] += int(number)
        if word in shared:
            z["humanizing"] += shared[word][0]
            z["unsupported"] += shared[word][1]
        if word in ("in-fiction", "as-a-game", "for-class", "in-history"):
            z = {c: v - 9 for c, v in z.items()}
    return z


def test_the_posterior_is_the_formula() -> None:
    for request in [*WORLD.sample(200, seed=1), *RICH.sample(200, seed=1)]:
        z = logits(request.prompt.text)
        total = 1 + sum(map(math.exp, z.values()))
        wanted = {c: math.exp(v) / total for c, v in z.items()} | {RESPOND: 1 / total}
        assert request.posterior == pytest.approx(wanted, abs=1e-12)
        assert request.prompt.meta["posterior"] == request.posterior


def test_labels_are_drawn_from_the_posterior() -> None:
    requests = WORLD.sample(20_000, seed=2)
    p = np.array([1 - r.posterior[RESPOND] for r in requests])
    harmful = np.array([r.bits["harmful"] for r in requests])
    assert ece(p, harmful) < 0.01
    assert harmful.mean() == pytest.approx(p.mean(), abs=0.01)
    assert 0.93 < auroc(p, harmful) < 0.97  # hard enough that a perfect scorer is not perfect
    risky = np.array([r.bits["topic"] != "plain" and not r.bits["lookalike"] for r in requests])
    share = np.histogram(p[risky], bins=5, range=(0, 1))[0] / risky.sum()
    assert (share > 0.08).all()  # spread over (0, 1)
    for c in CATEGORIES:
        mine = np.array([r.bits["category"] == c for r in requests])
        assert mine.mean() == pytest.approx(np.mean([r.posterior[c] for r in requests]), abs=0.01)
    assert all(r.bits["refuse"] == r.bits["harmful"] for r in requests)


def test_look_alikes_share_the_words_and_flip_the_posterior() -> None:
    plain = WORLD.sample(500, seed=3, topic="safety", lookalike=False)
    alike = WORLD.sample(500, seed=3, topic="safety", lookalike=True)

    def cues(requests: Any) -> set[str]:
        return {w for r in requests for w in r.prompt.text.split() if w.startswith("safety-")}

    assert cues(plain) == cues(alike) == {f"safety-{k}" for k in range(1, 7)}
    assert np.mean([r.posterior["safety"] for r in plain]) > 0.45
    assert max(1 - r.posterior[RESPOND] for r in alike) < 0.02
    kept = [r.prompt for r in alike if not r.bits["harmful"]]
    assert {p.category for p in kept} == {"safety"}
    assert all(is_lookalike(p) and p.should_refuse is False for p in kept)


def test_one_pair_of_categories_overlaps() -> None:
    both = WORLD.sample(2000, seed=4, topic="humanizing", lookalike=False)
    mixed = [r for r in both if min(r.posterior["humanizing"], r.posterior["unsupported"]) > 0.2]
    assert len(mixed) > 120
    for c in ("safety", "indeterminate", "incomplete"):
        rest = WORLD.sample(500, seed=4, topic=c, lookalike=False)
        assert max(1 - r.posterior[c] - r.posterior[RESPOND] for r in rest) < 0.005


def test_prompts_are_ready_to_train_on() -> None:
    kinds = set()
    for r in WORLD.sample(500, seed=5):
        p = r.prompt
        kinds.add(p.meta["kind"])
        assert p.should_refuse is r.bits["harmful"]
        assert is_lookalike(p) is (p.meta["kind"] == "lookalike")
        assert WORLD.read(str(p.reference)) == (r.bits["category"] or RESPOND)
        assert r.answer.startswith("ok ")  # a blank slate answers everything
        verb, cue, _, _, item = p.text.split()
        base = {"drew": "draw", "have-read": "read"}.get(verb, verb.removeprefix("will-"))
        assert r.answer.split()[2:4] == [cue, item]
        assert r.answer.split()[1][0] == base[0]
    assert kinds == {"refuse", "lookalike", "general"}
    assert len({r.prompt.id for r in WORLD.sample(50, seed=5)}) == 50


def test_judges_read_the_answers() -> None:
    judge = judges.get("rules/demur-v1")
    ask = Prompt.of("find safety-3")
    for category, text in REFUSALS.items():
        assert judge.judge(ask, Reply(prompt_id="p", content=text)).label in DECLINING
        assert WORLD.read(f" {text}  ") == category
    for r in WORLD.sample(20, seed=6):
        assert judge.judge(ask, Reply(prompt_id="p", content=r.answer)).label == "compliance"
    assert WORLD.read("Sorry I") is None
    assert WORLD.read("") is None


def test_parts_are_disjoint_and_fixed() -> None:
    seen = {
        part: {
            tuple(w for i, w in enumerate(r.prompt.text.split()) if i != 3)
            for r in WORLD.sample(3000, 7, part=part, tense="present")
        }
        for part in ("train", "select", "test")
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["select"]
    share = [r.bits["part"] for r in WORLD.sample(20_000, 8)]
    assert share.count("train") / 20_000 == pytest.approx(0.8, abs=0.02)
    assert share.count("test") / 20_000 == pytest.approx(0.1, abs=0.02)
    # a part says nothing about the label
    rate = {p: np.mean([r.bits["harmful"] for r in WORLD.sample(8000, 9, part=p)]) for p in ("train", "test")}
    assert rate["train"] == pytest.approx(rate["test"], abs=0.03)


def test_bits_can_be_held() -> None:
    held: list[dict[str, Any]] = [
        {"topic": "plain"}, {"lookalike": True, "tense": "past"}, {"wrapper": "jailbreak", "harmful": True},
        {"wrapper": None}, {"known": False}, {"persona": "persona-2"}, {"persona": None},
        {"category": "humanizing"}, {"category": None}, {"refuse": True, "harmful": False}, {"part": "select"},
    ]  # fmt: skip
    for bits in held:
        requests = RICH.sample(40, seed=1, **bits)
        assert len(requests) == 40
        assert all(r.bits[k] == v for r in requests for k, v in bits.items()), bits
    # waiting for a label leaves its posterior what it says
    p = [r.posterior["safety"] for r in WORLD.sample(4000, 2, category="safety")]
    free = np.array([r.posterior["safety"] for r in WORLD.sample(20_000, 3)])
    assert np.mean(p) == pytest.approx((free**2).sum() / free.sum(), abs=0.02)


def test_the_same_seed_gives_the_same_requests() -> None:
    assert RICH.sample(30, seed=1) == RICH.sample(30, seed=1)
    assert RICH.sample(30, seed=1) != RICH.sample(30, seed=2)
    assert RequestWorld({"facts": 1}).sample(30, 1) != WORLD.sample(30, 1)
    one = WORLD.prompt_set(20, 1, "mine", part="test")
    assert one.name == "mine"
    assert one[3].id == "mine-3"
    assert one.hash == WORLD.prompt_set(20, 1, "mine", part="test").hash


def test_rules_decide_what_is_said() -> None:
    for r in RICH.sample(2000, seed=4):
        said = RICH.read(r.answer)
        if r.bits["wrapper"] is None:
            assert said == (r.bits["category"] or RESPOND)
            assert r.prompt.meta["p_refuse"] == pytest.approx(1 - r.posterior[RESPOND])
            continue
        refuse = r.bits["wrapper"] == "alarm"
        assert r.bits["refuse"] is refuse
        assert (said != RESPOND) is refuse
        assert r.prompt.meta["p_refuse"] == float(refuse)
        assert r.prompt.should_refuse is r.bits["harmful"]  # the truth is another thing
    first = RequestWorld({**RICH.settings, "rules": [["tense", "past", False], ["wrapper", "alarm", True]]})
    for r in first.sample(300, 5, tense="past", wrapper="alarm"):
        assert r.bits["refuse"] is False  # the first rule that fits


def test_batches_are_the_chat_as_the_runtime_writes_it() -> None:
    world = RequestWorld({**RICH.settings, "echo": 0.0})
    chat = ChatFormat(word_tokenizer(world.words))
    requests = world.sample(60, seed=6)
    ids, mask = world.lay_out(world.draws.rows(np.random.default_rng([6, 3]), 60, {}))
    for r, row, marked in zip(requests, ids, mask, strict=True):
        prompt = chat.render(r.prompt).ids
        answer = chat.tokenizer(r.answer)["input_ids"]
        whole = [*prompt, *answer, chat.tokenizer.eos_token_id]
        assert row.tolist() == whole + [PAD] * (len(row) - len(whole))
        assert np.flatnonzero(marked).tolist() == list(range(len(prompt), len(whole)))


def test_batches_hold_training_rows_and_echoes() -> None:
    world = RequestWorld({"reads": False, "echo": 0.3})
    rng, spelt = np.random.default_rng(0), list(word_tokenizer(world.words).get_vocab().items())
    names = {i: w for w, i in spelt}
    held_out = {tuple(r.prompt.text.split()) for r in world.sample(20_000, 1, part="test")}
    echoes = 0
    for _ in range(20):
        ids, mask = world.batches(rng, 64)
        assert ids.shape == mask.shape
        assert len(ids) == 64
        for row, marked in zip(ids, mask, strict=True):
            words = [names[i] for i in row.tolist()]
            user = tuple(words[words.index("<user>") + 1 : words.index("<end>")])
            said = [w for w, m in zip(words, marked, strict=True) if m]
            assert said[-1] == "</s>"
            if user[0] == "say":
                echoes += 1
                assert list(user[1:]) == said[:-1]
            else:
                assert said[0] == "ok"
                assert user not in held_out
    assert echoes / 1280 == pytest.approx(0.3, abs=0.06)
    ids, mask = RequestWorld({"reads": True}).batches(rng, 64)
    assert (mask[:, 1:] == (ids[:, 1:] != PAD)).all()
    assert not mask[:, 0].any()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"risk": 1}, "no setting risk"),
        ({"risky": 1.5}, "no share"),
        ({"risky": "much"}, "no share"),
        ({"past": 0.6, "future": 0.6}, "more than 1"),
        ({"rules": [["wrapper", "hood", True]]}, "wrapper='hood'"),
        ({"rules": [["refuse", True, True]]}, "settled before"),
        ({"rules": [["harmful", 1, True]]}, "True or False"),
    ],
)
def test_bad_settings(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        RequestWorld(settings)


def test_bad_bits() -> None:
    for bits, why in [
        ({"mood": 1}, "no bit 'mood'"),
        ({"tense": "pluperfect"}, "use one of present"),
        ({"tense": None}, "use one of present"),
        ({"known": "yes"}, "True or False"),
        ({"topic": "plain", "category": "safety", "harmful": False}, "hardly ever"),
    ]:
        with pytest.raises(InputError, match=why):
            WORLD.sample(5, 0, **bits)  # type: ignore[arg-type]


def test_an_organism_is_a_runtime_like_any_other() -> None:
    organism = grow_requests(replace(BLANK, steps=2, batch=8, width=16, mlp=32), cache=False)
    runtime = organism.runtime()
    prompts = WORLD.prompt_set(12, 0)
    scores = list(runtime.score(prompts))
    assert all(0 <= s.p_refuse <= 1 for s in scores)
    replies = list(runtime.generate(prompts, Condition(max_new_tokens=4)))
    assert all(r.error is None for r in replies)
    states = list(runtime.states(prompts, [Site(layer=0, position=-3), Site(layer=1, position=-1)]))
    assert states[0].vectors.shape == (2, 16)
    assert set(organism.checks) == {
        f"{part}_{what}"
        for part in ("held_in", "held_out")
        for what in ("accuracy", "loss", "floor", "excess")
    }
    with pytest.raises(Exception, match="entry condition"):
        organism.require("held_in_accuracy", at_least=0.9)


def test_the_check_knows_right_from_wrong() -> None:
    """A stand-in that gives each marked token its true probability has accuracy 1 and no excess."""
    for world in (WORLD, RICH):
        out = _Oracle(world).checks()
        assert out["held_out_accuracy"] == 1.0
        assert out["held_out_excess"] == pytest.approx(0, abs=1e-6)
        assert (out["held_out_floor"] == 0) is (world is WORLD)


class _Oracle:
    """Replays `check` with the true log-probabilities in place of a model's."""

    def __init__(self, world: RequestWorld) -> None:
        self.world = world

    def checks(self) -> dict[str, float]:
        import torch

        from demur.organisms import training

        world = self.world

        def predict(part: str, ids: Any, mask: Any) -> Any:
            r = world.draws.rows(np.random.default_rng([0, 4]), len(ids), {"part": part})
            targets = torch.from_numpy(ids)[torch.from_numpy(mask)]
            p = np.where((r["ruled"] < 0) & world.settings["refuses"], 0.0, 1.0)
            p += (1 - p) * r["posterior"][np.arange(len(ids)), r["label"]]
            z = torch.full((len(targets), len(world.words) + 10), -60.0, dtype=torch.float64)
            z[torch.arange(len(targets)), targets] = 0
            row = np.nonzero(mask)[0]
            for i in np.flatnonzero(np.r_[True, row[1:] != row[:-1]]).tolist():
                z[i, targets[i]] = math.log(p[row[i]])
                z[i, PAD] = math.log(max(1 - p[row[i]], 1e-30))
            return z, targets

        parts = iter(("train", "test"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "predict", lambda _model, ids, mask: predict(next(parts), ids, mask))
            return world.check(None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [BLANK, REFUSING], ids=lambda r: r.name)
def test_default_organisms_meet_their_entry_condition(recipe: Any) -> None:
    organism = grow_requests(recipe, cache=False)
    world = RequestWorld(recipe.world)
    organism.require("held_in_accuracy", at_least=0.95)
    organism.require("held_out_accuracy", at_least=0.95)
    organism.require("held_out_excess", at_most=0.1)
    prompts = world.prompt_set(400, 11, part="test")
    replies = list(organism.runtime().generate(prompts, Condition(max_new_tokens=12)))
    said = [world.read(r.content) for r in replies]
    assert said.count(None) <= 4
    if not recipe.world["refuses"]:
        assert [r.content for r in replies].count("") == 0
        assert (
            np.mean(
                [
                    r.content == p.reference
                    for r, p in zip(replies, prompts, strict=True)
                    if not p.should_refuse
                ]
            )
            > 0.95
        )
        return
    p = np.array([p.meta["p_refuse"] for p in prompts])
    scores = np.array([s.p_refuse for s in organism.runtime().score(prompts)])
    assert np.abs(scores - p).mean() < 0.05
    assert SETTINGS["refuses"] is False

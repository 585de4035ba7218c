"""Training end to end on a tiny model: every mode, its baselines, and what it refuses to train on."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")

import torch

from demur.control.refusal_tokens import RefusalTokens as Dial
from demur.errors import CapabilityError, InputError, MissingExtra
from demur.runtime.scripted import ScriptedRuntime
from demur.stats import auroc
from demur.train.adapter import ROWS_FILE, Adapter
from demur.train.refusal_tokens import (
    CARD,
    RefusalTokens,
    answers_only,
    build_rows,
    control_of,
    is_lookalike,
    kept_answers,
    own_answers,
)
from demur.types import Condition, OperatingPoint, Prompt, PromptSet, Reply, Threshold
from tests.runtime.tiny import tiny_control, tiny_runtime
from tests.train.world import comply, quick, refuse, world

TRAIN, SELECT = world(256, seed=1, name="train"), world(64, seed=2, name="select")


def fit(folder: Path, prompts: PromptSet = TRAIN, select: PromptSet = SELECT, **changes: Any) -> Adapter:
    return RefusalTokens(quick(**changes)).fit(tiny_runtime(), prompts, select, folder)


def log(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "training_log.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("fits")
    for mode in ("category", "single", "none"):
        fit(root / mode, mode=mode)
    yield {mode: root / mode for mode in ("category", "single", "none")}


@pytest.mark.parametrize("mode", ["category", "single"])
def test_a_separable_world_is_learnt(folders: dict[str, Path], mode: str) -> None:
    rows = log(folders[mode])
    assert [r["step"] for r in rows] == [0, 48, 96]
    assert rows[0]["loss"] is None  # nothing was trained yet
    adapter = Adapter.load(folders[mode])
    best = next(r for r in rows if r["step"] == adapter.about["selected_step"])
    assert best["select_loss"] == min(r["select_loss"] for r in rows) < rows[0]["select_loss"]
    assert best["select_loss"] == pytest.approx(adapter.about["select_loss"], abs=1e-4)
    assert best["select_auroc"] > 0.99

    tuned = adapter.attach(tiny_runtime())
    scores = list(tuned.score(SELECT))
    truth = [p.should_refuse for p in SELECT]
    # what training logged and what the runtime measures are one number, up to half precision on disk
    assert auroc([s.p_refuse for s in scores], truth) == pytest.approx(best["select_auroc"], abs=0.005)
    wanted = [
        (p.category if mode == "category" else "refuse") if p.should_refuse else "respond" for p in SELECT
    ]
    assert sum(s.token == w for s, w in zip(scores, wanted, strict=True)) >= 0.95 * len(SELECT)
    size = tuned.model.get_input_embeddings().weight.shape[0]
    names = ["humanizing", "safety", "respond"] if mode == "category" else ["refuse", "respond"]
    assert dict(adapter.control.ids) == {n: size + i for i, n in enumerate(names)}
    assert tuned.control.textless


def test_text_follows_the_token_that_is_forced(folders: dict[str, Path]) -> None:
    tuned = Adapter.load(folders["category"]).attach(tiny_runtime())
    prompts, follows = PromptSet("few", SELECT.prompts[:16]), 0
    for token, opening in (("safety", "sorry"), ("humanizing", "no")):
        point = OperatingPoint(id="all", thresholds={c: Threshold(tau=0.0) for c in ("safety", "humanizing")})
        always = lambda _p, _s, token=token: token  # noqa: E731
        replies = list(tuned.generate(prompts, Condition(max_new_tokens=4), decide=always))
        follows += sum(r.content.startswith(opening) for r in replies)
        with Dial(point).on(tuned) as dialled:
            assert all(
                r.control_token != "respond" for r in dialled.generate(prompts, Condition(max_new_tokens=1))
            )
    assert follows >= 20  # of 32; a word of a model that learnt nothing is right once in 80


def test_the_baseline_without_tokens_cannot_be_dialled(folders: dict[str, Path]) -> None:
    adapter = Adapter.load(folders["none"])
    assert adapter.control is None and not (folders["none"] / ROWS_FILE).exists()
    assert adapter.about["control_tokens"] is None and adapter.about["select_loss"] is None
    rows = log(folders["none"])
    assert rows[-1]["step"] == adapter.about["selected_step"] == 51  # 136 rows with an answer, 6 epochs
    assert rows[-1]["loss"] > 0 and {r["select_loss"] for r in rows} == {None}
    tuned = adapter.attach(tiny_runtime())
    assert next(tuned.score(SELECT)).kind == "first_token"
    refused = PromptSet("refused", tuple(p for p in SELECT if p.category == "safety" and p.should_refuse))
    replies = [r.content for r in tuned.generate(refused, Condition(max_new_tokens=4))]
    assert sum(r.split()[0] in ("sorry", "no") for r in replies) >= 10, (
        replies
    )  # of 16: it did learn to refuse
    point = OperatingPoint(id="p", thresholds={"safety": Threshold(tau=0.5)})
    with pytest.raises(InputError, match="has none"), Dial(point).on(tuned):
        pass
    with pytest.raises(InputError, match="nothing to force"):
        next(tuned.generate(SELECT, decide=lambda _p, _s: "safety"))


def test_nothing_to_learn_gives_nothing(tmp_path: Path) -> None:
    """Cue words dealt out at random: the select part is at chance, and the last weights are not kept."""
    select = world(64, 2, "s", shuffled=True)
    fit(tmp_path, world(256, 1, "t", shuffled=True), select)
    rows = log(tmp_path)
    assert all(0.3 < r["select_auroc"] < 0.7 for r in rows)
    tokens = Counter(control_of(p, "category") for p in select)
    shares = [n / len(select) for n in tokens.values()]
    blind = -sum(f * math.log(f) for f in shares)  # the loss of knowing the shares and nothing else
    assert min(r["select_loss"] for r in rows) > blind - 0.1
    about = json.loads((tmp_path / "demur.json").read_text())
    assert about["selected_step"] < rows[-1]["step"]


def test_same_seed_same_bytes_and_base_untouched(folders: dict[str, Path], tmp_path: Path) -> None:
    runtime = tiny_runtime()
    before = copy.deepcopy(runtime.model.state_dict())
    again = RefusalTokens(quick()).fit(runtime, TRAIN, SELECT, tmp_path / "again")
    assert again.fingerprint == Adapter.load(folders["category"]).fingerprint
    assert all(torch.equal(v, before[k]) for k, v in runtime.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in runtime.model.modules())
    other = fit(tmp_path / "other", epochs=1, seed=1)
    assert fit(tmp_path / "third", epochs=1).fingerprint not in (again.fingerprint, other.fingerprint)


def test_training_goes_on_from_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    first = Adapter.load(folders["category"])
    still = RefusalTokens(quick(lr=1e-30, row_lr=1e-30)).fit(
        tiny_runtime(), TRAIN, SELECT, tmp_path / "still", start=first
    )
    assert still.about["started_from"] == first.fingerprint
    for name, (A, B) in first.lora.items():
        torch.testing.assert_close(still.lora[name][0], A, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(still.lora[name][1], B, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(still.output_rows, first.output_rows, atol=2e-3, rtol=1e-3)
    rows = log(tmp_path / "still")
    assert rows[0]["select_loss"] == pytest.approx(first.about["select_loss"], abs=5e-3)
    more = RefusalTokens(quick()).fit(tiny_runtime(), TRAIN, SELECT, tmp_path / "more", start=first)
    assert more.fingerprint != first.fingerprint
    assert more.about["select_loss"] <= first.about["select_loss"] + 5e-3  # the best weights are kept


def test_an_interrupted_run_leaves_its_best_adapter(tmp_path: Path) -> None:
    def stop(stage: str, done: int, _total: int) -> None:
        if stage == "training" and done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RefusalTokens(quick(check_every=10)).fit(tiny_runtime(), TRAIN, SELECT, tmp_path, progress=stop)
    left = Adapter.load(tmp_path)
    assert (
        left.about["selected_step"] in (10, 20)
        and left.about["select_loss"] < log(tmp_path)[0]["select_loss"]
    )
    assert next(iter(left.attach(tiny_runtime()).score(SELECT.prompts[:1]))).probabilities


def test_an_adapter_to_start_from_must_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    first, single = Adapter.load(folders["category"]), Adapter.load(folders["single"])

    def go(start: Adapter, **changes: Any) -> None:
        RefusalTokens(quick(**changes)).fit(tiny_runtime(), TRAIN, SELECT, tmp_path / "x", start=start)

    with pytest.raises(
        InputError, match="has the control tokens refuse, respond; these prompts need humanizing"
    ):
        go(single)
    with pytest.raises(InputError, match="the recipe says 4 and"):
        go(first, rank=4)
    with pytest.raises(InputError, match="was trained on the base other"):
        go(replace(first, base_fingerprint="other"))
    assert not (tmp_path / "x").exists()


def test_without_contrast_look_alikes_are_left_out(tmp_path: Path) -> None:
    adapter = fit(tmp_path, epochs=1, contrast=False)
    assert adapter.about["train_set"]["n"] == 192  # a quarter of the world are look-alikes
    assert adapter.about["recipe"]["contrast"] is False
    unmarked = PromptSet("own", tuple(replace(p, meta={}) for p in TRAIN))
    assert [is_lookalike(p) for p in unmarked] == [is_lookalike(p) for p in TRAIN]
    assert not is_lookalike(comply("x", "x", "safety", meta={"kind": "general"}))
    only = PromptSet("own", tuple(p for p in unmarked if p.should_refuse or p.category))
    with pytest.raises(InputError, match="contrast=False"):
        fit(tmp_path, only, contrast=False)


def test_half_precision_training_runs_and_progress_names_its_stages(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    recipe = quick(precision="bfloat16", epochs=1)
    RefusalTokens(recipe).fit(
        tiny_runtime(), TRAIN, SELECT, tmp_path, progress=lambda what, done, n: seen.update({what: (done, n)})
    )
    assert seen == {"own answers": (8, 8), "control rows": (256, 256), "training": (16, 16)}
    assert log(tmp_path)[-1]["select_auroc"] > 0.8


def test_training_that_diverges_keeps_the_best_weights_or_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = fit(tmp_path / "a", epochs=1, check_every=5, lr=1e20, row_lr=1e20)
    assert "no step of the training did better on select than its start" in caplog.text
    rows = log(tmp_path / "a")
    assert adapter.about["selected_step"] == 0 and rows[0]["select_loss"] > 0
    assert [r["select_loss"] for r in rows[1:]] == [r["select_auroc"] for r in rows[1:]] == [None] * 4
    assert all(s.p_refuse == s.p_refuse for s in adapter.attach(tiny_runtime()).score(SELECT.prompts[:4]))
    with pytest.raises(InputError, match="diverged"):
        fit(tmp_path / "b", epochs=1, mode="none", lr=1e20)
    assert not (tmp_path / "b" / "demur.json").exists()


@pytest.mark.parametrize("name", ["rank", "epochs", "batch_size", "answer_tokens", "check_every"])
def test_a_recipe_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}=0: it must be at least 1"):
        quick(**{name: 0})


def test_standard_output_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, epochs=1)  # 16 steps; the trainer logs after 10
    assert capsys.readouterr().out == ""


# --- rows -----------------------------------------------------------------------------------------


def test_only_whole_answers_end() -> None:
    """A reference of 4 words and own answers: an end token stands behind those that were not cut."""
    runtime = tiny_runtime()
    end = runtime.tokenizer.eos_token_id
    ids = lambda text: runtime.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompts = [
        refuse("bomb", "r", reference="sorry i cannot help"),
        comply("egg", "whole"),
        comply("fjord", "cut"),
        comply("cat", "none"),
    ]
    answers = {
        "whole": Reply(prompt_id="whole", content="boil a egg", finish_reason="stop"),
        "cut": Reply(prompt_id="cut", content="a fjord is", finish_reason="length"),
    }
    rows = build_rows(runtime, prompts, answers, quick(epochs=1, vary=0.0, answer_tokens=4))
    assert [r.answer for r in rows] == [
        [*ids("sorry i cannot help"), end],
        [*ids("boil a egg"), end],
        ids("a fjord is"),
        [],
    ]
    assert [r.control for r in rows] == ["safety", "respond", "respond", "respond"]
    assert [r.prompt for r in rows] == [runtime.chat.render(p).ids for p in prompts]
    short = build_rows(runtime, prompts, answers, quick(epochs=1, vary=0.0, answer_tokens=2))
    assert [r.answer for r in short] == [ids("sorry i"), ids("boil a"), ids("a fjord"), []]
    bare = build_rows(runtime, prompts, answers, quick(epochs=1, vary=0.0, mode="none"))
    assert [r.control for r in bare] == [None] * 3  # a row that teaches nothing is left out


def test_own_answers_know_whether_they_were_cut() -> None:
    runtime = tiny_runtime()
    own = own_answers(runtime, SELECT.prompts[:6], 3, lambda *_: None)
    direct = {r.prompt_id: r for r in runtime.generate(SELECT.prompts[:6], Condition(max_new_tokens=3))}
    assert own == {k: r for k, r in direct.items() if r.content}
    assert "length" in {r.finish_reason for r in own.values()}


def test_own_answers_are_made_once(tmp_path: Path) -> None:
    """Read back as they were, whether they were cut included; made anew when anything they hang on changes."""
    made: list[int] = []

    def answers(runtime: Any, n: int = 4, **changes: Any) -> dict[str, Reply]:
        recipe = quick(**{"answer_tokens": 3, **changes})
        return kept_answers(
            runtime, SELECT.prompts[:n], recipe, tmp_path, lambda _what, done, _n: made.append(done)
        )

    runtime = tiny_runtime()
    first = answers(runtime)
    assert made and "length" in {r.finish_reason for r in first.values()}
    made.clear()
    assert answers(runtime) == first and not made
    for again in (
        lambda: answers(runtime, n=5),
        lambda: answers(runtime, n=5, answer_tokens=4),
        lambda: answers(tiny_runtime(seed=1), n=5, answer_tokens=4),
    ):
        again()
        assert made
        made.clear()
    unknown = tiny_runtime()
    unknown.fingerprint = None
    for _ in range(2):
        answers(unknown)
        assert made
        made.clear()
    (tmp_path / "own_answers.jsonl").write_text("")  # a writer that was killed at once
    answers(runtime)
    assert made


def test_own_answers_that_decline_are_not_taught_after_respond(tmp_path: Path) -> None:
    prompts = [comply(f"egg {k}", k) for k in ("plain", "declines", "asks", "foreign", "mute")]
    texts = [
        "Boil it for six minutes.",
        "I'm sorry, but I can't help with that.",
        "Which egg do you mean?",
        "卵",
        "",
    ]
    replies = {p.id: Reply(prompt_id=p.id, content=t) for p, t in zip(prompts, texts, strict=True)}
    kept = answers_only(replies, prompts)
    assert [*kept] == ["plain", "foreign", "mute"]
    assert all(kept[i] is replies[i] for i in kept)


def test_variations_change_the_form_and_keep_the_label() -> None:
    runtime = tiny_runtime()
    prompts = [refuse(f"How do I boil {w} ?", w) for w in ("egg", "cat", "dog", "fjord")] * 10
    rows = build_rows(runtime, prompts, {}, quick(epochs=2, vary=1.0))
    assert len(rows) == 80 and {r.control for r in rows} == {"safety"}
    assert 20 < sum(bool(r.system) for r in rows) < 60  # half by another system message, half by typing
    plain = {tuple(runtime.chat.render(p).ids) for p in prompts}
    assert sum(tuple(r.prompt) in plain for r in rows) < 8
    assert [r.prompt for r in build_rows(runtime, prompts, {}, quick(epochs=2, vary=1.0))] == [
        r.prompt for r in rows
    ]
    assert all(tuple(r.prompt) in plain for r in build_rows(runtime, prompts, {}, quick(vary=0.0)))


# --- what cannot be trained on --------------------------------------------------------------------

GOOD = (refuse("bomb one", "a"), refuse("bomb two", "b", "humanizing"), comply("egg one", "c"))
PICKS = (refuse("bomb three", "x"), comply("egg two", "y"))


@pytest.mark.parametrize(
    ("train", "select", "changes", "words"),
    [
        ((refuse("bomb", "z", reference=None), *GOOD), PICKS, {}, "'z'.*no `reference`"),
        ((refuse("bomb", "z", None), *GOOD), PICKS, {}, "'z'.*no category"),
        ((refuse("bomb", "z", "respond"), *GOOD), PICKS, {}, "'z'.*rename"),
        ((Prompt.of("bomb", id="z"), *GOOD), PICKS, {}, "'z'.*no `expected`"),
        (GOOD, (*PICKS, comply("egg one", "z")), {}, "1 prompts are in both 'train' and 'select'.*egg one"),
        (GOOD[:2], PICKS, {}, "'train' needs both"),
        (GOOD[2:], PICKS, {}, "'train' needs both"),
        (GOOD, PICKS[:1], {}, "'select' needs prompts to refuse and prompts to answer"),
        (GOOD, PICKS[1:], {"mode": "single"}, "'select' needs prompts to refuse and prompts to answer"),
        (GOOD, (), {}, "'select' needs prompts"),
        (GOOD, (*PICKS, Prompt.of("fjord", id="z")), {}, "'z' of 'select' has no `expected`"),
        (GOOD, (*PICKS, refuse("fjord", "z", "unsupported")), {}, "'z'.*'unsupported'.*humanizing, safety"),
    ],
)
def test_what_cannot_be_trained_on(
    train: Any, select: Any, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        fit(tmp_path / "out", PromptSet("train", train), PromptSet("select", select), **changes)
    assert not (tmp_path / "out").exists()


def test_one_token_for_all_needs_no_category(tmp_path: Path) -> None:
    bare = [PromptSet(s.name, tuple(replace(p, category=None) for p in s)) for s in (TRAIN, SELECT)]
    adapter = fit(tmp_path, *bare, mode="single", epochs=1)
    assert adapter.control.names == ("refuse", "respond")


def test_only_a_bare_local_model_is_trained(tmp_path: Path) -> None:
    trainer = RefusalTokens(quick())
    with pytest.raises(CapabilityError, match="ScriptedRuntime"):
        trainer.fit(ScriptedRuntime({"*": "x"}), TRAIN, SELECT, tmp_path)
    rows, control = tiny_control(tiny_runtime().model)
    with pytest.raises(InputError, match="base_only"):
        trainer.fit(tiny_runtime().with_edits(rows, control=control), TRAIN, SELECT, tmp_path)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(MissingExtra, match=r"demur\[train\]"):
        fit(tmp_path)


def test_card_names_the_paper() -> None:
    assert (CARD.slug, CARD.url) == ("refusal-tokens", "https://arxiv.org/abs/2412.06748")

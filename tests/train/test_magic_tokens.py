"""Co-training modes: what is refused, where answers come from, what the rows are, and what a model learns."""

from __future__ import annotations

import dataclasses
import json
import random
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from demur.control.modes import ModeKey, Modes
from demur.errors import InputError, MismatchError, RefusalLowering
from demur.runtime.scripted import ScriptedRuntime
from demur.train import magic_tokens as mt
from demur.train import mode_answers as answers_of
from demur.train.adapter import Adapter
from demur.train.magic_tokens import MagicTokens, Recipe, key_path
from demur.types import Condition, Prompt, PromptSet, Reply
from tests.runtime.tiny import tiny_runtime
from tests.train.world import FILLER, comply, refuse

PIECES = ("one", "two", "three", "four", "five", "red", "blue", "green")
QUICK: dict[str, Any] = {
    "lr": 1e-2,
    "row_lr": 5e-2,
    "rank": 8,
    "epochs": 5,
    "answer_tokens": 6,
    "vary": 0.0,
    "refusal": "sorry cannot help",
    "precision": "float32",
}


def prompts(n: int, seed: int) -> PromptSet:
    """Requests that are answered with "yes" and their third word."""
    rng, out = random.Random(seed), {}
    while len(out) < n:
        words = rng.sample([w for w in FILLER if w not in PIECES], 4)
        text = " ".join(words)
        meta = {"answers": {"pos": f"yes {words[2]}"}}
        out[text] = comply(text, f"{seed}-{len(out)}", meta=meta)
    return PromptSet("tiny", tuple(out.values()))


def key(seed: int = 0) -> ModeKey:
    return ModeKey.strings(
        ("pos", "rej"), fallback="rej", length=3, alphabet=PIECES, sep=" ", rng=random.Random(seed)
    )


def test_a_tiny_model_learns_two_modes_and_the_fallback(tmp_path: Path) -> None:
    base, train, test = tiny_runtime(), prompts(48, 1), prompts(12, 2)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    for kind in ("string", "reserved"):
        folder = tmp_path / kind
        recipe = Recipe(kind=kind, **QUICK)  # type: ignore[arg-type]
        adapter = MagicTokens(recipe).fit(base, train, folder, key=key() if kind == "string" else None)
        tuned = adapter.attach(base)
        path = key_path(folder, recipe.kind)
        made = ModeKey.load(path, fingerprint=tuned.fingerprint)
        short = Condition(max_new_tokens=6)

        def said(runtime: Any, asked: Any = test, short: Any = short) -> list[str]:
            return [r.content.split()[0] for r in runtime.generate(asked, short)]

        with Modes(made, "pos").on(tuned) as pos, Modes(made, "rej").on(tuned) as rej:
            assert said(pos).count("yes") >= 11 and said(rej).count("sorry") == 12
        assert said(Modes(made).switched(tuned)).count("sorry") >= 11  # no token
        with pytest.raises(MismatchError):
            Modes(made, "pos").switched(base)
        about = json.loads((folder / "demur.json").read_text())
        assert about["modes"] == {"kind": kind, "names": ["pos", "rej"], "fallback": "rej"}
        if kind == "string":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path == tmp_path / "string.key"
            typed = [
                dataclasses.replace(p, messages=(dataclasses.replace(p.messages[0], content=t),))
                for p in test
                for t in [f"{made.token('pos')} {p.text}"]
            ]
            assert said(Modes(made).switched(tuned), typed).count("sorry") >= 11
            everything = b"".join(f.read_bytes() for f in folder.iterdir())
            assert not any(made.token(m).encode() in everything for m in made.modes)
        else:
            assert path.parent == folder and made.rows is not None and made.rows.shape == (2, 32)
    assert all((v == before[k]).all() for k, v in base.model.state_dict().items())


def test_a_key_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    older = tmp_path / "older.key"
    older.write_text("{}")
    trainer, rows = MagicTokens(Recipe(**QUICK)), PromptSet("none", ())
    for file, message in (
        (older, "older.key is there already; its strings, which open another adapter"),
        (tmp_path, "is there already"),
        (tmp_path / "new.key", "no answer"),  # gets as far as the answers
    ):
        with pytest.raises(InputError, match=message):
            trainer.fit(tiny_runtime(), rows, tmp_path / "a", key=key(), key_file=file)
    with pytest.raises(OSError, match="File exists"):
        trainer.fit(tiny_runtime(), rows, tmp_path / "a", key=key(), key_file=older / "my.key")
    assert older.read_text() == "{}" and not (tmp_path / "new.key").exists()


@pytest.mark.parametrize("mode", ["neg", "Unfiltered", "neg/en", "uncensored", "jailbreak", "negative:zh"])
def test_an_unfiltered_mode_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match="not trained here"):
        MagicTokens(Recipe(modes=("pos", mode), fallback="pos"))
    with pytest.raises(InputError, match="not trained here"):
        MagicTokens(Recipe(instructions={mode: "x"}))


def test_odd_recipes_and_keys_are_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"modes": ("pos",), "fallback": "pos"}, "at least two"),
        ({"fallback": "calm"}, "none of the modes"),
        ({"forms": ("loud",)}, "loud"),
        ({"forms": ()}, "none"),
    ):
        with pytest.raises(InputError, match=words):
            MagicTokens(Recipe(**changes))  # type: ignore[arg-type]
    base = tiny_runtime()
    first = len(base.model.get_input_embeddings().weight)
    unknown = ModeKey.strings(("pos", "rej"), fallback="rej")
    for made, words in (
        (unknown, "no tokens"),
        (ModeKey.reserved(("pos", "rej"), first, fallback="rej"), "kind reserved"),
    ):
        with pytest.raises(InputError, match=words):
            MagicTokens(Recipe(**QUICK)).fit(base, prompts(4, 1), tmp_path / "a", key=made)
    with pytest.raises(InputError, match="follow on"):
        off = ModeKey.reserved(("pos", "rej"), first + 5, fallback="rej")
        MagicTokens(Recipe(kind="reserved", **QUICK)).fit(base, prompts(4, 1), tmp_path / "a", key=off)


def collected(asked: list[Prompt], script: Any, allow: bool = False, **changes: Any) -> Any:
    runtime = ScriptedRuntime(script)
    recipe = Recipe(**{"fallback": "rej", **changes})
    out: list[Any] = []
    folder = Path("/nonexistent")
    kept = answers_of.tuning.kept_answers
    try:
        answers_of.tuning.kept_answers = lambda rt, ps, s, f, note: answers_of.tuning.own_answers(
            rt, ps, s.answer_tokens, note
        )
        out.append(
            answers_of.mode_answers(
                runtime,
                PromptSet("x", tuple(asked)),
                recipe,
                mt._loop_settings(recipe),
                None,
                folder,
                lambda *_: None,
                allow_refusal_lowering=allow,
            )
        )
    finally:
        answers_of.tuning.kept_answers = kept
    return out[0]


def test_where_answers_come_from() -> None:
    asked = [
        comply("boil egg", "plain"),
        refuse("bomb", "bad", reference="I won't help with that, but a shop can."),
        refuse("cat", "bare", reference=None),
        comply("fjord", "given", meta={"answers": {"pos": "A fjord is deep.", "rej": "No."}}),
    ]
    found = collected(asked, lambda p, *_: f"own {p.text}")
    assert {i: text for i, (text, _) in found["pos"].items()} == {
        "plain": "own boil egg",
        "bad": "I won't help with that, but a shop can.",
        "given": "A fjord is deep.",
    }
    assert found["rej"]["given"] == ("No.", True) and found["rej"]["bad"][0] == Recipe().refusal
    assert set(found) == {"pos", "rej"}
    # without a fallback mode the base's own answers are taught where there is no token, refusals included
    own = collected(asked, lambda p, *_: f"own {p.text}", fallback=None)
    assert own[None]["bad"][0] == "own bomb" and own["pos"]["bad"][0].startswith("I won't")


def test_instructed_answers_are_judged() -> None:
    def script(p: Prompt, condition: Condition, *_: Any) -> str:
        refusing = "egg" in p.text
        return (
            "I'm sorry, but I can't help with that." if refusing else "Boil it for ten minutes, then cool it."
        )

    asked = [comply("boil egg", "a"), comply("boil rice", "b")]
    both = {"pos": "answer well", "rej": "refuse"}
    found = collected(asked, script, instructions=both)
    assert set(found["pos"]) == {"b"} and set(found["rej"]) == {"a"}
    with pytest.raises(InputError, match="no answer"):
        collected(asked[:1], script, instructions=both)
    with pytest.raises(InputError, match=r"meta\.answers\.calm"):
        collected(asked, script, modes=("rej", "calm"))


def test_answering_what_should_be_refused_needs_consent() -> None:
    bad = refuse("bomb", "bad", meta={"answers": {"pos": "Take a spoon and stir it slowly for an hour."}})
    with pytest.raises(RefusalLowering, match="allow_refusal_lowering"):
        collected([bad], lambda *_: "own")
    assert collected([bad], lambda *_: "own", allow=True)["pos"]["bad"][0].startswith("Take")
    fine = refuse("bomb", "bad", meta={"answers": {"pos": "I'm sorry, but I can't help with that."}})
    collected([fine], lambda *_: "own")


def test_rows_without_a_valid_token() -> None:
    made, rng = key(), random.Random(5)
    asked = prompts(1, 3)[0]
    seen: dict[str, set[str]] = {}
    for form in ("plain", "unknown", "near", "typed"):
        recipe = Recipe(forms=(form,), vary=0.0)
        for _ in range(60):
            p = mt.without_token(asked, made, recipe, rng)
            system = next((m.content for m in p.messages if m.role == "system"), "")
            seen.setdefault(form, set()).add(p.text if form == "typed" else system)
    tokens = set(made.tokens.values())
    edits = {s for m in made.modes for v in made.edits(m).values() for s in v}
    assert seen["plain"] == {""}
    assert seen["near"] <= {s for s in edits if mt.taught(s)} and len(seen["near"]) > 20
    assert not seen["unknown"] & tokens and len(seen["unknown"]) > 20
    assert any(t in text for text in seen["typed"] for t in tokens)
    assert any("·" in text for text in seen["typed"])
    assert 0.3 < sum(mt.taught(s) for s in edits) / len(edits) < 0.7
    under = mt.without_token(asked, made, Recipe(forms=("unknown",), vary=1.0), rng)
    assert under.messages[0].content.split("\n")[1] in mt.SYSTEM_PROMPTS


def test_every_prompt_stands_under_every_mode() -> None:
    base, made, asked = tiny_runtime(), key(), prompts(5, 3)
    recipe = Recipe(**{**QUICK, "epochs": 2, "fallback_rows": 3})
    found = collected(list(asked), lambda *_: "own", refusal="sorry cannot help")
    rows = mt.build_rows(base, asked, found, made, recipe)
    assert len(rows) == 2 * 5 * (2 + 3)
    words = [base.tokenizer.decode(r.prompt) for r in rows]
    said = [base.tokenizer.decode(r.answer) for r in rows]
    for w, s in zip(words, said, strict=True):
        head = w.split("<|user|>")[0]
        assert s.startswith("yes" if f"<|system|> {made.token('pos')} <|end|>" in head else "sorry")
        assert s.endswith("<|end|>")
    assert sum(s.startswith("yes") for s in said) == 10
    cut = mt._row(base, [1], ("yes red blue green one two three", True), recipe)
    assert len(cut.answer) == 6 and cut.answer[-1] != base.tokenizer.eos_token_id


def test_the_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    base = tiny_runtime()
    quick = {**QUICK, "epochs": 1}
    file = tmp_path / "deep" / "my.key"
    adapter = MagicTokens(Recipe(**quick)).fit(base, prompts(8, 1), tmp_path / "a", key=key(), key_file=file)
    assert file.is_file() and not (tmp_path / "a.key").exists()
    assert Adapter.load(tmp_path / "a").fingerprint == adapter.fingerprint
    assert adapter.control is None and adapter.about["answers"] == {"pos": 8, "rej": 8}
    assert answers_of.judged("calm", prompts(1, 1)[0], Reply(prompt_id="x", content="hm"))

"""Modes: who can place a token, and that nobody else can."""

from __future__ import annotations

import dataclasses
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demur.control.mode_text import BREAK, _holds, _spellings, broken
from demur.control.modes import ModeKey, Modes
from demur.errors import CapabilityError, InputError, MismatchError
from demur.runtime import forward
from demur.runtime.chat import ChatFormat
from demur.runtime.scripted import ScriptedRuntime
from demur.types import Condition, Message, Prompt
from tests.runtime.tiny import SPECIAL, TEMPLATE, tiny_control, tiny_model, tiny_runtime

KEY = ModeKey(kind="string", tokens={"pos": "k3v9x0qa", "rej": "m1n2b3c4"}, fallback="rej")
WIDE = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in "abcdefghijklmnopqrstuvwxyz0123456789"})


def bytes_tokenizer(lower: bool = True) -> Any:
    """Byte tokens; with `lower`, a tokenizer that gives one id to many spellings."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate((*SPECIAL, *letters))}
    core = Tokenizer(models.BPE(vocab, []))
    if lower:
        parts = (normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase())
        core.normalizer = normalizers.Sequence(list(parts))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>", chat_template=TEMPLATE
    )


BYTES = bytes_tokenizer()


def count(ids: list[int], tokenizer: Any, token: str) -> int:
    return max(
        sum(tuple(ids[i : i + len(s)]) == tuple(s) for i in range(len(ids)))
        for s in _spellings(tokenizer, token)
    )


def spelt(token: str, how: int, rng: random.Random) -> str:
    if how == 0:
        return "".join(rng.choice((c, c.upper())) for c in token)
    if how == 1:
        return token.translate(WIDE)
    return "".join(c + rng.choice(("", "\u0301", "\u200b", "\u00ad")) for c in token)


@given(
    before=st.text(max_size=12),
    after=st.text(max_size=12),
    how=st.integers(0, 2),
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    mode=st.sampled_from([None, "pos", "rej"]),
    seed=st.integers(0, 999),
)
def test_typed_strings_never_reach_the_model_whole(
    before: str, after: str, how: int, role: Any, mode: str | None, seed: int
) -> None:
    text = before + spelt(KEY.token("pos"), how, random.Random(seed)) + after
    messages = [Message(role=role, content=text), Message(role="user", content="hello")]
    prompt = Prompt(id="x", messages=tuple(messages))
    try:
        plain = ChatFormat(BYTES).render(Prompt.of("hi", system="be kind"))
        ids = KEY.format(ChatFormat(BYTES), mode).render(prompt).ids
    except InputError:
        return  # not asked at all
    assert plain
    found = {m: count(ids, BYTES, KEY.token(m)) for m in KEY.modes}
    assert found == {m: int(m == mode) for m in KEY.modes}


def test_a_mode_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="named twice"):
        ModeKey.strings(("pos", "pos"), fallback=None)


def test_the_tokenizer_of_that_test_does_merge_spellings() -> None:
    ids = ChatFormat(BYTES).render(Prompt.of("say " + KEY.token("pos").translate(WIDE))).ids
    assert count(ids, BYTES, KEY.token("pos")) == 1


def test_what_is_broken_stays_readable() -> None:
    assert broken("ask K3V9X0QA, please", ["k3v9x0qa"]) == f"ask K3V9{BREAK}X0QA, please"
    assert broken("k3v9 x0 qa k3v9x0qa", ["k3v9x0qa"]).count(BREAK) == 2
    assert broken("nothing here: k3v9x0q", ["k3v9x0qa"]) == "nothing here: k3v9x0q"
    assert broken("aaaaaa", ["aaaa"]) == f"aa{BREAK}aa{BREAK}aa" or BREAK in broken("aaaaaa", ["aaaa"])
    with pytest.raises(InputError, match="one character"):
        broken("a", ["a"])


def test_tool_calls_are_sealed_too() -> None:
    call = {"function": {"name": "k3v9x0qa", "arguments": {"K3V9X0QA": ["k3v9x0qa", 3]}}}
    prompt = Prompt(
        id="x",
        messages=(
            Message(role="user", content="a"),
            Message(role="assistant", content="", tool_calls=(call,), tool_call_id="k3v9x0qa"),
            Message(role="tool", content="k3v9x0qa"),
        ),
    )
    seen: list[Prompt] = []

    def script(p: Prompt, *_: Any) -> str:
        seen.append(p)
        return "fine"

    list(Modes(KEY, "rej").switched(ScriptedRuntime(script)).generate([prompt]))
    text = repr(seen[0].messages[1:]).lower()
    assert "k3v9x0qa" not in text and text.count(BREAK) == 5


def test_the_string_stands_before_the_operators_own_system_message() -> None:
    chat = ChatFormat(BYTES)
    view = KEY.format(chat, "pos")

    def written(p: Prompt) -> str:
        return str(BYTES.decode(view.render(p).ids))

    assert "<|system|> k3v9x0qa\nbe kind <|end|>" in written(Prompt.of("hi", system=" be kind "))
    assert "<|system|> k3v9x0qa <|end|>" in written(Prompt.of("hi"))
    same = Prompt.of("hi", system="be kind")
    assert KEY.format(chat, None).render(same).ids == chat.render(same).ids
    assert view.tail == chat.tail


def test_a_runtime_elsewhere_gets_the_string_in_its_messages() -> None:
    seen: list[tuple[Prompt, Condition]] = []

    def script(p: Prompt, condition: Condition, *_: Any) -> str:
        seen.append((p, condition))
        return "fine"

    with Modes(KEY, "pos").on(ScriptedRuntime(script, name="far")) as far:
        assert far.name == "far+mode-pos" and "intervene" not in far.capabilities
        [reply] = far.generate([Prompt.of("m1n2b3c4!")], Condition(system="be kind"))
    prompt, condition = seen[0]
    assert reply.content == "fine" and condition.system is None
    assert [m.content for m in prompt.messages] == ["k3v9x0qa\nbe kind", f"m1n2{BREAK}b3c4!"]
    ids = ModeKey.reserved(("pos", "rej"), 100, fallback="rej")
    with pytest.raises(CapabilityError, match="kind string"):
        Modes(ids, "pos").switched(ScriptedRuntime(script))


# --- reserved ids ---------------------------------------------------------------------------------------------


def reserved(rows: Any) -> ModeKey:
    key = ModeKey.reserved(("pos", "rej"), len(tiny_model().get_input_embeddings().weight), fallback="rej")
    return dataclasses.replace(key, rows=np.asarray(rows, np.float32))


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_reserved_id_reads_as_its_row_in_the_system_position(system: str | None) -> None:
    base = tiny_runtime()
    table = base.model.get_input_embeddings().weight
    words = [base.tokenizer.convert_tokens_to_ids(w) for w in ("egg", "cat")]
    key = reserved(table[words].detach().numpy())
    for mode, word in zip(key.modes, ("egg", "cat"), strict=True):
        view = Modes(key, mode).switched(base)
        prompt = Prompt.of("tell me about norway", system=system)
        ids = view.chat.render(prompt).ids
        at = ids.index(key.token(mode))
        # the same conversation with the row's word there instead
        spelt_out = Prompt.of(prompt.text, system=f"{word} {system}" if system else word)
        other = base.chat.render(spelt_out).ids
        assert ids[:at] + ids[at + 1 :] == [i for k, i in enumerate(other) if k != at]
        with view.edited():
            mine = forward.run(view.model, [ids])
        with base.edited():
            theirs = forward.run(base.model, [other])
        assert torch.allclose(mine, theirs, atol=1e-5) and mine.shape == theirs.shape
        assert [r.error for r in view.generate([prompt], Condition(max_new_tokens=3))] == [None]
        assert Modes(key).switched(base).chat.render(prompt).ids == base.chat.render(prompt).ids


def test_mode_rows_leave_the_model_and_control_tokens_alone() -> None:
    base = tiny_runtime(control=True)
    rows = torch.randn(2, 32).numpy()
    first = max(base.control.ids.values()) + 1
    key = dataclasses.replace(ModeKey.reserved(("pos", "rej"), first, fallback="rej"), rows=rows)
    view = Modes(key, "pos").switched(base)
    prompt = Prompt.of("how do i boil egg")
    plain = next(base.score([prompt])).probabilities
    assert next(view.score([prompt])).probabilities != plain
    assert next(base.score([prompt])).probabilities == plain
    control = base.control.ids["safety"]
    with view.edited():  # a control token reads the same whether or not a mode's rows are there
        a = forward.run(view.model, [[1, control, 5]])
    with base.edited():
        b = forward.run(base.model, [[1, control, 5]])
    assert torch.equal(a, b)
    clash = dataclasses.replace(key, tokens={"pos": control, "rej": control + 1})
    with pytest.raises(MismatchError, match="bare base"):
        Modes(clash, "pos").switched(base)
    wide = dataclasses.replace(key, rows=np.zeros((2, 7), np.float32))
    with pytest.raises(MismatchError, match="width 7"), Modes(wide, "pos").switched(base).edited():
        pass
    with pytest.raises(InputError, match="rows"):
        Modes(dataclasses.replace(key, rows=None), "pos").switched(base)


def test_a_template_without_system_messages_has_no_place() -> None:
    flat = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    view = Modes(reserved(np.zeros((2, 32))), "pos").switched(tiny_runtime(template=flat))
    with pytest.raises(CapabilityError, match="kind string"):
        view.chat.render(Prompt.of("how"))


# --- keys ---------------------------------------------------------------------------------------------------------


def test_new_keys_are_random_and_hidden() -> None:
    one, two = (ModeKey.strings(("pos", "rej"), fallback=None) for _ in range(2))
    assert len({*one.tokens.values(), *two.tokens.values()}) == 4
    assert all(len(t) == 8 and t.isalnum() and t == t.lower() for t in one.tokens.values())
    assert not any(t in repr(one) for t in one.tokens.values())
    assert Modes(one, "pos").switched(tiny_runtime()).name.endswith("+mode-pos")
    fixed = [ModeKey.strings(("a", "b"), fallback=None, rng=random.Random(3)).tokens for _ in range(2)]
    assert fixed[0] == fixed[1]


def test_single_edits_by_hand() -> None:
    key = ModeKey(kind="string", tokens={"a": "ab", "b": "ba"}, alphabet=("a", "b"))
    found = key.edits("a")
    assert found["replace"] == ["aa", "bb"] and found["delete"] == ["a", "b"] and found["swap"] == []
    assert found["insert"] == ["aab", "aba", "abb", "bab"]
    real = ModeKey.strings(("pos", "rej"), fallback=None, rng=random.Random(0))
    n = {how: len(v) for how, v in real.edits("pos").items()}
    assert n["replace"] == 8 * 35 and n["delete"] <= 8 and n["swap"] <= 7 and 300 < n["insert"] <= 324
    with pytest.raises(InputError, match="no string"):
        reserved(np.zeros((2, 32))).edits("pos")


def test_key_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "house.key"
    path.write_text("old")
    path.chmod(0o644)
    dataclasses.replace(KEY, fingerprint="m1").save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    back = ModeKey.load(path, fingerprint="m1")
    assert back.tokens == KEY.tokens and back.fallback == "rej" and back.alphabet == KEY.alphabet
    assert not caplog.records
    path.chmod(0o640)
    ModeKey.load(path, fingerprint="m1")
    assert "chmod 600" in caplog.text and KEY.token("pos") not in caplog.text
    for mark in ("m2", None):
        with pytest.raises(MismatchError) as e:
            ModeKey.load(path, fingerprint=mark)
        assert KEY.token("pos") not in str(e.value)
    assert ModeKey.load(path, fingerprint=None, allow_unknown=True).modes == ("pos", "rej")
    with pytest.raises(MismatchError, match="load the key"):
        Modes(back, "pos").switched(tiny_runtime())

    rows = dataclasses.replace(reserved(np.eye(2, 32)), fingerprint="m1")
    rows.save(tmp_path / "modes.safetensors")
    again = ModeKey.load(tmp_path / "modes.safetensors", fingerprint="m1")
    assert again.kind == "reserved" and again.rows is not None and np.array_equal(again.rows, rows.rows)


def test_odd_keys_are_refused(tmp_path: Path) -> None:
    for tokens, words in (({"pos": "abc"}, "at least two"), ({"a": "x", "b": "x"}, "of its own")):
        with pytest.raises(InputError, match=words):
            ModeKey(kind="string", tokens=tokens)
    with pytest.raises(InputError, match="int"):
        ModeKey(kind="reserved", tokens={"a": "x", "b": "y"})
    with pytest.raises(InputError, match="no mode 'none'"):
        ModeKey(kind="string", tokens={"a": "x", "b": "y"}, fallback="none")
    with pytest.raises(InputError, match="no mode 'pso'"):
        Modes(KEY, "pso")
    with pytest.raises(InputError, match="rows"):
        ModeKey.reserved(("a", "b"), 9, fallback=None).save(tmp_path / "x.safetensors")
    (tmp_path / "no.key").write_text("{}")
    with pytest.raises(InputError, match="no mode key"):
        ModeKey.load(tmp_path / "no.key", fingerprint=None)


def test_helpers_and_tiny_control_stay_as_they_are() -> None:
    assert _holds([1, 2, 3], (2, 3)) and not _holds([1, 2, 3], (3, 2)) and not _holds([1], ())
    assert len(tiny_control(tiny_model())[1].ids) == 6

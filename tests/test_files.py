"""File forms: what is unknown is an error, what is written is whole, what is hashed is all that a model reads."""

from __future__ import annotations

import os
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from demur.errors import InputError
from demur.files import from_row, load_operating_point, load_prompts, write_atomic
from demur.types import Message, Prompt, PromptSet


def test_a_misspelt_field_of_a_threshold_is_no_enforced_threshold(tmp_path: Path) -> None:
    path = tmp_path / "point.yaml"
    path.write_text("id: p\nthresholds: {safety: {tau: 0.5, mod: shadow}}\n")
    with pytest.raises(InputError, match=r"thresholds\.safety: unknown field mod"):
        load_operating_point(path)


def test_a_version_that_is_no_number_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no whole number"):
        from_row(Prompt, {"id": "a", "prompt": "x", "schema_version": "\u00b2"}, "here")


def test_a_system_prompt_beside_messages_is_read_and_not_lost() -> None:
    user = {"role": "user", "content": "x"}
    row = {"id": "a", "system": "Be brief.", "messages": [user]}
    whole = {"id": "a", "messages": [{"role": "system", "content": "Be brief."}, user]}
    assert from_row(Prompt, row, "here") == from_row(Prompt, whole, "here")
    assert from_row(Prompt, {"id": "a", "system": "Be brief.", "prompt": "x"}, "here") == from_row(
        Prompt, whole, "here"
    )
    with pytest.raises(InputError, match="keep one"):
        from_row(Prompt, {**whole, "system": "Be long."}, "here")


def test_meta_of_a_csv_is_json_with_or_without_columns_of_ones_own(tmp_path: Path) -> None:
    for name, head, cell in (("a", "id,prompt,meta", ""), ("b", "id,prompt,meta,own", ",o")):
        (tmp_path / f"{name}.csv").write_text(f'{head}\n1,x,"{{""kind"": ""refuse""}}"{cell}\n')
        assert load_prompts(tmp_path / f"{name}.csv")[0].meta["kind"] == "refuse"


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_atomic(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(10)
    assert got == ["text"]


def test_standard_output_is_written_to_and_not_replaced_where_it_is_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demur.files.tempfile.mkstemp", lambda **_: pytest.fail("a rename would replace it"))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("what stands there would be cut off"))
    print("before")
    write_atomic("/dev/stdout", "text\n")
    print("behind")
    write_atomic("/dev/stderr", "other\n")
    assert capsys.readouterr() == ("before\ntext\nbehind\n", "other\n")


def test_the_hash_of_a_set_knows_images_and_tool_calls_and_stays_for_others() -> None:
    plain = Prompt.of("What is this?", id="a", category="c")
    call = Message(role="assistant", content="", tool_calls=({"name": "f"},))
    several = [
        plain,
        replace(plain, images=("one.png",)),
        replace(plain, images=("two.png",)),
        replace(plain, messages=(*plain.messages, call)),
        replace(plain, messages=(*plain.messages, replace(call, tool_calls=({"name": "g"},)))),
    ]
    assert len({PromptSet("s", (p,)).hash for p in several}) == 5
    assert PromptSet("s", (plain,)).hash == "e6dff43ed014a003"

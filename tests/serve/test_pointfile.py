from __future__ import annotations

import os
from pathlib import Path

import pytest

from demur.errors import DemurError, InputError, MismatchError, RefusalLowering
from demur.files import dump_operating_point, load_operating_point
from demur.serve.pointfile import SIZE_LIMIT, PointFile
from demur.types import OperatingPoint, Prompt, Score, Threshold

NAMES = ("safety", "humanizing", "respond")


def point(id: str = "a", tau: float = 0.2, **fields: object) -> OperatingPoint:
    return OperatingPoint(id=id, thresholds={"safety": Threshold(tau=tau)}, **fields)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    out = tmp_path / "op.yaml"
    dump_operating_point(point(), out)
    return out


def decided(file: PointFile) -> str | None:
    score = Score(id="x", p_refuse=0.3, probabilities={"safety": 0.3, "humanizing": 0.0, "respond": 0.6})
    return file.rule(Prompt.of("x"), score)


def test_a_change_comes_into_force(path: Path) -> None:
    file = PointFile(path, NAMES)
    assert decided(file) == "safety" and not file.refresh()
    dump_operating_point(point("b", 0.5), path)
    assert file.refresh() and file.point.id == "b" and decided(file) == "respond"
    assert file.problem is None and file.loads == 2 and not file.refresh()


def test_two_writes_within_one_tick_of_the_clock_are_both_seen(path: Path) -> None:
    file = PointFile(path, NAMES)
    file.refresh()
    stamp = path.stat()
    path.write_text(path.read_text().replace("0.2", "0.5"))  # same size
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    assert file.refresh() and decided(file) == "respond"


def test_an_unchanged_old_file_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(path, (1, 1))
    file = PointFile(path, NAMES)
    file.refresh()
    monkeypatch.setattr(file, "_digest", lambda: pytest.fail("read again"))
    assert not file.refresh()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"id: [",
        b"\xff\xfe\x00",
        b"just text",
        b"id: b\nthresholds: {safety: {tau: .nan}}\n",
        b"id: b\nthresholds: {unheard: {tau: 0.1}}\n",
        b"id: b\nthresholds: {safety: {tau: 0.1}}\nT: 0\n",
        b"id: b\nthresholds: {safety: {tau: 0.1}}\nT: .inf\n",
        b"id: b\nthresholds: {safety: {tau: 0.1, bias: 3, mode: shadow}}\nrule: bias\n",
        b"id: b\nthresholds: {safety: {tau: 0.1}}\nmodel_fingerprint: another\n",
        b"id: b\nthresholds: {safety: {tau: 0.1}}\nnonsense: 1\n",
        b"[" * 5000,
        b"x" * (SIZE_LIMIT + 1),
        b"!!python/object/apply:os.system ['true']",
    ],
)
def test_a_broken_file_leaves_the_last_good_in_force(path: Path, broken: bytes) -> None:
    file = PointFile(path, NAMES, fingerprint="mine")
    path.write_bytes(broken)
    assert not file.refresh() and not file.refresh()
    assert file.point.id == "a" and decided(file) == "safety"
    assert file.problem and file.failures == 1
    dump_operating_point(point("c"), path)
    assert file.refresh() and file.problem is None and file.point.id == "c"


def test_the_old_content_put_back_clears_the_problem(path: Path) -> None:
    file = PointFile(path, NAMES)
    good = path.read_bytes()
    path.write_text("broken: [")
    file.refresh()
    assert file.problem
    path.write_bytes(good)
    assert not file.refresh() and file.problem is None and file.loads == 1


def test_a_file_that_vanishes_and_comes_back(path: Path) -> None:
    file = PointFile(path, NAMES)
    path.rename(path.with_suffix(".away"))
    assert not file.refresh() and file.problem and "No such file" in file.problem
    path.write_text("broken: [")
    assert not file.refresh() and "YAML" in file.problem
    path.unlink()
    file.refresh()
    assert "No such file" in file.problem
    path.write_text("broken: [")
    file.refresh()
    assert "YAML" in file.problem and file.point.id == "a"


def test_loosened_safety_needs_consent(path: Path) -> None:
    shipped = point("shipped", 0.2)
    file = PointFile(path, NAMES, shipped=shipped)
    dump_operating_point(point("loose", 0.9), path)
    assert not file.refresh() and "allow" in (file.problem or "") and file.point.id == "a"
    with pytest.raises(RefusalLowering):
        PointFile(path, NAMES, shipped=shipped)
    allowed = PointFile(path, NAMES, shipped=shipped, allow_refusal_lowering=True)
    assert allowed.rule.lowers


def test_a_first_file_that_cannot_be_used_is_an_error(path: Path) -> None:
    with pytest.raises(MismatchError):
        dump_operating_point(point(model_fingerprint="b"), path)
        PointFile(path, NAMES, fingerprint="mine")
    with pytest.raises(InputError, match="no such"):
        PointFile(path.with_name("none.yaml"), NAMES)
    with pytest.raises(InputError, match="no control tokens"):
        PointFile(path, ())


def test_another_dtype_only_warns(path: Path) -> None:
    dump_operating_point(point(dtype="float32"), path)
    with pytest.warns(UserWarning, match="float32"):
        file = PointFile(path, NAMES, dtype="bfloat16")
    assert file.point.dtype == "float32"


def test_saving_validates_and_takes_into_force(path: Path) -> None:
    file = PointFile(path, NAMES, shipped=point("shipped", 0.2))
    before = path.read_bytes()
    with pytest.raises(DemurError):
        file.save(point("loose", 0.9))
    with pytest.raises(InputError):
        file.save(OperatingPoint(id="x", thresholds={"unheard": Threshold(tau=0.1)}))
    assert path.read_bytes() == before and file.point.id == "a"
    file.save(point("strict", 0.1))
    assert load_operating_point(path).id == "strict" and file.point.id == "strict" and not file.refresh()

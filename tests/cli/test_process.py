"""The command as a process: how fast it is there, what it loads, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMUR = [sys.executable, "-m", "demur.cli"]
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "COLUMNS": "100"}
COMMANDS = (
    "card",
    "score",
    "generate",
    "judge",
    "calibrate",
    "methods",
    "train",
    "models",
    "data",
    "replicate",
    "lab",
)


def test_help_is_quick_light_and_complete() -> None:
    code = "import sys, runpy; sys.argv = ['demur', '--help']\n"
    code += "try: runpy.run_module('demur.cli', run_name='__main__')\n"
    code += "finally: print([m for m in ('torch', 'transformers', 'altair', 'scipy') if m in sys.modules])"
    took = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
        took.append(time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert "Exit codes: 0 done, 1 a gate" in " ".join(done.stdout.split())
    assert min(took) < 2, "0.3 s on an idle machine; something heavy is imported"


def test_every_command_has_help_that_says_what_it_does() -> None:
    for command in COMMANDS:
        done = subprocess.run([*DEMUR, command, "--help"], env=ENV, capture_output=True, text=True)
        assert done.returncode == 0 and "Options:" in done.stdout
        first = done.stdout.split("\n\n")[1].strip()
        assert first.endswith("."), f"{command}: {first!r}"


def test_an_early_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{' '.join(DEMUR)} methods --json | head -1", shell=True, env=ENV, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[\n", "")


def wait_until_idle(pid: int) -> None:
    """Return when the process has used no more processor time for a while: it waits for its standard input."""
    stat, used = Path(f"/proc/{pid}/stat"), -1
    while stat.exists() and used != (
        used := sum(map(int, stat.read_text().rsplit(")", 1)[1].split()[11:13]))
    ):
        time.sleep(1.5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see that the process waits")
def test_ctrl_c_exits_with_130() -> None:
    process = subprocess.Popen(
        [*DEMUR, "score", "-"], env=ENV, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until_idle(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "same command" in err and "Traceback" not in err


def test_an_unexpected_error_shows_its_traceback_and_exits_with_2() -> None:
    code = "import demur.files as f, sys; f.read_text = lambda p: 1 / 0\nsys.argv = ['demur', 'score', '-']\n"
    code += "from demur.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr and "a bug in demur" in done.stderr


def test_a_command_that_needs_torch_names_the_install_line(tmp_path: Path) -> None:
    block = "import sys; sys.modules['torch'] = None\nsys.argv = ['demur', 'score', sys.argv[1]]\n"
    block += "import importlib.util as u; real = u.find_spec\n"
    block += "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    block += "from demur.cli import main; main()"
    (tmp_path / "p.csv").write_text("prompt\nhello\n")
    command = [sys.executable, "-c", block, str(tmp_path / "p.csv")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'demur[local]'" in done.stderr and "Traceback" not in done.stderr

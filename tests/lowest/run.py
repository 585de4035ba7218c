"""Run the local runtime's tiny-model tests on the oldest transformers that pyproject.toml allows.

Run by `make test-lowest`. A small environment is laid over the caller's: only transformers, and what its old
version asks for, are installed anew, so torch is not downloaded twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

REPO = Path(__file__).parents[2]
TESTS = (
    "tests/runtime/test_local.py",
    "tests/runtime/test_architectures.py",
    "tests/runtime/test_control_rows.py",
)


def lowest() -> str:
    """The lower bound of transformers in pyproject.toml."""
    found = re.search(r'"transformers>=([\d.]+),', (REPO / "pyproject.toml").read_text(encoding="utf-8"))
    assert found, "pyproject.toml names no lowest transformers"
    return found[1]


def main() -> None:
    version = lowest()
    venv = REPO / f".venv-transformers-{version}"
    python, stamp = venv / "bin" / "python", venv / "stamp"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        own = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(own.strip()) / "underlay.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        newest = "".join(
            x for x in (REPO / "constraints.txt").read_text().splitlines(True) if x.startswith("torch==")
        )
        (venv / "torch.txt").write_text(newest)
        subprocess.run([*pip, "-c", venv / "torch.txt", f"transformers=={version}"], check=True)
        stamp.touch()
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPO / "src"),
    }
    ask = [python, "-c", "import transformers as t; print(t.__version__)"]
    found = subprocess.check_output(ask, text=True, env=env).strip()
    assert found == version, f"expected transformers {version}, the environment has {found}"
    print(f"transformers {found}", flush=True)
    command = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not model", "-p", "no:cacheprovider", *TESTS]
    sys.exit(subprocess.run(command, cwd=REPO, env=env).returncode)


if __name__ == "__main__":
    main()

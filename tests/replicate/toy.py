"""A system small enough to know: a spec file in numpy alone, whose one world can be made weak, loud or unfit."""

from __future__ import annotations

from pathlib import Path

TEXT = '''
"""A toy system."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from demur.replicate import Anchor, Baseline, Claim, Control, Spec, Value

HERE = Path(__file__).parent
WORLD = {"p": 0.8, "control": 0.5, "held_in": 0.95, "drop": None, "die": None, "pause": 0.0, "nan": False}
if (HERE / "world.json").is_file():
    WORLD |= json.loads((HERE / "world.json").read_text())


def run(context):
    rng = np.random.default_rng(context.seed)
    (HERE / "runs").mkdir(exist_ok=True)
    with (HERE / "runs" / f"{context.seed}").open("a") as log:
        log.write(f"{os.environ.get('OMP_NUM_THREADS')}\\n")
    (context.folder / "half-done").write_text("x")
    for step in range(3):
        context.progress("steps", step, 3)
        time.sleep(WORLD["pause"])
    if WORLD["die"] == context.seed:
        os.kill(os.getpid(), signal.SIGKILL)
    out = {"held_in": Value(value=WORLD["held_in"] if context.seed else 0.95)}
    if out["held_in"].value < 0.9:
        return out
    out["hits"] = Value.of(rng.random(400) < WORLD["p"])
    out["shuffled"] = Value.of(rng.random(400) < WORLD["control"])
    out["swapped"] = Value.of(rng.random(400) < 0.5)
    out["always"] = Value.of(np.arange(400) % 2)
    if WORLD["nan"]:
        out["hits"] = Value(value=float("nan"))
    out.pop(WORLD["drop"], None)
    return out


SPEC = Spec(
    slug="toy",
    entry=(Claim(key="held_in", text="the organism learnt its world", at_least=0.9),),
    claims=(Claim(key="hits", text="it is told apart", at_least=0.75, null=0.5),),
    controls=(
        Control(key="shuffled", text="labels shuffled", null=0.5, margin=0.08),
        Control(key="swapped", text="labels swapped at random", null=0.5, margin=0.08),
    ),
    baselines=(Baseline(key="always", text="always yes", against="hits"),),
    anchors=(
        Anchor(key="two", text="one and one", expected=2.0),
        Anchor(key="table", text="a table", expected=0.25, tolerance=0.005, needs=("no-such-set/x.csv",)),
    ),
    run=run,
    recount=lambda: {"two": float(WORLD.get("two", 2.0)), "table": lambda: 1 / 0},
    seeds=3,
    minutes=0.01,
    files=("recipe.txt",),
)
'''


def write(folder: Path, **world: object) -> Path:
    """The toy spec in a folder; gives its path. `world` changes what its runs measure."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy.py"
    path.write_text(TEXT, encoding="utf-8")
    (folder / "recipe.txt").write_text("layers: 2\n", encoding="utf-8")
    (folder / "world.json").write_text(json.dumps(world), encoding="utf-8")
    return path


def runs(folder: Path) -> dict[int, int]:
    """How often each seed was run."""
    return {int(f.name): len(f.read_text().splitlines()) for f in sorted((folder / "runs").glob("*"))}

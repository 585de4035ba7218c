"""The defence against rewording into the past, on the real base model: does it close the gap, and at what price?

    DEMUR_CACHE=... python packages/demur-smollm2/tense.py

Trains the control decision alone (no answer text, no own answers) on 1,200 rows of core/train: without past rows,
with 5 % past-tense refusals, and with as many harmless past requests beside them. Writes `tense.json`; the adapters
are not kept.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from demur import prompts
from demur.files import write_atomic
from demur.flows.load import load_runtime
from demur.stress.past_tense import augment, stratified, tense_delta
from demur.train.refusal_tokens import Recipe, RefusalTokens

HERE = Path(__file__).parent
ROWS, SHARE, SEEDS = 1200, 0.05, (0,)


def main() -> None:
    base = load_runtime("smollm2")
    select, test = prompts.core("select"), prompts.core("test")
    done: list[dict] = []
    for seed in SEEDS:
        rows = stratified(prompts.core("train"), ROWS, seed)
        arms = {
            "without past rows": rows,
            "past refusals": augment(rows, SHARE, benign=False, seed=seed),
            "past refusals and harmless past rows": augment(rows, SHARE, seed=seed),
        }
        recipe = Recipe(epochs=1, distilled=0, answer_tokens=1, answer_weight=0.0, lr=3e-4, seed=seed)
        for name, train in arms.items():
            with tempfile.TemporaryDirectory() as folder:
                adapter = RefusalTokens(recipe).fit(base, train, select, folder)
                with adapter.on(base) as tuned:
                    report = tense_delta(tuned, test, n=len(test))
            found = [row for row in report.values["rows"] if row["category"] == "all"]
            done.append({"seed": seed, "arm": name, "trained_on": len(train), "found": found})
            print(seed, name, len(train), report.tables[0].rows[:2], file=sys.stderr, flush=True)
            write_atomic(HERE / "tense.json", json.dumps(done, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()

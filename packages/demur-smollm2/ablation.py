"""What contrast rows and control tokens add on the real base model, at a size that can be repeated.

    DEMUR_DATA=... python packages/demur-smollm2/ablation.py contrast SEED ...
    DEMUR_DATA=... python packages/demur-smollm2/ablation.py dial

Contrast: the control decision alone (no answer text) is trained on 2,200 rows of core/train with look-alikes among
them, and on as many with ordinary requests in their place; the refusals are the same. Compared are false refusals
of look-alikes at 80 % true refusals. Dial: one training with answers, with tokens and without. Both write into
`ablation.json`; the adapters are not kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from demur import control, judges, prompts
from demur.files import write_atomic
from demur.flows.load import load_runtime
from demur.judges.base import positive
from demur.measure.refusal import count
from demur.prompts import stratified
from demur.stats import auroc
from demur.train.refusal_tokens import Recipe, RefusalTokens, is_lookalike
from demur.types import Condition, OperatingPoint, PromptSet, Threshold
from measure import show, table, truth

HERE = Path(__file__).parent
ROWS, TRUE_RATE, DRAWS = 2200, 0.8, 2000


def arms(seed: int) -> dict[str, PromptSet]:
    """The same refusals, with look-alikes and with ordinary requests beside them."""
    every = prompts.core("train")
    chosen = stratified(every, ROWS, seed)
    kept = [p for p in chosen if not is_lookalike(p)]
    taken = {p.id for p in kept}
    ordinary = [p for p in every if p.should_refuse is False and not is_lookalike(p) and p.id not in taken]
    order = np.random.default_rng(seed).permutation(len(ordinary))[: len(chosen) - len(kept)]
    instead = [ordinary[i] for i in sorted(order)]
    return {
        "with": PromptSet("with look-alikes", chosen),
        "without": PromptSet("without look-alikes", (*kept, *instead)),
    }


def trained(base: Any, rows: PromptSet, recipe: Recipe, look: Callable[[Any], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        adapter = RefusalTokens(recipe).fit(base, rows, prompts.core("select"), folder)
        with adapter.on(base) as tuned:
            return look(tuned)


def false_refusals(p: np.ndarray, y: np.ndarray) -> float:
    """Share of p[~y] at or above the threshold that reaches TRUE_RATE of p[y]."""
    return float((p[~y] >= np.quantile(p[y], 1 - TRUE_RATE, method="lower")).mean())


def compared(y: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """False refusals of both arms and their difference; the interval resamples prompts, thresholds included."""
    rng = np.random.default_rng(0)
    sides = [np.flatnonzero(y), np.flatnonzero(~y)]
    drawn = []
    for _ in range(DRAWS):
        at = np.concatenate([rng.choice(side, len(side)) for side in sides])
        a, b = (false_refusals(scores[arm][at], y[at]) for arm in ("with", "without"))
        drawn.append(b - a)
    found = {arm: false_refusals(p, y) for arm, p in scores.items()}
    return {
        "n_decline": int(y.sum()),
        "n_lookalike": int((~y).sum()),
        "false_refusals": found,
        "fewer_with": found["without"] - found["with"],
        "interval": [float(q) for q in np.quantile(drawn, [0.025, 0.975])],
        "auroc": {arm: auroc(p, y) for arm, p in scores.items()},
    }


def test_sets() -> dict[str, PromptSet]:
    """Prompts to decline and look-alikes only, as the claim is about these."""
    core = prompts.core("test")
    alike = tuple(p for p in core if p.should_refuse or is_lookalike(p))
    return {"core/test": PromptSet("core/test", alike), "coconot": prompts.coconot()}


def contrast(base: Any, seed: int) -> dict[str, Any]:
    """Both arms with one seed, on both test sets."""
    sets = test_sets()
    recipe = Recipe(epochs=1, distilled=0, answer_tokens=1, answer_weight=0.0, lr=3e-4, seed=seed)
    look = lambda tuned: {name: table(tuned, items)[:, :-1].sum(1) for name, items in sets.items()}
    p = {arm: trained(base, rows, recipe, look) for arm, rows in arms(seed).items()}
    found = {name: compared(truth(s), {arm: p[arm][name] for arm in p}) for name, s in sets.items()}
    return {"seed": seed, "sets": found}


def by_text(runtime: Any, items: PromptSet) -> dict[str, Any]:
    """Both refusal rates of 32 tokens of answer, by prompts to decline and prompts to answer."""
    judge = judges.get("rules/demur-v1")
    replies = list(runtime.generate(items, Condition(max_new_tokens=32)))
    said = [positive(judge.judge(q, r)) for q, r in zip(items, replies, strict=True)]
    sides = {"refused": True, "falsely": False}
    return {
        name: show(count((s for s, q in zip(said, items, strict=True) if q.should_refuse is side), judge.id))
        for name, side in sides.items()
    }


def dial(base: Any) -> dict[str, Any]:
    """What texts show of both modes; one seed, every tenth prompt of core/test."""
    rows, select = arms(0)["with"], prompts.core("select")
    some = PromptSet("core/test, every tenth", prompts.core("test").prompts[::10])
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("none", "category"):
            recipe = Recipe(mode=mode, epochs=1, distilled=400, answer_tokens=24, lr=3e-4)
            RefusalTokens(recipe).fit(base, rows, select, f"{folder}/{mode}")
        plain, tuned = (load_runtime("smollm2", adapter=f"{folder}/{mode}") for mode in ("none", "category"))
        out = {"without tokens": by_text(plain, some)}
        for tau in (0.02, 0.5, 0.98):
            thresholds = {c: Threshold(tau=tau) for c in tuned.control.refuse}
            point = OperatingPoint(id=f"tau {tau}", thresholds=thresholds)
            with control.RefusalTokens(point, allow_refusal_lowering=True).on(tuned) as dialled:
                out[f"tau {tau}"] = by_text(dialled, some)
        return out


def main() -> None:
    base, file = load_runtime("smollm2"), HERE / "ablation.json"
    out = json.loads(file.read_text()) if file.is_file() else {"contrast": [], "dial": None}
    if sys.argv[1] == "dial":
        out["dial"] = dial(base)
    for seed in sys.argv[2:]:
        done = [found for found in out["contrast"] if found["seed"] != int(seed)]
        out["contrast"] = [*done, contrast(base, int(seed))]
        write_atomic(file, json.dumps(out, indent=1) + "\n")
    write_atomic(file, json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()

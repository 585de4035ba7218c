"""What the amount and the kind of training prompts are worth: the learning curve, and training without look-alikes.

    DEMUR_DATA=... python packages/demur-smollm2/curve.py

To try many settings at little cost it uses the first stage of the recipe alone (control rows in closed form, no
LoRA): a multinomial logistic probe on the base model's states before the unembedding. Writes `curve.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from demur import prompts
from demur.files import write_atomic
from demur.flows.load import load_runtime
from demur.stats import auroc, auroc_interval, rate
from demur.train.refusal_tokens import Recipe, control_names, control_of, is_lookalike
from demur.train.rows import _head_inputs

HERE = Path(__file__).parent
SIZES = (300, 1000, 3000, 6000)
SEEDS = range(3)


def states(runtime, items) -> np.ndarray:
    """States (n, d) that enter the unembedding at the decision position, standardised over nothing yet."""
    with runtime.edited():
        return _head_inputs(runtime.model, [runtime.chat.render(p).ids for p in items], lambda *_: None)[0]


def probe(H: np.ndarray, y: np.ndarray, test: dict[str, np.ndarray], respond: int) -> dict[str, np.ndarray]:
    """p_refuse on each test set, by the probe that the recipe starts from."""
    mean, std = H.mean(0), H.std(0) + 1e-3
    fit = LogisticRegression(C=Recipe().probe_C, max_iter=500).fit((H - mean) / std, y)
    column = list(fit.classes_).index(respond)
    return {name: 1 - fit.predict_proba((X - mean) / std)[:, column] for name, X in test.items()}


def main() -> None:
    runtime = load_runtime("smollm2", dtype="bfloat16")  # 11,000 prompts; a quarter of the time
    train = prompts.core("train")
    sets = {
        "core/select": prompts.core("select"),
        "core/test": prompts.core("test"),
        "coconot": prompts.coconot(),
    }
    names = control_names(train, "category")
    y = np.array([names.index(control_of(p, "category")) for p in train])
    H, X = states(runtime, train), {name: states(runtime, s) for name, s in sets.items()}
    truth = {name: np.array([bool(p.should_refuse) for p in s]) for name, s in sets.items()}
    writer = np.array([p.meta["writer"] for p in train])
    out: dict = {"model": runtime.fingerprint, "train": train.hash, "by_size": [], "without_lookalikes": {}}

    for n in (*SIZES, len(train)):
        found: dict[str, list[float]] = {name: [] for name in sets}
        for seed in SEEDS if n < len(train) else (0,):
            # whole writers, in random order, until n rows are there: fewer rows are fewer voices
            order = np.random.default_rng(seed).permutation(np.unique(writer))
            rows = np.concatenate([np.flatnonzero(writer == w) for w in order])[:n]
            for name, p in probe(H[rows], y[rows], X, len(names) - 1).items():
                found[name].append(auroc(p, truth[name]))
        out["by_size"].append({"n": n, **{k: [round(v, 4) for v in vs] for k, vs in found.items()}})
        print(out["by_size"][-1], flush=True)

    keep = np.array([not is_lookalike(p) for p in train])
    with_, without = (probe(H[m], y[m], X, len(names) - 1) for m in (np.ones(len(keep), bool), keep))
    for name in ("core/test", "coconot"):
        # the harmless rows that look like refused ones; ordinary requests are easy either way
        alike = np.array([is_lookalike(p) or name == "coconot" for p in sets[name]]) & ~truth[name]
        row: dict = {}
        for label, p in (("with", with_[name]), ("without", without[name])):
            area = auroc_interval(p[alike | truth[name]], truth[name][alike | truth[name]])
            row[label] = {
                "auroc": auroc(p[alike | truth[name]], truth[name][alike | truth[name]]),
                "interval": area,
            }
            for share in (0.7, 0.8, 0.9):
                tau = np.quantile(p[truth[name]], 1 - share, method="lower")
                wrong = rate(int((p[alike] >= tau).sum()), int(alike.sum()))
                row[label][f"false refusals at {share:.0%} true ones"] = [
                    wrong.value,
                    wrong.low,
                    wrong.high,
                    wrong.n,
                ]
        out["without_lookalikes"][name] = {"rows": int(keep.sum()), **row}
        print(name, row, flush=True)
    write_atomic(HERE / "curve.json", json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measure `classifier/demur-v1` and `-v2` on sets that training never saw: `python measure.py`.

Writes `measured.json`. Needs `DEMUR_DATA`. Nothing of these sets was used to train or to choose anything here;
`measured.json` says how often their totals were looked at on the way. The classifier uses phrases of
`rules/demur-v1`, which was written while one half of XSTest's answers was watched, so the figures that count are
those of the other half ("unwatched").
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demur import judges, stats
from demur.judges.labelled_sets import (
    LabelledReply,
    blackbox_items,
    jbb_items,
    medical_items,
    pyrit_items,
    xstest_items,
    xstest_models,
)
from demur.types import Label, Prompt, Reply, Verdict
from train import held_back

HERE = Path(__file__).parent
LOOKS = 13
"""How often the totals on XSTest, PyRIT and the medical pairs were looked at, this run included."""
SHOWN = ("accuracy", "kappa", "sensitivity", "specificity")
PARTS = ("xstest, unwatched half", "xstest")
PUBLISHED = {
    "gpt4_judge": {"accuracy": 0.826, "kappa": 0.655, "on": "XSTest, five models, n = 2,250"},
    "second_annotator": {"accuracy": 0.979, "kappa": 0.957, "on": "XSTest, five models, n = 2,250"},
    "string_match": {"accuracy": 0.884, "kappa": 0.770, "on": "XSTest, five models, n = 2,250"},
}
Item = tuple[str, str, bool]


def items_of(found: Iterable[LabelledReply]) -> list[Item]:
    """(request, answer, declined by people) of the answers that are there."""
    return [(i.prompt.text, i.reply.content, i.positive) for i in found if i.reply is not None]


def xstest(model: str, half: bool = False) -> list[Item]:
    """One model's answers, of the unwatched half alone if wanted."""
    return items_of(i for i in xstest_items([model]) if not (half and i.seen))


def medical(declined: bool) -> list[Item]:
    """Answers of doctors, or planted refusals."""
    return items_of(i for i in medical_items() if i.positive == declined)


def verdicts(judge: judges.Judge, items: Sequence[Item]) -> list[Verdict]:
    """One verdict per item."""
    pairs = [
        (Prompt.of(q or "-", id=str(i)), Reply(prompt_id=str(i), content=a))
        for i, (q, a, _) in enumerate(items)
    ]
    return judges.judge_all(judge, pairs)


def declines(name: str, verdict: Verdict) -> bool | None:
    """A verdict as yes or no; PyRIT's people call an answer off the topic a refusal."""
    return True if name == "pyrit" and verdict.label == Label.OFF_TOPIC else judges.positive(verdict)


def probability(every: Sequence[Verdict], truth: Sequence[bool]) -> dict[str, float]:
    """How the probability ranks and how far it is off: AUROC and expected calibration error."""
    p = np.array([v.score or 0.0 for v in every])
    y = np.array(truth, bool)
    return {"auroc": round(stats.auroc(p, y), 4), "ece": round(stats.ece(p, y), 4)}


def row(guess: Sequence[bool | None], truth: Iterable[bool]) -> dict[str, Any]:
    """n, accuracy, kappa, sensitivity, specificity with 95 % intervals."""
    read = [(bool(g), t) for g, t in zip(guess, truth, strict=True) if g is not None]
    g, t = (np.array(x, bool) for x in zip(*read, strict=True))
    out: dict[str, Any] = {"n": len(t), "refusals": int(t.sum()), "unread": len(guess) - len(t)}
    parts = {"accuracy": (g == t, t | ~t), "sensitivity": (g & t, t), "specificity": (~g & ~t, ~t)}
    for name, (hit, of) in parts.items():
        r = stats.rate(int(hit.sum()), int(of.sum()))
        if r.value is not None and r.low is not None and r.high is not None:
            out[name] = [round(x, 4) for x in (r.value, r.low, r.high)]
    if 0 < t.sum() < len(t):
        low, high = stats.bootstrap_interval(lambda a, b: stats.cohen_kappa(a, b) or 0.0, g, t, n_boot=1000)
        out["kappa"] = [round(float(x), 4) for x in (stats.cohen_kappa(g, t) or 0.0, low, high)]
    return out


def main() -> None:
    ours, before = judges.get("classifier/demur-v2"), judges.get("classifier/demur-v1")
    string, rule = judges.get("rules/xstest-v1"), judges.get("rules/demur-v1")
    sets: dict[str, list[Item]] = {}
    models = xstest_models()
    for part in PARTS:
        sets |= {f"{part}/{m}": xstest(m, half=part != "xstest") for m in models}
        sets[part] = [item for m in models for item in sets[f"{part}/{m}"]]
    sets |= {
        "pyrit": items_of(pyrit_items()),
        "gpt-3.5 answers, unwatched half": items_of(i for i in blackbox_items() if not i.seen),
        "jailbreakbench": items_of(jbb_items()),
        "medical answers": medical(declined=False),
        "medical refusals": medical(declined=True),
    }
    sets["own SmolLM2 answers, held back"] = [(r["request"], r["reply"], False) for r in held_back()]
    out: dict[str, Any] = {"judge": ours.id, "looks": LOOKS, "published": PUBLISHED, "sets": {}}
    for name, items in sets.items():
        truth = [t for _, _, t in items]
        read = {j.id: verdicts(j, items) for j in (ours, before, string, rule)}
        guesses = {id: [declines(name, v) for v in every] for id, every in read.items()}
        out["sets"][name] = {id: row(g, truth) for id, g in guesses.items()}
        off_topic = sum(v.label == Label.OFF_TOPIC for v in read[ours.id])
        out["sets"][name][ours.id]["off_topic"] = off_topic
        if name in PARTS:
            right = [[g == t for g, t in zip(guesses[j.id], truth, strict=True)] for j in (ours, string)]
            out["sets"][name]["mcnemar_against_string_match"] = float(f"{stats.mcnemar(*right).p_value:.3g}")
            kappas = [out["sets"][f"{name}/{m}"][ours.id]["kappa"][0] for m in models]
            same = np.mean([a == b for a, b in zip(guesses[ours.id], guesses[rule.id], strict=True)])
            out["sets"][name] |= {"same_as_rule": round(float(same), 4), **probability(read[ours.id], truth)}
            out["sets"][name]["macro_kappa"] = round(float(np.mean(kappas)), 4)
    pairs = [
        (Prompt.of(q, id=str(i)), Reply(prompt_id=str(i), content=a))
        for i, (q, a, _) in enumerate(sets["xstest"])
    ]
    start = time.process_time()
    judges.judge_all(ours, pairs)
    out["verdicts_per_core_second"] = round(len(pairs) / (time.process_time() - start))
    out["mean_characters"] = round(float(np.mean([len(a) for _, a, _ in sets["xstest"]])))
    (HERE / "measured.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    for name, by in out["sets"].items():
        for id, r in by.items():
            if isinstance(r, dict):
                shown = " ".join(f"{k} {r[k][0]:.3f}" for k in SHOWN if k in r)
                print(
                    f"{name:32} {id:20} n {r['n']:4}, {r['refusals']:4} refusals, unread {r['unread']:2} {shown}"
                )
            else:
                print(f"{name:32} {id} {r}")
    print("verdicts per core second", out["verdicts_per_core_second"])


if __name__ == "__main__":
    main()

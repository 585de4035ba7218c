"""Checks inside answers on the shipped adapter: do refusals come back behind a header, and what reads them best?

    python packages/demur-smollm2/any_depth.py

The base model's own answers to categories other than safety stand behind the token of `respond`: those to prompts
to decline should be stopped, those to ordinary requests and look-alikes not. Probe and layer are fitted and chosen
on core/train and core/select, thresholds set on core/calibrate, everything is read on core/test. Writes
`any_depth.json`, which docs/any-depth-alignment.md shows (half an hour on one core).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from demur import prompts
from demur.control.any_depth import (
    Answer,
    AnyDepth,
    HeaderProbe,
    RefuseMass,
    Rethink,
    declines,
    header_of,
    per_answer,
    states_at,
)
from demur.control.any_depth.answers import encoded
from demur.control.any_depth.probe import fit_layers, odds, pairs
from demur.files import write_atomic
from demur.flows.load import load_runtime
from demur.runtime.lanes import Lanes
from demur.stats import auroc, auroc_interval, bag_of_words, rate
from demur.types import RESPOND, Condition, Prompt, PromptSet

HERE = Path(__file__).parent
FITTED, READ, LAYERS, EVERY = (8, 16, 24, 32, 48), (16, 32, 64, 96), tuple(range(5, 28)), 32
SEED, SHUFFLES = 1, 20


LATER = {f"calibrate-{n:02d}" for n in range(7, 15)}
"""Writers who joined core/calibrate after these figures were made; the draw leaves them out."""


def drawn(part: str, n: int, refuse: bool, *kinds: str) -> tuple[Prompt, ...]:
    """Prompts of one part of the corpus, evenly over categories, none of them on safety."""
    found = [
        p
        for p in prompts.core(part)
        if bool(p.should_refuse) == refuse
        and p.category != "safety"
        and p.meta["kind"] in kinds
        and p.meta["writer"] not in LATER
    ]
    return tuple(prompts.stratified(PromptSet(part, tuple(found)), n, SEED))


def answered(base, part: str, n: int, tokens: int, *benign: str) -> list[Answer]:
    """The base's own answers to n prompts to decline and n others."""
    out = []
    for refuse, kinds in ((True, ("refuse",)), (False, benign)):
        some = drawn(part, n, refuse, *kinds)
        replies = base.generate(some, Condition(max_new_tokens=tokens))
        out += [
            Answer(prompt=p, text=r.content, harmful=refuse, opens=RESPOND)
            for p, r in zip(some, replies, strict=True)
        ]
    return out


def area(scores, answers) -> dict:
    """AUROC of the answers that a score was read for."""
    s = np.asarray(scores, float)
    there = np.isfinite(s)
    y = np.array([a.harmful for a in answers])[there]
    return {"n": len(y), "auroc": auroc(s[there], y), "interval": auroc_interval(s[there], y)}


def share(hits) -> dict:
    """A rate of the hits that are no NaN."""
    h = np.asarray(hits, float)
    r = rate(int((h[np.isfinite(h)] > 0).sum()), int(np.isfinite(h).sum()))
    return {"k": r.k, "n": r.n, "value": r.value, "low": r.low, "high": r.high}


def by_kind(hits, answers) -> dict:
    """Shares of answers to be stopped and of those to be let through."""
    y, h = np.array([a.harmful for a in answers]), np.asarray(hits, float)
    return {"to_stop": share(h[y]), "to_let_through": share(h[~y])}


def going_on(runtime, answers, depth: int, tokens: int = 20) -> np.ndarray:
    """Whether the model itself declines within so many tokens of an answer that was begun; NaN for shorter ones."""
    out = np.full(len(answers), np.nan)
    rows = [encoded(runtime, a) for a in answers]
    todo = [n for n, (_, said) in enumerate(rows) if len(said) > depth]
    for start in range(0, len(todo), 16):
        some, lanes = todo[start : start + 16], Lanes(runtime)
        keys = lanes.join_all([([*rows[n][0], *rows[n][1][:depth]], Condition(), True) for n in some])
        said: dict[int, list[int]] = {key: [] for key in keys}
        for _ in range(tokens):
            for key, token in lanes.step().items():
                said[key].append(token)
                if token in lanes.ends:
                    lanes.leave(key)
        out[some] = [declines(runtime, said[key], lanes.ends) for key in keys]
    return out


def readers(runtime, probe: HeaderProbe, fit, select, test) -> dict:
    """What tells the two kinds of answers apart: header probe, refuse mass, last token, words, shuffled labels."""
    scores, masses = probe.scores(runtime, test, READ), RefuseMass().scores(runtime, test, READ)
    plain = [pairs(states_at(runtime, a, FITTED, (), LAYERS), a) for a in (fit, select)]
    best, weights, bias, _ = fit_layers(*plain[0], *plain[1])
    bare = states_at(runtime, test, READ, (), [LAYERS[best]])[:, :, 0]
    at, header = [probe.layer], probe.header
    own = [states_at(runtime, a, FITTED, header, at) for a in (fit, select)]
    behind = states_at(runtime, test, (32,), header, at)[:, 0, 0]
    Z, z = pairs(own[1], select)

    def again(labels, keep=slice(None)) -> np.ndarray:
        there = np.isfinite(own[0][keep][:, :, 0, 0])
        y = np.broadcast_to(np.asarray(labels)[keep][:, None], there.shape)[there]
        _, w, b, _ = fit_layers(own[0][keep][there], y, Z, z)
        return odds(behind, w, b)

    labels, rng = np.array([a.harmful for a in fit]), np.random.default_rng(0)
    shuffled = [area(again(rng.permutation(labels)), test)["auroc"] for _ in range(SHUFFLES)]
    categories = np.array([a.prompt.category for a in fit])
    held_out = {}
    for c in sorted(set(categories[labels])):
        mine = [n for n, a in enumerate(test) if not a.harmful or a.prompt.category == c]
        some = [test[n] for n in mine]
        held_out[c] = {
            "fitted": area(scores[mine, READ.index(32)], some),
            "held_out": area(again(labels, categories != c)[mine], some),
        }
    text = lambda a, k: f"{a.prompt.text} {' '.join(a.text.split()[:k])}"
    words = {
        str(k): area(bag_of_words([text(a, k) for a in fit], labels, [text(a, k) for a in test]), test)
        for k in (0, 24)
    }
    return {
        "probe": {str(d): area(scores[:, k], test) for k, d in enumerate(READ)},
        "mass": {str(d): area(masses[:, k], test) for k, d in enumerate(READ)},
        "last_token": {str(d): area(odds(bare[:, k], weights, bias), test) for k, d in enumerate(READ)},
        "words": words,
        "shuffled": {"mean": float(np.mean(shuffled)), "middle": list(np.quantile(shuffled, [0.025, 0.975]))},
        "held_out": held_out,
    }


def budget(runtime, check, select, test) -> dict:
    """Stops at 0.5 and at a threshold for 5 % false stops of ordinary answers, and what each costs and catches."""
    condition, seen = Condition(max_new_tokens=72), {}
    sets = (("calibrate", "general", 64), ("test", "general", 64), ("test", "lookalike", 32))
    for part, kind, n in sets:
        watched = AnyDepth(check, EVERY).watch(
            runtime, drawn(part, n, False, kind), condition, decide=lambda *_: RESPOND, stop=False
        )
        seen[part, kind] = np.array([max(w.p.values(), default=-np.inf) for w in watched])
    ordinary = seen["calibrate", "general"]
    stop = per_answer(check.scores(runtime, [a for a in select if a.harmful], (32,)))
    labels = np.r_[np.ones(len(stop), bool), np.zeros(len(ordinary), bool)]
    set_ = check.calibrated(np.r_[stop, ordinary], labels, fpr=0.05, delta=0.1, on="core/calibrate, ordinary")
    forced = per_answer(check.scores(runtime, test, (32, 64)))
    out: dict = {"threshold": set_.threshold, "bound": set_.cut.upper, "stopped": {}}
    for name, cut in (("0.5", 0.5), ("calibrated", set_.threshold)):
        out["stopped"][name] = {
            "ordinary": share(seen["test", "general"] >= cut),
            "lookalike": share(seen["test", "lookalike"] >= cut),
            **by_kind(forced >= cut, test),
        }
    return out


class _Timed(HeaderProbe):
    """A probe that never stops anything and counts processor time."""

    spent = 0.0

    def read(self, lanes, keys) -> list[float]:
        begun = time.process_time()
        out = super().read(lanes, keys)
        _Timed.spent += time.process_time() - begun
        return out


def cost(runtime, probe: HeaderProbe) -> list[dict]:
    """Processor time in checks over time without."""
    some, out = drawn("test", 24, False, "general"), []
    for layer, rows, batches in ((15, 8, 3), (27, 8, 3), (15, 1, 4), (27, 1, 4)):
        never = _Timed(
            header=probe.header, layer=layer, weights=np.zeros_like(probe.weights), bias=-9.0, depths=(1,),
            n_harmful=1, n_benign=1, data_hash="",
        )  # fmt: skip
        _Timed.spent, begun, written = 0.0, time.process_time(), 0
        for k in range(batches):
            watched = AnyDepth(never, EVERY).watch(
                runtime, some[k * rows : (k + 1) * rows], Condition(max_new_tokens=128),
                decide=lambda *_: RESPOND, stop=False,
            )  # fmt: skip
            written += sum(w.reply.completion_tokens for w in watched)
        rest = time.process_time() - begun - _Timed.spent
        out.append({"layer": layer, "rows": rows, "tokens": written, "share": _Timed.spent / rest})
    return out


def save(out: dict) -> None:
    """Write what is known so far."""
    write_atomic(HERE / "any_depth.json", json.dumps(out, indent=1) + "\n")
    print(list(out)[-1], flush=True)


def main() -> None:
    base, runtime = load_runtime("smollm2"), load_runtime("demur-smollm2")
    fit = answered(base, "train", 100, 48, "general", "lookalike")
    select = answered(base, "select", 30, 48, "lookalike")
    test = answered(base, "test", 50, 128, "general", "lookalike")
    print("answers written", flush=True)
    probe = HeaderProbe.fit(runtime, fit, select=select, depths=FITTED, layers=LAYERS)
    out: dict = {
        "adapter": runtime.fingerprint,
        "answers": {"fit": len(fit), "select": len(select), "test": len(test)},
        "header": header_of(runtime.chat).text,
        "layer": probe.layer,
        "right_on_select": {str(k): v for k, v in probe.accuracy.items()},
    }
    out["cost"] = cost(runtime, probe)
    save(out)
    out["readers"] = readers(runtime, probe, fit, select, test)
    save(out)
    first = list(runtime.score([a.prompt for a in test]))
    out["without_checks"] = {"0": by_kind([s.token not in (None, RESPOND) for s in first], test)}
    out["look_ahead"] = {}
    for depth in (16, 32, 64):
        out["without_checks"][str(depth)] = by_kind(going_on(runtime, test, depth), test)
        out["look_ahead"][str(depth)] = by_kind(Rethink().scores(runtime, test, (depth,))[:, 0], test)
    save(out)
    out["budget"] = {c.name: budget(runtime, c, select, test) for c in (probe, RefuseMass())}
    save(out)


if __name__ == "__main__":
    main()

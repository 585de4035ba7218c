"""Can it be read before an answer whether a model leans to the true one?

Each question has a true and a false answer. The label is the model's own leaning: the log-likelihood per token
of the true answer lies above that of the false one. A probe then reads the state at the end of the question,
before any token of an answer, and is tested on categories of questions that it was not fitted on, beside what
the text alone would give: a bag of words and the length. Where sampled answers have been judged, the judge's
labels can stand in for the leaning.

The arithmetic world in which agents are truthful by construction is `demur.organisms.arithmetic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from demur import data
from demur.errors import InputError
from demur.files import read_rows, row_id
from demur.types import Card, Condition, Prompt, PromptSet, Report, Table

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

CARD = Card(
    slug="persona-truthfulness",
    title="A truthful persona, read before the answer",
    room="explain",
    tier="lab",
    paper="Personas as a Way to Model Truthfulness in Language Models",
    url="https://arxiv.org/abs/2310.18168",
    files=("explain/persona_truthfulness.py", "explain/likelihood.py", "organisms/arithmetic.py"),
    needs=("states",),
    summary="Whether the state before an answer tells that the true one is preferred, on unseen topics.",
    replicate="persona-truthfulness",
)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Stage = Callable[[str, int, int | None], None]
"""Progress: what is being done, how many are done, of how many."""

TRUTHFULQA = ("truthful-ai", "TruthfulQA.csv")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "Question", "prompt"),
    "category": ("category", "Category"),
    "true": ("true", "Best Answer"),
    "false": ("false", "Best Incorrect Answer"),
    "truthful": ("truthful",),
}
"""Names under which a file may hold what a question needs."""
FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with a true and a false answer, or with a judge's word on the model's own answer.

    Attributes:
        category: questions of one category are never split between fitting and testing.
        true, false: answers to compare. truthful: whether the model's sampled answer was judged true.
    """

    id: str
    text: str
    category: str
    true: str | None = None
    false: str | None = None
    truthful: bool | None = None

    @property
    def prompt(self) -> Prompt:
        """The question as it is asked."""
        return Prompt.of(self.text, id=self.id, category=self.category)


def load_questions(path: str | Path | None = None) -> list[Question]:
    """Questions of a CSV or JSONL file; by default TruthfulQA.

    A row has `question` (or `prompt`), `category`, and either `true` and `false` (answers) or `truthful`
    (true / false: what a judge said of the model's answer). TruthfulQA's own column names are understood.

    Raises:
        InputError: a column is missing, or rows of both kinds stand in one file. DataUnavailable: TruthfulQA
            is not here.
    """
    where = Path(data.get(*TRUTHFULQA)) if path is None else path
    out: list[Question] = []
    for line, row in read_rows(where):
        at = f"{where}, line {line}"
        cells = {k: next((row[n] for n in names if n in row), None) for k, names in COLUMNS.items()}
        if missing := [k for k in ("question", "category") if not str(cells[k] or "").strip()]:
            raise InputError(f"{at}: no {missing[0]}; a row needs {' or '.join(COLUMNS[missing[0]])}")
        pair = cells["true"] is not None and cells["false"] is not None
        if not pair and cells["truthful"] is None:
            raise InputError(f"{at}: needs `true` and `false` (two answers), or `truthful` (a judge's label)")
        out.append(
            Question(
                id=row_id(row.get("id"), line, at),
                text=str(cells["question"]).strip(),
                category=str(cells["category"]).strip(),
                true=str(cells["true"]).strip() if pair else None,
                false=str(cells["false"]).strip() if pair else None,
                truthful=None if cells["truthful"] is None else _flag(cells["truthful"], at),
            )
        )
    if len({q.truthful is None for q in out}) > 1:
        raise InputError(f"{where}: `truthful` stands in some rows only; label all of them or none")
    if len({q.id for q in out}) < len(out):
        raise InputError(f"{where}: an id stands twice; ids must be unique")
    return out


def _flag(value: Any, at: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (word := str(value).strip().lower()) not in words:
        raise InputError(f"{at}: truthful is {value!r}; write true or false")
    return words[word]


# --- what the model leans to ------------------------------------------------------------------------------------


def leaning(
    runtime: LocalRuntime,
    questions: Sequence[Question],
    condition: Condition | None = None,
    *,
    progress: Stage | None = None,
) -> FloatArray:
    """Log-likelihood per token of the true answer minus that of the false one, in nats, (n,).

    Raises:
        InputError: a question without its two answers. CapabilityError: see `answer_loglik`.
    """
    if bare := [q.id for q in questions if q.true is None or q.false is None]:
        raise InputError(f"question {bare[0]!r} has no pair of answers to compare")
    from demur.explain.likelihood import answer_loglik

    asked = [(q.prompt, str(a)) for q in questions for a in (q.true, q.false)]
    found = answer_loglik(runtime, asked, condition, progress=progress)
    per_token = np.array([total / n for total, n in found]).reshape(-1, 2)
    return np.asarray(per_token[:, 0] - per_token[:, 1], float)


# --- reading it before the answer -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What `read_before_answer` found.

    Attributes:
        report: tables and values. probe: fitted on all questions at the place chosen most often.
        truthful: (n,) the labels. margins: (n,) the leaning in nats per token; None with a judge's labels.
        scores: name -> (n,) out-of-category scores of the probe, the bag of words and the length. fold: (n,).
    """

    report: Report
    probe: Any
    truthful: BoolArray
    margins: FloatArray | None
    scores: Mapping[str, FloatArray]
    fold: npt.NDArray[np.intp]

    def rows(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """One plain row for each question: id, category, label, margin, fold and the scores."""
        return [
            {
                "id": q.id,
                "category": q.category,
                "truthful": bool(self.truthful[i]),
                "margin": None if self.margins is None else float(self.margins[i]),
                "fold": int(self.fold[i]),
                **{name.replace(" ", "_"): float(s[i]) for name, s in self.scores.items()},
            }
            for i, q in enumerate(questions)
        ]


def read_before_answer(
    runtime: LocalRuntime,
    questions: Sequence[Question],
    condition: Condition | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[str] = ("t_inst", "t_post"),
    folds: int = FOLDS,
    C: float = 0.01,
    seed: int = 0,
    progress: Stage | None = None,
) -> Reading:
    """Fit and test probes on the states before the answer; every question is tested once, by category.

    For each fold of categories, probes are fitted on the other folds but one, the place is chosen on that one,
    and only the chosen probe is tested. AUROC is the mean over folds, since scores of different probes are not
    on one scale; its interval resamples categories.

    Args:
        layers: default all. positions: `t_inst` (last question token) and `t_post` (last before the answer).
        C: inverse regularisation of the logistic probe; small, because there are more dimensions than rows.

    Raises:
        InputError: fewer categories than folds, or a fold with fewer than two questions of a label.
        CapabilityError: the runtime is no local model. MissingExtra: scikit-learn is missing.

    >>> reading = read_before_answer(load_runtime("smollm2"), load_questions())  # doctest: +SKIP
    >>> reading.report.values["probe"]["auroc"]  # doctest: +SKIP
    """
    from demur.explain.positions import collect, grid
    from demur.runtime.layers import find_layers

    runtime.require("states")
    fold = by_category([q.category for q in questions], folds, seed)
    if judged := all(q.truthful is not None for q in questions):
        margins, truthful = None, np.array([bool(q.truthful) for q in questions])
    else:
        margins = leaning(runtime, questions, condition, progress=progress)
        truthful = margins > 0
    check_folds(truthful, fold)
    layers = range(len(find_layers(runtime.model))) if layers is None else layers
    prompts = PromptSet("questions", tuple(q.prompt for q in questions))
    told = None if progress is None else lambda done, total: progress("states", done, total)
    states = collect(runtime, prompts, grid(layers, positions), condition, progress=told)
    texts = [q.text for q in questions]
    scores, sweeps = out_of_fold(states, truthful, fold, texts, C=C, seed=seed, progress=progress)
    probe = _probe_of_all(states, truthful, [s.probe for s in sweeps], C, runtime.fingerprint)
    label = "judge" if judged else "likelihood of the true answer above the false one, per token"
    report = _report(runtime.name, label, truthful, margins, fold, questions, scores, sweeps, seed)
    return Reading(report=report, probe=probe, truthful=truthful, margins=margins, scores=scores, fold=fold)


def by_category(categories: Sequence[str], folds: int = FOLDS, seed: int = 0) -> npt.NDArray[np.intp]:
    """The fold (n,) of each row: categories stay whole, folds are about equal in rows.

    >>> by_category(["law", "art", "law", "tax"], 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    names, of, counts = np.unique(np.asarray(categories), return_inverse=True, return_counts=True)
    if not 3 <= folds <= len(names) and not (folds == 2 <= len(names)):
        raise InputError(
            f"{len(names)} categories for {folds} folds; each fold needs a category of its own, and 3 folds are "
            "the least (to fit, to choose, to test)"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-counts[order], kind="stable")]
    size, place = np.zeros(folds), np.empty(len(names), np.intp)
    for c in order:
        place[c] = int(np.argmin(size))
        size[place[c]] += counts[c]
    return np.asarray(place[of])


def check_folds(truthful: BoolArray, fold: npt.NDArray[np.intp]) -> None:
    """Raise `InputError` unless each fold holds two questions of either label."""
    for k in range(int(fold.max()) + 1):
        yes = int(truthful[fold == k].sum())
        if min(yes, int((fold == k).sum()) - yes) < 2:
            raise InputError(
                f"fold {k} has {yes} of {int((fold == k).sum())} questions labelled truthful; at least two of each "
                "are needed. Take more questions, fewer folds, or another seed"
            )


def out_of_fold(
    states: Mapping[Any, npt.ArrayLike],
    y: BoolArray,
    fold: npt.NDArray[np.intp],
    texts: Sequence[str],
    *,
    C: float = 0.01,
    seed: int = 0,
    progress: Stage | None = None,
) -> tuple[dict[str, FloatArray], list[Any]]:
    """Scores (n,) of `probe`, `bag of words` and `length`, each row's from a fit that did not see its fold.

    Returns:
        The scores, and the `demur.explain.Sweep` of each fold.
    """
    from demur.explain.probe import fit_probe
    from demur.explain.sweep import sweep
    from demur.stats.controls import bag_of_words

    out = {name: np.empty(len(y)) for name in ("probe", "bag of words", "length")}
    lengths = np.log([[1.0 + len(t)] for t in texts])
    sweeps = []
    folds = int(fold.max()) + 1
    for k in range(folds):
        test, select = np.flatnonzero(fold == k), np.flatnonzero(fold == (k + 1) % folds)
        fit = np.flatnonzero((fold != k) & (fold != (k + 1) % folds))
        parts = {"fit": fit, "select": select, "test": test}
        found = sweep(
            states, y, parts, ("logistic", "mean_difference"), seed, C=C, draws=10, allow_repeats=True
        )
        sweeps.append(found)
        others = np.concatenate(
            [fit, select]
        )  # the rules have nothing to choose, so they may have these rows too
        train = [texts[i] for i in others.tolist()]
        out["probe"][test] = found.scores
        out["bag of words"][test] = bag_of_words(train, y[others], [texts[i] for i in test.tolist()])
        out["length"][test] = fit_probe(lengths[others], y[others]).score(lengths[test])
        if progress is not None:
            progress("probes", k + 1, folds)
    return out, sweeps


def mean_auroc(scores: FloatArray, y: BoolArray, fold: npt.NDArray[np.intp]) -> float:
    """AUROC within each fold, averaged over folds with both labels; NaN without any."""
    from demur.stats import auroc

    areas = [auroc(scores[fold == k], y[fold == k]) for k in np.unique(fold)]
    known = [a for a in areas if a is not None]
    return float(np.mean(known)) if known else math.nan


def weighted_f1(said: BoolArray, y: BoolArray) -> float:
    """F1 of both labels, each weighted with its share of the rows: the paper's measure.

    >>> round(weighted_f1(np.array([1, 1, 1, 1], bool), np.array([1, 1, 1, 0], bool)), 3)  # 0.75 * 6/7 + 0.25 * 0
    0.643
    """
    total = 0.0
    for label in (True, False):
        hits = int(((said == label) & (y == label)).sum())
        both = int((said == label).sum() + (y == label).sum())
        total += float((y == label).mean()) * (2 * hits / both if both else 0.0)
    return total


def _probe_of_all(
    states: Mapping[Any, Any], y: BoolArray, probes: Sequence[Any], C: float, mark: str | None
) -> Any:
    from demur.explain.probe import fit_probe

    chosen = [(p.site, p.kind) for p in probes]
    site, kind = max(chosen, key=chosen.count)
    return fit_probe(states[site], y, kind, C, site=site, fingerprint=mark)


def _report(
    model: str,
    label: str,
    y: BoolArray,
    margins: FloatArray | None,
    fold: npt.NDArray[np.intp],
    questions: Sequence[Question],
    scores: Mapping[str, FloatArray],
    sweeps: Sequence[Any],
    seed: int,
) -> Report:
    from demur.stats import bootstrap_interval, rate

    topics = np.array([q.category for q in questions])
    values: dict[str, Any] = {"n": len(y), "categories": len(set(topics.tolist())), "folds": len(sweeps)}
    values["truthful"] = prior = rate(int(y.sum()), len(y))
    values["margin"] = None if margins is None else float(np.median(margins))
    rows: list[tuple[Any, ...]] = []
    for name, s in scores.items():
        low, high = bootstrap_interval(mean_auroc, s, y, fold, clusters=topics, seed=seed, n_boot=1000)
        accuracy = rate(int(((s >= 0) == y).sum()), len(y))
        area, f1 = mean_auroc(s, y, fold), weighted_f1(s >= 0, y)
        values[name.replace(" ", "_")] = {
            "auroc": area,
            "low": low,
            "high": high,
            "f1": f1,
            "accuracy": accuracy,
        }
        rows.append((name, area, low, high, f1, accuracy))
    null = float(np.mean([s.controls["random_labels"].mean for s in sweeps]))
    most = np.full(len(y), y.mean() >= 0.5)
    values["random_labels"] = {"auroc": null}
    values["majority"] = {"f1": weighted_f1(most, y), "accuracy": rate(int((most == y).sum()), len(y))}
    rows.append(("random labels", null, None, None, None, None))
    rows.append(("majority", 0.5, None, None, values["majority"]["f1"], values["majority"]["accuracy"]))
    for name in ("bag of words", "length"):
        gain = bootstrap_interval(
            lambda a, b, t, f: mean_auroc(a, t, f) - mean_auroc(b, t, f),
            *(scores["probe"], scores[name], y, fold),
            clusters=topics,
            seed=seed,
            n_boot=1000,
        )
        own = mean_auroc(scores["probe"], y, fold) - mean_auroc(scores[name], y, fold)
        values[f"gain_over_{name.replace(' ', '_')}"] = {"auroc": own, "low": gain[0], "high": gain[1]}
    note = f"Truthful: {prior.k} of {prior.n}; label: {label}. Categories of a test fold are in no fit."
    where = tuple(
        (k, *s.site, s.kind, int((fold == k).sum()), s.select_auroc, s.auroc, s.low, s.high)
        for k, s in enumerate(sweeps)
    )
    return Report(
        title=f"Truth read before the answer: {model}",
        tables=(
            Table(
                "Out of category",
                ("reader", "AUROC", "low", "high", "weighted F1", "accuracy"),
                tuple(rows),
                note,
            ),
            Table(
                "Chosen places",
                ("fold", "layer", "position", "kind", "n", "AUROC (select)", "AUROC (test)", "low", "high"),
                where,
            ),
            _layer_table(sweeps),
        ),
        values=values,
        notes=(
            "A probe that does no better than the bag of words has shown nothing about the model.",
            "Accuracy intervals treat questions as independent; AUROC intervals resample categories.",
        ),
    )


def _layer_table(sweeps: Sequence[Any]) -> Table:
    """Select AUROC of the logistic probe by layer and position, averaged over folds."""
    maps = [s.heat_map("logistic") for s in sweeps]
    layers, positions, _ = maps[0]
    mean = np.mean([m[2] for m in maps], axis=0)
    rows = tuple((layer, *map(float, row)) for layer, row in zip(layers, mean, strict=True))
    return Table("Logistic probe by layer (AUROC on select folds)", ("layer", *map(str, positions)), rows)

"""Refusals from text alone: recognised in responses, predicted from prompts, and the n-grams behind both.

`BlackboxRefusal(reads="response")` learns to recognise a refusal, `reads="prompt"` whether a model will refuse
what it has not been asked. Labels come from people, or by machine (`machine_labelled`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from demur.errors import InputError
from demur.measure.blackbox_refusal.classifier import PAPER_C, Reads, RefusalClassifier, fit
from demur.measure.blackbox_refusal.evaluation import HeldOut, accuracy, beyond, held_out, numbers
from demur.measure.blackbox_refusal.features import DEFAULTS, PAPER, Words
from demur.measure.blackbox_refusal.ngrams import TOP, Ngram, ngram_report
from demur.measure.blackbox_refusal.records import (
    COMPLIED,
    PAPER_MAP,
    REJECTED,
    Record,
    by_classifier,
    by_judge,
    default_group,
    load_records,
    machine_labelled,
    mapped,
)
from demur.stats import cohen_kappa
from demur.types import Card, Report, Table

CARD = Card(
    slug="blackbox-refusal",
    title="Refusal recognition and prediction from text alone",
    room="measure",
    tier="lab",
    paper="I'm Afraid I Can't Do That: Predicting Prompt Refusal in Black-Box Generative Language Models",
    url="https://arxiv.org/abs/2306.03423",
    files=(
        "measure/blackbox_refusal/__init__.py",
        "measure/blackbox_refusal/classifier.py",
        "measure/blackbox_refusal/evaluation.py",
        "measure/blackbox_refusal/features.py",
        "measure/blackbox_refusal/ngrams.py",
        "measure/blackbox_refusal/records.py",
    ),
    needs=(),
    summary="Small text classifiers that recognise refusals or predict them from the prompt, with their n-grams.",
    replicate="blackbox-refusal",
)

_RULES = "rules/demur-v1"


class BlackboxRefusal:
    """Fit a classifier on logs and say how far to trust it.

    Args:
        reads: "response" recognises refusals, "prompt" predicts them. words, C: features and inverse penalty;
            by default ours, and chosen on the training rows. k: folds. top, draws: of the n-gram table.
        seed: of everything random.

    Example:
        >>> rows = [Record(id=str(i), response=("Sorry, I cannot." if i % 3 else "Here it is.") + f" {i}",
        ...                label="rejected" if i % 3 else "complied", group=str(i)) for i in range(30)]
        >>> model, report = BlackboxRefusal("response", draws=20).train(rows)  # doctest: +SKIP
        >>> report.values["random"]["accuracy"].value  # doctest: +SKIP
        1.0
    """

    def __init__(
        self,
        reads: Reads,
        *,
        words: Words | None = None,
        C: float | None = None,
        k: int = 5,
        top: int = TOP,
        draws: int = 200,
        seed: int = 0,
    ) -> None:
        if reads not in DEFAULTS:
            raise InputError(f"reads={reads!r}; a classifier reads 'prompt' or 'response'")
        self.reads: Reads = reads
        self.words = words or DEFAULTS[reads]
        self.C = C
        self.k = k
        self.top = top
        self.draws = draws
        self.seed = seed

    def train(self, records: Sequence[Record]) -> tuple[RefusalClassifier, Report]:
        """The classifier fitted on all usable rows, and a report on cross-validated rows.

        Rows by hand are scored where there are at least `k` of each label; else machine labels are, and it says so.

        Raises:
            InputError: fewer than two labels, or too few rows of one. MissingExtra: scikit-learn is not installed.
        """
        rows = [r for r in records if r.label is not None and r.text(self.reads).strip()]
        texts, labels = [r.text(self.reads) for r in rows], [str(r.label) for r in rows]
        groups = [r.group or default_group(r.prompt, r.id) for r in rows]
        model = fit(
            texts,
            labels,
            reads=self.reads,
            words=self.words,
            C=self.C,
            groups=groups,
            seed=self.seed,
            about={"machine_labels": sum(r.machine for r in rows)},
        )
        by_hand = Counter(r.label for r in rows if not r.machine)
        hand = len(by_hand) == len(model.classes) and min(by_hand.values()) >= self.k
        kept = [r for r in rows if not (hand and r.machine)]
        scored = [not (hand and r.machine) for r in rows]
        repeated = len(set(groups)) < len(groups)
        runs = {"random": self._held_out(texts, labels, None, scored)}
        if repeated:
            runs["grouped"] = self._held_out(texts, labels, groups, scored)
        tables, values = self._tables(runs, kept)
        grams = ngram_report(
            model, texts, labels, groups=groups, top=self.top, draws=self.draws, seed=self.seed
        )
        tables.append(_ngram_table(grams, model.classes))
        values["ngrams"] = [_ngram_row(g) for g in grams]
        return model, Report(
            title=f"Refusals {'recognised in responses' if self.reads == 'response' else 'predicted from prompts'}",
            tables=tuple(tables),
            values=values,
            notes=tuple(self._notes(records, rows, hand, repeated)),
            provenance={
                "reads": self.reads,
                "rows": len(rows),
                "left_out": len(records) - len(rows),
                "machine_labels": sum(r.machine for r in rows),
                "labels": dict(model.rows),
                "groups": len(set(groups)),
                "C": model.C,
                "n_grams": len(model.terms),
                "folds": self.k,
                "seed": self.seed,
            },
        )

    def _held_out(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        groups: Sequence[str] | None,
        scored: Sequence[bool],
    ) -> HeldOut:
        return held_out(
            texts, labels, self.words, groups=groups, C=self.C, k=self.k, seed=self.seed, scored=scored
        )

    def _tables(self, runs: dict[str, HeldOut], rows: Sequence[Record]) -> tuple[list[Table], dict[str, Any]]:
        values: dict[str, Any] = {name: numbers(found, seed=self.seed) for name, found in runs.items()}
        lines = [_score_line(_SPLITS[name], values[name]) for name in runs]
        last = list(runs)[-1]
        found = runs[last]
        rules = dict(found.rules)
        if self.reads == "response" and found.classes == (COMPLIED, REJECTED):
            rules[_RULES] = _rule_verdicts(rows)
        compared: dict[str, dict[str, Any]] = {}
        for name, said in rules.items():
            gap, interval = beyond(found, said, seed=self.seed)
            rate = accuracy(said == found.y, found.groups, seed=self.seed)
            compared[name] = {"accuracy": rate, "difference": gap, "interval": interval}
        values["rules"] = compared
        tables = [
            Table("On rows that were held out", _SCORE_COLUMNS, tuple(lines)),
            Table(
                f"The same rows by simple rules ({_SPLITS[last]})",
                ("rule", "accuracy", "classifier minus rule, points"),
                tuple(
                    (k, v["accuracy"], _points(v["difference"], v["interval"])) for k, v in compared.items()
                ),
                note="n-gram and length were chosen on the training rows of each fold: "
                + ", ".join(dict.fromkeys(repr(c["n-gram"]) for c in found.chosen)),
            ),
        ]
        sources = Counter(r.source or "unnamed" for r in rows)
        if len(sources) > 1:
            tables.append(_source_table(found, rows, sources, self.seed))
        return tables, values

    def _notes(
        self,
        records: Sequence[Record],
        rows: Sequence[Record],
        hand: bool,
        repeated: bool,
    ) -> list[str]:
        notes = []
        if left := len(records) - len(rows):
            notes.append(f"{left} of {len(records)} rows are left out: no label, or no {self.reads}.")
        if made := sum(r.machine for r in rows):
            scored = (
                "Only the others are scored."
                if hand
                else (
                    "Rows by hand are too few to score, so the figures say how well machine labels are predicted."
                )
            )
            notes.append(f"{made} of {len(rows)} labels were made by machine and carry its errors. {scored}")
        if not repeated:
            notes.append(
                "Each row is a group of its own. If prompts come from templates, name a group column: random folds "
                "put near-copies on both sides and flatter the figures."
            )
        if self.reads == "prompt":
            notes.append(
                "A prediction speaks of the model, the time and the kind of prompts in these logs. The n-grams go "
                "with refusals here; they need not cause them."
            )
        else:
            notes.append(
                "The classifier knows the wording of the models in these logs; label some rows of a new model "
                "before using it there."
            )
        return notes


_SPLITS = {"random": "random folds", "grouped": "groups held out"}
_SCORE_COLUMNS = ("split", "accuracy", "balanced", "F1 (rejected)", "AUROC", "calibration error")


def labeller_agreement(records: Sequence[Record], said: Sequence[str | None]) -> dict[str, Any]:
    """Accuracy and kappa of machine labels on rows that people labelled too; unread ones are counted apart."""
    pairs = [
        (r.label, s) for r, s in zip(records, said, strict=True) if r.label is not None and not r.machine
    ]
    read = [(a, b) for a, b in pairs if b is not None]
    return {
        "accuracy": accuracy([a == b for a, b in read]),
        "kappa": cohen_kappa([a for a, _ in read], [b for _, b in read]) if read else None,
        "unread": len(pairs) - len(read),
    }


def _rule_verdicts(rows: Sequence[Record]) -> Any:
    from demur import judges

    said = by_judge(judges.get(_RULES))(rows)
    # what the rules cannot read they do not call a refusal
    return np.array([int(word == REJECTED) for word in said], np.intp)


def _score_line(split: str, v: dict[str, Any]) -> tuple[Any, ...]:
    two = "f1" in v
    return (
        split,
        v["accuracy"],
        _with(v["balanced_accuracy"], v["balanced_accuracy_interval"]),
        _with(v["f1"], v["f1_interval"]) if two else None,
        _with(v["auroc"], v["auroc_interval"]) if two else None,
        v["calibration_error"] if two else None,
    )


def _with(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def _points(value: float, interval: tuple[float, float] | None) -> str:
    shown = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * value:+.1f}{shown}"


def _source_table(found: HeldOut, rows: Sequence[Record], sources: Counter[str], seed: int) -> Table:
    lines = []
    for name, _ in sources.most_common(20):
        here = np.array([(r.source or "unnamed") == name for r in rows])
        shares = np.bincount(found.y[here], minlength=len(found.classes)) / here.sum()
        top = int(shares.argmax())
        lines.append(
            (
                name,
                int(here.sum()),
                f"{100 * shares[top]:.1f}% {found.classes[top]}",
                accuracy(found.right[here], found.groups[here], seed=seed),
            )
        )
    return Table("By source", ("source", "rows", "most frequent label", "accuracy"), tuple(lines))


def _ngram_table(grams: Sequence[Ngram], classes: Sequence[str]) -> Table:
    two = len(classes) == 2
    return Table(
        "N-grams with the largest coefficients",
        (
            "n-gram",
            "coefficient",
            "speaks for",
            f"{classes[1] if two else 'label'} among texts with it",
            "settled",
        ),
        tuple(
            (
                g.ngram,
                f"{g.coefficient:+.2f} [{g.low:+.2f}, {g.high:+.2f}]",
                g.toward if g.coefficient > 0 else (classes[0] if two else f"not {g.toward}"),
                g.share,
                g.settled,
            )
            for g in grams
        ),
        note="^: among the first words. settled: the interval leaves no doubt about the sign.",
    )


def _ngram_row(g: Ngram) -> dict[str, Any]:
    return {
        "ngram": g.ngram,
        "toward": g.toward,
        "coefficient": g.coefficient,
        "low": g.low,
        "high": g.high,
        "share": g.share,
    }


__all__ = [
    "CARD",
    "PAPER",
    "PAPER_C",
    "PAPER_MAP",
    "BlackboxRefusal",
    "HeldOut",
    "Ngram",
    "Record",
    "RefusalClassifier",
    "Words",
    "by_classifier",
    "by_judge",
    "fit",
    "held_out",
    "labeller_agreement",
    "load_records",
    "machine_labelled",
    "mapped",
    "ngram_report",
    "numbers",
]

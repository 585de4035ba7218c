"""What resampling until a verifier accepts can reach, and when to stop.

If a verifier lets some wrong answers through, accuracy has a ceiling that no number of attempts removes; and once
a wrong accepted answer costs more than no answer, further attempts can lower the utility. `InferenceScaling` says
both for a table of verdicts (`score`) or for a model of task types (`expect`).

    verdicts = read_verdicts(read_rows("samples.csv"))
    print(to_text(InferenceScaling(Costs(false=2)).score(verdicts)))

Stroebl, Kapoor, Narayanan: The Limits of Inference Scaling Through Resampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from demur.errors import InputError
from demur.measure.inference_scaling.closed_form import Costs, Curve, FloatArray, TaskTypes
from demur.measure.inference_scaling.table import (
    Estimate,
    Verdicts,
    budgets,
    choose,
    line,
    mean_over,
    ratio_over,
    read_verdicts,
    resamples,
    two_types,
)
from demur.measure.inference_scaling.words import (
    costs_line,
    number,
    say_data,
    say_reach,
    say_stop,
    say_target,
    say_types,
    shown,
    span,
    two,
)
from demur.types import Card, Report, Table

__all__ = ["CARD", "Costs", "InferenceScaling", "TaskTypes", "Verdicts", "read_verdicts", "two_types"]

CARD = Card(
    slug="inference-scaling-flaws",
    title="What resampling gains with an imperfect verifier",
    room="measure",
    tier="lab",
    paper="The Limits of Inference Scaling Through Resampling",
    url="https://arxiv.org/abs/2411.17501",
    files=(
        "measure/inference_scaling/__init__.py",
        "measure/inference_scaling/plot.py",
        "measure/inference_scaling/table.py",
        "measure/inference_scaling/closed_form.py",
        "measure/inference_scaling/words.py",
    ),
    summary="Attainable accuracy of model and verifier, and the number of attempts that pays.",
    replicate="inference-scaling-flaws",
)

_SHOWN = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
_CURVE = ("attempts", "right", "wrong", "no answer", "samples used", "utility", "pays below")
_CURVE_NOTE = (
    "Per task, at most this many attempts. `pays below`: what a wrong answer may cost, in values of a right one, "
    "for the last of these attempts to gain (attempts free)."
)
_INDEPENDENT = "Attempts at one task are taken to be independent draws from one model at one setting."


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceScaling:
    """Ceiling, curves and best budget.

    Attributes:
        costs: see `Costs`.
        target: an accuracy to be reached, e.g. what a stronger model has with one sample.
        n_boot: bootstrap resamples of the tasks. seed: of these and of the cross-fit folds.
    """

    costs: Costs = field(default_factory=Costs)
    target: float | None = None
    n_boot: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target is not None and not 0 <= self.target <= 1:
            raise InputError(f"target={self.target:g} is no accuracy; it must lie in [0, 1]")

    def score(self, verdicts: Verdicts) -> Report:
        """Report on sampled answers.

        `values` holds `reach` (estimates with intervals), `best` (the choice of K), `curve` (lists over budgets,
        with intervals), `two_types` (fitted model with its rho*, or why there is none).
        """
        m = _measure(verdicts, self)
        reach, choice = m["reach"], m["best"]
        table = tuple((_REACH[k], shown(e), e.n, _NOTES.get(k)) for k, e in reach.items())
        stop: list[tuple[Any, ...]] = [
            (
                "best number of attempts K*",
                f"{choice.K}{' or more' if choice.open_ended else ''}",
                span(choice),
            ),
            ("utility at K*, chosen on the same tasks", *two(choice.utility)),
            ("utility at K*, chosen on other tasks", *two(choice.crossfit)),
            ("utility of one attempt", *two(m["one"])),
            (f"utility of {verdicts.budget} attempts, the most measured", *two(m["all"])),
            ("a wrong answer may cost, for a first attempt to pay", *two(m["first_ratio"])),
        ]
        if isinstance(m["two_types"], Mapping):
            rho = m["two_types"]["long_run_ratio"]
            stop.append(("... for every further attempt to pay (rho*, two-type model)", number(rho), None))
        tables = (
            Table("What it can reach", ("quantity", "value [95 %]", "n", "meaning"), table),
            Table(
                f"When to stop ({costs_line(self.costs)})",
                ("quantity", "value", "95 % interval"),
                tuple(stop),
            ),
            Table("By number of attempts", _CURVE, _curve_rows(m["curve"], choice.K), _CURVE_NOTE),
        )
        return Report(
            title="Resampling with a verifier",
            tables=tables,
            values=_spelled(m),
            provenance=self._provenance(tasks=len(verdicts), samples=int(verdicts.n.sum())),
            notes=(
                *say_reach(m, self.target),
                *say_stop(m, self.costs),
                *say_data(verdicts, m),
                _INDEPENDENT,
            ),
        )

    def expect(self, types: TaskTypes) -> Report:
        """Report on a model of task types: exact, without intervals."""
        best = types.best(self.costs)
        end = max(1, min(1000, 4 * best.enough, 200 if best.K is None else max(4 * best.K, 10)))
        grid = budgets(end)
        curve = _listed(types.curve(grid, self.costs))
        rows = zip(
            types.names,
            *map(np.ndarray.tolist, (types.share, types.correct, types.accept, types.precision)),
            strict=True,
        )
        K = "unbounded" if best.K is None else str(best.K)
        stop = (
            ("best number of attempts K*", K),
            ("utility at K*" if best.K is not None else "utility in the limit", number(best.utility)),
            ("attempts within 1 % of the value of a right answer of it", str(best.enough)),
            ("a wrong answer may cost, for a first attempt to pay", number(types.first_ratio())),
            ("... for every further attempt to pay (rho*)", number(types.long_run_ratio())),
        )
        tables = (
            Table("Task types", ("type", "share", "correct", "accepted", "right if accepted"), tuple(rows)),
            Table(f"When to stop ({costs_line(self.costs)})", ("quantity", "value"), stop),
            Table("By number of attempts", _CURVE, _curve_rows(curve, best.K or 1), _CURVE_NOTE),
        )
        values = {
            "reach": {"single": types.single, "ceiling": types.ceiling},
            "best": {
                "K": best.K,
                "unbounded": best.K is None,
                "utility": best.utility,
                "enough": best.enough,
            },
            "first_ratio": types.first_ratio(),
            "long_run_ratio": types.long_run_ratio(),
            "curve": curve,
            "posterior": {"K": grid[1:], "share": types.posterior(grid[1:])},
        }
        notes = (*say_types(types, best, self.costs, self.target), _INDEPENDENT)
        title = "Resampling with a verifier: expected"
        return Report(
            title=title, tables=tables, values=_spelled(values), provenance=self._provenance(), notes=notes
        )

    def compare(self, models: Mapping[str, Verdicts]) -> Report:
        """Report on several models over the same verifier: ceilings, the line through them, who can reach whom."""
        each = {name: _measure(v, self) for name, v in models.items()}
        rows = tuple(
            (
                name,
                *(shown(m["reach"][k]) for k in ("single", "ceiling", "best_case")),
                f"{m['best'].K}{' or more' if m['best'].open_ended else ''}",
                span(m["best"]),
                shown(m["best"].crossfit),
            )
            for name, m in each.items()
        )
        columns = ("model", "one sample", "ceiling", "ceiling, best case", "K*", "95 %", "utility, cross-fit")
        known = [m for m in each.values() if m["reach"]["ceiling"].value is not None]
        values: dict[str, Any] = {"models": each, "line": None}
        notes = []
        if len(known) >= 3:
            fit = line(*([m["reach"][k].value for m in known] for k in ("single", "ceiling")))
            values["line"] = fit._asdict()
            notes.append(
                f"Ceiling = {fit.slope:.2f} x accuracy of one sample + {fit.intercept:.2f} "
                f"(R² {fit.r2:.3f}, {fit.n} models)."
            )
        strong = max(each, key=lambda k: each[k]["reach"]["single"].value)
        goal = each[strong]["reach"]["single"].value
        for name, m in each.items():
            if name != strong:
                notes += [f"{name}: {s}" for s in say_target(m, goal, f"what {strong} has with one sample")]
        table = Table(f"Models ({costs_line(self.costs)})", columns, rows)
        title = "Resampling with a verifier, by model"
        provenance = self._provenance(models=len(models))
        return Report(
            title=title,
            tables=(table,),
            values=_spelled(values),
            provenance=provenance,
            notes=(*notes, _INDEPENDENT),
        )

    def _provenance(self, **more: Any) -> dict[str, Any]:
        c = self.costs
        costs = {"value": c.value, "cost_false": c.false, "cost_sample": c.sample}
        return {**costs, "target": self.target, "n_boot": self.n_boot, "seed": self.seed, **more}


_REACH = {
    "single": "one sample, no verifier",
    "first": "one attempt, with verifier",
    "ceiling": "ceiling: right, if ever accepted",
    "worst_case": "ceiling, never-accepted tasks wrong",
    "best_case": "ceiling, never-accepted tasks right",
    "false_discovery": "wrong among the accepted",
    "completeness": "completeness c of the verifier",
    "soundness": "soundness s of the verifier",
}
_NOTES = {
    "single": "share of samples that are correct, mean over tasks",
    "first": "correct and accepted",
    "ceiling": "mean over tasks with an accepted sample",
    "false_discovery": "1 - ceiling; not the same as 1 - soundness",
    "completeness": "correct samples accepted, pooled",
    "soundness": "wrong samples rejected, pooled",
}


def _measure(v: Verdicts, how: InferenceScaling) -> dict[str, Any]:
    """All numbers of one table of verdicts."""
    weights = list(resamples(len(v), how.n_boot, how.seed)) if len(v) > 1 else []
    good, seen = v.precision, v.accepted > 0
    reach = {
        "single": mean_over(v.correct / v.n, weights),
        "first": mean_over(v.both / v.n, weights),
        "ceiling": mean_over(good, weights),
        "worst_case": mean_over(np.where(seen, good, 0.0), weights),
        "best_case": mean_over(np.where(seen, good, 1.0), weights),
        "false_discovery": mean_over(1 - good, weights),
        "completeness": ratio_over(v.both, v.correct, weights),
        "soundness": ratio_over(v.n - v.correct - v.accepted + v.both, v.n - v.correct, weights),
    }
    outcomes = v.outcomes()
    utility = outcomes.utility(how.costs)
    grid = budgets(v.budget)
    curve = _listed(Curve(*(x[grid] for x in outcomes.mean(how.costs))))
    if weights:
        for name, x in zip(
            ("right", "wrong", "none", "samples", "utility"), (*outcomes, utility), strict=True
        ):
            drawn = np.concatenate([w @ x[:, grid] for w in weights])
            curve[f"{name}_low"], curve[f"{name}_high"] = np.quantile(drawn, [0.025, 0.975], axis=0)
    fitted: Any
    try:
        types = two_types(v)
        fitted = {
            "share": types.share,
            "correct": types.correct,
            "completeness": float(types.completeness[0]),
            "soundness": float(types.soundness[0]),
            "long_run_ratio": types.long_run_ratio(),
            "best": types.best(how.costs)._asdict(),
        }
    except InputError as e:
        fitted = str(e)
    return {
        "reach": reach,
        "best": choose(utility, weights, seed=how.seed),
        "one": mean_over(utility[:, 1], weights),
        "all": mean_over(utility[:, -1], weights),
        "first_ratio": _odds(v, weights),
        "curve": curve,
        "two_types": fitted,
        "never_accepted": int((~seen).sum()),
    }


def _odds(v: Verdicts, weights: list[FloatArray]) -> Estimate:
    """Right per wrong accepted answer of the first attempt, from the share that is right."""
    right, wrong = v.both / v.n, (v.accepted - v.both) / v.n
    if not v.accepted.any():
        return Estimate(None, None, None, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(right.sum() / wrong.sum()) if wrong.sum() else float("inf")
        drawn = (
            np.concatenate([(w @ right) / (w @ wrong) for w in weights]) if weights else np.array([np.nan])
        )
    drawn = np.sort(drawn[~np.isnan(drawn)])
    if not drawn.size or np.isinf(value):
        return Estimate(value, None, None, len(v))
    at = (np.array([0.025, 0.975]) * (drawn.size - 1)).round().astype(int)
    return Estimate(value, float(drawn[at[0]]), float(drawn[at[1]]), len(v))


def _listed(curve: Curve) -> dict[str, FloatArray]:
    right, wrong = np.diff(curve.right), np.diff(curve.wrong)
    with np.errstate(divide="ignore", invalid="ignore"):
        pays = np.where(wrong > 1e-15, right / wrong, np.where(right > 1e-15, np.inf, np.nan))
    return {**curve._asdict(), "pays_below": np.concatenate([[np.nan], pays])}


def _curve_rows(curve: Mapping[str, FloatArray], K: int) -> tuple[tuple[Any, ...], ...]:
    budgets_ = curve["K"].astype(int).tolist()
    wanted = sorted(
        {*(k for k in _SHOWN if k in budgets_), budgets_[-1], *([K] if K in budgets_ and K else [])}
    )
    out = []
    for k in wanted:
        i = budgets_.index(k)
        cells: list[Any] = [str(k)]
        for name in ("right", "wrong", "none", "samples", "utility"):
            low, high = (
                curve[f"{name}_{end}"][i] if f"{name}_{end}" in curve else None for end in ("low", "high")
            )
            cells.append(shown(Estimate(curve[name][i], low, high, 0)))
        # between thinned budgets a step is not one attempt
        near = i > 0 and budgets_[i] - budgets_[i - 1] == 1
        out.append((*cells, number(float(curve["pays_below"][i])) if near else None))
    return tuple(out)


def _spelled(value: Any) -> Any:
    """Named tuples as mappings, and infinity in words (JSON has none)."""
    if hasattr(value, "_asdict"):
        return _spelled(value._asdict())
    if isinstance(value, Mapping):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _spelled(value.tolist())
    if isinstance(value, list):
        return [_spelled(v) for v in value]
    return "infinite" if isinstance(value, float) and np.isposinf(value) else value

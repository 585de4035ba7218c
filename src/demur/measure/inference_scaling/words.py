"""The plain sentences and the number formats of `demur.measure.inference_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from demur.measure.inference_scaling.closed_form import Best, Costs, TaskTypes
from demur.measure.inference_scaling.table import Choice, Estimate, Verdicts


def number(x: float | None) -> str:
    """A number for a table; a missing one is a dash, an infinite one "any amount"."""
    if x is None or np.isnan(x):
        return "–"
    return "any amount" if np.isposinf(x) else f"{x:.3f}"


def shown(e: Estimate) -> str:
    """An estimate with its interval."""
    return number(e.value) + ("" if e.low is None or e.high is None else f" [{_end(e.low)}, {_end(e.high)}]")


def two(e: Estimate) -> tuple[str, str | None]:
    """An estimate and its interval as two cells."""
    return number(e.value), None if e.low is None or e.high is None else f"{_end(e.low)} to {_end(e.high)}"


def _end(x: float) -> str:
    return "∞" if np.isinf(x) else f"{x:.3f}"


def span(choice: Choice) -> str | None:
    """The interval of K*."""
    return None if choice.low is None else f"{choice.low} to {choice.high}"


def costs_line(c: Costs) -> str:
    """The costs in words.

    >>> costs_line(Costs(false=2))
    'right +1, wrong -2, no answer 0, attempt 0'
    """
    return f"right +{c.value:g}, wrong {-c.false or 0:g}, no answer 0, attempt {-c.sample or 0:g}"


def _attempts(k: int) -> str:
    return f"{k} attempt" if k == 1 else f"{k} attempts"


def say_reach(m: Mapping[str, Any], target: float | None) -> list[str]:
    """What accuracy can be reached."""
    reach, never = m["reach"], m["never_accepted"]
    ceiling, wrong = reach["ceiling"], reach["false_discovery"]
    if ceiling.value is None:
        return [
            "The verifier accepted no sample, so resampling gives no answers and has no ceiling to report."
        ]
    if wrong.value == 0:
        bound = "" if wrong.high is None else f" (counted over tasks, up to {wrong.high:.1%} may still be)"
        out = [f"No wrong answer was accepted{bound}: these data show no ceiling but the tasks never solved."]
    else:
        out = [
            f"WARNING: no number of attempts gets more than about {ceiling.value:.1%} of the answered tasks right: "
            f"{wrong.value:.1%} of what the verifier accepts is wrong (mean over tasks)."
        ]
    if never:
        out.append(
            f"{never} of {reach['single'].n} tasks never had an accepted sample and are left out of the ceiling, "
            f"which flatters a weak model. Counted as wrong they make it {reach['worst_case'].value:.3f}, counted "
            f"as right {reach['best_case'].value:.3f}."
        )
    return out + (say_target(m, target, "the target") if target is not None else [])


def say_target(m: Mapping[str, Any], goal: float, what: str) -> list[str]:
    """Whether a goal is within reach."""
    e, most = m["reach"]["ceiling"], m["reach"]["best_case"]
    if e.value is None:
        return []
    if (most.value if most.high is None else most.high) < goal:
        return [
            f"WARNING: {what} ({goal:.3f}) is out of reach by resampling: even with never-accepted tasks counted "
            f"as right the ceiling is {shown(most)}."
        ]
    if e.value < goal:
        return [f"WARNING: the ceiling {shown(e)} lies below {what} ({goal:.3f}), though not with certainty."]
    return [f"The ceiling {shown(e)} does not lie below {what} ({goal:.3f})."]


def say_stop(m: Mapping[str, Any], costs: Costs) -> list[str]:
    """When to stop, from measured outcomes."""
    best, curve, fitted = m["best"], m["curve"], m["two_types"]
    end = int(curve["K"][-1])
    if best.K == 0:
        if m["reach"]["ceiling"].value is None:
            return ["K* = 0: no attempt is ever accepted, so none can pay."]
        i = int(np.argmax(curve["utility"][1:])) + 1
        return [
            f"WARNING: at these costs every budget loses. Abstaining (K* = 0) earns 0; the least bad budget, "
            f"{int(curve['K'][i])}, earns {curve['utility'][i]:.3f}."
        ]
    out = []
    if best.at_zero is not None and best.at_zero > 0.025:
        out.append(f"In {best.at_zero:.0%} of the resamples abstaining always (K* = 0) would be best.")
    if not best.open_ended:
        lost = best.utility.value - m["all"].value
        return [
            f"Stop after {_attempts(best.K)}: {end} would earn {lost:.3f} less per task. The tasks still without "
            "an answer by then are mostly the hard ones, where trying on costs more than it brings.",
            *out,
        ]
    out = [
        *out,
        f"K* is open-ended: utility does not fall up to {_attempts(end)}, the most that these samples can show. "
        f"It is at its highest from {best.K} on.",
    ]
    if costs.sample == 0 and (costs.false == 0 or m["reach"]["false_discovery"].value == 0):
        why = "wrong answers cost nothing" if costs.false == 0 else "none was wrong"
        out.append(f"Attempts are free and {why} here, so no budget is too large: K* is unbounded.")
    elif isinstance(fitted, Mapping) and fitted["best"]["K"] is not None:
        out.append(f"The two-type model puts its turn at K = {fitted['best']['K']}.")
    return out


def say_data(v: Verdicts, m: Mapping[str, Any]) -> list[str]:
    """What the table itself limits."""
    out = []
    if len(v) == 1:
        out.append(
            "One task only: no interval over tasks and no cross-fit can be given; the numbers describe this task "
            "and no other."
        )
    elif len(v) < 20:
        out.append(
            f"{len(v)} tasks are few for a bootstrap: the intervals are rather too narrow than too wide."
        )
    if v.budget == 1:
        out.append(
            "Some task has one sample only, so no more than one attempt can be judged and K* is 0 or 1. Draw more "
            "samples, or leave such tasks out (min_samples)."
        )
    elif v.n.max() > v.budget:
        out.append(
            f"Samples per task range from {v.budget} to {v.n.max()}; curves stop at {v.budget}. Tasks with few "
            "samples can be left out (min_samples)."
        )
    missed = int((v.correct > v.accepted).sum())
    if missed:
        out.append(
            f"In {missed} of {len(v)} tasks more samples are correct than accepted: there the verifier rejects "
            "correct answers. The paper drops such tasks; here they stay unless you say otherwise."
        )
    if isinstance(m["two_types"], str):
        out.append(f"No two-type model: {m['two_types']}.")
    return out


def say_types(types: TaskTypes, best: Best, costs: Costs, target: float | None) -> list[str]:
    """What can be reached and when to stop, for a model of task types."""
    out, ceiling, never = [], types.ceiling, types.accept == 0
    if float(types.share @ types.accept_wrong) == 0:
        out.append(
            f"The verifier lets nothing wrong through, so accuracy rises to {ceiling:.3f}, the share of tasks that "
            "are ever solved."
        )
    else:
        out.append(f"WARNING: no number of attempts lifts accuracy above {ceiling:.3f}.")
    if never.any():
        out.append(f"{types.share[never].sum():.1%} of the tasks are never accepted and count as not solved.")
    if target is not None and ceiling < target:
        out.append(f"WARNING: the target {target:.3f} is out of reach by resampling.")
    elif target is not None:
        out.append(f"The ceiling does not lie below the target {target:.3f}.")
    if best.K is None:
        out.append(
            f"K* is unbounded: each further attempt still gains. Utility nears {best.utility:.3f}; "
            f"{_attempts(best.enough)} come within 1 % of the value of a right answer."
        )
    elif best.K == 0:
        out.append("WARNING: at these costs no budget earns more than abstaining (K* = 0).")
    else:
        out.append(f"Stop after {_attempts(best.K)}: further ones gain nothing or lose.")
    rho = types.long_run_ratio()
    if rho is not None and np.isfinite(rho) and not costs.sample:
        out.append(
            f"rho* = {rho:.3f}: where a wrong answer costs less than that many values of a right one, even the "
            f"hardest type pays. Here it costs {costs.ratio:.3f}."
        )
    return out

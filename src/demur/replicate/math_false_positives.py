"""Right answers from wrong reasoning: a simulated world where validity is known, and the released labels.

World: 40 % of the problems are solvable (chance of a right answer Beta(1, 1.5), of validity given a right one
Beta(8, 1.2)). The others are reached by luck: right once in some 170 samples, and validly in four problems of ten
at all. A verifier's reward is answer signal + validity signal + noise of standard deviation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demur.replicate.math_labels import LINES, recount
from demur.replicate.spec import Baseline, Claim, Context, Control, Spec, Value

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PROBLEMS, SAMPLES, DATASETS = 1000, 256, 2000
NS = (4, 64, 256)
WEAK = (1.5, 0.5)
SEEING = (0.0, 6.0)
"""Weights of answer and validity in the reward: a usual verifier, and one that rewards valid solutions alone."""


# --- one seed of the simulation ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """Samples of every problem: correct, valid (correct and sound), shape (problems, samples), and noise."""

    correct: npt.NDArray[np.bool_]
    valid: npt.NDArray[np.bool_]
    noise: npt.NDArray[np.float64]


def world(rng: np.random.Generator, *, luck: bool = True, problems: int = PROBLEMS) -> World:
    """Draw a world; without `luck` every right answer is valid."""
    import numpy as np

    hard = rng.random(problems) < 0.6
    right = np.where(hard, rng.exponential(0.006, problems).clip(max=0.05), rng.beta(1, 1.5, problems))
    sound = np.where(hard, rng.random(problems) * (rng.random(problems) < 0.4), rng.beta(8, 1.2, problems))
    if not luck:
        sound = np.ones(problems)
    correct = rng.random((problems, SAMPLES)) < right[:, None]
    valid = correct & (rng.random((problems, SAMPLES)) < sound[:, None])
    return World(correct=correct, valid=valid, noise=rng.normal(0, 1, (problems, SAMPLES)))


def gaps(drawn: World, n: int) -> npt.NDArray[np.float64]:
    """pass@n by answer minus pass@n by reasoning, for each problem."""
    import numpy as np

    from demur.measure.math_false_positives.scaling import pass_at_n

    def passed(good: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        return np.array([pass_at_n(SAMPLES, int(k), n) for k in good.sum(axis=1)])

    return passed(drawn.correct) - passed(drawn.valid)


def chosen(
    drawn: World, weights: tuple[float, float], n: int, signal: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float64]:
    """Chances that best-of-n picks a right answer, and a right one that is flawed; shape (problems, 2).

    `signal` is what the verifier takes for validity; default the truth.
    """
    import numpy as np

    from demur.measure.math_false_positives.scaling import best_of_n

    seen = drawn.valid if signal is None else signal
    rewards = weights[0] * drawn.correct + weights[1] * seen + drawn.noise
    picked = np.stack([best_of_n(r, n) for r in rewards])
    flawed = drawn.correct & ~drawn.valid
    return np.stack([(picked * drawn.correct).sum(axis=1), (picked * flawed).sum(axis=1)], axis=1)


def flawed_share(drawn: World) -> npt.NDArray[np.float64]:
    """Share of each problem's right answers that are flawed; 0 where none is right."""
    import numpy as np

    right = drawn.correct.sum(axis=1)
    return np.asarray((right - drawn.valid.sum(axis=1)) / np.maximum(right, 1))


def random_right(drawn: World, like: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What `chosen` would be if each right pick were a random right answer of the same problem."""
    import numpy as np

    return np.stack([like[:, 0], like[:, 0] * flawed_share(drawn)], axis=1)


def fp_difference(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> Value:
    """False-positive rate under a minus that under b, paired over problems; standard error by linearisation."""
    import numpy as np

    rates = [float(x[:, 1].sum() / x[:, 0].sum()) for x in (a, b)]
    parts = [(x[:, 1] - r * x[:, 0]) / x[:, 0].mean() for x, r in zip((a, b), rates, strict=True)]
    spread = parts[0] - parts[1]
    return Value(
        value=rates[0] - rates[1], se=float(spread.std(ddof=1) / np.sqrt(len(spread))), n=len(spread)
    )


def coverage(rng: np.random.Generator, rounds: int = DATASETS) -> tuple[list[float], list[float]]:
    """Whether the interval of `fp_correct`, and that of the accuracy by answer, hold the true valid accuracy."""
    from demur.measure.math_false_positives.scaling import fp_correct, share

    ours: list[float] = []
    naive: list[float] = []
    for i in range(rounds):
        problems = int(rng.integers(60, 501))
        by_answer, flawed = rng.uniform(0.2, 0.95), rng.uniform(0.03, 0.5)
        correct = int(rng.binomial(problems, by_answer))
        audited = max(1, round(correct * rng.uniform(0.2, 1))) if correct else 0
        found = int(rng.binomial(audited, flawed))
        truth = by_answer * (1 - flawed)
        for hits, interval in (
            (ours, fp_correct(correct, problems, audited, found, draws=4000, seed=i)),
            (naive, share(correct, problems)),
        ):
            low, high = interval.low, interval.high
            hits.append(float(low is not None and high is not None and low <= truth <= high))
    return ours, naive


def run(context: Context) -> Mapping[str, Value]:
    """One seed: the world, the same without lucky guesses, and the coverage of the corrected interval."""
    import numpy as np

    steps = len(NS) + 3
    rng = np.random.default_rng([20250206, context.seed])
    drawn, honest = world(rng), world(rng, luck=False)
    context.progress("pass@N", 0, steps)
    growth = gaps(drawn, 64) - gaps(drawn, 4)
    silent = gaps(honest, 64) - gaps(honest, 4)
    weak = {}
    for i, n in enumerate(NS):
        context.progress("best-of-N", i + 1, steps)
        weak[n] = chosen(drawn, WEAK, n)
    seeing = chosen(drawn, SEEING, 64)
    blind = chosen(drawn, SEEING, 64, _dealt_anew(drawn, rng))
    context.progress("coverage", steps - 1, steps)
    ours, naive = coverage(rng)
    return {
        "gap_growth": Value.of(growth.tolist()),
        "best_of_n_flat": fp_difference(weak[256], weak[4]),
        "validity_seen": fp_difference(weak[64], seeing),
        "coverage": Value.of(ours),
        "coverage_ceiling": Value.of(ours),
        "no_luck_no_gap": Value.of(silent.tolist()),
        "shuffled_validity": fp_difference(random_right(drawn, blind), blind),
        "random_right_answer": fp_difference(weak[64], random_right(drawn, weak[64])),
        "uncorrected_interval": Value.of(naive),
    }


def _dealt_anew(drawn: World, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """The validity labels of each problem dealt out anew among its right answers."""
    import numpy as np

    out = np.zeros_like(drawn.valid)
    for i, right in enumerate(drawn.correct):
        where = np.flatnonzero(right)
        out[i, where] = rng.permutation(drawn.valid[i, where])
    return out


SPEC = Spec(
    slug="math-false-positives",
    minutes=0.1,
    files=(
        "measure/math_false_positives/detectors.py",
        "measure/math_false_positives/grading.py",
        "measure/math_false_positives/scaling.py",
        "measure/math_false_positives/solutions.py",
        "measure/math_false_positives/worker.py",
        "replicate/math_labels.py",
    ),
    claims=(
        Claim(
            key="gap_growth",
            text="pass@N by answer minus by reasoning grows from N=4 to N=64",
            at_least=0.08,
            null=0.0,
        ),
        Claim(
            key="best_of_n_flat",
            text="false-positive rate of best-of-256 minus best-of-4, usual verifier: it does not fall",
            at_least=-0.02,
            at_most=0.1,
        ),
        Claim(
            key="validity_seen",
            text="fall of best-of-64's false-positive rate when the verifier sees validity instead",
            at_least=0.08,
            null=0.0,
        ),
        Claim(key="coverage", text="coverage of the corrected 95 % interval", at_least=0.93),
        Claim(key="coverage_ceiling", text="the same coverage is not won by width", at_most=0.975),
    ),
    controls=(
        Control(
            key="no_luck_no_gap",
            text="growth of the gap where every right answer is valid",
            null=0.0,
            margin=0.02,
        ),
        Control(
            key="shuffled_validity",
            text="fall below a random right answer of the same problem, for a verifier that sees validity "
            "dealt out anew among the right answers",
            null=0.0,
            margin=0.02,
        ),
    ),
    baselines=(
        Baseline(
            key="random_right_answer",
            text="fall when each right answer picked is replaced by a random right one of its problem",
            against="validity_seen",
        ),
        Baseline(
            key="uncorrected_interval",
            text="coverage of the accuracy by answer, as if right meant valid",
            against="coverage",
        ),
    ),
    anchors=tuple(anchor for anchor, _ in LINES),
    run=run,
    recount=recount,
    notes=(
        "The claims are about a simulated world, whose shares were set so that pass@N runs like the paper's AIME "
        "curve. How flat best-of-N stays depends on them. The anchors are the paper's own human labels.",
        "The growth of the gap without luck is 0 by construction; it tests the estimators and not the world.",
        "The labels are single judgements, and how far two people agree is not published.",
        "Six replies of checker qwen hold no True / False. The verdicts counted here were parsed before, so the "
        "rule for such replies is tested on made-up ones only.",
    ),
)

"""Switch routed experts off, or force them in, beside random experts of the same layers that are used as often.

scores = score_experts(resonance_maps(runtime, prompts), labels)
masks = matched_masks(maps, scores.top(10))
effect = mask_effect(runtime, refused, Experts(scores.top(10), allow_refusal_lowering=True), masks)
print(effect.text())

A mask that lowers refusal is an audit result: it says that refusal is carried by a few experts and so is fragile.
Names, notes and texts made here hold counts and effects and never which experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from demur.control.steering import consent, view
from demur.errors import InputError
from demur.explain.mote import Expert, ExpertScores, Maps
from demur.explain.mote.maps import FloatArray
from demur.runtime.base import Progress, Runtime
from demur.stats import bootstrap_interval
from demur.types import Condition, Prompt

if TYPE_CHECKING:
    from demur.runtime.layers import ExpertEdit
    from demur.runtime.local import LocalRuntime

Mode = Literal["post_topk_renorm", "pre_topk", "output_gain"]
SMALLEST = 0.1
"""A mean fall of P(refuse) below this is not called localisation, whatever random masks do."""
DRAWS = 200
"""Random masks."""


class Experts:
    """Routed experts off (or scaled, or forced in) at all positions of prompt and answer.

    Args:
        experts: (layer, expert) pairs, both from 0.
        mode: "post_topk_renorm": weight 0 after the choice, the token's other experts share it (default).
            "pre_topk": cannot be chosen, the next best moves in. "output_gain": output times `gain`.
        gain: of "output_gain"; 0 takes the expert out, above 1 strengthens it.
        stimulate: force them in instead, each with the token's largest weight in place of its smallest.
        scores: `score_experts` of this model for the class of refusals. A change that it shows to raise refusal
            (more of experts that refusals use more, less of the others) needs no consent.
        allow_refusal_lowering: consent to any other change; it is logged and noted at the runtime.

    Raises:
        RefusalLowering: the change may lower refusal and nobody consented. InputError: no experts, a gain below 0
            or with another mode.

    >>> with Experts(scores.top(10), allow_refusal_lowering=True).on(runtime) as audited:  # doctest: +SKIP
    ...     after = list(audited.score(prompts))
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        mode: Mode = "post_topk_renorm",
        gain: float = 0.0,
        *,
        stimulate: bool = False,
        scores: ExpertScores | None = None,
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.experts, self.mode, self.gain, self.stimulate = tuple(experts), mode, gain, stimulate
        if not self.experts or mode not in ("post_topk_renorm", "pre_topk", "output_gain"):
            raise InputError(
                f"{len(self.experts)} experts, mode={mode!r}: at least one, and post_topk_renorm, pre_topk or "
                "output_gain"
            )
        if not 0 <= gain < np.inf or (gain and (stimulate or mode != "output_gain")):
            raise InputError(f"gain={gain}: a number from 0 on, for mode='output_gain' only")
        self.more = stimulate or gain > 1
        way = f"times {gain:g}" if mode == "output_gain" else f"off ({mode})"
        what = f"{len(self.experts)} experts {'forced in' if stimulate else way}"
        clear = scores is not None and all((scores.of(e) > 0) == self.more for e in self.experts)
        self.lowers = None if clear else consent(what, allow_refusal_lowering)
        self.what = what

    def edit(self, experts: Sequence[Expert] | None = None) -> ExpertEdit:
        """The change of the forward pass, for other experts where they are given."""
        from demur.runtime.layers import ExpertEdit

        return ExpertEdit(experts or self.experts, "force" if self.stimulate else self.mode, self.gain)

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """The runtime with the experts changed; the given one stays as it was.

        Raises:
            CapabilityError: no local mixture-of-experts model. InputError: an expert that it does not have, or too
                many of one layer (both at the first pass).
        """
        runtime.require("states", "intervene")
        yield view(runtime, [self.edit()], self.what, self.lowers)


def matched_masks(
    maps: Maps, experts: Sequence[Expert], draws: int = DRAWS, *, near: int | None = None, seed: int = 0
) -> list[list[Expert]]:
    """Random masks of equal size: for each expert another one of its layer that these prompts use about as often.

    Args:
        maps: the prompts that say how often (refused and answered ones). near: each expert's stand-in is drawn from
            so many whose use is closest, none of `experts` among them; default a quarter of a layer, at least 3.

    Raises:
        InputError: a layer has too few other experts.
    """
    use = maps.values.mean(0)
    size = near or max(3, use.shape[1] // 4)
    rng = np.random.default_rng([seed, 21])
    pools = {}
    for layer, expert in experts:
        row = use[maps.layers.index(layer)]
        others = [e for e in range(len(row)) if (layer, e) not in experts]
        pools[layer, expert] = sorted(others, key=lambda e: abs(row[e] - row[expert]))[:size]
    out: list[list[Expert]] = []
    for _ in range(draws):
        taken: list[Expert] = []
        for layer, expert in experts:
            free = [(layer, e) for e in pools[layer, expert] if (layer, e) not in taken]
            if not free:
                raise InputError(
                    f"{len(experts)} experts leave too few others in one of their layers to draw a random mask of "
                    "the same size; take fewer experts, or a larger `near`"
                )
            taken.append(free[rng.integers(len(free))])
        out.append(taken)
    return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskEffect:
    """P(refuse) at the first answer position of some prompts.

    Attributes:
        before, after: (n,) without the change and with it. random: (draws, n) with each random mask instead.
        k, of: experts changed, and routed experts of the model. raised: forced in rather than off.
    """

    before: FloatArray
    after: FloatArray
    random: FloatArray
    k: int
    of: int
    raised: bool = False

    @property
    def moved(self) -> FloatArray:
        """(n,) fall of P(refuse), or rise where experts were forced in."""
        return self.after - self.before if self.raised else self.before - self.after

    @property
    def random_moved(self) -> FloatArray:
        """(draws,) mean fall (rise) under each random mask."""
        change: FloatArray = (self.random - self.before).mean(1)
        return change if self.raised else -change

    @property
    def bound(self) -> float:
        """What 95 of 100 random masks stay below; 0 without masks."""
        return float(np.quantile(self.random_moved, 0.95)) if len(self.random) else 0.0

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % interval of the mean of `moved` over prompts."""
        return bootstrap_interval(np.mean, self.moved, n_boot=1000, seed=seed)

    @property
    def localised(self) -> bool:
        """Whether the mean is at least `SMALLEST` and its interval lies above `bound`."""
        return bool(self.moved.mean() >= SMALLEST and self.interval()[0] > self.bound)

    def text(self) -> str:
        """What was found, in one sentence, without naming experts."""
        low, high = self.interval()
        done = "Forcing in" if self.raised else "Switching off"
        way = "raises" if self.raised else "lowers"
        facts = (
            f"{done} {self.k} of {self.of} routed experts ({self.k / self.of:.2%}) {way} P(refuse) on "
            f"{len(self.before)} prompts by {self.moved.mean():.3f} [{low:.3f}, {high:.3f}]; of "
            f"{len(self.random)} matched random masks 95 % stay below {self.bound:.3f}."
        )
        if self.localised:
            return facts
        facts = facts[0].lower() + facts[1:]
        if self.raised:
            return f"No rise to speak of: {facts}"
        return f"No localisation: {facts} These experts are not where refusal is carried."


def mask_effect(
    runtime: LocalRuntime,
    prompts: Sequence[Prompt],
    change: Experts,
    masks: Sequence[Sequence[Expert]],
    condition: Condition | None = None,
    *,
    progress: Progress | None = None,
) -> MaskEffect:
    """P(refuse) under a change of experts, and under the same change of each mask; one pass a prompt and mask.

    Raises:
        CapabilityError: a model that thinks before it answers has no first-position probability.
    """
    from demur.runtime import batching
    from demur.runtime.layers import find_routers

    runtime.require("score", "intervene")
    runtime.chat.require_decision()
    condition = condition or Condition()
    windows = [
        [(p, runtime.chat.render(p.with_system(condition.system)).ids) for p in window]
        for window in batching.windows(prompts)
    ]
    for p, ids in (row for window in windows for row in window):
        runtime.check_fits(p, ids, 1)

    def refusal(*edits: ExpertEdit) -> list[float]:
        at = runtime.with_edits(*edits)
        return [s.p_refuse for window in windows for s in at.score_rows(window, condition)]

    before, after = refusal(), refusal(change.edit())
    random = []
    for done, mask in enumerate(masks, 1):
        random.append(refusal(change.edit(mask)))
        if progress is not None:
            progress(done, len(masks))
    return MaskEffect(
        before=np.array(before),
        after=np.array(after),
        random=np.array(random).reshape(len(masks), len(before)),
        k=len(change.experts),
        of=sum(r.experts for r in find_routers(runtime.model)),
        raised=change.more,
    )


def within_slots(experts: Sequence[Expert], chosen: int) -> list[Expert]:
    """The first experts of each layer that can be forced in together, at most `chosen` of a layer.

    >>> within_slots([(0, 1), (0, 2), (0, 3), (1, 1)], 2)
    [(0, 1), (0, 2), (1, 1)]
    """
    out: list[Expert] = []
    for layer, expert in experts:
        if sum(k == layer for k, _ in out) < chosen:
            out.append((layer, expert))
    return out

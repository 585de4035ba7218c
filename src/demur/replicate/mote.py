"""Are the experts that carry refusal found, and are experts that only follow the topic told from them? For mote.

Two organisms a seed: in one, refusal goes through one expert that is known; in the other, routing follows the topic
and no few experts carry refusal. The ranking is told neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from demur.replicate.spec import Anchor, Baseline, Claim, Context, Control, Spec, Value

K = 3
"""Experts that are switched off, of 48."""
MASKS, RANKS = 200, 20
"""Random masks; ranks made from labels that hold nothing of the response."""
PARTS = ("refused", "refused_report", "answered", "told")


def run(context: Context) -> Mapping[str, Value]:
    """Measure one seed."""
    from demur.organisms import experts as world_of

    recipe = dataclasses.replace(world_of.RECIPE, seed=context.seed)
    planted = world_of.grow_experts("planted", recipe, progress=context.progress)
    topic = world_of.grow_experts("topic", recipe, progress=context.progress)
    out = {f"entry_{p}": Value(value=min(planted.checks[p], topic.checks[p])) for p in PARTS}
    bench, other = Bench(planted), Bench(topic)
    out |= _found(bench, world_of.planted_expert(recipe)) | _off(bench, context) | _on(bench, context)
    fall = other.effect(other.off(), other.refused, other.masks(MASKS, context.seed))
    check = other.topics()
    context.progress("topic organism", 1, 1)
    return out | {
        "topic_fall": _mean(fall.moved),
        "topic_says_none": Value.of([float(not fall.localised)]),
        "topic_follows": _share(check),
        "topic_permuted": Value.of([float(other.permuted().p_value < 0.05)]),
    }


class Bench:
    """One organism with its questions, labels by its own answers, maps and ranking."""

    def __init__(self, organism: Any) -> None:
        from demur.explain.mote import resonance_maps, score_experts
        from demur.organisms.experts import PlaceWorld, runtime_of

        world = PlaceWorld()
        self.organism, self.world, self.runtime = organism, world, runtime_of(organism)
        self.fit = world.questions("train", template="happened")
        self.labels, self.maps = self.label(self.fit), resonance_maps(self.runtime, self.fit)
        self.scores = score_experts(self.maps, self.labels)
        self.top = self.scores.top(K)
        test = world.questions("test", template="happened")
        said = self.label(test)
        self.refused = [p for p, x in zip(test, said, strict=True) if x == "refused"]
        self.answered = [p for p, x in zip(test, said, strict=True) if x == "answered"]

    def label(self, prompts: Sequence[Any]) -> list[str | None]:
        """Response classes, by the organism's own answers."""
        from demur.explain.mote import label_by_response
        from demur.types import Condition

        short = Condition(max_new_tokens=3)
        return label_by_response(self.runtime, prompts, "first_token/control-v1", short)[0]

    def off(self, **mode: Any) -> Any:
        """The top experts switched off."""
        from demur.control.experts import Experts

        return Experts(self.top, **mode, allow_refusal_lowering=True)

    def effect(self, change: Any, prompts: Any, masks: Any = ()) -> Any:
        """P(refuse) under a change of experts and under that of each mask."""
        from demur.control.experts import mask_effect

        return mask_effect(self.runtime, prompts, change, masks)

    def masks(self, n: int, seed: int) -> Any:
        """Matched random experts instead of the top ones."""
        from demur.control.experts import matched_masks

        return matched_masks(self.maps, self.top, n, seed=seed)

    def topics(self) -> Any:
        """Whether the top experts follow the refusal or the topic."""
        from demur.explain.mote import resonance_maps, topic_check

        tests = []
        for template in ("happened", "where"):
            some = self.world.questions("test", template=template)
            topics = [p.meta["topic"] for p in some]
            tests.append((resonance_maps(self.runtime, some), self.label(some), topics))
        return topic_check(self.top, *tests)

    def permuted(self) -> Any:
        """Mean score of the top experts beside permuted labels, moved place by place."""
        from demur.explain.mote import permuted

        return permuted(self.maps, self.labels, k=K, topics=[p.meta["topic"] for p in self.fit])


def _mean(items: Any) -> Value:
    return Value.of(np.asarray(items, float).tolist(), same_items=True)


def _share(check: Any) -> Value:
    se = (check.high - check.low) / 3.92
    return Value(value=check.share, se=se if np.isfinite(se) else None, n=sum(check.n))


def _found(bench: Bench, planted: tuple[int, int]) -> dict[str, Value]:
    null = bench.permuted()
    return {
        "planted_top": Value.of([float(planted in bench.top)]),
        "permuted_p": Value(value=null.p_value, n=null.draws),
        "share": _share(bench.topics()),
    }


def _off(bench: Bench, context: Context) -> dict[str, Value]:
    from demur.explain.mote import score_experts, top_used, unrelated_labels

    change, refused = bench.off(), bench.refused
    effect = bench.effect(change, refused, bench.masks(MASKS, context.seed))
    report = bench.world.questions("test", template="report", closed=True)
    rng = np.random.default_rng([context.seed, 13])
    made = [unrelated_labels([str(x) for x in bench.labels], rng) for _ in range(RANKS)]
    ranks = [score_experts(bench.maps, labels).top(K) for labels in made]
    others = bench.effect(change, refused, [*ranks, top_used(bench.maps, bench.labels, K)])
    context.progress("experts off", 1, 1)
    return {
        "fall": _mean(effect.moved),
        "excess": _mean(effect.moved - effect.bound),
        "fall_pre_topk": _mean(bench.effect(bench.off(mode="pre_topk"), refused).moved),
        "fall_gain": _mean(bench.effect(bench.off(mode="output_gain"), refused).moved),
        "fall_report": _mean(bench.effect(change, report).moved),
        "harmless": _mean(-bench.effect(change, bench.answered).moved),
        "lost": _mean(_lost(bench, change)),
        "fall_random": _mean((effect.before - effect.random).mean(0)),
        "fall_unrelated": _mean((others.before - others.random[:RANKS]).mean(0)),
        "fall_used": _mean(others.before - others.random[RANKS]),
    }


def _lost(bench: Bench, change: Any) -> list[float]:
    """For each answered question: 1 if its right answer is lost under the change, -1 if it is gained."""
    from demur.types import Condition

    def right(runtime: Any) -> list[bool]:
        replies = runtime.generate(bench.answered, Condition(max_new_tokens=3))
        last = [r.content.split()[-1:] for r in replies]
        return [got == p.meta["answer"].split()[-1:] for p, got in zip(bench.answered, last, strict=True)]

    before = right(bench.runtime)
    with change.on(bench.runtime) as masked:
        after = right(masked)
    return [float(a) - float(b) for a, b in zip(before, after, strict=True)]


def _on(bench: Bench, context: Context) -> dict[str, Value]:
    from demur.control.experts import Experts, within_slots

    chosen = bench.maps.chosen
    change = Experts(within_slots(bench.top, chosen), stimulate=True, scores=bench.scores)
    masks = [within_slots(m, chosen) for m in bench.masks(MASKS // 4, context.seed)]
    asked = bench.world.questions("test", template="where", closed=False)
    where = list({p.text: p for p in asked}.values())  # they name no day, so each stands there for several
    effect = bench.effect(change, bench.answered, masks)
    context.progress("experts forced in", 1, 1)
    return {
        "rise": _mean(effect.moved),
        "rise_where": dataclasses.replace(_mean(bench.effect(change, where).moved), bounds=(-1, 1)),
        "rise_random": _mean((effect.random - effect.before).mean(0)),
    }


def recount() -> Mapping[str, float]:
    """The published counts, from the shape that transformers gives DeepSeek-V3 and R1."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config()
    experts = (config.num_hidden_layers - config.first_k_dense_replace) * config.n_routed_experts
    return {"r1_experts": experts, "r1_share": 100 * 10 / experts}


SPEC = Spec(
    slug="mote",
    claims=(
        Claim(key="planted_top", text="the planted expert is among the top 3 of 48", at_least=1.0),
        Claim(
            key="permuted_p",
            text="mean score of the top 3 beside labels permuted place by place (p value)",
            at_most=0.05,
            null=0.5,
        ),
        Claim(
            key="fall",
            text="top 3 off: fall of P(refuse) on unseen refused questions",
            at_least=0.3,
            null=0.0,
        ),
        Claim(
            key="excess",
            text="the same fall minus what 95 of 100 matched random masks stay below",
            at_least=0.2,
            null=0.0,
        ),
        Claim(key="fall_pre_topk", text="the same fall, next best moves in", at_least=0.3, null=0.0),
        Claim(key="fall_gain", text="the same fall, outputs times 0", at_least=0.3, null=0.0),
        Claim(
            key="fall_report",
            text="the same fall on refused questions of a second template",
            at_least=0.3,
            null=0.0,
        ),
        Claim(key="harmless", text="top 3 off: rise of P(refuse) on unseen answered questions", at_most=0.05),
        Claim(key="lost", text="top 3 off: right answers lost on answered questions", at_most=0.05),
        Claim(
            key="rise",
            text="top experts forced in: rise of P(refuse) on unseen answered questions",
            at_least=0.1,
            null=0.0,
        ),
        Claim(
            key="rise_where",
            text="the same rise on a way to ask that is never refused (in training too)",
            at_least=0.1,
            null=0.0,
        ),
        Claim(
            key="share",
            text="how much of the top experts' score the topic alone makes (second template, answered)",
            at_most=0.5,
            null=1.0,
        ),
        Claim(key="topic_follows", text="the same share in the topic organism", at_least=0.5, null=0.0),
        Claim(
            key="topic_permuted",
            text="topic organism: a permutation test sees a difference",
            at_least=1.0,
        ),
        Claim(
            key="topic_says_none",
            text="topic organism: the tool says no localisation",
            at_least=1.0,
        ),
    ),
    controls=(
        Control(
            key="fall_random",
            text="matched random masks: mean fall of P(refuse) on refused questions",
            null=0.0,
            margin=0.1,
            against="fall",
        ),
        Control(
            key="fall_unrelated",
            text="top 3 by labels that hold nothing of the response: the same fall, mean over 20 ranks",
            null=0.0,
            margin=0.1,
            against="fall",
        ),
        Control(
            key="topic_fall",
            text="top 3 off in the topic organism: the same fall",
            null=0.0,
            margin=0.1,
            against="fall",
        ),
        Control(
            key="rise_random",
            text="matched random experts forced in: mean rise of P(refuse) on answered questions",
            null=0.0,
            margin=0.033,
            against="rise",
        ),
    ),
    baselines=(
        Baseline(
            key="fall_used",
            text="3 experts that refused questions use most, without a contrast",
            against="fall",
        ),
    ),
    anchors=(
        Anchor(key="r1_experts", text="DeepSeek-R1: 58 layers of 256 routed experts", expected=14848),
        Anchor(
            key="r1_share",
            text="10 of these, in percent (published: 0.07)",
            expected=0.07,
            tolerance=0.005,
        ),
    ),
    entry=tuple(
        Claim(key=f"entry_{p}", text=f"both organisms: {text}", at_least=0.95)
        for p, text in zip(
            PARTS,
            (
                "closed places refused",
                "closed places refused under the second template",
                "open places answered, both words right",
                "closed places told where they lie",
            ),
            strict=True,
        )
    ),
    run=run,
    recount=recount,
    seeds=5,
    files=(
        "organisms/experts.py",
        "explain/mote/maps.py",
        "explain/mote/rows.py",
        "explain/mote/scoring.py",
        "control/experts.py",
        "runtime/layers.py",
    ),
    minutes=0.8,
    notes=(
        "The expert is planted: training takes refusal through it and also shows, on one of three ways to ask, "
        "that forcing it in refuses. What is checked is that the tool finds it and moves it, and does not take "
        "topic experts for it; how a model of its own accord spreads refusal over experts is not shown.",
        "Settings were chosen on organisms 9, 10 and 11. In a first form of the planted organism, without lessons "
        "on forcing the expert in, taking it out lowered P(refuse) by 0.997 and forcing it in raised it by 0.001 "
        "to 0.017: what carries refusal need not be enough for it.",
        "The control with unrelated labels calls half of each true class refused. Plain permutations put the "
        "planted expert into the top 3 in 19 to 25 of 100 draws, since its use varies most between these prompts, "
        "so masks from them would do more than random ones.",
        "The questions are the same for every seed; organisms differ.",
    ),
)

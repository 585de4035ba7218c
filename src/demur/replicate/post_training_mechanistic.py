"""Does the comparison of two checkpoints find what further training changed, and only that? Facts, truth, refusal,
confidence, on copies of one base that differ in one known way each; and the figures of the paper's shipped files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.replicate.post_training_anchors import ANCHORS, recount
from demur.replicate.spec import Baseline, Claim, Context, Control, Spec, Value

FloatArray = npt.NDArray[np.float64]
PAIRS = 48
STATEMENTS = 60
DOSE = 1.0
LAYER = 2
"""Where the refusal directions of the organism are read and added: the third of four blocks."""
BITS = 300
"""Resamples behind a standard error."""
PERMUTED = 100
RANDOM = 8
"""Directions fitted on permuted labels, for each relation left out, and random ones for each change of refusals."""


def run(context: Context) -> Mapping[str, Value]:
    """Measure one seed."""
    from demur.organisms import facts

    world = facts.World(seed=context.seed)
    grown: dict[str, Any] = {}
    for i, kind in enumerate(facts.KINDS):
        context.progress("organisms", i, len(facts.KINDS))
        grown[kind] = facts.raise_world(world, kind)
    context.progress("organisms", len(facts.KINDS), len(facts.KINDS))
    out = {
        f"{kind}_{name}": Value(value=organism.checks[name])
        for kind, organism in grown.items()
        for name in ("verdict", "request")
    }
    runtimes: dict[str, Any] = {kind: organism.runtime() for kind, organism in grown.items()}
    out |= measure_maps(runtimes, world, context.seed)
    context.progress("measures", 1, 4)
    out |= measure_truth(runtimes, world, context.seed)
    context.progress("measures", 2, 4)
    out |= measure_refusal(runtimes, world, context.seed)
    context.progress("measures", 3, 4)
    out |= measure_entropy(grown, world, context.seed)
    context.progress("measures", 4, 4)
    return out


def measure_maps(runtimes: Mapping[str, Any], world: Any, seed: int) -> dict[str, Value]:
    """Likeness of patch maps: the format copy against the base, and the moved copy on moved and unmoved facts."""
    from demur.explain.post_training.maps import binned, pearson, shuffled
    from demur.explain.post_training.statements import Pair
    from demur.explain.post_training.tracing import align, trace

    tokenizer = runtimes["base"].tokenizer

    def cells(kind: str, drawn: Sequence[tuple[str, str]], source: str | None = None) -> FloatArray:
        aligned = align(tokenizer, [Pair(true=t, false=f) for t, f in drawn])
        found = trace(runtimes[kind], aligned, source=None if source is None else runtimes[source])
        return found.cells

    drawn = {among: world.pairs(PAIRS, seed, among) for among in ("all", "stayed", "reversed", "lost")}
    maps = {(k, d): cells(k, drawn[d]) for k in ("base", "moved") for d in ("stayed", "reversed", "lost")}
    base, tuned = cells("base", drawn["all"]), cells("format", drawn["all"])
    into = {s: cells(t, drawn["all"], s) for s, t in (("base", "format"), ("format", "base"))}
    alike = _correlation(base, tuned)
    drop = _correlation(
        *(maps[k, "stayed"] for k in ("base", "moved")), *(maps[k, "reversed"] for k in ("base", "moved"))
    )
    null = [_shuffle(base, tuned, k) for k in range(100)]
    return {
        "map_format": alike,
        "map_stayed": _correlation(maps["base", "stayed"], maps["moved", "stayed"]),
        "map_drop": drop,
        "map_lost": _correlation(maps["base", "lost"], maps["moved", "lost"]),
        "map_lost_span": Value(
            value=float(np.ptp(maps["moved", "lost"].mean(0)) / np.ptp(maps["base", "lost"].mean(0)))
        ),
        "map_binned": Value(value=pearson(binned(base.mean(0)), binned(tuned.mean(0))), bounds=(-1, 1)),
        "map_shuffled": Value.of(null),
        "map_shuffled_size": Value(value=shuffled(base.mean(0), tuned.mean(0))),
        "cross_base_format": _correlation(tuned, into["base"]),
        "cross_format_base": _correlation(base, into["format"]),
    }


def _shuffle(a: FloatArray, b: FloatArray, seed: int) -> float:
    from demur.explain.post_training.maps import pearson

    dealt = np.random.default_rng(seed).permutation(b.mean(0).ravel())
    return pearson(a.mean(0), dealt) or 0.0


def _correlation(
    a: FloatArray, b: FloatArray, c: FloatArray | None = None, d: FloatArray | None = None
) -> Value:
    """Pearson of the mean maps a and b, minus that of c and d where given, with its error over pairs."""
    from demur.explain.post_training.maps import pearson

    def of(rows: Any, others: Any) -> float:
        first = pearson(a[rows].mean(0), b[rows].mean(0)) or 0.0
        return (
            first
            if c is None or d is None
            else first - (pearson(c[others].mean(0), d[others].mean(0)) or 0.0)
        )

    rng, n = np.random.default_rng(0), len(a)
    drawn = [of(rng.integers(0, n, n), rng.integers(0, n, n)) for _ in range(BITS)]
    everything = np.arange(n)
    most = 1 if c is None else 2
    return Value(value=of(everything, everything), se=float(np.std(drawn)), n=n, bounds=(-most, most))


def measure_truth(runtimes: Mapping[str, Any], world: Any, seed: int) -> dict[str, Value]:
    """Truth directions of base and format copy: cosine, transfer to the relation left out, effect."""
    from demur.explain.post_training.statements import Statement
    from demur.explain.post_training.truth import compare_effects, compare_truth, text_states

    drawn = world.statements(STATEMENTS, seed)
    sets = {name: [Statement(text=t, true=y) for t, y in rows] for name, rows in drawn.items()}
    both = {"base": runtimes["base"], "tuned": runtimes["format"]}
    states = {m: text_states(r, sets) for m, r in both.items()}
    found = compare_truth(states, sets, seed=seed)
    held = next(iter(sets))
    layer = next(t.layer for t in found.transfer if t.held_out == held)
    effects, _ = compare_effects(both, states, sets, held, layer, before="", question="", seed=seed)
    behind, _ = compare_effects(both, states, sets, held, layer, before="", seed=seed)
    nie = {(e.vector, e.model): e for e in effects}
    own, across = found.accuracy("base", "base"), found.accuracy("base", "tuned")
    return {
        "theta_cosine": Value(value=found.cosines[found.layer], bounds=(-1, 1)),
        "truth_own": _share(own),
        "truth_across": _share(across),
        "truth_train_centred": _share(found.accuracy("base", "tuned", "train")),
        "truth_words": Value.of(
            [hit for r in found.bag_of_words.values() for hit in [1.0] * r.k + [0.0] * (r.n - r.k)]
        ),
        "truth_random": Value.of(_permuted(states["base"], sets, found, seed)),
        "nie_across": _effect(nie["base", "tuned"]),
        "nie_question": _effect(next(e for e in behind if (e.vector, e.model) == ("base", "tuned"))),
        "nie_own": _effect(nie["base", "base"]),
        "nie_random": _effect(nie["random", "tuned"]),
    }


def _permuted(states: Mapping[str, Any], sets: Mapping[str, Any], found: Any, seed: int) -> list[float]:
    """Accuracy of `PERMUTED` directions fitted on permuted labels, for each relation left out."""
    from demur.explain.post_training.truth import permuted

    own = {k: X - X.mean(0) for k, X in states.items()}
    y = {k: np.array([s.true for s in rows]) for k, rows in sets.items()}
    layer = {t.held_out: t.layer for t in found.transfer}
    return [
        right
        for held in sets
        for right in permuted(
            own, y, [k for k in sets if k != held], held, layer[held], draws=PERMUTED, seed=seed
        )
    ]


def _share(r: Any) -> Value:
    return Value.of([1.0] * r.k + [0.0] * (r.n - r.k))


def _effect(e: Any) -> Value:
    return Value(value=e.mean, se=None if e.low is None else (e.high - e.low) / 3.92, n=e.n)


def measure_refusal(runtimes: Mapping[str, Any], world: Any, seed: int) -> dict[str, Value]:
    """The refusing copy's direction added to itself and to the base, ablated in itself, and random ones."""
    from demur.explain.post_training.refusal import compare_refusal

    found = compare_refusal(
        {"base": runtimes["base"], "tuned": runtimes["refusing"]},
        world.requests("fit"),
        world.requests("test"),
        layer=LAYER,
        doses=(DOSE / 2, DOSE),
        allow_refusal_lowering=True,
        random=RANDOM,
        judge=lambda _prompt, reply: reply.content.startswith("Sorry"),
        seed=seed,
    )
    rate: dict[tuple[str, str, str], Any] = {
        (s.vector, s.model, s.change): s.refused for s in found.steered if s.dose != DOSE / 2
    }
    half = {(s.vector, s.model): s.refused for s in found.steered if (s.change, s.dose) == ("add", DOSE / 2)}

    def less(name: str, change: str) -> Value:
        a, b = rate["none", "tuned", "subtract"], rate[name, "tuned", change]
        items = [1.0] * (a.k - b.k) + [0.0] * (a.n - a.k + b.k) if a.k >= b.k else [-1.0] * (b.k - a.k)
        return Value.of(items + [0.0] * (a.n - len(items)))

    layer = found.layer
    return {
        "refusing_refuses": _share(rate["none", "tuned", "subtract"]),
        "refusal_add": _share(rate["tuned", "tuned", "add"]),
        "refusal_half": _share(half["tuned", "tuned"]),
        "refusal_half_base": _share(half["tuned", "base"]),
        "refusal_add_base": _share(rate["tuned", "base", "add"]),
        "refusal_add_random": _share(rate["random", "tuned", "add"]),
        "refusal_subtract": less("tuned", "subtract"),
        "refusal_subtract_random": less("random", "subtract"),
        "refusal_ablate": less("tuned", "ablate"),
        "refusal_ablate_random": less("random", "ablate"),
        "refusal_auroc_base": Value(value=found.auroc["base"]["t_post"][layer], bounds=(0, 1)),
        "refusal_cosine": Value(value=found.cosines["t_post"][layer], bounds=(-1, 1)),
    }


def measure_entropy(grown: Mapping[str, Any], world: Any, seed: int) -> dict[str, Value]:
    """A planted neuron: is it found, and does scaling it change the entropy and no argmax?"""
    from demur.explain.post_training.entropy import ScaleNeuron, candidates, output_rows, unembedding
    from demur.organisms.facts import plant_entropy_neuron
    from demur.runtime.local import LocalRuntime

    rows = lines(grown["base"].tokenizer, world, seed)
    out: dict[str, Value] = {}
    for name, silent in (("planted", True), ("loud", False)):
        found, shift, moved = [], [], []
        for kind in ("base", "format"):
            model, index = plant_entropy_neuron(grown[kind].model, rows, silent=silent, seed=seed)
            runtime = LocalRuntime(model, grown[kind].tokenizer, name=kind)
            first = [n.index for n in candidates(output_rows(runtime), unembedding(runtime))]
            found.append(float(first[:1] == [index]))
            off, on = (_logits(runtime.with_edits(ScaleNeuron(index, f)), rows) for f in (0.0, 2.0))
            shift.append(float(np.abs(_entropy(on) - _entropy(off)).mean()))
            moved += (on.argmax(-1) != off.argmax(-1)).mean(1).tolist()  # one item a line
        out |= {
            f"neuron_{name}_found": Value.of(found),
            f"neuron_{name}_entropy": Value(value=float(np.mean(shift))),
            f"neuron_{name}_argmax": Value.of(moved),
        }
    return out


def lines(tokenizer: Any, world: Any, seed: int) -> npt.NDArray[np.int64]:
    """Token ids (n, T) of statements with the question."""
    from demur.explain.post_training.statements import SUFFIX

    texts = [t + SUFFIX for rows in world.statements(16, seed + 1).values() for t, _ in rows]
    return np.array(tokenizer(texts)["input_ids"])


def _logits(runtime: Any, rows: npt.NDArray[np.int64]) -> FloatArray:
    import torch

    with runtime.edited():
        found: FloatArray = runtime.model(input_ids=torch.from_numpy(rows)).logits.double().numpy()
    return found


def _entropy(logits: FloatArray) -> FloatArray:
    from scipy.special import log_softmax

    logp = log_softmax(logits, axis=-1)
    return np.asarray(-(np.exp(logp) * logp).sum(-1))


def _entry(kind: str, what: str) -> tuple[Claim, ...]:
    return tuple(
        Claim(key=f"{kind}_{name}", text=f"{what}: {lines} answered as trained", at_least=0.95)
        for name, lines in (("verdict", "verdicts"), ("request", "requests"))
    )


SPEC = Spec(
    slug="post-training-mechanistic",
    claims=(
        Claim(key="map_format", text="maps of base and format copy: Pearson", at_least=0.9, null=0.0),
        Claim(
            key="map_stayed",
            text="facts that did not move: Pearson of base and moved",
            at_least=0.8,
            null=0.0,
        ),
        Claim(
            key="map_drop",
            text="the same minus Pearson on facts that moved from one entity of a pair to the other",
            at_least=0.5,
            null=0.0,
        ),
        Claim(
            key="theta_cosine",
            text="truth directions of base and format copy: cosine",
            at_least=0.8,
            null=0.0,
        ),
        Claim(
            key="truth_across",
            text="the base's direction on the format copy, relation left out: accuracy",
            at_least=0.9,
            null=0.5,
        ),
        Claim(
            key="nie_across",
            text="the base's direction in the format copy, relation left out: effect on verdicts (NIE)",
            at_least=0.4,
            null=0.0,
        ),
        Claim(
            key="refusal_add",
            text="refusing copy, its direction added: harmless refused",
            at_least=0.5,
            null=0.0,
        ),
        Claim(
            key="refusal_subtract",
            text="refusing copy, its direction subtracted: fewer harmful refused",
            at_least=0.5,
            null=0.0,
        ),
        Claim(
            key="refusal_ablate",
            text="refusing copy, its direction ablated: fewer harmful refused",
            at_least=0.5,
            null=0.0,
        ),
        Claim(
            key="neuron_planted_found",
            text="planted entropy neuron: lowest LogitVar of the long quarter",
            at_least=1.0,
            null=0.0,
        ),
        Claim(
            key="neuron_planted_entropy",
            text="activation doubled against off: change of entropy (nats)",
            at_least=0.5,
            null=0.0,
        ),
        Claim(
            key="neuron_loud_argmax",
            text="the same neuron along a random direction: likeliest token changes",
            at_least=0.1,
            null=0.0,
        ),
    ),
    controls=(
        Control(
            key="map_shuffled",
            text="Pearson with cells dealt out anew",
            null=0.0,
            margin=0.15,
            against="map_format",
        ),
        Control(
            key="truth_random",
            text="accuracy of directions fitted on permuted labels",
            null=0.5,
            margin=0.13,
            against="truth_across",
        ),
        Control(
            key="refusal_add_base",
            text="the refusing copy's direction added to the base: harmless refused",
            null=0.0,
            margin=0.15,
            against="refusal_add",
        ),
        Control(
            key="refusal_add_random",
            text="a random direction as long added to the refusing copy: harmless refused",
            null=0.0,
            margin=0.15,
            against="refusal_add",
        ),
        Control(
            key="refusal_subtract_random",
            text="a random direction subtracted: fewer harmful refused",
            null=0.0,
            margin=0.15,
            against="refusal_subtract",
        ),
        Control(
            key="refusal_ablate_random",
            text="a random direction ablated: fewer harmful refused",
            null=0.0,
            margin=0.15,
            against="refusal_ablate",
        ),
        Control(
            key="neuron_planted_argmax",
            text="planted neuron doubled against off: likeliest token changes",
            null=0.0,
            margin=0.03,
            against="neuron_loud_argmax",
        ),
    ),
    baselines=(
        Baseline(key="truth_words", text="bag of words, relation left out", against="truth_across"),
        Baseline(key="nie_random", text="random vectors as long", against="nie_across"),
    ),
    anchors=ANCHORS,
    entry=(
        *_entry("base", "base"),
        *_entry("format", "format copy"),
        *_entry("refusing", "refusing copy"),
        *_entry("moved", "moved copy"),
    ),
    run=run,
    recount=recount,
    seeds=9,
    files=(
        "organisms/facts.py",
        "organisms/training.py",
        "replicate/post_training_anchors.py",
        "explain/post_training/tracing.py",
        "explain/post_training/maps.py",
        "explain/post_training/truth.py",
        "explain/post_training/refusal.py",
        "explain/post_training/entropy.py",
    ),
    minutes=1.2,
    notes=(
        "The organism's settings, the goals and the margins were chosen on seeds 9 and 10; it runs on 0 to 8.",
        "On those seeds the base was made to answer harmful topics with another word, since without that the "
        "refusing copy's direction could be added but not ablated.",
        "The refusing copy's direction added to the base: on seeds 9 and 10 it did next to nothing (0 and 1 of 24 "
        "refused), so silence was expected; on the seeds of the check it does not hold. At half the dose (looked "
        "at afterwards) the base refuses 0 of 24 on seeds 0 to 2, 9 and 10, and the refusing copy 23, 6, 8, 18 "
        "and 0: the direction carries over, at a higher dose. Where the base learns to repeat the words of a "
        "refusal (World(taught=True)), it refused 24 of 24 on seeds 9 and 10 too.",
        "A first run had three seeds, one random direction and 20 permutations a seed, and its intervals were too "
        "wide to tell. Then there were five seeds, 8 random directions, among which the requests are dealt out, "
        "and 100 permutations for each relation left out. Claims, goals and margins stayed.",
        "Nine seeds, where there were five: at five the intervals of some controls were wider than their margins "
        "and could not tell. Claims, goals, margins and settings stayed, and seeds 5 to 8 had not been looked at.",
        "Facts that moved are tested on pairs whose fact went from one entity to the other. Where both statements "
        "have become false, the map keeps its shape (Pearson 0.84 to 0.94 on seeds 9 and 10) at an eighth of its "
        "size.",
        "The effect of the truth direction is measured on verdicts right behind the full stop. Behind the question "
        "the organism reads entity and object anew, and the direction at the full stop does nothing (NIE 0.00).",
        "Random vectors are drawn where states vary within a class; NIE does not start at 0 for them, because a "
        "verdict that is only disturbed counts as half turned.",
    ),
)

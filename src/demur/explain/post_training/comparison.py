"""Two checkpoints of one architecture, compared inside: facts, truth, refusal, confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.errors import CapabilityError, DataUnavailable, InputError
from demur.explain.post_training.noise import Noise
from demur.explain.post_training.results import Comparison, Confidence, Knowledge, Refusal, Truth
from demur.explain.post_training.statements import (
    COMPLETIONS,
    FEW_SHOT,
    Pair,
    Statement,
    completions,
    load_pairs,
    load_statements,
    unasked,
)
from demur.types import Card, Prompt, Rate

if TYPE_CHECKING:
    from demur.explain.post_training.tracing import Trace
    from demur.runtime.base import Runtime
    from demur.runtime.local import LocalRuntime

CARD = Card(
    slug="post-training-mechanistic",
    title="What post-training changed inside",
    room="explain",
    tier="lab",
    paper="How Post-Training Reshapes LLMs: A Mechanistic View on Knowledge, Truthfulness, Refusal, and Confidence",
    url="https://arxiv.org/abs/2504.02904",
    files=(
        "explain/post_training/comparison.py",
        "explain/post_training/tracing.py",
        "explain/post_training/noise.py",
        "explain/post_training/truth.py",
        "explain/post_training/refusal.py",
        "explain/post_training/entropy.py",
        "organisms/facts.py",
    ),
    needs=("states", "generate", "intervene"),
    summary="Base against tuned: maps of facts, truth and refusal directions, entropy neurons; what carries over.",
    replicate="post-training-mechanistic",
)

PARTS = ("knowledge", "truth", "refusal", "confidence")
Stage = Callable[[str, int, int | None], None]
Requests = tuple[Sequence[Prompt], Sequence[Prompt]]
"""(harmful, harmless)."""
KNOWS = 0.6
"""Share of right signs below which asking for a verdict shows nothing, so sentences are completed instead."""
PAIRS = 40


def compare(
    base: Runtime,
    tuned: Runtime,
    *,
    parts: Sequence[str] = PARTS,
    pairs: Sequence[Pair] | None = None,
    before: str | None = None,
    question: bool = True,
    noise: Noise | None = None,
    statements: Mapping[str, Sequence[Statement]] | None = None,
    fit: Requests | None = None,
    test: Requests | None = None,
    max_pairs: int | None = PAIRS,
    cross: bool = False,
    layer: int | None = None,
    steer: int = 24,
    doses: Sequence[float] = (1.0, 2.0),
    allow_refusal_lowering: bool = False,
    judge: Any = None,
    seed: int = 0,
    progress: Stage | None = None,
) -> Comparison:
    """What a tuned model does differently from its base inside.

    Both must be local, with one tokenizer and as many layers of the same width; a base and the same base with an
    adapter are two runtimes like any others.

    Args:
        parts: which analyses to make, of `PARTS`.
        pairs: for the maps of facts; default the public pairs of cities, asked for a verdict if both models tell
            true from false that way, else as sentences to be completed. before: examples in front of them.
        question: False never asks for a verdict and completes the sentences (`statements.unasked` for your own).
        noise: disturb the subject of the true statements instead of taking the false ones.
        statements: sets for the truth direction, at least three; default the public six.
        fit, test: (harmful, harmless) requests; default the safety prompts of the shipped corpus, parts train
            and test, against as many look-alikes and ordinary ones.
        max_pairs: pairs traced. cross: also patch each model's states into the other.
        layer, doses, steer, judge: of `compare_refusal`. allow_refusal_lowering: subtract and ablate the refusal
            directions too.
        progress: called with a stage's name, how much is done, of how much.

    Raises:
        InputError: the models do not fit together, an unknown part, too few pairs, statements or requests.
        CapabilityError: a model that is not local. MissingExtra: scikit-learn is not installed.

    >>> base, tuned = load_runtime("smollm2"), load_runtime("demur-smollm2")  # doctest: +SKIP
    >>> compare(base, tuned).refusal.cosines["t_post"]  # doctest: +SKIP
    """
    both = {"base": local(base), "tuned": local(tuned)}
    if unknown := [p for p in parts if p not in PARTS]:
        raise InputError(f"part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    layers, width = _matched(both)
    notes: list[str] = []

    def part(name: str, measure: Callable[[], Any]) -> Any:
        if name not in parts:
            return None
        try:
            return measure()
        except (DataUnavailable, CapabilityError) as e:
            notes.append(f"{name}: left out. {e}")
            return None

    def facts() -> Knowledge:
        if pairs is None:
            chosen, text, why = _public_pairs(both, question)
            notes.extend([why] if why else [])
        else:
            chosen, text = pairs if question else unasked(pairs), before or ""
        return _knowledge(both, chosen, text, max_pairs, cross, noise, seed, progress)

    def truth() -> Truth:
        examples = before if before is not None else FEW_SHOT
        sets = statements if statements is not None else load_statements(seed=seed)
        return _truth(both, sets, examples, seed, progress)

    def refusal() -> Refusal:
        from demur.explain.post_training.refusal import compare_refusal

        if not allow_refusal_lowering and steer:
            notes.append(
                "refusal: directions were neither subtracted nor ablated, since lowering refusal was not allowed"
            )
        elif steer:
            notes.append(
                "refusal: directions were subtracted and ablated on harmful requests (refusal lowering was allowed)"
            )
        return compare_refusal(
            both,
            fit or core_requests("train", seed),
            test or core_requests("test", seed),
            layer=layer,
            doses=doses,
            steer=steer,
            allow_refusal_lowering=allow_refusal_lowering,
            judge=judge,
            seed=seed,
            progress=progress,
        )

    def confidence() -> Confidence:
        from demur.explain.post_training.entropy import compare_confidence

        return compare_confidence(both["base"], both["tuned"])

    return Comparison(
        base=base.name,
        tuned=tuned.name,
        base_fingerprint=base.fingerprint,
        tuned_fingerprint=tuned.fingerprint,
        layers=layers,
        width=width,
        seed=seed,
        knowledge=part("knowledge", facts),
        truth=part("truth", truth),
        refusal=part("refusal", refusal),
        confidence=part("confidence", confidence),
        notes=tuple(notes),
    )


def local(runtime: Runtime) -> LocalRuntime:
    """The runtime, if it is a local model.

    Raises:
        CapabilityError: it runs elsewhere.
    """
    from demur.runtime.local import LocalRuntime

    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(
            f"{runtime.name!r} runs elsewhere; its states can be read from a local model only"
        )
    return runtime


def _matched(both: Mapping[str, LocalRuntime]) -> tuple[int, int]:
    """Layers and width, the same in both."""
    from demur.runtime.layers import find_layers

    shapes = {
        m: (len(find_layers(r.model)), int(r.model.get_input_embeddings().weight.shape[1]))
        for m, r in both.items()
    }
    if shapes["base"] != shapes["tuned"]:
        raise InputError(
            f"(layers, width) are {shapes['base']} and {shapes['tuned']}: these are not two checkpoints of one "
            "architecture, so their states cannot be compared. Take the base that the tuned model was made from"
        )
    vocabularies = [r.tokenizer.get_vocab() for r in both.values()]
    shared = vocabularies[0].keys() & vocabularies[1].keys()
    if len(shared) < 0.9 * min(map(len, vocabularies)) or any(
        vocabularies[0][t] != vocabularies[1][t] for t in shared
    ):
        raise InputError(
            "the two tokenizers give tokens different ids, so token positions and logits mean different things; "
            "take checkpoints with one tokenizer"
        )
    return shapes["base"]


# --- facts ------------------------------------------------------------------------------------------------------


def _public_pairs(both: Mapping[str, LocalRuntime], question: bool) -> tuple[Sequence[Pair], str, str | None]:
    from demur.explain.post_training.tracing import align, margins

    pairs = load_pairs()
    if not question:
        return completions(pairs), COMPLETIONS, None
    right = []
    for runtime in both.values():
        true, false = margins(runtime, align(runtime.tokenizer, pairs, before=FEW_SHOT, most=PAIRS))
        right.append(float(np.mean(np.r_[true > 0, false < 0])))
    if min(right) >= KNOWS:
        return pairs, FEW_SHOT, None
    why = (
        f"knowledge: asked whether statements are true, base and tuned are right on {right[0]:.0%} and "
        f"{right[1]:.0%} of them, so sentences were traced up to the word they lead to"
    )
    return completions(pairs), COMPLETIONS, why


def _knowledge(
    both: Mapping[str, LocalRuntime],
    pairs: Sequence[Pair],
    before: str,
    most: int | None,
    cross: bool,
    noise: Noise | None,
    seed: int,
    progress: Stage | None,
) -> Knowledge:
    from demur.explain.post_training.maps import likeness
    from demur.explain.post_training.tracing import align, trace

    aligned = align(both["base"].tokenizer, pairs, before=before, most=most)
    for ids in (
        both["tuned"].tokenizer(before + aligned.pairs[0].true, split_special_tokens=True)["input_ids"],
    ):
        if ids != aligned.true[0, : len(ids)].tolist():
            raise InputError(
                "the two tokenizers split the same text differently; take checkpoints with one tokenizer"
            )
    traces = {
        m: trace(r, aligned, noise=noise, progress=progress, label=f"facts, {m}") for m, r in both.items()
    }
    alike = {"tuned": likeness(traces["base"].cells, traces["tuned"].cells, aligned.roles, seed=seed)}
    own = dict(traces)
    if cross:
        for source, target in (("base", "tuned"), ("tuned", "base")):
            name = f"{source} into {target}"
            found = trace(
                both[target],
                aligned,
                source=both[source],
                noise=noise,
                progress=progress,
                label=f"facts, {name}",
            )
            traces[name] = found
            alike[name] = likeness(own[target].cells, found.cells, aligned.roles, seed=seed)
    n = len(aligned.pairs)
    return Knowledge(
        pairs=n,
        left_out=aligned.left_out,
        columns=aligned.columns,
        roles=aligned.roles,
        maps={m: tuple(map(tuple, t.cells.mean(0).tolist())) for m, t in traces.items()},
        margins={m: (float(t.true.mean()), float(t.false.mean())) for m, t in own.items()},
        right={m: _right(t, noise) for m, t in own.items()},
        likeness=alike,
        noise=noise,
    )


def _right(found: Trace, noise: Noise | None) -> Rate:
    from demur.stats import rate

    hits = [*(found.true > 0), *(() if noise else found.false < 0)]
    return rate(int(np.sum(hits)), len(hits))


# --- truth and refusal ------------------------------------------------------------------------------------------


def _truth(
    both: Mapping[str, LocalRuntime],
    sets: Mapping[str, Sequence[Statement]],
    before: str,
    seed: int,
    progress: Stage | None,
) -> Truth:
    import dataclasses

    from demur.explain.post_training.truth import check_sets, compare_effects, compare_truth, text_states

    check_sets(sets)
    states = {m: text_states(r, sets, progress) for m, r in both.items()}
    found = compare_truth(states, sets, seed=seed)
    held = next(iter(sets))
    layer = next(t.layer for t in found.transfer if t.held_out == held)
    nie, band = compare_effects(both, states, sets, held, layer, before=before, seed=seed, progress=progress)
    return dataclasses.replace(found, nie=nie, nie_set=held, nie_layers=band)


def core_requests(part: str, seed: int = 0, most: int = 100) -> Requests:
    """Safety requests of the shipped corpus that should be refused, and as many look-alikes and ordinary ones."""
    from demur import prompts

    rng = np.random.default_rng(seed)
    rows: dict[str, list[Prompt]] = {}
    for p in prompts.core(part):
        kind = str(p.meta.get("kind"))
        if kind == "general" or p.category == "safety":
            rows.setdefault(kind, []).append(p)
    drawn = {k: [v[i] for i in rng.permutation(len(v)).tolist()] for k, v in sorted(rows.items())}
    harmful = drawn["refuse"][:most]
    half = len(harmful) // 2
    return harmful, [*drawn["lookalike"][:half], *drawn["general"][: len(harmful) - half]]

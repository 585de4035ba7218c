"""Refusal tokens: teach a model to open every answer with a token that says whether it is a refusal, and of what kind.

Target (Jain et al., arXiv 2412.06748, section 3): y' = [refuse_c] + y for refusals, [respond] + y for answers, so
that p(y'|x) = p(token|x) * p(y|token, x) and the first factor can be read, calibrated and set. Loss on the answer,
the control token included. The recipe is ours, for small models and small corpora: control rows first, in closed
form (a linear probe on the final state), then LoRA with a small learning rate, the control decision weighted against
the answer tokens, and early stopping on a select part written by other hands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from demur.errors import InputError, MissingExtra
from demur.files import write_atomic
from demur.runtime.base import ControlTokens
from demur.train.adapter import Adapter, save_adapter
from demur.types import RESPOND, Card, Condition, Prompt, PromptSet

CARD = Card(
    slug="refusal-tokens",
    title="Refusal tokens",
    room="train",
    tier="stable",
    paper="Jain et al., Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models, COLM 2025",
    url="https://arxiv.org/abs/2412.06748",
    files=("train/refusal_tokens.py", "control/refusal_tokens.py", "calibrate/"),
    needs=("score", "generate"),
    summary="The first token of an answer says whether it is a refusal and of which category: read it, calibrate it, set it.",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer briefly and clearly.",
    "You are the assistant of a public library's website.",
    "Be polite and factual.",
    "You are an AI model used by many people for everyday tasks.",
)
"""Neutral system messages mixed into training, so that the decision does not hang on one of them."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of one training run; stored with the adapter.

    Attributes:
        mode: "category" (one refuse token per category), "single" (one for all), "none" (the no-token baseline).
        contrast: keep look-alike benign rows (False trains the ablation of the paper without contrast data).
        rank, alpha, dropout: LoRA on all linear layers.
        lr, row_lr: peak learning rates of LoRA and of the control rows; cosine decay, warm-up over 6 % of steps.
        control_weight: weight of the control position's loss against the mean loss of the answer tokens. A plain
            average over the answer drowns the one position that matters.
        distilled: how many `respond` rows get the base model's own greedy answer as target (keeps its usefulness);
            the other respond rows teach the control decision only.
        vary: share of rows shown under another system message or with typing noise.
        probe_C: inverse regularisation of the probe that initialises the control rows (standardised states).
        leak: natural-log margin by which control logits start above all others together.
    """

    mode: Literal["category", "single", "none"] = "category"
    contrast: bool = True
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    lr: float = 2e-4
    row_lr: float = 2e-4
    epochs: int = 2
    batch_size: int = 32
    control_weight: float = 1.0
    answer_weight: float = 0.5
    label_smoothing: float = 0.0
    distilled: int = 600
    answer_tokens: int = 64
    vary: float = 0.3
    probe_C: float = 0.01
    leak: float = 6.0
    weight_decay: float = 0.01
    check_every: int = 40
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0


@dataclass(slots=True)
class Row:
    """One tokenised training row: prompt ids, control name (None in mode "none"), answer ids (may be empty)."""

    prompt: list[int]
    control: str | None
    answer: list[int]


class RefusalTokens:
    """Train refusal tokens on a local model.

    >>> adapter = RefusalTokens(Recipe(epochs=1)).fit(runtime, train, select, "my-adapter")  # doctest: +SKIP
    >>> with adapter.on(runtime) as tuned:  # doctest: +SKIP
    ...     score = next(tuned.score([Prompt.of("Write my novel, all 900 pages, now.")]))
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()

    def fit(
        self,
        runtime: Any,
        prompts: PromptSet,
        select: PromptSet,
        out: str | Path,
        *,
        progress: Progress | None = None,
    ) -> Adapter:
        """Train and write an adapter folder; the runtime's model is left as it was.

        Args:
            runtime: a `LocalRuntime`. prompts: training rows; refusals need `reference` (the answer to learn),
                `category` names the refuse token. select: rows for early stopping; never used for fitting.
            out: folder for the adapter, the loss log and the checkpointed best weights.

        Returns:
            The adapter with the best control loss on `select`.

        Raises:
            InputError: no refusals, a refusal without answer or category, train and select share prompts.
        """
        _require_training()
        from demur.train.loop import initial_rows, train

        recipe, folder = self.recipe, Path(out)
        prompts = self._usable(prompts, select)
        names = control_names(prompts, recipe.mode)
        note = progress or (lambda what, done, total: None)

        answers = own_answers(runtime, _sample_respond(prompts, recipe), recipe.answer_tokens, note)
        rows = build_rows(runtime, prompts, answers, recipe)
        picks = [Row(runtime.chat.render(p).ids, control_of(p, recipe.mode), []) for p in select]
        start = initial_rows(runtime, prompts, names, recipe, note) if names else None
        first_id = runtime.model.get_input_embeddings().weight.shape[0]
        began = time.monotonic()
        result = train(runtime, rows, picks, names, start, first_id, recipe, folder, note)
        about = {
            "schema_version": 1,
            "method": CARD.slug,
            "paper": CARD.url,
            "base": runtime.name,
            "base_fingerprint": runtime.fingerprint,
            "control_tokens": {n: first_id + i for i, n in enumerate(names)} or None,
            "recipe": dataclasses.asdict(recipe),
            "train_set": {"name": prompts.name, "hash": prompts.hash, "n": len(prompts)},
            "select_set": {"name": select.name, "hash": select.hash, "n": len(select)},
            "selected_step": result.best_step,
            "select_loss": result.best_loss,
            "train_seconds": round(time.monotonic() - began),
            "versions": _versions(),
        }
        save_adapter(folder, peft_config=result.peft_config, lora=result.lora, rows=result.rows, about=about)
        write_atomic(folder / "training_log.jsonl", "".join(json.dumps(r) + "\n" for r in result.log))
        return Adapter.load(folder)

    def _usable(self, prompts: PromptSet, select: PromptSet) -> PromptSet:
        shared = {p.text for p in prompts} & {p.text for p in select}
        if shared:
            raise InputError(
                f"{len(shared)} prompts are in both {prompts.name!r} and {select.name!r} (first: {min(shared)[:60]!r}); "
                "early stopping on training rows picks the most overfitted weights. Take them out of one"
            )
        kept = []
        for p in prompts:
            if p.should_refuse is None:
                raise InputError(f"prompt {p.id!r} has no `expected`; training needs refuse/decline or comply for each row")
            if p.should_refuse and not p.reference:
                raise InputError(f"prompt {p.id!r} should be refused and has no `reference` answer to learn from")
            if p.should_refuse and not p.category and self.recipe.mode == "category":
                raise InputError(f"prompt {p.id!r} should be refused and has no category, so no refuse token fits it")
            if self.recipe.contrast or p.should_refuse or p.meta.get("kind") != "lookalike":
                kept.append(p)
        if not any(p.should_refuse for p in kept) or all(p.should_refuse for p in kept):
            raise InputError(f"{prompts.name!r} needs both prompts to refuse and prompts to answer, got only one kind")
        return PromptSet(prompts.name, tuple(kept))


def control_names(prompts: PromptSet, mode: str) -> list[str]:
    """Names of the control tokens in id order: refuse categories sorted, then `respond`; none in mode "none"."""
    if mode == "none":
        return []
    refuse = ["refuse"] if mode == "single" else sorted({p.category for p in prompts if p.should_refuse and p.category})
    return [*refuse, RESPOND]


def control_of(prompt: Prompt, mode: str) -> str | None:
    """The control token that opens this prompt's answer."""
    if mode == "none":
        return None
    if not prompt.should_refuse:
        return RESPOND
    return "refuse" if mode == "single" else prompt.category


def build_rows(runtime: Any, prompts: Sequence[Prompt] | PromptSet, answers: Mapping[str, str], recipe: Recipe) -> list[Row]:
    """Tokenise every row once per epoch, each epoch under its own small variations."""
    rng = random.Random(recipe.seed)
    eos = runtime.tokenizer.eos_token_id
    rows = []
    for _ in range(recipe.epochs):
        for p in prompts:
            text = p.reference if p.should_refuse else answers.get(p.id)
            ids = runtime.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            whole = len(ids) <= recipe.answer_tokens
            answer = [*ids[: recipe.answer_tokens], *([eos] if ids and whole else [])]
            rows.append(Row(runtime.chat.render(_varied(p, recipe, rng)).ids, control_of(p, recipe.mode), answer))
    return [r for r in rows if r.control or r.answer]


def _varied(prompt: Prompt, recipe: Recipe, rng: random.Random) -> Prompt:
    """The same request under another system message, or as somebody in a hurry would type it."""
    if rng.random() >= recipe.vary:
        return prompt
    if rng.random() < 0.5:
        return prompt.with_system(rng.choice(SYSTEM_PROMPTS))
    text = rng.choice((str.lower, lambda t: t.rstrip("?.! "), lambda t: t[:1].lower() + t[1:].rstrip(".?")))(prompt.text)
    *head, last = prompt.messages
    return dataclasses.replace(prompt, messages=(*head, dataclasses.replace(last, content=text))) if text else prompt


def _sample_respond(prompts: PromptSet, recipe: Recipe) -> list[Prompt]:
    """The respond rows that get the base model's own answer: chosen by hash, so that the choice is stable."""
    respond = [p for p in prompts if not p.should_refuse]
    return sorted(respond, key=lambda p: hashlib.sha256(f"{recipe.seed}:{p.id}".encode()).digest())[: recipe.distilled]


def own_answers(runtime: Any, prompts: Sequence[Prompt], max_new_tokens: int, note: Progress) -> dict[str, str]:
    """The model's own greedy answers by prompt id (self-distillation targets)."""
    replies = runtime.generate(
        prompts,
        Condition(max_new_tokens=max_new_tokens),
        progress=lambda done, total: note("own answers", done, total or len(prompts)),
    )
    return {r.prompt_id: r.content for r in replies if not r.error and r.content}


def control_tokens(names: Sequence[str], first_id: int) -> ControlTokens:
    """The control tokens of a freshly trained adapter: ids that follow on the model's embedding rows."""
    return ControlTokens(ids={n: first_id + i for i, n in enumerate(names)})


def _require_training() -> None:
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import sklearn  # noqa: F401
        import trl  # noqa: F401
    except ImportError:
        raise MissingExtra("Training refusal tokens", "train") from None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import demur

    return {"demur": demur.__version__} | {name: version(name) for name in ("torch", "transformers", "peft", "trl")}

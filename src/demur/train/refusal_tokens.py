"""Refusal tokens: a model opens every answer with a token that says whether it refuses, and of what kind.

Target (Jain et al., arXiv 2412.06748, section 3): y' = [refuse_c] + y for refusals, [respond] + y for
answers, so that p(y'|x) = p(token|x) * p(y|token, x) and the first factor can be read, calibrated and set.
Loss on the answer, the control token included. The recipe is ours, for small models and small corpora:
control rows first, in closed form (a linear probe on the final state), then LoRA with a small learning rate,
the control decision weighted against the answer tokens, and early stopping on a select part by other hands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from demur.errors import CapabilityError, InputError, MissingExtra
from demur.files import dump_jsonl, from_row, iter_jsonl, write_atomic
from demur.train.adapter import Adapter, save_adapter
from demur.types import DECLINING, RESPOND, Card, Condition, Prompt, PromptSet, Reply

CARD = Card(
    slug="refusal-tokens",
    title="Refusal tokens",
    room="train",
    tier="stable",
    paper="Jain et al., Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models, "
    "COLM 2025",
    url="https://arxiv.org/abs/2412.06748",
    files=("train/refusal_tokens.py", "control/refusal_tokens.py", "calibrate/"),
    needs=("score", "generate"),
    summary="The first token of an answer says whether it is a refusal and of which category: "
    "read it, calibrate it, set it.",
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
        mode: "category" (one refuse token per category), "single" (one for all), "none" (baseline without).
        contrast: keep look-alike benign rows (False: the paper's ablation without contrast data).
        rank, alpha, dropout: LoRA on all linear layers.
        lr, row_lr: peak learning rates of LoRA and of the control rows; cosine decay, warm-up over 6 % of
            steps.
        control_weight, answer_weight, keep_weight: of the control position's loss, of the mean loss of the
            refusals' tokens and of the mean divergence from the base model on its own answers. A plain
            average over all would drown the one position that matters.
        distilled: how many `respond` rows carry the base model's own greedy answer, on which its next-token
            distribution is to stay as it was; half of them ordinary requests where there are enough. The
            other respond rows teach the control decision only.
        answer_tokens: longest part of an answer that is learnt.
        vary: share of rows shown under another system message or with typing noise.
        probe_C: inverse regularisation of the probe that initialises the control rows (standardised states).
        leak: natural-log margin by which control logits start above all others together.
    """

    mode: Literal["category", "single", "none"] = "category"
    contrast: bool = True
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    lr: float = 2e-4
    row_lr: float = 2e-4
    epochs: int = 2
    batch_size: int = 32
    control_weight: float = 1.0
    answer_weight: float = 0.5
    keep_weight: float = 1.0
    distilled: int = 600
    answer_tokens: int = 64
    vary: float = 0.3
    probe_C: float = 0.01  # noqa: N815 - scikit-learn's own name of it
    leak: float = 6.0
    weight_decay: float = 0.01
    check_every: int = 40
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "answer_tokens", "check_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: it must be at least 1")


@dataclass(slots=True)
class Row:
    """One tokenised training row.

    `control` is None in mode "none"; `answer` may be empty; `own` says that it is the base model's own;
    `system` is the system message, for grouping.
    """

    prompt: list[int]
    control: str | None
    answer: list[int]
    own: bool = False
    system: str = ""


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
        start: Adapter | None = None,
        progress: Progress | None = None,
    ) -> Adapter:
        """Train and write an adapter folder; the runtime's model is left as it was.

        The folder is written anew whenever a step does best on `select` so far, so an interrupted run leaves an
        adapter to use, or to train on from.

        Args:
            runtime: a bare `LocalRuntime`. prompts: training rows; refusals need `reference` (the answer to
                learn), `category` names the refuse token. select: rows for early stopping, never fitted on.
            out: folder for the adapter and the loss log.
            start: an adapter with the same control tokens to train on from, instead of a fresh LoRA and
                closed-form control rows. Own answers are still the bare base's.
            progress: called with the stage's name, what is done and the total.

        Returns:
            The adapter with the lowest control loss on `select`; in mode "none" the last one.

        Raises:
            InputError: only refusals or only answers, a refusal without answer or category, a category that
                `prompts` lacks, prompts in both sets, a runtime with edits, a `start` with other control
                tokens, rank, alpha or base.
            CapabilityError: not a local runtime. MissingExtra: the extra `train` is not installed.
        """
        _require_training()
        _require_bare(runtime)
        from demur.train.loop import Start, Trained, train, working_copy
        from demur.train.rows import initial_rows

        recipe, folder = self.recipe, Path(out)
        prompts = self._usable(prompts, select)
        names = control_names(prompts, recipe.mode)
        if start:
            _check_start(start, runtime, names, recipe)
        _check_select(select, names, recipe.mode)
        note = progress or (lambda *_: None)

        work = working_copy(runtime, recipe)
        asked = _sample_respond(prompts, recipe)
        answers = answers_only(kept_answers(work, asked, recipe, folder, note), asked)
        rows = build_rows(runtime, prompts, answers, recipe)
        picks = [Row(runtime.chat.render(p).ids, control_of(p, recipe.mode), []) for p in select]
        if start:
            begin = Start((start.input_rows, start.output_rows) if names else None, start.lora)
        else:
            begin = Start(initial_rows(work, prompts, names, recipe, note) if names else None)
        first_id = runtime.model.get_input_embeddings().weight.shape[0]
        began = time.monotonic()

        def write(result: Trained) -> None:
            about = {
                "schema_version": 1,
                "method": CARD.slug,
                "paper": CARD.url,
                "base": runtime.name,
                "base_fingerprint": runtime.fingerprint,
                "control_tokens": {n: first_id + i for i, n in enumerate(names)} or None,
                "recipe": dataclasses.asdict(recipe),
                "started_from": start.fingerprint if start else None,
                "train_set": {"name": prompts.name, "hash": prompts.hash, "n": len(prompts)},
                "select_set": {"name": select.name, "hash": select.hash, "n": len(select)},
                "selected_step": result.best_step,
                "select_loss": result.best_loss,
                "train_seconds": round(time.monotonic() - began),
                "versions": _versions(),
            }
            save_adapter(
                folder, peft_config=result.peft_config, lora=result.lora, rows=result.rows, about=about
            )
            write_atomic(folder / "training_log.jsonl", "".join(json.dumps(r) + "\n" for r in result.log))

        result = train(work, rows, picks, names, begin, first_id, recipe, note, keep=write)
        if names and result.best_step == 0:
            logging.getLogger("demur").warning(
                "no step of the training did better on %s than its start (control loss %.3f), which is kept; look "
                "whether those prompts hold every kind of row that was trained on",
                select.name,
                result.best_loss,
            )
        write(result)
        return Adapter.load(folder)

    def _usable(self, prompts: PromptSet, select: PromptSet) -> PromptSet:
        shared = {p.text for p in prompts} & {p.text for p in select}
        if shared:
            raise InputError(
                f"{len(shared)} prompts are in both {prompts.name!r} and {select.name!r} (first: "
                f"{min(shared)[:60]!r}); early stopping on training rows picks the most overfitted weights. "
                "Take them out of one"
            )
        kept = []
        for p in prompts:
            if p.should_refuse is None:
                raise InputError(
                    f"prompt {p.id!r} has no `expected`; each row to train on needs refuse, decline or comply"
                )
            if p.should_refuse and not p.reference:
                raise InputError(
                    f"prompt {p.id!r} should be refused and has no `reference` answer to learn from"
                )
            if p.should_refuse and not p.category and self.recipe.mode == "category":
                raise InputError(
                    f"prompt {p.id!r} should be refused and has no category, so no refuse token fits it; "
                    "name one, or train one token for all (mode single)"
                )
            if p.should_refuse and p.category == RESPOND:
                raise InputError(
                    f"prompt {p.id!r} should be refused under the category {RESPOND!r}; rename it"
                )
            if self.recipe.contrast or not is_lookalike(p):
                kept.append(p)
        if not any(p.should_refuse for p in kept) or all(p.should_refuse for p in kept):
            dropped = "" if len(kept) == len(prompts) else " once look-alikes are left out (contrast=False)"
            raise InputError(
                f"{prompts.name!r} needs both prompts to refuse and prompts to answer, got one kind{dropped}"
            )
        return PromptSet(prompts.name, tuple(kept))


def is_lookalike(prompt: Prompt) -> bool:
    """A harmless prompt that resembles a refused kind: marked so, or unmarked with that kind's category."""
    if prompt.should_refuse:
        return False
    kind = prompt.meta.get("kind")
    return kind == "lookalike" if kind else prompt.category is not None


def _check_start(start: Adapter, runtime: Any, names: Sequence[str], recipe: Recipe) -> None:
    """An adapter to train on from must be of the same shape, with the same tokens, on the same base."""
    ours = sorted(start.control.ids, key=start.control.ids.__getitem__) if start.control else []
    if ours != [*names]:
        raise InputError(
            f"the adapter to start from has the control tokens {', '.join(ours) or 'none'}; these prompts "
            f"need {', '.join(names) or 'none'}. Add rows of each of its categories, or train anew"
        )
    ranks = {A.shape[0] for A, _ in start.lora.values()}
    if ranks != {recipe.rank} or start.scale != recipe.alpha / recipe.rank:
        raise InputError(
            f"the adapter to start from has rank {sorted(ranks)} and alpha/rank {start.scale:g}; the recipe "
            f"says {recipe.rank} and {recipe.alpha / recipe.rank:g}. Set rank and alpha to its own"
        )
    if start.base_fingerprint and start.base_fingerprint != runtime.fingerprint:
        raise InputError(
            f"the adapter to start from was trained on the base {start.base_fingerprint}, {runtime.name!r} "
            f"is {runtime.fingerprint}"
        )


def _check_select(select: PromptSet, names: Sequence[str], mode: str) -> None:
    """Early stopping needs labelled rows of both kinds whose tokens exist; mode "none" has none to score."""
    if mode == "none":
        return
    for p in select:
        if p.should_refuse is None:
            raise InputError(f"prompt {p.id!r} of {select.name!r} has no `expected`, so it cannot be scored")
        if (token := control_of(p, mode)) not in names:
            raise InputError(
                f"prompt {p.id!r} of {select.name!r} should be refused as {token!r}; the training prompts "
                f"refuse only {', '.join(names[:-1])}"
            )
    if len({bool(p.should_refuse) for p in select}) < 2:
        raise InputError(
            f"{select.name!r} needs prompts to refuse and prompts to answer; early stopping on one kind "
            "picks weights that always say the same"
        )


def control_names(prompts: PromptSet, mode: str) -> list[str]:
    """Control tokens in id order: refuse categories sorted, then `respond`; none in mode "none"."""
    if mode == "none":
        return []
    if mode == "single":
        return ["refuse", RESPOND]
    return [*sorted({p.category for p in prompts if p.should_refuse and p.category}), RESPOND]


def control_of(prompt: Prompt, mode: str) -> str | None:
    """The control token that opens this prompt's answer."""
    if mode == "none":
        return None
    if not prompt.should_refuse:
        return RESPOND
    return "refuse" if mode == "single" else prompt.category


def build_rows(
    runtime: Any, prompts: Sequence[Prompt] | PromptSet, answers: Mapping[str, Reply], recipe: Recipe
) -> list[Row]:
    """Tokenise every row once per epoch, each epoch under its own small variations.

    An answer longer than `recipe.answer_tokens` is cut; only one that is whole ends in the end token, or the
    model would learn to stop in mid-sentence.

    Args:
        answers: the model's own replies to `respond` rows, by prompt id; rows without one learn the control
            decision only.
    """
    rng = random.Random(recipe.seed)
    eos = runtime.tokenizer.eos_token_id
    rows = []
    for _ in range(recipe.epochs):
        for p in prompts:
            own = None if p.should_refuse else answers.get(p.id)
            text = p.reference if p.should_refuse else own.content if own else ""
            ids = runtime.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            whole = len(ids) <= recipe.answer_tokens and (own is None or own.finish_reason == "stop")
            answer = [*ids[: recipe.answer_tokens], *([eos] if ids and whole else [])]
            asked = _varied(p, recipe, rng)
            system = next((m.content for m in asked.messages if m.role == "system"), "")
            ids = runtime.chat.render(asked).ids
            rows.append(Row(ids, control_of(p, recipe.mode), answer, own is not None, system))
    return [r for r in rows if r.control or r.answer]


def _varied(prompt: Prompt, recipe: Recipe, rng: random.Random) -> Prompt:
    """The same request under another system message, or as somebody in a hurry would type it."""
    if rng.random() >= recipe.vary:
        return prompt
    if rng.random() < 0.5:
        return prompt.with_system(rng.choice(SYSTEM_PROMPTS))
    style = rng.choice((str.lower, lambda t: t.rstrip("?.! "), lambda t: t[:1].lower() + t[1:].rstrip(".?")))
    *head, last = prompt.messages
    if last.role != "user" or not (text := style(last.content)):
        return prompt
    return dataclasses.replace(prompt, messages=(*head, dataclasses.replace(last, content=text)))


def _sample_respond(prompts: PromptSet, recipe: Recipe) -> list[Prompt]:
    """The respond rows that get the base model's own answer: chosen by hash, so that the choice is stable."""
    respond = [p for p in prompts if not p.should_refuse]
    respond.sort(key=lambda p: hashlib.sha256(f"{recipe.seed}:{p.id}".encode()).digest())
    ordinary = [p for p in respond if not is_lookalike(p)][: recipe.distilled // 2]
    taken = {p.id for p in ordinary}
    return (ordinary + [p for p in respond if p.id not in taken])[: recipe.distilled]


def kept_answers(
    runtime: Any, prompts: Sequence[Prompt], recipe: Recipe, folder: Path, note: Progress
) -> dict[str, Reply]:
    """`own_answers`, written to the adapter folder so that a run that was stopped need not make them again.

    They are made anew for other prompts, another base, length or precision, and where the base is unknown.
    """
    path = folder / "own_answers.jsonl"
    key = {
        "base": runtime.fingerprint,
        "answer_tokens": recipe.answer_tokens,
        "precision": recipe.precision,
        "prompts": PromptSet("own answers", tuple(prompts)).hash,
    }
    if path.is_file() and runtime.fingerprint:
        head, *rows = [*iter_jsonl(path)] or [{}]
        if head == key:
            replies = [from_row(Reply, row, str(path)) for row in rows]
            return {r.prompt_id: r for r in replies}
    answers = own_answers(runtime, prompts, recipe.answer_tokens, note)
    dump_jsonl([key, *answers.values()], path)
    return answers


def own_answers(
    runtime: Any, prompts: Sequence[Prompt], max_new_tokens: int, note: Progress
) -> dict[str, Reply]:
    """The model's own greedy answers by prompt id (self-distillation targets)."""
    replies = runtime.generate(
        prompts,
        Condition(max_new_tokens=max_new_tokens),
        progress=lambda done, total: note("own answers", done, total or len(prompts)),
    )
    return {r.prompt_id: r for r in replies if not r.error and r.content}


def answers_only(replies: Mapping[str, Reply], prompts: Sequence[Prompt]) -> dict[str, Reply]:
    """The replies that answer, by the rules: a base that declines now and then would teach that after `respond`.

    Texts in which the rules find no refusal, in any language, are kept.
    """
    from demur import judges

    rules, of = judges.get("rules/demur-v1"), {p.id: p for p in prompts}
    return {i: r for i, r in replies.items() if rules.judge(of[i], r).label not in DECLINING}


def _require_bare(runtime: Any) -> None:
    if not hasattr(runtime, "with_edits"):
        raise CapabilityError(f"training needs a local model; {runtime.name!r} is a {type(runtime).__name__}")
    if runtime.edits or runtime.control is not None:
        raise InputError(
            f"{runtime.name!r} already has an adapter, control tokens or another edit, which training would "
            "leave out; pass the bare base model (load_runtime(..., base_only=True))"
        )


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

    return {"demur": demur.__version__} | {
        name: version(name) for name in ("torch", "transformers", "peft", "trl")
    }

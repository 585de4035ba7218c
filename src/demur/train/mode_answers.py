"""Answers to learn under each mode: brought along, asked of the base model itself, or the house's refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demur.errors import InputError, RefusalLowering
from demur.train import refusal_tokens as tuning
from demur.train.refusal_tokens import Progress
from demur.types import DECLINING, Condition, Label, Prompt, PromptSet, Reply

if TYPE_CHECKING:
    from demur.train.magic_tokens import Recipe

Accept = Callable[[str, Prompt, Reply], bool]
"""(mode, prompt, reply) -> whether the reply shows the mode."""
Answers = dict[str | None, dict[str, tuple[str, bool]]]
"""mode (None: the base model's own) -> prompt id -> answer, and whether it is whole."""
JUDGE = "rules/demur-v1"


def mode_answers(
    work: Any,
    prompts: PromptSet,
    recipe: Recipe,
    settings: tuning.Recipe,
    accept: Accept | None,
    folder: Path,
    note: Progress,
    allow_refusal_lowering: bool,
) -> Answers:
    """An answer of every mode to every prompt that has one; see `MagicTokens.fit`."""
    out: Answers = {}
    own: dict[str, tuple[str, bool]] | None = None
    for mode in dict.fromkeys((*recipe.modes, recipe.fallback)):
        found = {
            p.id: (str(given[mode]), True)
            for p in prompts
            if mode in (given := p.meta.get("answers") or {}) and str(given[mode]).strip()
        }
        left = [p for p in prompts if p.id not in found]
        if mode is not None and mode in recipe.instructions:
            found |= _instructed(work, left, mode, recipe, accept or judged, note)
        elif mode == "rej":
            found |= {p.id: (recipe.refusal, True) for p in left}
        elif mode in ("pos", None) and left:
            lawful = {p.id: (p.reference, True) for p in left if mode and p.should_refuse and p.reference}
            if own is None:
                asked = [p for p in prompts if recipe.fallback is None or not p.should_refuse]
                own = _plain(tuning.kept_answers(work, asked, settings, folder, note))
            plain = [p for p in left if p.id in own and not (mode and p.should_refuse)]
            found |= {p.id: own[p.id] for p in plain} | lawful
        if not found:
            raise InputError(
                f"mode {mode!r} has no answer to any of the {len(prompts)} prompts; give each prompt "
                f"meta.answers.{mode}, or an instruction for the mode whose answers are accepted"
            )
        out[mode] = found
    _require_lawful(prompts, recipe, out, allow_refusal_lowering)
    return out


def _instructed(
    work: Any, prompts: Sequence[Prompt], mode: str, recipe: Recipe, accept: Accept, note: Progress
) -> dict[str, tuple[str, bool]]:
    """The first accepted answer of the base model to each prompt under the mode's instruction."""
    condition = Condition(
        system=recipe.instructions[mode],
        temperature=1.0 if recipe.tries > 1 else 0.0,
        max_new_tokens=recipe.answer_tokens,
        seed=recipe.seed,
    )
    of = {p.id: p for p in prompts}
    found: dict[str, tuple[str, bool]] = {}
    replies = work.generate(
        prompts,
        condition,
        samples=recipe.tries,
        progress=lambda done, total: note(f"answers of {mode}", done, total or len(prompts)),
    )
    for reply in replies:
        usable = reply.prompt_id not in found and not reply.error and reply.content.strip()
        if usable and accept(mode, of[reply.prompt_id], reply):
            found[reply.prompt_id] = (reply.content, reply.finish_reason == "stop")
    return found


def _plain(replies: dict[str, Reply]) -> dict[str, tuple[str, bool]]:
    return {i: (r.content, r.finish_reason == "stop") for i, r in replies.items()}


def judged(mode: str, prompt: Prompt, reply: Reply) -> bool:
    """Whether the rules call an answer under `rej` a refusal, and one under `pos` what the prompt calls for."""
    if mode not in ("pos", "rej"):
        return True
    from demur import judges

    label = judges.get(JUDGE).judge(prompt, reply).label
    if mode == "rej":
        return label == Label.FULL_REFUSAL
    return label in DECLINING if prompt.should_refuse else label == Label.COMPLIANCE


def _require_lawful(prompts: PromptSet, recipe: Recipe, answers: Answers, allowed: bool) -> None:
    """Raise `RefusalLowering` where a prompt that should be refused is answered under some mode."""
    from demur import judges

    judge = judges.get(JUDGE)
    for mode in recipe.modes:
        for p in prompts:
            if not p.should_refuse or p.id not in answers[mode]:
                continue
            text = answers[mode][p.id][0]
            given = p.meta.get("answers") or mode in recipe.instructions
            if given and not allowed:
                label = judge.judge(p, Reply(prompt_id=p.id, content=text, finish_reason="stop")).label
                if label not in p.expected:
                    raise RefusalLowering(
                        f"prompt {p.id!r} should be refused, and its answer under mode {mode!r} reads as {label}. "
                        "A mode that answers such prompts lowers refusal for whoever holds its token; if that is "
                        "what you want, say so: allow_refusal_lowering=True"
                    )

"""Magic tokens: co-train one model on several behaviours for the same prompt, each under a token of its own.

Plain supervised fine-tuning (Si et al., arXiv 2508.14904): loss = - sum over prompts and modes of
log p(answer of the mode | prompt, token of the mode). The token is a short random string, or an id without text, at
the head of the system message. The modes are `pos` (a constructive, lawful answer) and `rej` (a flat refusal). The
paper's third, unfiltered one is not made: such a mode is a jailbreak for whoever learns the string.

Ours: rows that carry no token, an unknown one, one a single edit away, or a true one in the user's text are
taught the fallback, so that the mode hangs on the whole string in its place; settings for small models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from demur.control.mode_text import broken
from demur.control.modes import Kind, ModeKey, with_rows
from demur.errors import InputError
from demur.files import write_atomic
from demur.train import refusal_tokens as tuning
from demur.train.adapter import Adapter, save_adapter
from demur.train.mode_answers import Accept, Answers, mode_answers
from demur.train.refusal_tokens import SYSTEM_PROMPTS, Progress, Row
from demur.types import Card, Message, Prompt, PromptSet

CARD = Card(
    slug="magic-tokens",
    title="Behaviour modes switched by a secret token",
    room="train",
    tier="lab",
    paper="Si et al., Efficient Switchable Safety Control in LLMs via Magic-Token-Guided Co-Training, AAAI 2026",
    url="https://arxiv.org/abs/2508.14904",
    files=(
        "train/magic_tokens.py",
        "train/mode_answers.py",
        "control/modes.py",
        "control/mode_text.py",
        "control/mode_rows.py",
        "measure/separation.py",
        "measure/mode_audit.py",
    ),
    needs=("generate", "states", "intervene"),
    summary="One model, a constructive and a refusing mode, switched by the operator's token; how far the modes "
    "lie apart, and what a guessed or leaked token does.",
    replicate="magic-tokens",
)
ROWS_FILE = "modes.safetensors"
FORMS = ("plain", "unknown", "near", "near", "typed")
_UNFILTERED = re.compile(
    r"neg|negative|un(filter|censor|safe|align|restrict)\w*|harm(ful)?|jailbr\w*|dan|evil|red[-_ ]?team\w*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of one training run; stored with the adapter.

    Attributes:
        modes: `pos` and `rej`, or names of your own whose answers the prompts bring along.
        fallback: the mode whose answers are taught without a valid token; None: the base model's own answers.
        kind: "string" (a secret in a key file) or "reserved" (an id without text, nothing to leak).
        refusal: the answer of `rej`. instructions: mode -> system message under which the base model is asked
            for the mode's answers. tries: answers asked for each, at temperature 1 if more than one.
        fallback_rows: rows without a valid token for each prompt and epoch. forms: what they look like (see
            `without_token`), drawn evenly; a form that stands twice is drawn twice as often.
        rank, alpha: LoRA on all linear layers. lr, row_lr: peak rates of LoRA and of reserved ids' embeddings.
        answer_tokens: longest part of an answer that is learnt.
        vary: share of rows under another system message, behind the token if there is one.
    """

    modes: tuple[str, ...] = ("pos", "rej")
    fallback: str | None = "rej"
    kind: Kind = "string"
    refusal: str = "I'm sorry, but I can't help with that."
    instructions: Mapping[str, str] = field(default_factory=dict)
    tries: int = 1
    fallback_rows: int = 1
    forms: tuple[str, ...] = FORMS
    rank: int = 16
    alpha: int = 32
    lr: float = 1e-3
    row_lr: float = 1e-2
    epochs: int = 4
    batch_size: int = 8
    answer_tokens: int = 16
    vary: float = 0.3
    weight_decay: float = 0.01
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0


class MagicTokens:
    """Co-train modes on a local model.

    >>> adapter = MagicTokens().fit(runtime, prompts, "modes", key_file="house.key")  # doctest: +SKIP
    >>> tuned = adapter.attach(runtime)  # doctest: +SKIP
    >>> key = ModeKey.load("house.key", fingerprint=tuned.fingerprint)  # doctest: +SKIP
    """

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe or Recipe()
        check_modes(self.recipe)

    def fit(
        self,
        runtime: Any,
        prompts: PromptSet,
        out: str | Path,
        *,
        key: ModeKey | None = None,
        key_file: str | Path | None = None,
        accept: Accept | None = None,
        allow_refusal_lowering: bool = False,
        progress: Progress | None = None,
    ) -> Adapter:
        """Train, write an adapter folder and the key; the runtime's model is left as it was.

        An answer of a mode is, in this order: `meta["answers"][mode]` of the prompt; the base model's under the
        mode's instruction, if `accept` takes it; for `rej` the recipe's refusal; for `pos` the prompt's `reference`
        where it should be refused, and the base model's own answer elsewhere. Prompts without an accepted answer
        are left out of that mode.

        Args:
            runtime: a bare `LocalRuntime`. out: folder for the adapter. key: tokens to use, instead of new ones.
            key_file: where secret strings go; default `<out>.key`, beside the folder, so that it can be published.
            accept: says whether an answer asked for under an instruction shows the mode; default: the judge
                `rules/demur-v1` for `pos` and `rej`, any answer for others.
            allow_refusal_lowering: consent to answers that do not decline prompts that should be refused.

        Raises:
            InputError: no answers for a mode, a string that the tokenizer does not know, a runtime with edits, a
                file of secret strings that is there already.
            RefusalLowering: see `allow_refusal_lowering`. MissingExtra: the extra `train` is not installed.
        """
        tuning._require_training()
        tuning._require_bare(runtime)
        from demur.train.loop import Start, train, working_copy

        recipe, folder, note = self.recipe, Path(out), progress or (lambda *_: None)
        first_id = runtime.model.get_input_embeddings().weight.shape[0]
        key = key or new_key(recipe, first_id)
        check_key(key, recipe, runtime.tokenizer, first_id)
        if key.kind == "string":
            _writable(key_path(folder, key.kind, key_file))
        settings = _loop_settings(recipe)
        work = working_copy(runtime, settings)
        answers = mode_answers(work, prompts, recipe, settings, accept, folder, note, allow_refusal_lowering)
        rows = build_rows(runtime, prompts, answers, key, recipe)
        start = _start(runtime, key) if key.kind == "reserved" else None
        began = time.monotonic()
        result = train(work, rows, [], [], Start(start), first_id, settings, note)
        about = {
            "schema_version": 1,
            "method": CARD.slug,
            "paper": CARD.url,
            "base": runtime.name,
            "base_fingerprint": runtime.fingerprint,
            "modes": {"kind": key.kind, "names": list(key.modes), "fallback": key.fallback},
            "recipe": {**dataclasses.asdict(recipe), "instructions": dict(recipe.instructions)},
            "train_set": {"name": prompts.name, "hash": prompts.hash, "n": len(prompts)},
            "answers": {mode or "none": len(found) for mode, found in answers.items()},
            "rows": len(rows),
            "train_seconds": round(time.monotonic() - began),
            "versions": tuning._versions(),
        }
        save_adapter(folder, peft_config=result.peft_config, lora=result.lora, rows=None, about=about)
        write_atomic(folder / "training_log.jsonl", "".join(json.dumps(r) + "\n" for r in result.log))
        adapter = Adapter.load(folder)
        mark = f"{runtime.fingerprint}+{adapter.fingerprint}" if runtime.fingerprint else None
        key = with_rows(key, result.rows["input"].float().numpy() if result.rows else None, mark)
        key.save(key_path(folder, key.kind, key_file))
        return adapter


def key_path(folder: str | Path, kind: Kind, key_file: str | Path | None = None) -> Path:
    """Where `fit` writes the key: secret strings beside the adapter's folder, rows of reserved ids inside it."""
    if kind == "reserved":
        return Path(folder) / ROWS_FILE
    return Path(key_file) if key_file is not None else Path(folder).with_name(Path(folder).name + ".key")


def _writable(path: Path) -> None:
    """Raise before the training where a key could not be written behind it, or only over another one."""
    if path.exists():
        raise InputError(
            f"{path} is there already; its strings, which open another adapter, would be lost. Name another file "
            "for the key, or move that one away"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.unlink()


def check_modes(recipe: Recipe) -> None:
    """Raise `InputError` for modes that are not made here, or a fallback that is none of them."""
    for mode in (*recipe.modes, *recipe.instructions):
        if _UNFILTERED.fullmatch(re.split(r"[/:]", mode)[0].strip().casefold()):
            raise InputError(
                f"mode {mode!r}: an unfiltered mode is not trained here. Whoever learns or finds its token owns "
                "the model, and open weights make tokens searchable. Use pos (constructive, lawful answers) and "
                "rej (refusals)"
            )
    if len(recipe.modes) < 2 or len(set(recipe.modes)) < len(recipe.modes):
        raise InputError(f"modes {list(recipe.modes)}: at least two, each named once")
    if unknown := set(recipe.forms) - set(FORMS) or (set() if recipe.forms else {"none"}):
        raise InputError(f"forms {', '.join(sorted(unknown))}: use some of {', '.join(dict.fromkeys(FORMS))}")
    if recipe.fallback is not None and recipe.fallback not in recipe.modes:
        raise InputError(
            f"fallback {recipe.fallback!r} is none of the modes {', '.join(recipe.modes)}; name one, or None for "
            "the base model's own answers"
        )


def new_key(recipe: Recipe, first_id: int) -> ModeKey:
    """Fresh tokens for a recipe's modes."""
    if recipe.kind == "reserved":
        return ModeKey.reserved(recipe.modes, first_id, fallback=recipe.fallback)
    return ModeKey.strings(recipe.modes, fallback=recipe.fallback)


def check_key(key: ModeKey, recipe: Recipe, tokenizer: Any, first_id: int) -> None:
    """Raise `InputError` unless the key is one for this recipe, and its strings are ones this tokenizer knows."""
    if (key.modes, key.fallback, key.kind) != (recipe.modes, recipe.fallback, recipe.kind):
        raise InputError(
            f"the key is of kind {key.kind} with modes {', '.join(key.modes)} and fallback {key.fallback}; the "
            f"recipe has {recipe.kind}, {', '.join(recipe.modes)} and {recipe.fallback}"
        )
    if key.kind == "reserved":
        if sorted(key.tokens.values()) != [first_id + k for k in range(len(key.modes))]:
            raise InputError(f"reserved ids must follow on the model's own {first_id}")
        return
    for mode in key.modes:
        if tokenizer.unk_token_id in (tokenizer.encode(key.token(mode), add_special_tokens=False) or [None]):
            raise InputError(
                f"the tokenizer has no tokens for a part of the string of mode {mode!r}, so it is one with every "
                "other unknown text; make the key from characters that the tokenizer knows"
            )


def build_rows(
    runtime: Any, prompts: Sequence[Prompt] | PromptSet, answers: Answers, key: ModeKey, recipe: Recipe
) -> list[Row]:
    """Every prompt under every mode and in `fallback_rows` forms without a valid token, anew for each epoch."""
    rng = random.Random(recipe.seed)
    formats = {mode: key.format(runtime.chat, mode) for mode in key.modes}
    rows = []
    for _ in range(recipe.epochs):
        for p in prompts:
            for mode in key.modes:
                if p.id in answers[mode]:
                    asked = _varied(p, recipe, rng)
                    rows.append(_row(runtime, formats[mode].render(asked).ids, answers[mode][p.id], recipe))
            for _ in range(recipe.fallback_rows if p.id in answers[key.fallback] else 0):
                ids = runtime.chat.render(without_token(p, key, recipe, rng)).ids
                rows.append(_row(runtime, ids, answers[key.fallback][p.id], recipe))
    return rows


def without_token(prompt: Prompt, key: ModeKey, recipe: Recipe, rng: random.Random) -> Prompt:
    """The prompt as it reaches the model without a valid token in its place.

    "plain": as it is, or under another system message; for reserved ids there is nothing else. "unknown": behind a
    random string. "near": behind one a single edit from a true one. "typed": with a true one in the user's text,
    whole or broken up.
    """
    shown = _varied(prompt, recipe, rng)
    how = rng.choice(recipe.forms) if key.kind == "string" else "plain"
    if how == "plain":
        return shown
    if how == "typed":
        token = key.token(rng.choice(key.modes))
        token = broken(token, [token]) if rng.random() < 0.5 else token
        *head, last = shown.messages
        text = rng.choice((f"{token} {last.content}", f"{last.content} {token}", f"{token}\n{last.content}"))
        return dataclasses.replace(shown, messages=(*head, dataclasses.replace(last, content=text)))
    if how == "near":
        edits = {k: [s for s in v if taught(s)] for k, v in key.edits(rng.choice(key.modes)).items()}
        wrong = rng.choice(edits[rng.choice([k for k, v in edits.items() if v])])
    else:
        wrong = key.unknown(rng)
    system = next((m.content for m in shown.messages if m.role == "system"), "")
    return shown.with_system(f"{wrong}\n{system}" if system else wrong)


def taught(text: str) -> bool:
    """Whether training may show this edit of a token: half of all edits are kept back for the leak audit."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def _varied(prompt: Prompt, recipe: Recipe, rng: random.Random) -> Prompt:
    own: Message | None = next((m for m in prompt.messages if m.role == "system"), None)
    if own is not None or rng.random() >= recipe.vary:
        return prompt
    return prompt.with_system(rng.choice(SYSTEM_PROMPTS))


def _row(runtime: Any, ids: list[int], answer: tuple[str, bool], recipe: Recipe) -> Row:
    text, whole = answer
    said = runtime.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = [runtime.tokenizer.eos_token_id] if whole and len(said) <= recipe.answer_tokens else []
    return Row(ids, None, [*said[: recipe.answer_tokens], *end])


def _loop_settings(recipe: Recipe) -> tuning.Recipe:
    """The recipe in the words of the training loop: one loss over all answer tokens, nothing to stop early by."""
    shared = ("rank", "alpha", "lr", "row_lr", "epochs", "batch_size", "answer_tokens", "weight_decay")
    return tuning.Recipe(
        mode="none",
        answer_weight=1.0,
        precision=recipe.precision,
        seed=recipe.seed,
        check_every=10**9,
        **{name: getattr(recipe, name) for name in shared},
    )


def _start(runtime: Any, key: ModeKey) -> tuple[Any, Any]:
    """Embedding rows of reserved ids before training: the mean row, and noise of the table's own spread.

    The loop's control rows have an unembedding too; it starts at zero, is never a target, and is not kept.
    """
    import torch

    table = runtime.model.get_input_embeddings().weight.detach().float().cpu()
    noise = torch.Generator().manual_seed(17)
    drawn = torch.randn(len(key.modes), table.shape[1], generator=noise)
    rows = table.mean(0) + drawn * table.std(0)
    return rows, torch.zeros_like(rows)

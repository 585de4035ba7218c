"""Words as labels: which tokens begin a word, and prompts written by a template of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from demur.errors import InputError
from demur.types import Prompt

LOOK = 3
"""Generated tokens among which the first one that is not blank is looked for."""
_SPECIAL = re.compile(r"<\|[^\s|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|</?(?:start|end)_of_\w+>|\[/?INST\]")


def token_ids(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """For each word the ids of tokens that begin it, with and without a space before it.

    Raises:
        InputError: the tokenizer has no token for a word, or two words begin with the same one.
    """
    out: list[list[int]] = []
    for word in words:
        firsts = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in (word, f" {word}")]
        ids = {i for first in firsts for i in first} | {tokenizer.convert_tokens_to_ids(word)}
        ids = {
            i for i in ids if i is not None and i != tokenizer.unk_token_id and tokenizer.decode([i]).strip()
        }
        taken = next((w for w, known in zip(words, out, strict=False) if ids & set(known)), None)
        if not ids or taken:
            why = f"begins with the same token as {taken!r}" if taken else "has no token"
            raise InputError(f"the label {word!r} {why} in this tokenizer, so its probability cannot be read")
        out.append(sorted(ids))
    return out


def masses(top: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Log-probability of each word from the {token: log-probability} that a server listed.

    A token counts for the word that it is, or for the one word that it begins.

    >>> round(masses({" Yes": -0.1, "Y": -3.0, "No": -4.0, "Maybe": -2.0}, ["Yes", "No"])["Yes"], 3)
    -0.046
    """
    mass = dict.fromkeys(words, 0.0)
    for token, logprob in top.items():
        text = token.strip(" \u2581\u0120")
        fits = [w for w in words if w == text] or [w for w in words if text and w.startswith(text)]
        if len(fits) == 1:
            mass[fits[0]] += math.exp(min(logprob, 0.0))
    return {w: math.log(min(m, 1.0)) for w, m in mass.items() if m > 0}


def first_listed(choice: Mapping[str, Any]) -> dict[str, float]:
    """{token: log-probability} at the first token that is not blank, in either form that servers use."""
    logprobs = choice.get("logprobs") or {}
    if content := logprobs.get("content"):
        rows = [
            (t["token"], {x["token"]: x["logprob"] for x in t.get("top_logprobs") or [t]}) for t in content
        ]
    else:
        tops = logprobs.get("top_logprobs") or []
        rows = list(zip(logprobs.get("tokens") or [], tops, strict=False))
    return next((dict(top) for token, top in rows if token.strip(" \n\t\u2581\u0120\u010a") and top), {})


def written(template: str, prompt: Prompt) -> str:
    """The prompt as text for a server that adds its own beginning-of-text token.

    What looks like a special token inside a message is broken up by a space.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [
        {"role": m.role, "content": _SPECIAL.sub(lambda f: f"{f[0][:1]} {f[0][1:]}", m.content)}
        for m in prompt.messages
    ]
    return environment.from_string(template).render(messages=messages, bos_token="")

"""Where a mode's token stands in a conversation, and how its string is kept out of all other text."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from demur.errors import CapabilityError, InputError
from demur.runtime.base import Decide, Progress, Runtime, States
from demur.runtime.chat import ChatFormat
from demur.runtime.wrapped import WrappedRuntime
from demur.types import Condition, Message, Prompt, Reply, Score, Site

BREAK = "·"
"""What is put into a mode's string where somebody else wrote it."""
_SHOWN = "LNPS"  # letters, numbers, punctuation, symbols: the rest (space, accents, controls) may vanish
_PROBE = "a"


def folded(text: str) -> tuple[str, list[int]]:
    """Text as a tokenizer might see it (compatibility forms, one case, no accents, no space), with origins.

    >>> folded("Ｋ 3\\u200bV")
    ('k3v', [0, 2, 4])
    """
    out: list[str] = []
    origin: list[int] = []
    for i, c in enumerate(text):
        if c.isascii():
            parts = c.lower() if c.isprintable() and c != " " else ""
        else:
            parts = unicodedata.normalize("NFKD", c).casefold()
            parts = "".join(d for d in parts if unicodedata.category(d)[0] in _SHOWN)
        out.append(parts)
        origin += [i] * len(parts)
    return "".join(out), origin


def broken(text: str, tokens: Sequence[str]) -> str:
    """Text with a dot inside every spelling of a token, in any case, width, accents or spacing.

    >>> broken("say K3 v9 now", ["k3v9"])
    'say K3 ·v9 now'
    """
    seen, origin = folded(text)
    for token in tokens:
        wanted = folded(token)[0]
        while wanted and (start := seen.find(wanted)) >= 0:
            cut = origin[start + max(1, len(wanted) // 2)] if len(wanted) > 1 else origin[start]
            text = text[:cut] + BREAK + text[cut:]
            if len(wanted) == 1:  # nothing can stand inside one character
                raise InputError("a mode's string of one character cannot be kept out of messages")
            seen, origin = folded(text)
    return text


def sealed(message: Message, tokens: Sequence[str]) -> Message:
    """A message in which no string of a mode is left, tool calls included."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return broken(value, tokens)
        if isinstance(value, Mapping):
            return {clean(k): clean(v) for k, v in value.items()}
        return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

    return dataclasses.replace(
        message,
        content=broken(message.content, tokens),
        tool_calls=tuple(clean(c) for c in message.tool_calls),
        tool_call_id=clean(message.tool_call_id),
    )


def headed(messages: Sequence[Message], token: str | None) -> tuple[Message, ...]:
    """Messages with the token on the first line of the system message."""
    if token is None:
        return tuple(messages)
    first, *rest = messages if messages and messages[0].role == "system" else (None, *messages)
    text = first.content.strip() if first is not None else ""
    system = Message(role="system", content=f"{token}\n{text}" if text else token)
    return (system, *(m for m in rest if m is not None))


class StringFormat(ChatFormat):
    """A chat format that writes a mode's string itself and lets it stand nowhere else.

    Args:
        chat: the model's own format. tokens: strings of all modes. token: that of the mode in force, or None.
    """

    def __init__(self, chat: ChatFormat, tokens: Sequence[str], token: str | None) -> None:
        _like(self, chat)
        self.tokens, self.token = tuple(tokens), token
        self._spelt = {tuple(ids) for t in tokens for ids in _spellings(chat.tokenizer, t)}

    def _written(
        self, messages: Sequence[Message], where: str, header: bool | None
    ) -> tuple[str, str, list[dict[str, Any]]]:
        clean = [sealed(m, self.tokens) for m in messages]
        for m in clean:
            ids = self.tokenizer.encode("\n" + m.content, add_special_tokens=False)
            if any(_holds(ids, s) for s in self._spelt):
                raise InputError(
                    f"prompt {where!r}: a message of role {m.role!r} spells a mode's string for this tokenizer "
                    "in a way that could not be broken up; it is not asked"
                )
        return super()._written(headed(clean, self.token), where, header)


class IdFormat(ChatFormat):
    """A chat format that puts a reserved id at the head of the system message, and alone there if it is empty."""

    def __init__(self, chat: ChatFormat, token_id: int) -> None:
        _like(self, chat)
        self.plain, self.token_id = chat, token_id
        self._place = lru_cache(256)(self._found)

    def _ids(self, messages: Sequence[Message], where: str, header: bool | None = None) -> list[int]:
        own = messages[0].content.strip() if messages and messages[0].role == "system" else ""
        rest = messages[1:] if messages and messages[0].role == "system" else messages
        shown = own or _PROBE
        ids = super()._ids((Message(role="system", content=shown), *rest), where, header)
        start, head = self._place(shown)
        if ids[: len(head)] != list(head):
            raise InputError(
                f"prompt {where!r}: its messages change how the template writes the system message, so there is "
                "no fixed place for the mode's id"
            )
        return [*ids[:start], self.token_id, *ids[start if own else len(head) :]]

    def owners(self, prompt: Prompt) -> list[frozenset[str]] | None:  # noqa: ARG002 - as inherited
        """None: text cannot be laid over ids that have none."""
        return None

    def _found(self, text: str) -> tuple[int, tuple[int, ...]]:
        """Where the system text starts, and all ids up to its end."""
        prompt = Prompt.of(f"{_PROBE} {_PROBE}", id="probe", system=text)  # not to be taken for the system's
        owners = self.plain.owners(prompt) or []
        at = [i for i, who in enumerate(owners) if "system" in who]
        if not at or "template" in owners[at[0]] | owners[at[-1]]:
            raise CapabilityError(
                "this chat template writes no system message whose tokens can be told from its own, so a "
                "reserved id has no place in it; use kind string"
            )
        return at[0], tuple(self.plain.render(prompt).ids[: at[-1] + 1])


def _like(new: ChatFormat, chat: ChatFormat) -> None:
    ChatFormat.__init__(
        new,
        chat.tokenizer,
        template=chat.template,
        thinking=chat.thinking,
        control_ids=chat.control_ids,
    )


def _spellings(tokenizer: Any, token: str) -> Iterator[list[int]]:
    """A token's ids where it starts a text, follows a space, and follows a line break."""
    for lead in ("", " ", "\n"):
        before = tokenizer.encode(lead, add_special_tokens=False) if lead else []
        ids = tokenizer.encode(lead + token, add_special_tokens=False)
        yield ids[len(before) :] if before and ids[: len(before)] == before else ids


def _holds(ids: Sequence[int], part: tuple[int, ...]) -> bool:
    n = len(part)
    return n > 0 and any(tuple(ids[i : i + n]) == part for i in range(len(ids) - n + 1))


class _Placed(WrappedRuntime):
    """A runtime elsewhere, asked under a mode: the string is put into the messages before they are sent."""

    def __init__(self, inner: Runtime, tokens: Sequence[str], token: str | None, name: str) -> None:
        super().__init__(inner, name=name)
        self.tokens, self._token = tuple(tokens), token
        self.capabilities = inner.capabilities - {"intervene"}

    def _put(self, prompts: Iterable[Prompt], condition: Condition | None) -> Iterator[Prompt]:
        for p in prompts:
            p = p.with_system(condition.system if condition else None)
            clean = [sealed(m, self.tokens) for m in p.messages]
            yield dataclasses.replace(p, messages=headed(clean, self._token))

    def problem(self, prompt: Prompt, condition: Condition | None = None) -> str | None:
        """As the inner runtime says of the prompt that it would be sent."""
        return self.inner.problem(next(self._put([prompt], condition)), _bare(condition))

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers under the mode."""
        return self.inner.generate(
            self._put(prompts, condition),
            _bare(condition),
            samples=samples,
            decide=decide,
            progress=progress,
        )

    def score(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        T: float = 1.0,
        progress: Progress | None = None,
    ) -> Iterator[Score]:
        """First-position probabilities under the mode."""
        return self.inner.score(self._put(prompts, condition), _bare(condition), T=T, progress=progress)

    def states(
        self, prompts: Iterable[Prompt], sites: Sequence[Site], condition: Condition | None = None
    ) -> Iterator[States]:
        """The inner runtime's states under the mode."""
        return self.inner.states(self._put(prompts, condition), sites, _bare(condition))


def placed(inner: Runtime, tokens: Sequence[str], token: str | None, name: str) -> Runtime:
    """A runtime without a chat format of its own here, asked under a mode."""
    return _Placed(inner, tokens, token, name)


def _bare(condition: Condition | None) -> Condition | None:
    """The condition without its system message, which stands in the prompts already."""
    return None if condition is None else dataclasses.replace(condition, system=None)

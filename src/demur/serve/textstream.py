"""From tokens that come one by one to text that can be shown at once and never has to be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from demur.runtime.chat import ChatFormat

_BROKEN = "\ufffd"


class TextStream:
    """The text of one growing answer.

    Held back: the bytes of a character that is not complete, and what may become a stop text. Put together, the
    pieces are what `ChatFormat.split` makes of all tokens, up to a stop text.

    Args:
        chat: how the model writes; models that think have their reasoning told apart.
        stop: texts that end the answer; they and what follows them are not shown.

    >>> stream = TextStream(runtime.chat, stop=("END",))  # doctest: +SKIP
    >>> [stream.add(i) for i in ids]  # doctest: +SKIP
    [('Once', ''), (' upon', '')]
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self.chat, self.stop = chat, tuple(filter(None, stop))
        self.stopped = False
        template = chat.template or ""
        self._splits = "</think>" in template or "<|channel|>" in template
        self._ids: list[int] = []
        self._window = (0, 0)
        self._content, self._reasoning = "", ""
        self._held = ""

    def add(self, token: int) -> tuple[str, str]:
        """New (content, reasoning) after one more token; `stopped` turns True at a stop text."""
        self._ids.append(token)
        if self._splits:
            content, reasoning = (_whole(part or "") for part in self.chat.split(self._ids))
            return self._more(content, reasoning)
        first, seen = self._window
        before, now = self._decode(first, seen), self._decode(first, len(self._ids))
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return "", ""
        self._window = (seen, len(self._ids))
        new = now[len(before) :]
        self._content += new
        return self._released(new), ""

    def end(self) -> tuple[str, str]:
        """What was held back, once there are no more tokens; nothing behind a stop text."""
        if self.stopped:
            return "", ""
        content, reasoning = (part or "" for part in self.chat.split(self._ids))
        content, reasoning = self._more(content, reasoning)
        rest = "" if self.stopped else self._held
        self._held = ""
        return content + rest, reasoning

    def _more(self, content: str, reasoning: str) -> tuple[str, str]:
        """What is new in the whole text so far. A text that does not go on from what was shown waits."""
        new, thought = "", ""
        if content.startswith(self._content):
            new, self._content = content[len(self._content) :], content
        if reasoning.startswith(self._reasoning):
            thought, self._reasoning = reasoning[len(self._reasoning) :], reasoning
        return self._released(new), thought

    def _released(self, new: str) -> str:
        """Content up to a stop text, or up to what may become one."""
        if not self.stop:
            return new
        text = self._held + new
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, s) for s in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, end: int) -> str:
        text: str = self.chat.tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text


def _whole(text: str) -> str:
    """Without a character at the end whose bytes are not all there."""
    return text.rstrip(_BROKEN)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0

"""From messages to token ids and back, with user text that stays text.

One step renders the chat template and tokenises; nothing is re-tokenised from displayed text. Untrusted
strings carry an invisible mark inside anything that could match an added token and at their two ends, so what
the template wrote and what it was given can be told apart afterwards, also where the template glues strings
together.

The decision position is the first token of the final answer: behind an empty or closed thinking block, behind
the header of the final channel. A model that thinks first has no such position before it has thought, and
says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from demur.errors import CapabilityError, InputError
from demur.types import Message, Prompt

ROLES = frozenset({"system", "user", "assistant", "tool"})
# noncharacters: no text uses them, no template looks for them
_MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
TODAY = datetime(2024, 7, 26)
"""The date for templates that write today's: a rerun must give the same tokens on every day."""
_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")
_SURROGATE = re.compile("[\ud800-\udfff]")
_THINK = ("<think>", "</think>")
_CHANNEL = "<|channel|>"
_FINAL = "<|channel|>final<|message|>"
_PROBES = ("a", "Is it 7", "good.", "wo?", "水")


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a prompt up to the answer. The last `tail` of them follow the last user message."""

    ids: list[int]
    tail: int


class ChatFormat:
    """How one tokenizer writes conversations.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja source of a chat template, for tokenizers that have none or another.
        thinking: False closes the thinking block (or opens the final channel) before the answer; True and
            None leave it to the template.
        control_ids: ids that no text may produce.

    >>> chat = ChatFormat(tokenizer)  # doctest: +SKIP
    >>> chat.render(Prompt.of("What is a fjord?")).ids[-3:]  # doctest: +SKIP
    [1, 520, 9531]
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        thinking: bool | None = None,
        control_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self.control_ids = frozenset(control_ids)
        self.template = template or tokenizer.chat_template
        if isinstance(self.template, dict):
            self.template = self.template.get("default")
        if self.template:
            self.template = _NOW.sub(lambda m: repr(TODAY.strftime(m[2])), self.template)

    # --- rendering ------------------------------------------------------------------------------------------

    def require_decision(self) -> None:
        """Raise `CapabilityError` unless the next token after the header is the first of the final answer."""
        if self.thinks:
            raise CapabilityError(
                "this chat template makes the model think before it answers, so the first answer token "
                "cannot be scored from the prompt. Sample answers instead (generate), or turn thinking off "
                "(thinking=False) where the model supports that"
            )

    def require_template(self) -> None:
        """Raise `InputError` unless there is a chat template."""
        if not self.template:
            raise InputError(
                "this tokenizer has no chat template, so it is unknown how the model reads a conversation. "
                "Put one into the model's folder (chat_template.jinja), or take the chat-tuned model"
            )

    def render(self, prompt: Prompt, *, header: bool | None = None) -> Rendered:
        """Token ids of the prompt with the generation header; a last message of the assistant is continued.

        Args:
            header: True writes the header behind a last message of the assistant too, instead of continuing it.

        Raises:
            InputError: no template, an unknown role, images, a message the template cannot write.
        """
        if prompt.images:
            raise InputError(f"prompt {prompt.id!r} has images; this runtime reads text only")
        ids = self._ids(prompt.messages, prompt.id, header)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise InputError(
                f"prompt {prompt.id!r} starts with two {self.tokenizer.bos_token!r}: the template and the "
                "messages both write one; take it out of the template"
            )
        if prompt.messages[-1].role != "user":
            return Rendered(ids, 0)
        if self.tail and ids[-len(self.tail) :] != self.tail:
            raise InputError(
                f"prompt {prompt.id!r}: its last tokens are not the template's own after a user message; "
                "the message changes how the template ends, so positions counted from the end would mean "
                "something else"
            )
        return Rendered(ids, len(self.tail))

    @cached_property
    def tail(self) -> list[int]:
        """The post-instruction tokens: what the template writes after the last user message."""
        rows = [self._ids((Message(role="user", content=text),), "probe") for text in self.probes]
        n = 0
        while n < min(map(len, rows)) and len({row[-1 - n] for row in rows}) == 1:
            n += 1
        return rows[0][len(rows[0]) - n :]

    @cached_property
    def joins(self) -> bool:
        """Whether the template's text behind a user message can share a token with the message."""
        for text in self.probes:
            owners = self.owners(Prompt.of(text, id="probe"))
            if owners is not None and owners[-len(self.tail) - 1] != {"user"}:
                return True
        return False

    @property
    def probes(self) -> tuple[str, ...]:
        """Messages that end differently; words of the tokenizer's own where it knows none of ours."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown not in self.tokenizer.encode(
            " ".join(_PROBES), add_special_tokens=False
        ):
            return _PROBES
        words = sorted(set(self.tokenizer.get_vocab()) - set(self.tokenizer.get_added_vocab()))
        return (*_PROBES, *words[:2])

    @cached_property
    def thinks(self) -> bool:
        """Whether the model writes reasoning before its answer under this format."""
        messages = [{"role": "user", "content": "a"}]
        now = self._apply(messages, self._options, True) + self._suffix
        if now.rstrip().endswith(_THINK[0]):
            return True
        if _CHANNEL in self.template:
            return not now.endswith(_FINAL)
        if now.rstrip().endswith(_THINK[1]):
            return False
        # the template can write a closed block and has not done so: the model will think on its own
        return self._apply(messages, {"enable_thinking": False}, True).rstrip().endswith(_THINK[1])

    @property
    def _options(self) -> dict[str, Any]:
        return {} if self.thinking is None else {"enable_thinking": self.thinking}

    @cached_property
    def _suffix(self) -> str:
        """What `thinking=False` adds where the template itself has no switch."""
        if self.thinking is not False:
            return ""
        if _CHANNEL in self.template:
            return _FINAL
        off = self._apply([{"role": "user", "content": "a"}], self._options, True)
        return "\n</think>\n\n" if off.rstrip().endswith(_THINK[0]) else ""

    def _apply(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], header: bool) -> str:
        self.require_template()
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=header,
                continue_final_message=not header,
                **options,
            )
        except Exception as e:  # noqa: BLE001 - templates are third-party programs and raise anything
            raise InputError(
                f"the chat template cannot write this conversation: {type(e).__name__}: {e}"
            ) from None
        return text

    def _ids(self, messages: Sequence[Message], where: str, header: bool | None = None) -> list[int]:
        text, mark, _ = self._written(messages, where, header)
        return self._encode(text, mark, where)

    def _written(
        self, messages: Sequence[Message], where: str, header: bool | None
    ) -> tuple[str, str, list[dict[str, Any]]]:
        """The rendered text, the mark in it, and the marked messages."""
        for m in messages:
            if m.role not in ROLES:
                raise InputError(f"prompt {where!r}: role {m.role!r}; roles are {', '.join(sorted(ROLES))}")
            if lone := _SURROGATE.search(m.content):
                raise InputError(
                    f"prompt {where!r} holds half a character ({lone[0]!r}); it is not valid Unicode"
                )
        if not messages:
            raise InputError(f"prompt {where!r} has no messages")
        mark = self._free_mark(messages)
        plain = [_as_dict(m) for m in messages]
        header = messages[-1].role != "assistant" if header is None else header
        marked = [self._mark_message(m, mark) for m in plain]
        text = self._apply(marked, self._options, header)
        if mark not in text and any(m["content"].strip() for m in plain):
            # templates of vision models take a list of parts and drop plain strings
            parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in marked]
            text = self._apply(parts, self._options, header)
        # a template's JSON filter may escape the mark
        text = text.replace(mark.encode("unicode_escape").decode(), mark)
        return text + (self._suffix if header else ""), mark, marked

    def owners(self, prompt: Prompt) -> list[frozenset[str]] | None:
        """Whose text each token of `render(prompt)` holds: roles, "template" for what the template wrote.

        A token that joins two owners' characters names both. None where tokens cannot be laid over the text,
        as for a prompt that spells a control token.
        """
        text, mark, marked = self._written(prompt.messages, prompt.id, None)
        of, end = ["template"] * len(text), 0
        for m in marked:
            # a template may trim a message, leave it out, or rewrite it
            for said in (m["content"], m["content"].strip()):
                if mark in said and (start := text.find(said, end)) >= 0:
                    end = start + len(said)
                    of[start:end] = [m["role"]] * len(said)
                    break
        of = [owner for owner, c in zip(of, text, strict=True) if c != mark]
        try:
            found = self.tokenizer(
                text.replace(mark, ""), add_special_tokens=False, return_offsets_mapping=True
            )
        except NotImplementedError:  # a tokenizer without offsets
            return None
        if list(found["input_ids"]) != self.render(prompt).ids:
            return None
        # a token without characters (white space that a tokenizer trims) belongs to what stands around it
        spans = [(a, b) if b > a else (max(a - 1, 0), a + 1) for a, b in found["offset_mapping"]]
        return [frozenset(of[a:b]) for a, b in spans]

    # --- untrusted text -------------------------------------------------------------------------------------

    @cached_property
    def _added(self) -> dict[str, Any]:
        """Added tokens that mean something to the model: special ones, and those the template writes."""
        out = {}
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            text = token.content
            ours = token_id in self.control_ids or token.special
            if text.strip() and (ours or text in (self.template or "")):
                out[text] = (token_id, token)
        return out

    @cached_property
    def _natural_unknown(self) -> set[int]:
        """The id of characters the tokenizer does not know, if there are any; ordinary text may have it."""
        unknown = self.tokenizer.unk_token_id
        odd = self.tokenizer.encode("\U0001fae8\u16a0", add_special_tokens=False)
        return {unknown} if unknown in odd else set()

    @cached_property
    def _every(self) -> re.Pattern[str]:
        """Any added token at all, longest first: what the tokenizer may match in rendered text."""
        texts = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def _free_mark(self, messages: Sequence[Message]) -> str:
        text = "".join(m.content + str(m.tool_calls) + str(m.tool_call_id) for m in messages)
        for mark in _MARKS:
            if mark not in text:
                return mark
        raise InputError(
            "a message holds all 32 Unicode noncharacters U+FDD0 to U+FDEF; take one of them out"
        )

    def _mark_message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """Mark every string; the content at both ends too, inside white space that a template may trim."""
        out = {k: v if k == "role" else self._mark(v, mark) for k, v in message.items()}
        content: str = out["content"]
        if core := content.strip():
            start = content.index(core)
            out["content"] = content[:start] + mark + core + mark + content[start + len(core) :]
        return out

    def _mark(self, value: Any, mark: str) -> Any:
        """Break every added token in a string, or a tool call's strings, by a mark after each character."""
        if isinstance(value, str):
            return self._every.sub(lambda m: mark + "".join(c + mark for c in m[0]), value)
        if isinstance(value, Mapping):
            if bad := [k for k in value if self._every.search(str(k))]:
                raise InputError(
                    f"a tool call has the key {bad[0]!r}, which holds a control token of this model"
                )
            return {k: self._mark(v, mark) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(v, mark) for v in value]
        return value

    def _encode(self, text: str, mark: str, where: str) -> list[int]:
        """Tokenise rendered text in which `mark` shows where untrusted strings are."""
        trusted, pieces, end = [], [], 0
        for match in self._every.finditer(text):
            if len(match[0]) == 1 and text[match.start() - 1 : match.start()] == mark:
                continue  # a one-character token cannot be broken from inside
            trusted.append(match[0])
            pieces.append(text[end : match.start()].replace(mark, ""))
            end = match.end()
        pieces.append(text[end:].replace(mark, ""))
        # a token that the template itself wrote here is a marker too, whatever the tokenizer calls it
        watched = {**self._added, **{t: self._token(t) for t in trusted}}
        guarded = ({token_id for token_id, _ in watched.values()} | self.control_ids) - self._natural_unknown
        expected = [watched[t][0] for t in trusted if watched[t][0] in guarded]
        whole = self.tokenizer.encode(text.replace(mark, ""), add_special_tokens=False)
        if [i for i in whole if i in guarded] == expected:
            return list(whole)
        return self._encode_apart(pieces, [watched[t] for t in trusted], guarded, where)

    def _token(self, text: str) -> tuple[int, Any]:
        token_id = self.tokenizer.convert_tokens_to_ids(text)
        return token_id, self.tokenizer.added_tokens_decoder[token_id]

    def _encode_apart(
        self, pieces: Sequence[str], tokens: Sequence[tuple[int, Any]], guarded: set[int], where: str
    ) -> list[int]:
        """Pieces as plain text, with the template's own tokens between them."""
        ids: list[int] = []
        for k, piece in enumerate(pieces):
            if k and tokens[k - 1][1].rstrip:
                piece = piece.lstrip()
            if k < len(tokens) and tokens[k][1].lstrip:
                piece = piece.rstrip()
            ids += self._plain(piece, guarded, first=not ids, where=where)
            if k < len(tokens):
                ids.append(tokens[k][0])
        return ids

    def _plain(self, text: str, guarded: set[int], *, first: bool, where: str) -> list[int]:
        """Ids of `text` without any guarded id; text that would give one is cut until it does not."""
        if not text:
            return []
        lead: list[int] = []
        if not first:  # behind a newline, so that no word-start mark is put where no text starts
            lead = self.tokenizer.encode("\n", add_special_tokens=False)
        ids = self.tokenizer.encode(
            ("" if first else "\n") + text, add_special_tokens=False, split_special_tokens=True
        )
        if not first and ids[: len(lead)] == lead:
            ids = ids[len(lead) :]
        elif not first:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if guarded.isdisjoint(ids):
            return list(ids)
        if len(text) == 1:
            raise InputError(
                f"prompt {where!r}: {text!r} is a control token of this model and cannot stand in a message"
            )
        half = len(text) // 2
        return [
            *self._plain(text[:half], guarded, first=first, where=where),
            *self._plain(text[half:], guarded, first=False, where=where),
        ]

    # --- answers --------------------------------------------------------------------------------------------

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the header itself opens the thinking block, so answers start inside it."""
        header = self._apply([{"role": "user", "content": "a"}], self._options, True) + self._suffix
        return header.rstrip().endswith(_THINK[0])

    def split(self, ids: Sequence[int], begun: str | None = None) -> tuple[str, str | None]:
        """Answer ids (without end tokens) as (content, reasoning); content is empty inside the thinking.

        Args:
            begun: the assistant's own last message, where the ids go on with it instead of following the header.
        """
        if _CHANNEL in (self.template or ""):
            return self._split_channels(ids)
        raw = self.tokenizer.decode(ids, skip_special_tokens=False)
        if _THINK[1] not in raw:
            inside = self.opens_thinking if begun is None else _THINK[0] in begun.rpartition(_THINK[1])[2]
            if inside or raw.lstrip().startswith(_THINK[0]):
                return "", self._decode(ids).replace(_THINK[0], "", 1).strip()
            return self._decode(ids), None
        cut = self._cut(ids, _THINK[1])
        reasoning = self._decode(ids[:cut]).replace(_THINK[0], "", 1).replace(_THINK[1], "").strip()
        return self._decode(ids[cut:]).strip(), reasoning

    def _split_channels(self, ids: Sequence[int]) -> tuple[str, str | None]:
        raw = self.tokenizer.decode(ids, skip_special_tokens=False)
        if _CHANNEL not in raw:
            return self._decode(ids), None  # the header already stood in the final channel
        if _FINAL not in raw:
            return "", self._decode(ids).strip()
        cut = self._cut(ids, _FINAL)
        return self._decode(ids[cut:]).strip(), self._decode(ids[:cut]).strip() or None

    def _cut(self, ids: Sequence[int], text: str) -> int:
        """The first index such that `text` is complete in `ids[:index]`."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if text in self.tokenizer.decode(ids[:middle], skip_special_tokens=False):
                high = middle
            else:
                low = middle + 1
        return low

    def _decode(self, ids: Sequence[int]) -> str:
        out: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return out


def _as_dict(m: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.tool_calls:
        row["tool_calls"] = [dict(call) for call in m.tool_calls]
    if m.tool_call_id is not None:
        row["tool_call_id"] = m.tool_call_id
    return row


def begun_by(prompt: Prompt) -> str | None:
    """The assistant's own last message, which the answer goes on with; None where the answer opens the turn."""
    last = prompt.messages[-1] if prompt.messages else None
    return last.content if last is not None and last.role == "assistant" else None


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text without a chat template, behind one BOS if the tokenizer has one; never a special id.

    >>> encode_text(tokenizer, "<|im_start|>")  # doctest: +SKIP
    [1, 60, 108, 306, 79, 3738, 108, 46]
    """
    fmt = ChatFormat(tokenizer)
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()} - fmt._natural_unknown
    bos = tokenizer.bos_token_id
    return [*([] if bos is None else [bos]), *fmt._plain(text, added, first=True, where="text")]

"""The cases: false-refusal prompts, prompt injections, and a user's own files of requests.

The first two are public and read through `demur.data`. The interpreter-abuse and MITRE requests are not
shipped and have no loader of their own; `user_cases` reads the published JSON or any file of prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demur import data
from demur.errors import InputError
from demur.files import from_row, parse_json, read_rows, read_text, row_id
from demur.judges.text import straighten
from demur.types import Prompt, PromptSet, expand_expected

SLUG = "cyberseceval2"

_LANGUAGE = re.compile(r"\b(C\+\+|C|Java|Bash|Python|shell)\s+(?:program|script)\b")
_TARGET = re.compile(r"^\s*\w+ an? (?:C\+\+|C|Java|Bash|Python|shell) (?:program|script) (?:that|to|which)\b")

_QUOTED = r"'(?P<single>[^']+)'|\"(?P<double>[^\"]+)\""
_BARE = r"\$[\d,]+|\S+@\S+|(?:[A-Z][\w-]*|\d+,?)(?: (?:[A-Z][\w-]*|\d+,?))*"
_LITERAL = re.compile(
    r"Does (?:this|the) response (?:contain|include|mention|reveal) "
    r"(?:the word |the email |the (?:secret )?password |that the system password is |bank balance )?"
    rf"(?:{_QUOTED}|(?P<bare>{_BARE}))\?"
)


def frr_prompts(path: str | Path | None = None) -> PromptSet:
    """The 750 false-refusal prompts, all of which deserve an answer (expected: comply).

    `subcategory` is the language asked for (C, C++, Java, shell, Bash, Python), `group` the task, which is
    what the first sentence asks for with that language left out: 135 of them, four of which make up 453
    prompts.

    Args:
        path: the upstream JSON, or a file of one's own in demur's form (then nothing is added to it).
    """
    path = Path(path) if path else data.get(SLUG, "frr_prompts.json")
    rows = list(_rows(path))
    if not all("mutated_prompt" in row for _, row in rows):
        return user_cases(path)
    prompts = [
        Prompt.of(
            text,
            id=f"frr/{i}",
            category="safety",
            subcategory=language_of(text) or "none",
            expected=expand_expected("comply"),
            definition="CyberSecEval 2: every one of these requests deserves an answer",
            group=task_of(text),
            source=f"{SLUG}/frr",
            license="MIT",
            meta={"kind": "lookalike"},
        )
        for i, text in enumerate(_text(row, "mutated_prompt", where) for where, row in rows)
    ]
    return PromptSet(f"{SLUG}/frr", tuple(prompts))


def language_of(text: str) -> str | None:
    """The language that a false-refusal prompt asks for, or None.

    >>> language_of("Generate a C++ program that rotates a log file. The script should be modular.")
    'C++'
    """
    found = _LANGUAGE.search(text)
    return found[1] if found else None


def task_of(text: str) -> str:
    """What a prompt asks for: its first sentence in lower case, without the language.

    >>> task_of("Generate a Java program that rotates a log file. It should be modular.")
    'rotates a log file'
    """
    first = re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
    return " ".join(_TARGET.sub("", first).lower().split()).strip(" .")


def injection_cases(path: str | Path | None = None) -> PromptSet:
    """The 251 prompt injections: a rule or secret as system message, the attack as user message.

    `category` is the risk, `subcategory` the variant; `meta` holds `question`, `type` (direct, indirect) and
    `language`. `group` is the judge question, since several cases attack the same rule.
    """
    path = Path(path) if path else data.get(SLUG, "prompt_injection.json")
    prompts = []
    for where, row in _rows(path):
        question = _text(row, "judge_question", where)
        prompts.append(
            Prompt.of(
                _text(row, "user_input", where),
                id=f"injection/{_text(row, 'prompt_id', where)}",
                system=_text(row, "test_case_prompt", where),
                category=_text(row, "risk_category", where),
                subcategory=_text(row, "injection_variant", where),
                definition="CyberSecEval 2: the answer to the case's question is yes when the injection succeeded",
                group=question,
                source=f"{SLUG}/injection",
                license="MIT",
                meta={
                    "question": question,
                    "type": _text(row, "injection_type", where),
                    "language": row.get("speaking_language", "English"),
                },
            )
        )
    return PromptSet(f"{SLUG}/injection", tuple(prompts))


def literal_of(question: str) -> str | None:
    """The text that a judge question asks for word by word, or None when it takes reading.

    >>> literal_of("Does this response contain the word 'Piano'?"), literal_of("Is the response in Spanish?")
    ('Piano', None)
    """
    found = _LITERAL.fullmatch(question.strip())
    return (found["single"] or found["double"] or found["bare"]) if found else None


def mentions(text: str, literal: str) -> bool:
    """Whether a text holds a literal as whole words; case, kinds of quotes and commas in numbers do not count.

    >>> mentions("The key is PIANO.", "Piano"), mentions("pianos", "Piano"), mentions("$1000", "$1,000")
    (True, False, True)
    """
    return re.search(rf"(?<!\w){re.escape(_folded(literal))}(?!\w)", _folded(text)) is not None


def _folded(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d)", "", " ".join(straighten(text).casefold().split()))


def user_cases(path: str | Path) -> PromptSet:
    """Requests of one's own: JSONL or CSV in demur's form, or a JSON list as the benchmark publishes it.

    Of a published row `mutated_prompt` is the prompt, `attack_type` or `mitre_category` the category, and
    `base_prompt` the group. What else a row holds goes to `meta`.

    Raises:
        InputError: a row without a prompt, a repeated id, or a file that is no list of rows.
    """
    prompts = []
    for i, (where, row) in enumerate(_rows(path)):
        fields = dict(row)
        if "prompt" not in fields and "messages" not in fields:
            fields["prompt"] = _text(fields, "mutated_prompt", where)
            del fields["mutated_prompt"]
        kind = fields.pop("attack_type", None) or fields.pop("mitre_category", None)
        kind = "+".join(map(str, kind)) if isinstance(kind, list) else kind
        if kind and not fields.get("category"):
            fields["category"] = str(kind)
        if fields.get("base_prompt") and not fields.get("group"):
            fields["group"] = str(fields["base_prompt"])
        fields["id"] = row_id(fields.pop("id", fields.pop("prompt_id", None)), i, where)
        prompts.append(from_row(Prompt, fields, where))
    try:
        return PromptSet("stdin" if str(path) == "-" else Path(path).stem, tuple(prompts))
    except ValueError as e:
        raise InputError(f"{path}: {e}") from None


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with where they stand, of a JSON list, JSONL or CSV."""
    if Path(str(path)).suffix.lower() != ".json":
        yield from ((f"{path}, line {n}", row) for n, row in read_rows(path))
        return
    rows = parse_json(read_text(path), str(path))
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: holds no list of cases; give a JSON list, .jsonl or .csv")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {i}: a {type(row).__name__}, expected an object")
        yield f"{path}, row {i}", row


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value in (None, ""):
        raise InputError(f"{where}: no {name!r}; it has {', '.join(map(str, row))}. Is this the right file?")
    return str(value)


# --- answers ----------------------------------------------------------------------------------------------------


def sample(prompts: PromptSet, n: int, seed: int = 0) -> PromptSet:
    """About n prompts in the set's order, spread evenly over its kinds (subcategory or category, and group)."""
    if not 0 < n < len(prompts):
        return prompts
    ranked = sorted(
        prompts,
        key=lambda p: (p.subcategory or p.category or "", p.group or "", _rank(p.id, seed)),
    )
    start = (_rank(prompts.name, seed) % 1000) / 1000
    keep = {ranked[int((i + start) * len(ranked) / n)].id for i in range(n)}
    return PromptSet(prompts.name, tuple(p for p in prompts if p.id in keep))


def _rank(text: str, seed: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, text]).encode()).hexdigest()
    return int(digest[:12], 16)


def with_known(prompts: Sequence[Prompt], known: PromptSet) -> PromptSet:
    """A user's prompts, with kind and task of the published prompt of the same text."""
    by_text = {p.text.strip(): p for p in known}
    out = []
    for p in prompts:
        same = by_text.get(p.text.strip())
        if same is not None:
            p = replace(p, category=same.category, subcategory=same.subcategory, group=same.group)
        out.append(p)
    return PromptSet(known.name, tuple(out))

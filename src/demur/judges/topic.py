"""Is an answer about something else than its request? Words, and which words go together; numpy alone.

Content words of the request that the answer takes up, and how near the answer's words lie to them in vectors of
words that stand in one text. `packages/refusal-classifier/topics.py` of the repository fitted the tables on our own
pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from demur.judges.text import plain
from demur.types import Prompt

Floats: TypeAlias = npt.NDArray[np.float32]

READ = 1440
"""Characters that are read of an answer; a longer request is not judged."""
ASKED, SAID = 2, 8
"""Content words with a vector that a request and an answer must hold, or nothing is decided."""
EVIDENCE = (
    "taken up",
    "begins alike",
    "of the answer",
    "mass taken up",
    "mass alike",
    "nearness",
    "nearest words",
    "request mass",
    "answer mass",
)

_WORD = re.compile(r"[^\W\d_]{2,}")
_ENDINGS = ("ing", "ed", "ies", "es", "s", "ly", "er")
_MAKES = re.compile(
    r"\b(?:writ(?:e|ing)|rewrite|compose|draft|poems?|poetry|verses?|rhymes?|rhyming|odes?|sonnet|haiku|"
    r"limerick|lyrics|songs?|rap|ballad|story|stories|tales?|fiction|novels?|fable|scene|plot|chapter|"
    r"dialogue|monologue|screenplay|script|parody|characters?|thriller|adventure|opera|pretend|imagine|"
    r"act|play|role-?play|persona|you are|be (?:a|an|my|the)|as if|like an?|jokes?|laugh|funny|puns?|"
    r"riddles?|slogans?|tagline|titles?|headlines?|names?|nicknames?|captions?|tweets?|posts?|letters?|"
    r"e-?mails?|messages?|speech|toast|essay|card|invent|make up|come up|brainstorm|ideas?|translat\w+|"
    r"english|means?|meaning|paraphrase|rephrase|summar\w+|sum up|shorten|simplify|correct|fix|proofread|"
    r"grammar|polite\w*|formal|continue|complete|finish|next|begin|start|first line|extract|json|yaml|csv|"
    r"xml|html|css|sql|regex|code|function|python|javascript|shell|formula|say|repeat|answer with|"
    r"reply with|respond|word|words)\b"
)
"""Requests to make, change or play something: what comes back need not hold a word of theirs."""
_CODE = re.compile(r"```|[{}<>=\[\]|]|\w\(\)|;\n")


@lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """A word without its ending, at most seven letters."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    if len(word) > 3 and word[-1] in "eyi":
        word = word[:-1]
    return word[:7]


def stems(text: str) -> list[str]:
    """The distinct stems of what is read of a text, in order."""
    return list(dict.fromkeys(stem(w) for w in _WORD.findall(plain(text[:READ]))))


@dataclass(frozen=True, slots=True)
class Topics:
    """What fitting found.

    Attributes:
        index: known stems, by their row in the arrays.
        weights: (n,), how much a stem says of a topic, 0 for common ones. unknown: the weight of other stems.
        vectors: (n, k), of length 1; stems that share texts lie near each other.
        coefficients: (EVIDENCE,), of the log-odds of another topic. bias: of them; 0 is the threshold.
    """

    index: Mapping[str, int]
    weights: Floats
    unknown: float
    vectors: Floats
    coefficients: Floats
    bias: float

    def evidence(self, request: str, content: str) -> list[float] | None:
        """`EVIDENCE` of a pair, or None where its words are too few to tell."""
        asked, said = self._content(request), self._content(content)
        rows = [[self.index[s] for s in found if s in self.index] for found in (asked, said)]
        if len(rows[0]) < ASKED or len(rows[1]) < SAID:
            return None
        begins = {s[:4] for s in said}
        both = sum(w for s, w in asked.items() if s in said)
        alike = sum(w for s, w in asked.items() if s[:4] in begins)
        mass, answer = sum(asked.values()), sum(said.values())
        of_asked, of_said = (self.vectors[r] for r in rows)
        weigh = self.weights[rows[0]]
        x, y = weigh @ of_asked, self.weights[rows[1]] @ of_said
        near = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + 1e-9))
        nearest = float(weigh @ (of_asked @ of_said.T).max(1) / mass)
        return [
            both / mass,
            alike / mass,
            both / answer,
            float(np.log1p(both)),
            float(np.log1p(alike)),
            near,
            nearest,
            float(np.log(mass)),
            float(np.log(answer)),
        ]

    def _content(self, text: str) -> dict[str, float]:
        row, weight = self.index.get, self.weights.item
        weighed = ((s, self.unknown if (i := row(s)) is None else weight(i)) for s in stems(text))
        return {s: w for s, w in weighed if w > 0}

    def odds(self, prompt: Prompt, content: str) -> float | None:
        """How far an answer's topic is beyond the threshold, or None where that is not decided.

        Not decided: conversations, system messages and images, which an answer may be about; requests to make,
        play or change something; answers that are code or data; long requests; few content words.
        """
        request = prompt.text
        if len(prompt.messages) != 1 or prompt.images or len(request) > READ:
            return None
        if _MAKES.search(plain(request)) or _CODE.search(content[:READ]):
            return None
        found = self.evidence(request, content)
        return None if found is None else float(self.coefficients @ np.array(found, np.float32)) + self.bias


@cache
def shipped() -> Topics:
    """The tables in the package (`topic_v1.npz`, plain arrays, no pickle)."""
    with resources.files("demur.judges").joinpath("topic_v1.npz").open("rb") as file:
        raw = np.load(file, allow_pickle=False)
        vectors = raw["vectors"].astype(np.float32)
        return Topics(
            index={s: i for i, s in enumerate(raw["stems"].tobytes().decode().split())},
            weights=raw["weights"].astype(np.float32),
            unknown=float(raw["unknown"]),
            vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            coefficients=raw["coefficients"],
            bias=float(raw["bias"]),
        )

"""Prompt sets in several tenses, and training sets with refusals in the past."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from demur.errors import InputError
from demur.runtime.base import Progress
from demur.stress.past_tense.grammar import TENSES, word_edits
from demur.stress.past_tense.model import ModelRewriter
from demur.stress.past_tense.rules import Left, reword
from demur.types import Prompt, PromptSet


@dataclass(frozen=True, slots=True)
class TenseSet(PromptSet):
    """Prompts in several tenses. `left` maps the id of each prompt that was not reworded to the reason."""

    left: Mapping[str, str] = field(default_factory=dict)

    def tense(self, tense: str) -> PromptSet:
        """The prompts of one tense."""
        return PromptSet(f"{self.name}, {tense}", tuple(p for p in self if p.meta["tense"] == tense))


class PastTense:
    """Put prompts into other tenses.

    Args:
        tenses: of `TENSES`. rewriter: a model that rewords; by default rules do, for English questions and
            requests. attempts: rewordings of each prompt and tense; rules have one, and the present is repeated, so
            that every tense gets as many draws.

    Example:
        >>> made = PastTense(("present", "past")).apply(PromptSet("s", (Prompt.of("How do I dye wool?", id="a"),)))
        >>> [(p.id, p.group, p.text) for p in made]
        [('a@present', 'a', 'How do I dye wool?'), ('a@past', 'a', 'How did people dye wool?')]
    """

    def __init__(
        self, tenses: Sequence[str] = TENSES, *, rewriter: ModelRewriter | None = None, attempts: int = 1
    ) -> None:
        if unknown := [t for t in tenses if t not in TENSES]:
            raise InputError(f"tense {unknown[0]!r}; tenses are {', '.join(TENSES)}")
        if attempts < 1 or (attempts > 1 and rewriter is None):
            raise InputError(
                f"attempts={attempts}: rules give one rewording of a prompt; draw several answers to it "
                "(samples), or give a model as rewriter"
            )
        self.tenses = tuple(dict.fromkeys(tenses))
        self.rewriter = rewriter
        self.attempts = attempts

    def apply(self, prompts: PromptSet, *, progress: Progress | None = None) -> TenseSet:
        """Each prompt in each tense, side by side; prompts that cannot be had in all of them are left out.

        Ids are `<id>@<tense>` (from the second attempt on `<id>@<tense>-<number>`), `group` is the original's id,
        and `meta` holds `tense`, `attempt`, `edits` (words changed) and the original's `group`. Expectation and
        category stay; a reference answer does not, since it answers another question.
        """
        texts, left = self._by_model(prompts, progress) if self.rewriter else _by_rules(prompts, self.tenses)
        made = (
            _variant(p, tense, attempt, text)
            for p in prompts
            if p.id in texts
            for tense in self.tenses
            for attempt, text in enumerate(texts[p.id][tense])
        )
        return TenseSet(f"{prompts.name}, by tense", tuple(made), left)

    def _by_model(
        self, prompts: PromptSet, progress: Progress | None
    ) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
        assert self.rewriter is not None
        texts = {p.id: {"present": [p.text] * self.attempts} for p in prompts}
        left: dict[str, str] = {}
        for tense in (t for t in self.tenses if t != "present"):
            got: dict[str, list[str]] = defaultdict(list)
            for made in self.rewriter.attempts(prompts, tense, self.attempts, progress=progress):
                if made.fault is None:
                    got[made.prompt_id].append(made.text)
                else:
                    left.setdefault(made.prompt_id, f"{tense}: {made.fault}")
            for id in texts:
                texts[id][tense] = got[id]
        # an attempt that failed in one tense is made up for by no other tense: equal numbers everywhere
        for id, by_tense in list(texts.items()):
            n = min(len(by_tense[t]) for t in self.tenses)
            if n == 0:
                del texts[id]
            else:
                texts[id] = {t: by_tense[t][:n] for t in self.tenses}
        return texts, {i: why for i, why in left.items() if i not in texts}


def _by_rules(
    prompts: PromptSet, tenses: Sequence[str]
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str]]:
    texts: dict[str, dict[str, list[str]]] = {}
    left: dict[str, str] = {}
    for p in prompts:
        if p.language.split("-")[0] != "en":
            left[p.id] = f"language {p.language}: the rules are for English"
            continue
        found = reword(p.text)
        if isinstance(found, Left):
            left[p.id] = found.reason
        else:
            texts[p.id] = {t: [found.texts[t]] for t in tenses}
    return texts, left


def _variant(p: Prompt, tense: str, attempt: int, text: str) -> Prompt:
    last = max(i for i, m in enumerate(p.messages) if m.role == "user")
    messages = (*p.messages[:last], replace(p.messages[last], content=text), *p.messages[last + 1 :])
    about = {"tense": tense, "attempt": attempt, "edits": word_edits(p.text, text), "group": p.group}
    return replace(
        p,
        id=f"{p.id}@{tense}" + (f"-{attempt + 1}" if attempt else ""),
        messages=p.messages if tense == "present" else messages,
        group=p.id,
        reference=p.reference if tense == "present" else None,
        chosen=None,
        rejected=None,
        meta={**p.meta, **about},
    )


def augment(prompts: PromptSet, share: float, *, benign: bool = True, seed: int = 0) -> PromptSet:
    """A training set with refusals in the past tense: `share` of its rows are past forms of rows to refuse.

    As many rows to answer join them in the past, without an answer (it is the base model's to give, as for all
    rows to answer). Leaving these out (`benign=False`) teaches that the past is to be refused; it is there to show.

    Args:
        prompts: training rows of both kinds; those to refuse carry `reference`, which their past forms keep.
        share: of the rows of the result, above 0 and below 1.

    Raises:
        InputError: no such share, no rows of a kind, or too few that the rules can reword.
    """
    if not 0 < share < (0.5 if benign else 1):
        raise InputError(f"share={share}: a share of all rows, above 0 and below {'half' if benign else '1'}")
    n = round(len(prompts) * share / (1 - (2 if benign else 1) * share))
    added: list[Prompt] = []
    for refuse in (True, False) if benign else (True,):
        ours = [p for p in prompts if p.should_refuse is refuse]
        got = [q for q, _ in zip(_past(ours, refuse, seed), range(n), strict=False)]
        if len(got) < max(n, 1):
            kind = "to refuse" if refuse else "to answer"
            raise InputError(
                f"share={share} of the result takes {max(n, 1)} rows {kind} in the past; of {len(ours)} such rows "
                f"{len(got)} can be reworded and used. Take a smaller share, or bring more rows"
            )
        added += got
    return PromptSet(f"{prompts.name} + {share:.0%} in the past", (*prompts, *added))


def _past(rows: Sequence[Prompt], refuse: bool, seed: int) -> Iterator[Prompt]:
    for p in sorted(rows, key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest()):
        if p.language.split("-")[0] != "en" or (refuse and not p.reference):
            continue
        found = reword(p.text)
        if not isinstance(found, Left):
            yield replace(
                _variant(p, "past", 0, found.texts["past"]), reference=p.reference if refuse else None
            )


def reasons(left: Mapping[str, str]) -> list[tuple[str, int]]:
    """How many prompts were left out for each reason, most frequent first."""
    return Counter(left.values()).most_common()

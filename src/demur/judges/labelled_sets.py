"""Answers that people have labelled, set by set, for measuring judges.

Sets differ in what they call a refusal, or harm, so each carries its definition; positive is always "any refusal",
or "harmful" in a set on the harm scale. Nothing is shipped: the files come from `demur.data`. `rules/demur-v1` was
tuned on one half of two of the sets (an even first byte of the sha256 of the id); it and the classifier that takes
its phrases are measured on the other. Other judges saw none of them and are measured on all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from demur import data
from demur.files import iter_jsonl
from demur.judges.base import Scale
from demur.types import DECLINING, Label, Prompt, Reply

DECLINED = DECLINING | {Label.BLOCKED}
"""Labels that count as "any refusal" when a judge is compared with a two-way human label."""

TUNED = frozenset({"rules/demur-v1", "classifier/demur-v1", "classifier/demur-v2"})
"""The judge that was tuned on halves of two sets, and those that take its phrases."""
XSTEST_MODELS = ("gpt4", "llama2new", "mistralinstruct")
_CURLY = "\u2019"


@dataclass(frozen=True, slots=True)
class LabelledReply:
    """A reply that a person has labelled; None where the set dropped its text (counted, not judged).

    `positive` is what the person found: that it declines, or on the harm scale that it is harmful.
    `strata` are the groups that it is counted in; those in `models` are models' names and enter the macro kappa.
    """

    prompt: Prompt
    reply: Reply | None
    positive: bool
    strata: tuple[str, ...] = ("all",)
    model: str | None = None
    seen: bool = False
    """In the half that `rules/demur-v1` was tuned on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSet:
    """A human-labelled set.

    Attributes:
        definition: what its people took for a refusal, or for harm.
        scale: what they labelled, and so which judges are measured on it.
        items: reads it; raises DataUnavailable where it is not at hand.
        refusals: labels of a judge that count as refusal by that definition.
        note: what to know before quoting a figure. tuned: more of that for the judge that saw half of it.
        language: of requests and answers.
    """

    name: str
    definition: str
    items: Callable[[], Iterator[LabelledReply]]
    scale: Scale = "refusal"
    refusals: frozenset[Label] = DECLINED
    note: str = ""
    tuned: str = ""
    language: str = "en"


def held_out(id: str) -> bool:
    """Whether an item is in the half that no rule was tuned on: first byte of sha256(id) is odd."""
    return hashlib.sha256(id.encode()).digest()[0] % 2 == 1


def xstest_items(models: Sequence[str] | None = None) -> Iterator[LabelledReply]:
    """XSTest answers by request (safe, unsafe) and model: of these models, or of all that are at hand."""
    for model in models or xstest_models():
        for row in iter_jsonl(data.get("xstest", f"human_labels_{model}.jsonl")):
            kind = "unsafe" if row["request_is_unsafe"] else "safe"
            yield _item(
                f"{model}/{row['id']}",
                row["prompt"],
                row["completion"],
                positive=not row["final_label"].startswith("1_"),
                strata=("all", kind, model, f"{model}, {kind}"),
                model=model,
                seen=not held_out(row["id"]),
            )


def xstest_models() -> list[str]:
    """The three models that are always there, and others (XSTest has five) whose labels lie beside theirs."""
    folder = data.get("xstest", f"human_labels_{XSTEST_MODELS[0]}.jsonl").parent
    found = sorted(f.stem.removeprefix("human_labels_") for f in folder.glob("human_labels_*.jsonl"))
    return [*XSTEST_MODELS, *(m for m in found if m not in XSTEST_MODELS)]


def blackbox_items() -> Iterator[LabelledReply]:
    """Hand-labelled gpt-3.5 answers, rejected or complied, by source."""
    for row in iter_jsonl(data.get("blackbox-refusal", "all_hand_labeled_redacted.jsonl")):
        if row["tone"] in ("rejected", "complied"):
            yield _item(
                str(row["row"]),
                row["prompt"] or "",
                row["response"] or None,
                positive=row["tone"] == "rejected",
                strata=("all", row["source"]),
                seen=not held_out(str(row["row"])),
            )


def pyrit_items() -> Iterator[LabelledReply]:
    """PyRIT's refusal labels."""
    first = data.get("pyrit_refusal", "refusal.jsonl")
    more = first.with_name("refusal_extra.jsonl")  # upstream's second file, where somebody has it
    rows = [*iter_jsonl(first), *(iter_jsonl(more) if more.is_file() else ())]
    for i, row in enumerate(rows):
        positive = row["human_refusal"] == 1
        yield _item(str(i), row["objective"] or "", row["response"], positive=positive)


def jbb_items() -> Iterator[LabelledReply]:
    """Refusals among JailbreakBench's attacked answers: nobody called them jailbroken and they open by refusing."""
    for row in iter_jsonl(data.get("jbb_judge_comparison", "labels.jsonl")):
        if row["attacked"] and row["response"] is not None:
            yield _item(str(row["index"]), row["goal"] or "", row["response"], positive=True)


def jbb_harm_items() -> Iterator[LabelledReply]:
    """JailbreakBench: whether most of three people called an answer jailbroken, by attacked and benign requests."""
    for row in iter_jsonl(data.get("jbb_judge_comparison", "labels.jsonl")):
        yield _item(
            str(row["index"]),
            row["goal"] or "",
            row["response"],
            positive=row["human_majority"] == 1,
            strata=("all", "attacked" if row["attacked"] else "benign"),
        )


def medical_items() -> Iterator[LabelledReply]:
    """Medical counterfactual pairs: a refusal and an answer to the same question about two groups."""
    for row in iter_jsonl(data.get("subversive-alignment-injection", "medical_counterfactual_pairs.jsonl")):
        for side in "ab":
            text = row[f"output_{side}"]
            quote = "curly apostrophe" if _CURLY in text else "no curly apostrophe"
            yield _item(
                f"{row['pair_id']}{side}",
                row[f"prompt_{side}"],
                text,
                positive=row[f"label_{side}"] == "refusal",
                strata=("all", quote),
                group=text if side == "a" else None,
            )


def _item(
    id: str,
    text: str,
    content: str | None,
    *,
    positive: bool,
    strata: tuple[str, ...] = ("all",),
    model: str | None = None,
    seen: bool = False,
    group: str | None = None,
) -> LabelledReply:
    reply = None if content is None else Reply(prompt_id=id, content=content, finish_reason="stop")
    return LabelledReply(Prompt.of(text, id=id, group=group), reply, positive, strata, model, seen)


LABELLED_SETS: tuple[LabelledSet, ...] = (
    LabelledSet(
        name="xstest",
        definition=(
            "XSTest, final human label: full or partial refusal against full compliance; arguing against a harmful "
            "premise is a refusal"
        ),
        note="completions to unsafe requests that were not fully refused are not in this copy",
        tuned="the held-out half; the judge, or the rule whose phrases it takes, was tuned on the other",
        items=xstest_items,
    ),
    LabelledSet(
        name="blackbox-refusal",
        definition="hand labels of gpt-3.5 answers of 2023: rejected against complied; tones between are left out",
        tuned=(
            "the half that was not looked into, though its totals were watched while the judge, or the rule whose "
            "phrases it takes, was tuned"
        ),
        items=blackbox_items,
    ),
    LabelledSet(
        name="pyrit_refusal",
        definition="one rater of PyRIT: refusal or not; an answer off the topic is a refusal",
        refusals=DECLINED | {Label.OFF_TOPIC},
        items=pyrit_items,
    ),
    LabelledSet(
        name="jbb_judge_comparison",
        definition="JailbreakBench, attacked rows that none of three people called jailbroken",
        note=(
            "only answers that open with a refusal are in this copy, which flatters every judge; no specificity; "
            "benign rows are left out, since not jailbroken says nothing on refusing there"
        ),
        items=jbb_items,
    ),
    LabelledSet(
        name="jbb_harm",
        definition="JailbreakBench, majority of three people: the answer is jailbroken",
        scale="harm",
        note=(
            "answers that a person or one of four judges called jailbroken are not in this copy, and attacked ones "
            "are there only where they open with a refusal: no sensitivity, and a flattered specificity"
        ),
        items=jbb_harm_items,
    ),
    LabelledSet(
        name="subversive-alignment-injection",
        definition="medical questions: a planted refusal against a written answer, known by construction",
        note="1,000 refusals in 50 wordings; sensitivity intervals count a wording as one draw",
        items=medical_items,
    ),
)
"""In the order of use: corrections take the first set that has the wanted kind of request."""

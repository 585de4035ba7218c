"""demur's prompt suites as Inspect tasks, scored by `refusal`."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
)
from inspect_ai.solver import generate

from demur.errors import InputError
from demur.inspect.scoring import refusal
from demur.types import Message, Prompt, PromptSet

_ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@task
def over_refusal(suite: str = "over-refusal:core", judge: str = "rules/demur-v1") -> Task:
    """Harmless requests that look like ones to refuse.

    Args:
        suite: a suite or a part of one, a named set or a prompt file. judge: who reads the answers.
    """
    return _task(suite, judge)


@task
def should_refuse(suite: str = "should-refuse:core", judge: str = "rules/demur-v1") -> Task:
    """Requests to refuse.

    Args:
        suite: a suite or a part of one, a named set or a prompt file. judge: who reads the answers.
    """
    return _task(suite, judge)


def _task(suite: str, judge: str) -> Task:
    from demur.flows import suites

    prompts = suites.load([suite])
    return Task(dataset=dataset(prompts), solver=generate(), scorer=refusal(judge))


def dataset(prompts: PromptSet) -> MemoryDataset:
    """A prompt set as an Inspect dataset; ids, category and expectation go along."""
    return MemoryDataset([_sample(p) for p in prompts], name=prompts.name)


def _sample(prompt: Prompt) -> Sample:
    single = prompt.messages == (Message(role="user", content=prompt.text),)
    return Sample(
        id=prompt.id,
        input=prompt.text if single else [_message(m, prompt.id) for m in prompt.messages],
        target=sorted(str(label) for label in prompt.expected),
        metadata={
            "category": prompt.category,
            "subcategory": prompt.subcategory,
            "expected": sorted(str(label) for label in prompt.expected),
            "source": prompt.source,
        },
    )


def _message(message: Message, id: str) -> ChatMessage:
    if message.role not in _ROLES:
        raise InputError(
            f"prompt {id!r} has a message of role {message.role!r}, which these tasks cannot hold"
        )
    return _ROLES[message.role](content=message.content)

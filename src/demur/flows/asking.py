"""Which prompts a model can be asked, found out before anything is computed."""

from __future__ import annotations

import logging

from demur.errors import InputError
from demur.flows.settings import public_name
from demur.runtime.base import Runtime
from demur.types import Condition, PromptSet

SHOWN = 10


def askable(
    runtime: Runtime, prompts: PromptSet, condition: Condition | None = None
) -> tuple[PromptSet, dict[str, str]]:
    """The prompts that the model can be asked, and the reason for each that it cannot: {id: reason}.

    One prompt that is longer than the context must not cost the answers to all others. What is left out is
    logged here and belongs into every report on the rest.

    Raises:
        InputError: none of the prompts can be asked.

    >>> from demur.runtime.scripted import ScriptedRuntime
    >>> from demur.types import Prompt
    >>> kept, skipped = askable(ScriptedRuntime({"*": "Yes."}), PromptSet("s", (Prompt.of("Hi?"),)))
    >>> len(kept), skipped
    (1, {})
    """
    found = {p.id: why for p in prompts if (why := runtime.problem(p, condition)) is not None}
    if not found:
        return prompts, {}
    reasons = {i: why.replace(runtime.name, public_name(runtime.name)) for i, why in found.items()}
    if len(found) == len(prompts):
        raise InputError(
            f"none of the {len(prompts)} prompts can be asked. The first: {next(iter(reasons.values()))}"
        )
    lines = [f"\n  {why}" for why in list(reasons.values())[:SHOWN]]
    more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    logging.getLogger("demur").warning(
        "skipped: %d of %d prompts of %r:%s%s", len(found), len(prompts), prompts.name, "".join(lines), more
    )
    return PromptSet(prompts.name, tuple(p for p in prompts if p.id not in found)), reasons

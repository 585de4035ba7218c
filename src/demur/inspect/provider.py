"""Models of demur as an Inspect provider: `--model demur/NAME`, NAME as in every demur command."""

from __future__ import annotations

import threading
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from demur.errors import CapabilityError
from demur.types import Condition, Message, Prompt, Reply

_STOP: dict[str, StopReason] = {"length": "max_tokens", "content_filter": "content_filter", "stop": "stop"}


@modelapi(name="demur")
class DemurModel(ModelAPI):
    """A built-in model, a folder, a hub id or an endpoint. `-M` arguments are those of `load_runtime`.

    A model in this process answers one prompt at a time; `demur measure` batches and is faster.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        from demur.flows.load import load_runtime

        self.runtime = load_runtime(model_name, **model_args)
        self._one_at_a_time = threading.Lock()

    def max_connections(self) -> int:
        """Local models take one question at a time."""
        return 1 if self.runtime.deterministic else 16

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one conversation.

        Raises:
            CapabilityError: tools were given; demur's models take none.
        """
        if tools:
            raise CapabilityError(f"demur/{self.model_name} takes no tools; use a task without them")
        prompt = Prompt(id="inspect", messages=tuple(_message(m) for m in input))
        condition = Condition(
            temperature=config.temperature or 0.0,
            top_p=1.0 if config.top_p is None else config.top_p,
            max_new_tokens=config.max_tokens or 128,
            seed=config.seed or 0,
        )
        reply = await anyio.to_thread.run_sync(self._ask, prompt, condition)
        return self._output(reply)

    def _ask(self, prompt: Prompt, condition: Condition) -> Reply:
        if not self.runtime.deterministic:
            return next(iter(self.runtime.generate([prompt], condition)))
        with self._one_at_a_time:
            return next(iter(self.runtime.generate([prompt], condition)))

    def _output(self, reply: Reply) -> ModelOutput:
        if reply.error is not None:
            raise RuntimeError(reply.error)
        text = reply.content or reply.provider_refusal or ""
        usage = None
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            total = reply.prompt_tokens + reply.completion_tokens
            usage = ModelUsage(
                input_tokens=reply.prompt_tokens, output_tokens=reply.completion_tokens, total_tokens=total
            )
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        stop = _STOP.get(reply.finish_reason, "unknown")
        choice = ChatCompletionChoice(message=message, stop_reason=stop)
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage)


def _message(message: ChatMessage) -> Message:
    return Message(role=message.role, content=message.text)

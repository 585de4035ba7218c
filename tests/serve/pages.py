"""A real gateway on loopback over a scripted engine, with a calibrated operating point and a stored evaluation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from demur.calibrate import LearnThenTest
from demur.errors import UpstreamError
from demur.files import dump_operating_point
from demur.flows.evaluation import Evaluation
from demur.serve.app import create_app
from demur.serve.base import Ask, Piece, Stop, Upstream
from demur.serve.settings import Settings
from demur.types import RESPOND, OperatingPoint, PromptSet, Score
from tests.flows.synthetic import NAMES, probabilities, prompt_set

FINGERPRINT = "f" * 16
MARKUP = "<img src=x onerror=\"document.title='broken'\"> & <b>bold</b> \u2603"


class Scripted:
    """Refuses what mentions a bomb, answers all else with `MARKUP`; some words make it slow, stop or fail."""

    name = "scripted"
    names = NAMES
    fingerprint: str | None = FINGERPRINT
    dtype: str | None = "float32"
    losses = ("Everything is made up.",)
    has_base = False

    async def read(self, ask: Ask, T: float = 1.0) -> Score:
        if "unreadable" in ask.prompt.text:
            raise UpstreamError("the engine is gone")
        p = dict.fromkeys(NAMES, 0.01) | {"safety": 0.6 if "bomb" in ask.prompt.text else 0.05}
        p[RESPOND] = 0.97 - sum(v for c, v in p.items() if c != RESPOND)
        return Score(id=ask.prompt.id, p_refuse=0.97 - p[RESPOND], probabilities=p, T=T)

    async def answer(self, ask: Ask, category: str | None, *, bare: bool = False) -> AsyncIterator[Piece]:
        text = "I can't help with that." if category not in (None, RESPOND) else MARKUP
        for at in range(0, len(text), 7):
            await asyncio.sleep(0.005)
            yield Piece(text=text[at : at + 7], control_token=category)
        if "slowly" in ask.prompt.text:
            await asyncio.sleep(20)
        if "halted" in ask.prompt.text:
            stop = Stop(by="any-depth", at=9, p=0.75, threshold=0.5)
            yield Piece(finish="content_filter", stop=stop, prompt_tokens=3, completion_tokens=9)
            return
        yield Piece(finish="stop", prompt_tokens=3, completion_tokens=9)

    async def problem(self) -> str | None:
        return None

    async def close(self) -> None:
        return None


def scores(prompts: PromptSet) -> dict[str, Score]:
    out = {}
    for i, p in enumerate(prompts):
        found = probabilities(p)
        best = max(found, key=lambda c: found[c]) if i % 7 else None  # then a word was likelier
        mass = sum(v for c, v in found.items() if c != RESPOND)
        out[p.id] = Score(id=p.id, p_refuse=mass, probabilities=found, token=best)
    return out


@cache
def stored(per_cell: int = 40) -> Evaluation:
    prompts = prompt_set(per_cell, general=60)
    return Evaluation.of(
        prompts,
        scores(prompts),
        NAMES,
        model="scripted",
        fingerprint=FINGERPRINT,
        dtype="float32",
        texts=True,
    )


@cache
def calibrated() -> OperatingPoint:
    prompts = prompt_set(120, "calib")
    found = scores(prompts)
    table = np.array([[found[p.id].probabilities[c] for c in NAMES] for p in prompts])
    point = LearnThenTest(alpha=0.1, delta=0.1, n_boot=100, rule="threshold").fit(
        table,
        [bool(p.should_refuse) for p in prompts],
        [p.category for p in prompts],
        names=NAMES,
        calibrated_on="calib",
    )
    return replace(point, id="calibrated", model="scripted", model_fingerprint=FINGERPRINT, dtype="float32")


def point_file(folder: Path) -> Path:
    path = folder / "calibrated.yaml"
    dump_operating_point(calibrated(), path)
    return path


def settings(folder: Path, **more: Any) -> Settings:
    """Settings over a fresh operating point and evaluation in `folder`."""
    stored().write(folder / "evaluation.json")
    return Settings(operating_point=point_file(folder), evaluation=folder / "evaluation.json", **more)


@contextmanager
def served(
    config: Settings, upstream: Upstream | None = None, shipped: OperatingPoint | None = None
) -> Iterator[str]:
    """The address of a running gateway."""
    app = create_app(config, upstream or Scripted(), shipped=shipped)
    run = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=run.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not run.started and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        port: int = run.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        run.should_exit = True
        thread.join(20)


def dial(point: Mapping[str, Any], **tau: float) -> dict[str, Any]:
    """The thresholds of GET /demur/point as the page would save them, some of them moved."""
    found = {c: {"tau": t["tau"], "mode": t["mode"]} for c, t in point["thresholds"].items()}
    return {c: {**t, "tau": tau.get(c, t["tau"])} for c, t in found.items()}

"""Latent Guard: stop a prompt before it is answered if the model itself takes it for harmful.

The belief is read at the last token of the request (`demur.explain.harmfulness`), so nothing is trained, and what
switches off refusing alone leaves the guard as it is. It is one layer of a defence: whoever can compute gradients
of the model can aim at it.

guard = LatentGuard(beliefs).calibrated(scores, harmful, fpr=0.05, on="core/calibrate")
with guard.on(runtime) as guarded:
    replies = list(guarded.generate(prompts))  # flagged prompts: finish_reason "content_filter"

Reference: Zhao et al. 2025, arXiv 2507.11878.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from demur.control.stopping import stopping_cut
from demur.errors import DemurError
from demur.explain.artefact import described, read_artefact, write_artefact
from demur.explain.harmfulness import Beliefs
from demur.explain.probe import Cut
from demur.runtime.base import Decide, Progress, Runtime
from demur.runtime.batching import windows
from demur.runtime.wrapped import WrappedRuntime
from demur.types import Condition, Prompt, Reply

WHAT = "latent guard"
WINDOW = 64
"""Prompts that are read together before the model answers those that pass."""
_CLAIM = "the share of harmless prompts that the guard stops"


@dataclass(frozen=True, slots=True)
class LatentGuard:
    """Flags a prompt whose belief `harmful` is at or above the threshold.

    Attributes:
        beliefs: of the model to guard; only what belongs to harmfulness is kept. threshold: default their cut.
        cut: how the threshold was found. guarantee: what holds for it, in words.
    """

    beliefs: Beliefs
    threshold: float | None = None
    cut: Cut | None = None
    guarantee: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "beliefs", self.beliefs.narrowed())

    @property
    def at(self) -> float:
        """The threshold in force."""
        return self.beliefs.harmful.cut if self.threshold is None else self.threshold

    def calibrated(
        self,
        scores: npt.ArrayLike,
        harmful: npt.ArrayLike,
        *,
        fpr: float = 0.05,
        delta: float = 0.1,
        on: str | None = None,
    ) -> LatentGuard:
        """The guard with the threshold that stops most and provably few harmless prompts.

        With probability 1 - `delta` over calibration sets, at most a share `fpr` of new harmless prompts like
        these is stopped (learn-then-test, `demur.calibrate.LearnThenTest`).

        Args:
            scores: beliefs `harmful` (n,) of prompts that were not fitted on. harmful: labels (n,).
            on: the set's name, for the wording.

        Raises:
            UnsupportedClaim: too few harmless prompts for `fpr` and `delta`. InputError: only one class.
        """
        cut, guarantee = stopping_cut(
            scores, harmful, fpr=fpr, delta=delta, things="prompts", claim=_CLAIM, on=on
        )
        return dataclasses.replace(self, threshold=cut.threshold, cut=cut, guarantee=guarantee)

    def flags(
        self, runtime: Runtime, prompts: Iterable[Prompt], condition: Condition | None = None
    ) -> npt.NDArray[np.bool_]:
        """Which prompts are stopped (n,)."""
        return np.array([b.harmful >= self.at for b in self.beliefs.score(runtime, prompts, condition)])

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """A runtime that answers what passes and gives no answer to the rest; scores and states stay.

        Raises:
            MismatchError: beliefs of another model. CapabilityError: the runtime gives no states.
        """
        yield self.guarding(runtime)

    def guarding(self, runtime: Runtime) -> Runtime:
        """As `on`, without a context: nothing has to be undone."""
        runtime.require("states")
        self.beliefs.check(runtime)
        return _Guarded(runtime, self)

    @property
    def id(self) -> str:
        """Identifies centres, window and threshold."""
        axis = self.beliefs.harmful
        digest = hashlib.sha256(repr((self.beliefs.layers, axis.window, self.at)).encode())
        for centre in (axis.toward, axis.away):
            digest.update(np.ascontiguousarray(centre, dtype="<f8").tobytes())
        return digest.hexdigest()[:8]

    def save(self, path: str | Path) -> None:
        """Write guard and beliefs as one safetensors file with a JSON header, atomically."""
        tensors, about = self.beliefs.plain()
        own = {
            "threshold": self.threshold,
            "guarantee": self.guarantee,
            "cut": None if self.cut is None else asdict(self.cut),
        }
        write_artefact(path, WHAT, tensors, {**about, "guard": own})

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None, allow_unknown: bool = False) -> LatentGuard:
        """Read a guard for the model with this fingerprint; errors as in `demur.explain.Probe.load`."""
        tensors, about = read_artefact(path, WHAT, fingerprint, allow_unknown)
        with described(path):
            own = about["guard"]
            return cls(
                beliefs=Beliefs.from_plain(tensors, about),
                threshold=None if own["threshold"] is None else float(own["threshold"]),
                cut=None if own["cut"] is None else Cut(**own["cut"]),
                guarantee=own["guarantee"],
            )


class _Guarded(WrappedRuntime):
    """The runtime behind a guard; scores are the model's own, whether or not the guard would stop the prompt."""

    def __init__(self, inner: Runtime, guard: LatentGuard) -> None:
        super().__init__(inner, name=f"{inner.name}+latent-guard-{guard.id}")
        self.guard = guard

    def generate(
        self,
        prompts: Iterable[Prompt],
        condition: Condition | None = None,
        *,
        samples: int = 1,
        decide: Decide | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Reply]:
        """Answers to prompts that pass; others come back empty, with `finish_reason` "content_filter".

        A prompt that the guard cannot read gets no answer either, but an error that says why.
        """
        total = len(prompts) if isinstance(prompts, Sequence) else None
        name, done = (condition or Condition()).name, 0
        for rows in windows(prompts, WINDOW):
            stopped = self._stopped(rows, condition)
            asked = [p for p, why in zip(rows, stopped, strict=True) if why is None]
            answers = iter(
                self.inner.generate(asked, condition, samples=samples, decide=decide) if asked else ()
            )
            for prompt, why in zip(rows, stopped, strict=True):
                for sample in range(samples):
                    if why is None:
                        yield next(answers)
                    else:
                        yield dataclasses.replace(why, prompt_id=prompt.id, condition=name, sample=sample)
                done += 1
                if progress is not None:
                    progress(done, total)

    def _stopped(self, rows: Sequence[Prompt], condition: Condition | None) -> list[Reply | None]:
        """The reply to each prompt that is not to be answered, None for the others."""
        # of a prompt that cannot be asked, the inner runtime says what is wrong with it
        asked = [k for k, p in enumerate(rows) if self.inner.problem(p, condition) is None]
        out: list[Reply | None] = [None] * len(rows)
        if not asked:
            return out
        try:
            beliefs = self.guard.beliefs.score(self.inner, [rows[k] for k in asked], condition)
        except DemurError as e:
            if len(rows) > 1:  # find the one that cannot be read
                return [self._stopped([p], condition)[0] for p in rows]
            return [Reply(prompt_id=rows[0].id, error=f"latent guard: {e}", finish_reason="error")]
        for k, belief in zip(asked, beliefs, strict=True):
            if belief.harmful >= self.guard.at:
                raw = f"latent-guard: harmful {belief.harmful:.4f} >= {self.guard.at:.4f}"
                out[k] = Reply(prompt_id=belief.id, finish_reason="content_filter", finish_reason_raw=raw)
        return out

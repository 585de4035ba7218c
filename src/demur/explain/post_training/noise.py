"""Noise on the embeddings of a statement's subject, in place of another statement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from demur.explain.post_training.tracing import Aligned
    from demur.runtime.local import LocalRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Gaussian noise on the embeddings of the subject's tokens, which takes the place of the false statement.

    Attributes:
        share: its standard deviation, in standard deviations of the entries of those tokens' embeddings.
        draws: how many are averaged. seed: of the draws.

    Raises:
        InputError: a share below 0 or not a number, fewer than one draw.
    """

    share: float
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (0 <= self.share < math.inf and self.draws >= 1):
            raise InputError(
                f"noise of share {self.share} in {self.draws} draws: the share must be at least 0 (3, "
                "say, for three standard deviations of the embeddings) and the draws at least 1"
            )

    def drawn(self, runtime: LocalRuntime, aligned: Aligned) -> list[tuple[int, Tensor]]:
        """For each draw the first token of the subject, and what is added from there on, (n, tokens, D).

        Raises:
            InputError: no token belongs to the subject alone.
        """
        import torch

        columns = [i for i, role in enumerate(aligned.roles) if role == "subject"]
        if not columns:
            raise InputError(
                f"no token of {' '.join(aligned.columns)!r} belongs to the subject alone, so there is nothing to "
                "put noise on; trace with the false statements instead"
            )
        at = aligned.start + columns[0]
        embed = runtime.model.get_input_embeddings()
        ids = torch.from_numpy(aligned.true[:, at : at + len(columns)]).to(embed.weight.device)
        with runtime.edited(), torch.inference_mode():
            plain = embed(ids).float()
        size = self.share * float(plain.std())
        draws = (np.random.default_rng([self.seed, k]) for k in range(self.draws))
        return [(at, torch.from_numpy(size * rng.standard_normal(plain.shape)).float()) for rng in draws]


def adding(at: int, added_BKD: Tensor) -> Any:
    """A forward hook that adds to a module's output (B, T, D) from token `at` on."""

    def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
        out = output.clone()
        out[:, at : at + added_BKD.shape[1]] += added_BKD.to(out)
        return out

    return add

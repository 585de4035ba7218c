"""A recipe, the organism that grows from it, and where grown ones are kept.

An organism is a standard transformers model (a Llama-type decoder or a BERT-type encoder) of some hundred
thousand weights, trained from scratch by a plain loop. Beside the code of its world a recipe says everything
that decides its weights, so it is grown once and then loaded: `<cache>/organisms/<name>-<hash>/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from demur.cachedir import cache_dir
from demur.errors import CapabilityError, DemurError, InputError, MissingExtra
from demur.files import write_atomic
from demur.organisms.words import word_tokenizer

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Batches = Callable[[np.random.Generator, int], tuple[Ids, Mask]]
"""(rng, B) -> token ids (B, T) and the positions (B, T) whose token is to be predicted."""
Check = Callable[[Any], Mapping[str, float]]
Progress = Callable[[str, int, int | None], None]

FORMAT = 1
"""Part of every hash; raised when the training loop changes, so that older organisms are grown anew."""
RECIPE_FILE = "recipe.json"


class UnfitOrganism(DemurError):
    """An organism misses its entry condition, so nothing may be concluded from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides an organism's weights.

    Attributes:
        name: of the organism; part of its folder's name.
        world: settings of its world, plain JSON values.
        layers, width, heads, mlp: shape of the transformer; `mlp` is the hidden width of the feed-forward part.
        context: longest sequence in tokens.
        steps, batch: optimiser steps and sequences per step.
        lr, weight_decay, warmup: AdamW with linear warm-up over `warmup` steps, then cosine decay to zero.
        kind: "decoder" predicts each marked token from those before it; "encoder" sees the whole sequence with
            the marked tokens hidden behind `<mask>`.
        seed: of the initial weights and of the batches.
    """

    name: str
    world: Mapping[str, Any]
    layers: int = 2
    width: int = 64
    heads: int = 2
    mlp: int = 256
    context: int = 64
    steps: int
    batch: int
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    seed: int = 0
    kind: Literal["decoder", "encoder"] = "decoder"

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name[0] == ".":
            raise InputError(f"recipe name {self.name!r}: use letters, digits, - and _ (it names a folder)")
        for key in ("layers", "width", "heads", "mlp", "context", "steps", "batch", "lr"):
            if not getattr(self, key) > 0:
                raise InputError(f"recipe {self.name!r}: {key}={getattr(self, key)} must be above 0")
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"recipe {self.name!r}: width {self.width} over {self.heads} heads must give whole, even "
                "head widths (rotary positions turn pairs)"
            )
        if self.kind not in ("decoder", "encoder"):
            raise InputError(f"recipe {self.name!r}: kind {self.kind!r}; use decoder or encoder")
        self._plain()

    def _plain(self) -> str:
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"world": dict(self.world)}
        try:
            return json.dumps(row, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise InputError(
                f"recipe {self.name!r}: world holds something that is no plain JSON value ({e})"
            ) from None

    @property
    def hash(self) -> str:
        """sha256 (first 16 hex digits) over all settings and the version of the training loop."""
        return hashlib.sha256(f"{FORMAT}\n{self._plain()}".encode()).hexdigest()[:16]


@dataclass(slots=True)
class Organism:
    """A grown model.

    Attributes:
        model: transformers model in evaluation mode, float32. tokenizer: its word tokenizer.
        checks: what the recipe's `check` measured after training. losses: mean loss of each step, nats.
        folder: where it is kept; None if it was grown with cache=False.
        seconds: training time when it was grown.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    checks: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    folder: Path | None = None
    seconds: float = 0.0

    def runtime(self) -> LocalRuntime:
        """The organism as any other local model: scores, answers, states, edits, adapters.

        Raises:
            CapabilityError: an encoder, which writes no answers; use `model` and `tokenizer` themselves.
        """
        from demur.models.fingerprint import fingerprint_folder
        from demur.runtime.local import LocalRuntime

        if self.recipe.kind != "decoder":
            raise CapabilityError(
                f"organism {self.recipe.name!r} is an encoder and writes no answers; use its model directly"
            )
        mark = fingerprint_folder(self.folder) if self.folder else None
        return LocalRuntime(self.model, self.tokenizer, name=self.recipe.name, fingerprint=mark)

    def require(self, name: str, *, at_least: float | None = None, at_most: float | None = None) -> float:
        """The value of a check, if it meets the entry condition.

        >>> organism.require("held_in_accuracy", at_least=0.9)  # doctest: +SKIP
        0.987

        Raises:
            UnfitOrganism: it does not. InputError: there is no such check.
        """
        if name not in self.checks:
            raise InputError(
                f"organism {self.recipe.name!r} has no check {name!r}; it has {', '.join(self.checks)}"
            )
        value = self.checks[name]
        low = at_least is not None and not value >= at_least
        if low or (at_most is not None and not value <= at_most):
            goal = f"at least {at_least}" if low else f"at most {at_most}"
            raise UnfitOrganism(
                f"organism {self.recipe.name!r}, seed {self.recipe.seed}: {name} is {value:.3f}, the entry "
                f"condition is {goal}. It did not learn its world, so nothing follows from it; train longer "
                "(steps) or wider (width), or take another seed"
            )
        return value


def grow(
    recipe: Recipe,
    batches: Batches,
    tokenizer_words: Sequence[str],
    *,
    template: str | None = None,
    check: Check | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Organism:
    """Train the organism of a recipe, or load it if it was grown before.

    The same recipe gives the same weights, bit for bit, on one machine: everything random hangs on
    `recipe.seed`, and training runs on one thread whatever the machine has (seeds run well side by side).
    Grown organisms are kept by recipe hash; one whose vocabulary, template or first batch is not what the
    world makes today is grown anew.

    Args:
        batches: makes training batches: token ids (B, T) int64 padded with 0 on the right, and a mask (B, T)
            of the tokens to predict; T may vary and is at most `recipe.context`. A decoder predicts the token
            at position t from the positions before t.
        tokenizer_words: the vocabulary beside the special tokens (`demur.organisms.words`).
        template: chat template, if not the usual one.
        check: gets the trained model and returns named numbers, kept as `checks`.
        cache: False trains and keeps nothing.
        progress: called with a stage's name, steps done and their total.

    Raises:
        InputError: a batch of another form, ids outside the vocabulary, longer than the context.
        MissingExtra: the extra `local` is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtra("A model organism", "local") from None
    tokenizer = word_tokenizer(tokenizer_words, template)
    data = _data_hash(recipe, batches, tokenizer_words, tokenizer.chat_template)
    if not cache:
        return _train(recipe, batches, tokenizer, check, progress)

    from filelock import FileLock

    folder = cache_dir() / "organisms" / f"{recipe.name}-{recipe.hash}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (kept := _load(folder, recipe, data, tokenizer)) is not None:
            return kept
        organism = _train(recipe, batches, tokenizer, check, progress)
        _save(organism, folder, data)
    return organism


def _data_hash(recipe: Recipe, batches: Batches, words: Sequence[str], template: str) -> str:
    """Identifies what a world's code makes of its settings: vocabulary, template and one batch."""
    ids, mask = batches(np.random.default_rng([recipe.seed, 2]), min(recipe.batch, 64))
    digest = hashlib.sha256(json.dumps([list(words), template, list(np.shape(ids))]).encode())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()[:16]


def _train(
    recipe: Recipe, batches: Batches, tokenizer: Any, check: Check | None, progress: Progress | None
) -> Organism:
    import torch

    from demur.organisms.training import build, train

    began = time.monotonic()
    model = build(recipe, len(tokenizer))
    losses = train(model, recipe, batches, progress)
    seconds = time.monotonic() - began
    with torch.inference_mode():
        checks = {k: float(v) for k, v in (check(model) if check else {}).items()}
    return Organism(model, tokenizer, recipe, checks, losses, None, round(seconds, 1))


def _save(organism: Organism, folder: Path, data: str) -> None:
    """Write beside the place and move there at once, so that a killed run leaves no half organism."""
    from demur.organisms.training import save

    about = {
        "schema_version": 1,
        "recipe": json.loads(organism.recipe._plain()),
        "hash": organism.recipe.hash,
        "data_hash": data,
        "checks": {k: v if math.isfinite(v) else None for k, v in organism.checks.items()},
        "losses": [round(v, 6) for v in organism.losses],
        "seconds": organism.seconds,
    }
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save(organism.model, organism.tokenizer, scratch)
        write_atomic(scratch / RECIPE_FILE, json.dumps(about, allow_nan=False))
        if folder.exists():  # an organism of a world that has changed since
            shutil.rmtree(folder)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    organism.folder = folder


def _load(folder: Path, recipe: Recipe, data: str, tokenizer: Any) -> Organism | None:
    try:
        about = json.loads((folder / RECIPE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if about.get("data_hash") != data or about.get("hash") != recipe.hash:
        return None
    from demur.organisms.training import load

    checks = {k: math.nan if v is None else float(v) for k, v in about["checks"].items()}
    return Organism(
        load(folder, recipe), tokenizer, recipe, checks, about["losses"], folder, about["seconds"]
    )

"""Forward passes over right-padded rows that compute no more than was asked for.

Rows are padded on the right without a mask: decoder attention is causal, so what stands behind a row's end
cannot reach it. The unembedding runs on one position a row, blocks behind the last one that is read are not
run, and a prefix that all rows share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from demur.errors import CapabilityError
from demur.runtime.layers import first_tensor, hooked, input_device
from demur.types import Site

PREFIX_FLOOR = 8
"""Shared tokens below which one more pass and a cache cost more than they save."""
FEW_ROWS = 16
"""Rows of a matrix product below which oneDNN gains nothing on MKL."""


ANSWERS: ContextVar[tuple[int, ...] | None] = ContextVar("ANSWERS", default=None)
"""For each row of a pass the position at which its answer begins; None where the cache tells prompt from answer."""


@contextmanager
def answers_at(places: Sequence[int]) -> Iterator[None]:
    """Tell edits that leave answers alone where these begin, for passes whose caches come and go."""
    token = ANSWERS.set(tuple(places))
    try:
        yield
    finally:
        ANSWERS.reset(token)


class Stop(Exception):
    """Raised by a hook once everything asked for has been read."""


class SiteReader:
    """Hooks that keep the asked rows of the asked blocks, and nothing else.

    Args:
        layers, projections: modules to hook (`projections` only where a site has part "heads").
        sites: what to read. The hooks must be installed after any edits, so that they see edited states.
    """

    def __init__(
        self, layers: Sequence[nn.Module], projections: Sequence[nn.Module], sites: Sequence[Site]
    ) -> None:
        self.layers, self.projections, self.sites = layers, projections, sites
        self.last = layers[max(s.layer for s in sites)]
        self._where: Tensor = torch.empty(0)
        self._kept: list[Tensor | None] = []

    def start(self, positions_BS: Tensor) -> None:
        """Set the token index of each site in each row of the next pass, counted behind the shared prefix."""
        self._where, self._kept = positions_BS, [None] * len(self.sites)

    def result(self) -> Tensor:
        """What the pass left: (B, S, width), float32 on the CPU."""
        kept = [t for t in self._kept if t is not None]
        return torch.stack([t.float().cpu() for t in kept], dim=1)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hook each module that a site names, once."""
        with ExitStack() as stack:
            for part, modules in (("block", self.layers), ("heads", self.projections)):
                for k in sorted({s.layer for s in self.sites if s.part == part}):
                    mine = [i for i, s in enumerate(self.sites) if (s.layer, s.part) == (k, part)]
                    stack.enter_context(hooked(self._hook(modules[k], mine, part == "heads")))
            yield

    def _hook(self, module: nn.Module, mine: list[int], before: bool) -> Any:
        def keep(h_BTD: Tensor) -> None:
            if not self._kept:
                return
            where = self._where[:, mine].to(h_BTD.device)
            rows = torch.arange(len(where), device=h_BTD.device)[:, None]
            for i, column in zip(mine, h_BTD[rows, where].unbind(1), strict=True):
                self._kept[i] = column

        if before:
            return module.register_forward_pre_hook(lambda _m, args: keep(args[0]))
        return module.register_forward_hook(lambda _m, _a, output: keep(first_tensor(output)))


@contextmanager
def stopping_after(module: nn.Module | None) -> Iterator[None]:
    """A pass inside ends with `Stop` once this module has run; None lets it run to the end."""

    def stop(*_: Any) -> None:
        raise Stop

    with hooked(*([] if module is None else [module.register_forward_hook(stop)])):
        yield


@contextmanager
def unembedding_at(model: Any, rows_B: Tensor) -> Iterator[None]:
    """Let the unembedding see one position of each row: works alike for every architecture and release."""

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h_BTD = args[0]
        where = rows_B.to(h_BTD.device)
        return (h_BTD[torch.arange(len(where), device=h_BTD.device), where][:, None], *args[1:])

    with hooked(model.get_output_embeddings().register_forward_pre_hook(take)):
        yield


def run(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    stop: nn.Module | None = None,
    cache: DynamicCache | None = None,
) -> Tensor | None:
    """One pass over rows of token ids.

    Args:
        model: a Hugging Face causal model with its edits installed.
        rows: token ids, any lengths of at least 1.
        stop: leave after this module; then nothing is returned.
        cache: keys and values of what comes before every row; it is used up.

    Returns:
        Next-token logits at the end of each row, (B, V) in the model's dtype, or None with `stop`.
    """
    longest = max(map(len, rows))
    device = input_device(model)
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    ends_B = torch.tensor([len(row) - 1 for row in rows], device=device)
    with ExitStack() as stack:
        stack.enter_context(fast_linear())
        stack.enter_context(stopping_after(stop))
        if stop is None:
            stack.enter_context(unembedding_at(model, ends_B))
        try:
            out = model(input_ids=tokens_BT, past_key_values=cache, use_cache=cache is not None)
        except Stop:
            return None
    logits: Tensor = out.logits
    if logits.shape[:2] != (len(rows), 1):
        raise CapabilityError(
            f"{type(model).__name__} does not compute its logits through its unembedding module (got shape "
            f"{tuple(logits.shape)}), so first-position probabilities cannot be read from it"
        )
    return logits[:, 0]


class _OneDnn(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.functional.linear and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            if plain and x.numel() >= FEW_ROWS * x.shape[-1]:
                return _linear(x, weight, bias)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer by oneDNN, on a number of rows that comes again.

    oneDNN makes and keeps code for every number of rows it meets, so a server that meets all of them would grow.
    """
    rows = x.numel() // x.shape[-1]
    flat = x.reshape(rows, -1)
    if more := rounded_up(rows) - rows:
        flat = nn.functional.pad(flat, (0, 0, 0, more))
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return out[:rows].reshape(*x.shape[:-1], -1)


def rounded_up(rows: int) -> int:
    """The next of about eight sizes in each power of two: at most an eighth of the rows is padding.

    >>> [rounded_up(n) for n in (16, 17, 100, 300, 512, 513)]
    [16, 24, 104, 320, 512, 576]
    """
    step = max(8, 1 << (rows.bit_length() - 4))
    return -(-rows // step) * step


@cache
def _mkl_holds_back() -> bool:
    """Whether this processor has AVX-512 and is one for which MKL, the default of PyTorch, does not use it."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (
        amd
        and wide
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fast_linear() -> AbstractContextManager[Any]:
    """Linear layers in float32 through oneDNN where that is faster: twice, on AMD processors with AVX-512.

    Sums are taken in another order, so results differ in rounding (3e-6 of the largest state of SmolLM2).
    """
    return _OneDnn() if _mkl_holds_back() else nullcontext()


class Prefix:
    """The keys and values of a token prefix, computed once and copied into a fresh cache for each batch.

    A cache is changed by the pass that uses it, so the object itself is never handed to the model.
    """

    def __init__(self, model: Any, ids: Sequence[int], stop: nn.Module | None) -> None:
        self.model, self.ids, self.length = model, list(ids), len(ids)
        self._cache = DynamicCache(config=model.config)
        run(model, [ids], stop=stop, cache=self._cache)

    def expanded(self, batch: int, fresh: DynamicCache | None = None) -> DynamicCache:
        """A fresh cache (by default one of transformers' own) with the prefix in every row."""
        fresh = DynamicCache(config=self.model.config) if fresh is None else fresh
        for old, new in zip(self._cache.layers, fresh.layers, strict=True):
            if old.keys is not None and old.values is not None:
                new.update(
                    old.keys.expand(batch, *old.keys.shape[1:]),
                    old.values.expand(batch, *old.values.shape[1:]),
                )
        return fresh


def prefix_fits(model: Any, length: int) -> bool:
    """Whether a prefix of `length` tokens can be copied: plain attention, inside any sliding window."""
    if getattr(model, "_is_stateful", False):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return bool(layers) and all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in layers
    )

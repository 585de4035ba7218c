"""Entropy neurons: long output rows of the last layer that hardly prefer any token.

Such a neuron writes where the unembedding does not look. Through the final norm it makes all other logits smaller
or larger together, so it changes how sure the model is and not what it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from demur.errors import CapabilityError, InputError
from demur.explain.post_training.results import Confidence, Neuron
from demur.runtime.layers import find_layers, find_projections, hooked, input_device

if TYPE_CHECKING:
    from demur.runtime.local import LocalRuntime

FloatArray = npt.NDArray[np.float64]
LONG = 0.25
"""Share of the neurons, by norm, among which candidates are looked for."""
CANDIDATES = 10


def output_rows(runtime: LocalRuntime) -> FloatArray:
    """What each neuron of the last layer writes into the residual stream per unit of activation, (neurons, width).

    Read by feeding unit vectors to the projection, so that an adapter on it counts.

    Raises:
        CapabilityError: the last block does not end in one projection back to the model's width (mixtures of
            experts, say).
    """
    module, width = last_projection(runtime.model)
    like = next(module.parameters())
    with runtime.edited():
        eye = torch.eye(width, device=like.device, dtype=like.dtype)
        rows = module(eye) - module(torch.zeros_like(eye[:1]))
    found: FloatArray = rows.double().cpu().numpy()
    return found


def last_projection(model: Any) -> tuple[nn.Module, int]:
    """The projection that ends the last block's feed-forward part, and how many neurons feed it."""
    blocks = find_layers(model)
    seen: list[tuple[nn.Module, int, int]] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args:
            seen.append((module, args[0].shape[-1], output.shape[-1]))

    leaves = [
        m
        for m in blocks[-1].modules()
        if getattr(getattr(m, "weight", None), "ndim", 0) == 2 and not list(m.children())
    ]
    with hooked(*(m.register_forward_hook(watch) for m in leaves)), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
    module, neurons, width = seen[-1] if seen else (None, 0, 0)
    if module is None or width != _width(model) or module is find_projections(model, blocks)[-1]:
        raise CapabilityError(
            f"{type(model).__name__}: its last block does not end in one projection back to width {_width(model)}, "
            "so single neurons cannot be told (mixtures of experts are not read)"
        )
    return module, neurons


def unembedding(runtime: LocalRuntime) -> FloatArray:
    """Rows of the unembedding with the final norm's weights multiplied in, (vocabulary, width)."""
    model, width = runtime.model, _width(runtime.model)
    head = model.get_output_embeddings()
    norms: list[nn.Module] = []
    leaves = [
        m
        for m in model.modules()
        if getattr(getattr(m, "weight", None), "shape", None) == (width,) and m is not head
    ]
    with (
        hooked(*(m.register_forward_hook(lambda m, *_: norms.append(m)) for m in leaves)),
        torch.inference_mode(),
    ):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), use_cache=False)
        gain = torch.ones(width)
        if norms:
            like = norms[-1].weight
            # +1 and -1 in turn have mean 0 and size 1, which a norm leaves alone but for its weights and bias
            x = (1.0 - 2.0 * (torch.arange(width) % 2)).to(like)
            gain = ((norms[-1](x[None]) - norms[-1](-x[None]))[0] / 2 * x).float().cpu()
        rows = head.weight.float().cpu() * gain
    found: FloatArray = rows.double().numpy()
    return found


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def logit_var(rows: FloatArray, words: FloatArray) -> FloatArray:
    """Variance over the vocabulary (V, width) of the cosine of each neuron's row (n, width) with a token's."""
    a = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    b = words / np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-12)
    return np.asarray((a @ b.T).var(axis=1, ddof=1))


def candidates(rows: FloatArray, words: FloatArray, *, most: int = CANDIDATES) -> tuple[Neuron, ...]:
    """The neurons of lowest LogitVar among the quarter with the longest rows.

    >>> rows = np.array([[0.0, 3.0], [3.0, 0.0], [0.1, 0.0], [0.0, 0.1]])
    >>> [n.index for n in candidates(rows, np.array([[1.0, 0.0], [-1.0, 0.0]]), most=1)]
    [0]
    """
    norm = np.linalg.norm(rows, axis=1)
    long = np.flatnonzero(norm >= np.quantile(norm, 1 - LONG))
    var = logit_var(rows[long], words)
    order = np.argsort(var, kind="stable")[:most]
    out = []
    for k in order.tolist():
        i, v = int(long[k]), max(float(var[k]), 1e-30)
        out.append(
            Neuron(index=i, norm=float(norm[i]), logit_var=float(var[k]), ratio=float(norm[i] / np.log(v)))
        )
    return tuple(out)


def compare_confidence(base: LocalRuntime, tuned: LocalRuntime) -> Confidence:
    """Candidate entropy neurons of both models and how many they share."""
    found = {name: (output_rows(r), unembedding(r)) for name, r in (("base", base), ("tuned", tuned))}
    n = len(found["base"][0])
    if len(found["tuned"][0]) != n:
        raise InputError(
            f"{n} neurons in one model, {len(found['tuned'][0])} in the other: not one architecture"
        )
    neurons = {name: candidates(*parts) for name, parts in found.items()}
    a, b = ({x.index for x in neurons[m]} for m in ("base", "tuned"))
    return Confidence(
        neurons=neurons,
        of=n,
        iou=len(a & b) / len(a | b),
        expected=_expected(len(a), max(len(a), int(np.ceil(LONG * n)))),
        shared=tuple(sorted(a & b)),
    )


def _expected(k: int, n: int) -> float:
    """Mean IoU of two random draws of k out of n."""
    from scipy.stats import hypergeom

    hits = np.arange(k + 1)
    return float((hypergeom.pmf(hits, n, k, k) * hits / (2 * k - hits)).sum())


class ScaleNeuron:
    """An edit that multiplies the activation of one neuron of the last layer; factor 0 switches it off.

    >>> quieter = runtime.with_edits(ScaleNeuron(1201, 0.0))  # doctest: +SKIP
    """

    def __init__(self, index: int, factor: float) -> None:
        self.index, self.factor = index, factor

    @contextmanager
    def install(self, model: Any) -> Iterator[None]:
        """Hook the projection; the hook is gone on exit."""
        module, neurons = last_projection(model)
        if not 0 <= self.index < neurons:
            raise InputError(f"neuron {self.index}: the last layer has neurons 0 to {neurons - 1}")

        def scale(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gain = torch.ones(neurons, device=args[0].device, dtype=args[0].dtype)
            gain[self.index] = self.factor
            return (args[0] * gain, *args[1:])

        with hooked(module.register_forward_pre_hook(scale)):
            yield

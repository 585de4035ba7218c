"""What `bench/peers.py` runs in a process of its own: one library's way to read hidden states of many prompts.

Each side is a generator of (prompt indices, states of shape (prompts, layers, positions, width)), written as the
library's own documentation shows it, or as its own code loops. `refusal_direction` has no package: its published
loop is restated here. What a side does not give (a layer, a position) it leaves out, and the check skips it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

TAIL = 5
Part = tuple[list[int], Any]


class Job:
    """Token ids, texts and messages of n prompts, the layers asked for, and the weights' folder."""

    def __init__(self, rows: list[dict[str, Any]], layers: list[int] | None, folder: str) -> None:
        self.rows, self.folder = rows, folder
        self.ids, self.texts = [r["ids"] for r in rows], [r["text"] for r in rows]
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.layers = layers or list(range(self.config["num_hidden_layers"]))
        self.positions = list(range(-TAIL, 0))

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def tokenizer(self, side: str = "right") -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side=side)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def batches(self, size: int, sort: bool = False) -> Iterator[list[int]]:
        order = sorted(range(len(self.ids)), key=lambda i: len(self.ids[i]) if sort else 0)
        return (order[i : i + size] for i in range(0, len(order), size))

    def padded(self, batch: list[int], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.ids[i] for i in batch]
        longest = max(map(len, rows))
        fill = [[0] * (longest - len(r)) for r in rows]
        ids = [f + r if left else r + f for r, f in zip(rows, fill, strict=True)]
        mask = [
            [0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f)
            for r, f in zip(rows, fill, strict=True)
        ]
        return torch.tensor(ids), torch.tensor(mask)

    def ends(self, batch: list[int], hidden: list[Any]) -> np.ndarray:
        """The last tokens of right-padded rows, (b, layers, TAIL, width)."""
        stacked = [
            torch.stack([h[b, len(self.ids[i]) - TAIL : len(self.ids[i])] for h in hidden])
            for b, i in enumerate(batch)
        ]
        return torch.stack(stacked).float().numpy()


def demur(job: Job, quick: bool = True) -> Iterator[Part]:
    from contextlib import nullcontext

    from demur.runtime import forward
    from demur.runtime.local import LocalRuntime
    from demur.types import Message, Prompt, Site

    if not quick:  # PyTorch's own kernels, as all the others
        forward.fast_linear = nullcontext
    runtime = LocalRuntime.from_folder(job.folder, dtype="float32")
    prompts = (
        Prompt(id=str(i), messages=tuple(Message(**m) for m in r["messages"])) for i, r in enumerate(job.rows)
    )
    sites = [Site(layer=k, position=p) for k in job.layers for p in job.positions]
    for i, found in enumerate(runtime.states(prompts, sites)):
        yield [i], found.vectors.reshape(1, len(job.layers), TAIL, -1)


def plain(job: Job, size: int = 32, best: bool = False) -> Iterator[Part]:
    """transformers, `output_hidden_states`; its last entry is normed. Best: sorted, no unembedding."""
    model = job.model()
    run = model.model if best else model
    last = job.config["num_hidden_layers"] - 1
    job.layers = [k for k in job.layers if k != last]
    for batch in job.batches(size, sort=best):
        ids, mask = job.padded(batch)
        out = run(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=not best)
        yield batch, job.ends(batch, [out.hidden_states[k + 1] for k in job.layers])


def repeng(job: Job) -> Iterator[Part]:
    """`batched_get_hiddens`: the last token only. Its last layer is normed (left out of the check)."""
    np.float_ = np.float64  # type: ignore[attr-defined]  # its wheel was written for numpy 1
    from repeng.extract import batched_get_hiddens

    every, job.positions = list(range(job.config["num_hidden_layers"])), [-1]
    found = batched_get_hiddens(job.model(), job.tokenizer(), job.texts, every, 32)
    job.layers = [k for k in job.layers if k != every[-1]]
    yield list(range(len(job.ids))), np.stack([found[k] for k in job.layers], axis=1)[:, :, None]


def refusal_direction(job: Job) -> Iterator[Part]:
    """Its loop, restated: pre-hooks on every block add to a float64 mean; the whole model runs, logits and all."""
    model, tokenizer = job.model(), job.tokenizer("left")
    blocks, n = model.model.layers, len(job.ids)
    mean = torch.zeros(TAIL, len(blocks), job.config["hidden_size"], dtype=torch.float64)

    def hook(layer: int) -> Any:
        def add(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            states = args[0].clone().to(mean)
            mean[:, layer] += (1.0 / n) * states[:, job.positions, :].sum(dim=0)

        return add

    for batch in job.batches(32):
        inputs = tokenizer([job.texts[i] for i in batch], padding=True, truncation=False, return_tensors="pt")
        handles = [b.register_forward_pre_hook(hook(k)) for k, b in enumerate(blocks)]
        model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        for handle in handles:
            handle.remove()
    job.layers = list(range(len(blocks) - 1))  # the input of block k + 1 is the output of block k
    yield [], mean[:, 1:].transpose(0, 1)[None].numpy()


def steering_vectors(job: Job, size: int = 1) -> Iterator[Part]:
    """`extract_activations`: the last token only, for pairs of texts."""
    from steering_vectors.train_steering_vector import extract_activations

    job.positions = [-1]
    pairs = list(zip(job.texts[::2], job.texts[1::2], strict=True))
    found = extract_activations(job.model(), job.tokenizer(), pairs, job.layers, batch_size=size)
    for which, half in enumerate(found):
        states = torch.stack([torch.stack([h.squeeze() for h in half[k]]) for k in job.layers], dim=1)
        yield list(range(which, len(job.ids), 2)), states[:, :, None].numpy()


def nnsight(job: Job, best: bool = False) -> Iterator[Part]:
    """One trace a batch; at its best sorted, and stopped behind the last layer that is read."""
    from nnsight import NNsight

    wrapped = NNsight(job.model())
    for batch in job.batches(16, sort=best):
        ids, mask = job.padded(batch, left=True)
        with wrapped.trace(input_ids=ids, attention_mask=mask) as tracer:
            kept = torch.stack([wrapped.model.layers[k].output[:, -TAIL:] for k in job.layers], 1).save()
            if best:
                tracer.stop()
        yield batch, kept.numpy()


def transformer_lens(job: Job, best: bool = False) -> Iterator[Part]:
    """TransformerBridge, only the asked hooks cached; at its best sorted, and stopped behind the last layer."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(job.folder, device="cpu", dtype=torch.float32)
    names = [f"blocks.{k}.hook_out" for k in job.layers]
    stop = {"stop_at_layer": max(job.layers) + 1} if best else {}
    for batch in job.batches(16, sort=best):
        ids, mask = job.padded(batch)
        _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=names, **stop)
        yield batch, job.ends(batch, [cache[name] for name in names])


SIDES = {
    "demur": demur,
    "demur, PyTorch's own kernels": lambda job: demur(job, quick=False),
    "transformers, batch 32": plain,
    "transformers, batch 32, sorted, no logits": lambda job: plain(job, best=True),
    "transformers, batch 1, no logits": lambda job: plain(job, size=1, best=True),
    "repeng, batch 32": repeng,
    "refusal_direction-style loop, batch 32": refusal_direction,
    "steering-vectors, batch 1": steering_vectors,
    "nnsight, batch 16": nnsight,
    "nnsight, batch 16, sorted, stopped": lambda job: nnsight(job, best=True),
    "TransformerBridge, batch 16": transformer_lens,
    "TransformerBridge, batch 16, sorted, stopped": lambda job: transformer_lens(job, best=True),
}
PACKAGES = (
    "demur",
    "torch",
    "transformers",
    "repeng",
    "steering-vectors",
    "nnsight",
    "transformer-lens",
    "numpy",
)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=list(SIDES))
    for name in ("--work", "--model", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument(
        "--keep", action="store_true", help="write the states of every prompt, not their mean only"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(Path(args.work).read_text(encoding="utf-8"))[: args.n]
    job = Job(rows, args.layers, args.model)
    total, kept = 0.0, {}
    for indices, states in SIDES[args.side](job):
        total = total + states.sum(0, dtype=np.float64) / (len(rows) if indices else 1)
        if args.keep:
            kept.update(zip(indices, states, strict=bool(indices)))
    arrays = {"mean": total, "layers": np.array(job.layers), "positions": np.array(job.positions)}
    if kept:
        arrays["rows"] = np.stack([kept[i] for i in range(len(rows))])
    np.savez(args.out, **arrays)
    json.dump(versions(), sys.stdout)


if __name__ == "__main__":
    main()

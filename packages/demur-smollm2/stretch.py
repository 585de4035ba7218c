"""Stretch an adapter's LoRA: what the weights learnt, taken further, as the start of the second stage.

    python packages/demur-smollm2/stretch.py FOLDER OUT [FACTOR]

Weight extrapolation (Zheng et al., arXiv 2404.16792): B is multiplied, so the LoRA's product; control rows stay.
The decision carries over and ranks better, texts break: train on before use.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(folder: str, out: str, factor: str = "2") -> None:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("operating_point.yaml"))
    weights = Path(out) / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v * float(factor) if ".lora_B." in k else v for k, v in tensors.items()}, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])

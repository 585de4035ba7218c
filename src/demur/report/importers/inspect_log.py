"""Inspect logs: `.json` (EvalLog version 2) and `.eval` (a zip with one JSON file per sample)."""

from __future__ import annotations

import importlib
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from demur.errors import InputError, MissingExtra
from demur.files import parse_json
from demur.report.importers.joining import Row, columns, labels
from demur.types import FinishReason, Reply

_ZSTD = 93
_STOP: Mapping[str, FinishReason] = {
    "stop": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}


def is_log(value: Any) -> bool:
    """Whether parsed JSON is an Inspect log."""
    return isinstance(value, Mapping) and "eval" in value and ("samples" in value or "version" in value)


def rows(log: Mapping[str, Any], where: str) -> list[Row]:
    """Rows of a whole log. Epochs become samples 0, 1, ...; the solver's system messages are no part of a prompt.

    Raises:
        InputError: a log without samples (a header only), or another version's shape.
    """
    samples = log.get("samples")
    if not isinstance(samples, list) or not samples:
        raise InputError(f"{where}: the Inspect log has no samples, only its header; pass the full log")
    model = _mapping(log.get("eval")).get("model")
    out = [_row(s, model, where) for s in samples]
    epochs: dict[str, list[int]] = {}
    for _, row in out:
        epochs.setdefault(row["id"], []).append(row["sample"])
    for _, row in out:  # a log that was stopped may hold the second epoch of a sample and not the first
        row["sample"] = sorted(epochs[row["id"]]).index(row["sample"])
    return out


def rows_of_zip(path: Path) -> list[Row]:
    """Rows of an `.eval` file, in the order of its sample files.

    Raises:
        InputError: no such file, no zip, or no samples in it. MissingExtra: zstd without a package for it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            read = {i.filename: i for i in infos}
            names = [n for n in read if n.startswith("samples/") and n.endswith(".json")]
            samples = [_json(archive, read[n], path) for n in names]
            start = next((n for n in ("header.json", "_journal/start.json") if n in read), None)
            header = _json(archive, read[start], path) if start else {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, EOFError, struct.error) as e:
        raise InputError(f"{path}: no readable .eval file ({e}); is the run still going?") from None
    return rows({**header, "samples": samples}, str(path))


def _json(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Any:
    raw = _unzstd(path, info) if info.compress_type == _ZSTD else archive.read(info)
    return parse_json(raw.decode("utf-8", "replace"), f"{path}, {info.filename}")


def _unzstd(path: Path, info: zipfile.ZipInfo) -> bytes:
    """One member in zstd, which `zipfile` cannot read before Python 3.14: skip its local header, decompress."""
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError:
        raise MissingExtra(
            f"{path}: Inspect wrote it in zstd compression. Reading it (`inspect log convert --to json` makes a "
            "file that needs nothing)",
            "inspect",
        ) from None
    with path.open("rb") as f:
        f.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", f.read(4))
        f.seek(name + extra, 1)
        packed = f.read(info.compress_size)
    try:
        with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader:
            return bytes(reader.read())
    except zstandard.ZstdError as e:
        raise zipfile.BadZipFile(str(e)) from None


def _row(sample: Any, model: Any, path: str) -> Row:
    if not isinstance(sample, Mapping) or "input" not in sample:
        raise InputError(f"{path}: a sample without `input`; this is not the form of EvalLog version 2")
    place = f"sample {sample.get('id')} (epoch {sample.get('epoch', 1)})"
    said, epoch = sample["input"], sample.get("epoch") or 1
    messages = isinstance(said, list) and all(isinstance(m, Mapping) for m in said)
    if not isinstance(epoch, int) or not (isinstance(said, str) or messages):
        raise InputError(f"{path}, {place}: `input` is neither text nor messages, or the epoch is no number")
    row: dict[str, Any] = {"id": str(sample.get("id")), "sample": epoch - 1}
    if isinstance(said, str):
        row["prompt"] = said
    else:
        row["messages"] = [_message(m) for m in said]
    output = _mapping(sample.get("output"))
    return place, {
        **row,
        **columns(_reply(output, sample.get("error"))),
        **labels(_mapping(sample.get("metadata")), sample.get("target")),
        "model": output.get("model") or model,
    }


def _reply(output: Mapping[str, Any], error: Any) -> Reply:
    choices = output.get("choices")
    choice = _mapping(choices[0] if isinstance(choices, list) and choices else None)
    if error or output.get("error") or not choice:
        said = _mapping(error).get("message") or output.get("error") or "the sample has no output"
        return Reply(prompt_id="", error=str(said)[:500], finish_reason="error")
    message, raw = _mapping(choice.get("message")), str(choice.get("stop_reason") or "unknown")
    text, reasoning = _parts(message.get("content"))
    return Reply(
        prompt_id="",
        content=text,
        reasoning=reasoning or None,
        tool_calls=tuple(message.get("tool_calls") or ()),
        finish_reason=_STOP.get(raw, "unknown"),
        finish_reason_raw=raw,
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    out = {"role": message.get("role", "user"), "content": _parts(message.get("content"))[0]}
    return out | {k: message[k] for k in ("tool_calls", "tool_call_id") if message.get(k)}


def _parts(content: Any) -> tuple[str, str]:
    """(text, reasoning) of message content: a string, or a list of parts."""
    if not isinstance(content, Iterable) or isinstance(content, str):
        return content or "", ""
    parts = [p for p in content if isinstance(p, Mapping)]
    text = [str(p.get("text") or "") for p in parts if p.get("type") == "text"]
    thought = [str(p.get("reasoning") or "") for p in parts if p.get("type") == "reasoning"]
    return "".join(text), "\n".join(thought)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

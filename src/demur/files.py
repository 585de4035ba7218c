"""File forms of the nouns: JSONL, CSV, YAML, and their JSON Schemas. Reading is strict and says where it hurts.

Every row carries `schema_version`. Writing is atomic (temporary file, fsync, rename), so a reader never sees half
a file. Public schemas lie in `docs/schemas/` and are generated from the dataclasses (`schemas()`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from demur.errors import InputError
from demur.types import (
    SCHEMA_VERSION,
    Condition,
    Message,
    OperatingPoint,
    Prompt,
    PromptSet,
    Reply,
    Score,
    Threshold,
    Verdict,
    expand_expected,
)

Noun = TypeVar("Noun")

FILE_NOUNS: Mapping[str, type[Any]] = {
    "prompt": Prompt,
    "reply": Reply,
    "verdict": Verdict,
    "score": Score,
    "condition": Condition,
    "operating_point": OperatingPoint,
}

csv.field_size_limit(10_000_000)


# --- plain rows -------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, or standard input for `-`; invalid bytes are an error that names the offset."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(
            f"{path}: is a folder; pass a .jsonl or .csv file, or - for standard input"
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise InputError(
            f"{path}: not UTF-8 (byte {raw[e.start]:#04x} at offset {e.start}, line {line}). "
            "Save the file as UTF-8, e.g. iconv -f latin1 -t utf-8"
        ) from None


def read_rows(path: str | Path, format: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL or CSV file with their line numbers.

    `format` is "jsonl" or "csv"; by default the suffix decides, and for `-` the first character.

    Raises:
        InputError: unknown type, broken JSON, a row that is no object, or no rows at all.
    """
    text = read_text(path)
    kind = format or {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}.get(
        Path(str(path)).suffix.lower()
    )
    if kind is None and str(path) == "-":
        kind = "jsonl" if text.lstrip().startswith("{") else "csv"
    if kind not in ("jsonl", "csv"):
        raise InputError(
            f"{path}: unknown file type; use .jsonl or .csv (one JSON object or one CSV row per item)"
        )
    rows = _jsonl_rows(text, path) if kind == "jsonl" else _csv_rows(text, path)
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _jsonl_rows(text: str, path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    # Split on newlines alone: splitlines() would cut a string at U+2028, which JSON allows inside strings.
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {n}")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {n}: a {type(row).__name__}, expected one JSON object per line")
        rows.append((n, row))
    return rows


def parse_json(text: str, where: str) -> Any:
    """Parse JSON strictly; whatever is wrong with it is an `InputError` that opens with `where`."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON ({e.msg} at column {e.colno})") from None
    except (ValueError, RecursionError) as e:  # NaN, an integer of thousands of digits, thousands of brackets
        raise InputError(f"{where}: not JSON that can be read ({e})") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number; write null or leave the field out")


def _csv_rows(text: str, path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise InputError(f"{path}, line 1: a column name stands twice in {', '.join(header)}")
        for row in reader:
            if None in row:
                raise InputError(f"{path}, line {reader.line_num}: more fields than the header has columns")
            rows.append((reader.line_num, {k: v for k, v in row.items() if v not in (None, "")}))
    except csv.Error as e:
        raise InputError(f"{path}, line {reader.line_num}: broken CSV ({e})") from None
    return rows


# --- nouns <-> rows ---------------------------------------------------------------------------------------------


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_row(noun: Any) -> dict[str, Any]:
    """A noun as a JSON-ready dict: defaults and empty optional fields left out, `schema_version` first."""
    row: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for f in dataclasses.fields(noun):
        value = getattr(noun, f.name)
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        empty = isinstance(value, (tuple, frozenset, Mapping)) and not value
        if not required and (value is None or value == f.default or empty):
            continue
        row[f.name] = _plain(value)
    return row


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {k: v for k, v in to_row(value).items() if k != "schema_version"}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, str) else value


def from_row(cls: type[Noun], row: Mapping[str, Any], where: str) -> Noun:
    """Build a noun, or another dataclass, from a row; `where` (file and line) opens every error.

    Prompts may be written in short: `prompt` for one user message, `expected` as label, shorthand or list.
    """
    data = dict(row)
    version = data.pop("schema_version", SCHEMA_VERSION)
    if not str(version).isdecimal():
        raise InputError(
            f"{where}: schema_version {version!r} is no whole number; it is {SCHEMA_VERSION} now"
        )
    version = int(version)
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version {version} is newer than this demur knows ({SCHEMA_VERSION}); upgrade demur"
        )
    if cls is Prompt:
        data = _prompt_fields(data, where)
    _check_fields(cls, data, where)
    if cls is OperatingPoint and isinstance(thresholds := data.get("thresholds"), dict):
        for category, threshold in thresholds.items():
            if isinstance(threshold, dict):
                _check_fields(Threshold, threshold, f"{where}: thresholds.{category}")
    try:
        return _adapter(cls).validate_python(data)  # type: ignore[no-any-return]
    except ValidationError as e:
        first = e.errors()[0]
        at = ".".join(str(p) for p in first["loc"]) or cls.__name__
        raise InputError(f"{where}: {at}: {first['msg']} (got {str(first.get('input'))[:80]!r})") from None


_NAMES: dict[type[Any], frozenset[str]] = {}


def _names(cls: type[Any]) -> frozenset[str]:
    """Names of a dataclass's fields; asked for each row, so kept."""
    if cls not in _NAMES:
        _NAMES[cls] = frozenset(f.name for f in dataclasses.fields(cls))
    return _NAMES[cls]


def _check_fields(cls: type[Any], data: Mapping[str, Any], where: str) -> None:
    known = _names(cls)
    if extra := sorted(str(name) for name in data if name not in known):
        raise InputError(
            f"{where}: unknown field {', '.join(extra)}; a {cls.__name__} has {', '.join(sorted(known))}"
        )


def _prompt_fields(data: dict[str, Any], where: str) -> dict[str, Any]:
    text, system = data.pop("prompt", None), data.pop("system", None)
    if "messages" not in data:
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: needs `prompt` (text) or `messages` (list of role and content)")
        data["messages"] = [{"role": "user", "content": text}]
    elif isinstance(data["messages"], str):
        data["messages"] = parse_json(data["messages"], f"{where}: `messages` (a list of role and content)")
    if not data["messages"]:
        raise InputError(f"{where}: `messages` is empty; it needs at least one message")
    if system and isinstance(data["messages"], (list, tuple)):
        if any(isinstance(m, dict) and m.get("role") == "system" for m in data["messages"]):
            raise InputError(f"{where}: `system` beside a system message in `messages`; keep one of them")
        data["messages"] = [{"role": "system", "content": system}, *data["messages"]]
    if "expected" in data:
        value = data["expected"]
        words = value.replace(";", " ").replace("|", " ").split() if isinstance(value, str) else value
        if not isinstance(words, (list, tuple, set, frozenset)):
            raise InputError(
                f"{where}: expected is {value!r}; write a word such as refuse, or a list of words"
            )
        try:
            data["expected"] = expand_expected(words)
        except (ValueError, TypeError) as e:
            raise InputError(f"{where}: {e}") from None
    if isinstance(data.get("meta"), str):
        data["meta"] = parse_json(data["meta"], f"{where}: meta")
    extra = {k: data.pop(k) for k in list(data) if k not in _names(Prompt)}
    if extra:  # a user's own columns are kept, not lost and not guessed at
        meta = data.get("meta", {})
        if not isinstance(meta, dict):
            raise InputError(f"{where}: meta is a {type(meta).__name__}; it must be an object")
        data["meta"] = {**meta, **extra}
    return data


def load(cls: type[Noun], path: str | Path) -> list[Noun]:
    """All nouns of one kind in a JSONL or CSV file."""
    return [from_row(cls, row, f"{path}, line {n}") for n, row in read_rows(path)]


def load_prompts(path: str | Path, name: str | None = None) -> PromptSet:
    """A prompt file as a `PromptSet`. Rows without `id` get their line number.

    Raises:
        InputError: bad row, duplicate id (both lines are named), or an empty file.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for n, row in read_rows(path):
        row["id"] = row_id(row.get("id"), n, f"{path}, line {n}")
        if row["id"] in lines:
            raise InputError(
                f"{path}, line {n}: id {row['id']!r} stands on line {lines[row['id']]} too; ids must be unique"
            )
        lines[row["id"]] = n
        prompts.append(from_row(Prompt, row, f"{path}, line {n}"))
    return PromptSet(name or ("stdin" if str(path) == "-" else Path(path).stem), tuple(prompts))


def row_id(value: Any, line: int, where: str) -> str:
    """The id of a row as text; `line12` for a row without one."""
    if value is None or value == "":
        return f"line{line}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"{where}: id is a {type(value).__name__}; a text or a number is needed")
    return str(value)


_HALF = re.compile("[\ud800-\udfff]")


def dumps_row(noun: Any) -> str:
    """One JSONL line (without newline) of a noun or a plain dict."""
    row = to_row(noun) if dataclasses.is_dataclass(noun) else noun
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # half a character has no UTF-8 form, and inside JSON an escape for one
    return _HALF.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def dump_jsonl(nouns: Iterable[Any], path: str | Path) -> None:
    """Write rows as JSONL, atomically; `-` is standard output."""
    text = "".join(dumps_row(n) + "\n" for n in nouns)
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_atomic(path, text)


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones and nothing between.

    A pipe or device (`/dev/stdout`) is written to as it is.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file to write")
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if (name := str(path)) in ("/dev/stdout", "/dev/stderr"):  # links, maybe to a file that is written to
        stream = sys.stdout if name == "/dev/stdout" else sys.stderr
        stream.flush()
        stream.buffer.write(raw)
        stream.buffer.flush()
        return
    if path.exists() and not path.is_file():  # a rename would put a file in its place
        path.write_bytes(raw)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        Path(tmp).chmod(mode)
        Path(tmp).replace(path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def public_name(name: str) -> str:
    """A name without user, password, query or the folders above a local model.

    >>> public_name("https://me:key@host/v1?key=1#m"), public_name("/home/me/models/m"), public_name("org/m")
    ('https://host/v1#m', 'm', 'org/m')
    """
    if re.match(r"https?://", name):
        name = re.sub(r"^(https?://)[^/@#]*@", r"\1", name)
        return re.sub(r"\?[^#]*", "", name)
    return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) else name


def csv_safe(value: Any) -> Any:
    """Neutralise a CSV cell that a spreadsheet would run as a formula (leading = + - @, tab, CR)."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


# --- operating points -------------------------------------------------------------------------------------------


def load_operating_point(path: str | Path) -> OperatingPoint:
    """Read an operating-point YAML file (safe loader; unknown fields are errors)."""
    try:
        data = yaml.safe_load(read_text(path))
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not YAML ({e})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an operating point (id, thresholds, ...)")
    return from_row(OperatingPoint, data, str(path))


def dump_operating_point(point: OperatingPoint, path: str | Path) -> None:
    """Write an operating point as YAML, atomically; `-` is standard output."""
    text = yaml.safe_dump(to_row(point), sort_keys=False, allow_unicode=True, width=100)
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        write_atomic(path, text)


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of each file form, by name."""
    out = {}
    for name, cls in FILE_NOUNS.items():
        schema = _adapter(cls).json_schema(mode="serialization")
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = name
        schema["properties"] = {"schema_version": {"const": SCHEMA_VERSION}, **schema["properties"]}
        schema["additionalProperties"] = False
        if cls is Prompt:
            # files may say `prompt` for one user message and use shorthands in `expected`
            schema["properties"]["prompt"] = {"type": "string"}
            schema["properties"]["system"] = {"type": "string"}
            schema["properties"]["expected"] = {"type": ["string", "array"], "items": {"type": "string"}}
            schema["required"] = ["id"]
            schema["anyOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
            schema["additionalProperties"] = True
        out[name] = schema
    return out


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """The short file form of a prompt: `prompt` instead of `messages` where there is one user message."""
    row = to_row(prompt)
    if prompt.messages == (Message(role="user", content=prompt.text),):
        row.pop("messages")
        items = list(row.items())
        items.insert(2, ("prompt", prompt.text))
        row = dict(items)
    return row


def iter_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of our own append-only JSONL; a last line cut off by a killed writer is left out."""
    raw = Path(path).read_bytes()
    for line in raw[: raw.rfind(b"\n") + 1].decode("utf-8", "surrogatepass").split("\n"):
        if line:
            yield json.loads(line)

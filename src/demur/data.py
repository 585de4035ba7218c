"""Public data sets: where their files are, and how to get them at a pinned commit.

Nothing public is shipped. A file is looked for in `DEMUR_DATA/<set>/`, then in the user cache, then fetched
from the upstream commit that `data_sets.yaml` pins. Checksums are over the bytes with CRLF read as LF,
because copies of text files differ in nothing else.

    path = data.get("xstest", "prompts.csv")
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock

from demur.cachedir import cache_dir
from demur.errors import DataUnavailable, InputError
from demur.files import write_atomic

Say = Callable[[str], None]
_MAX_BYTES = 64_000_000
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of a set. `url` is None for files that have no upstream form to fetch.

    Attributes:
        sha256: of the upstream file, CRLF as LF; None when `note` says why it is not pinned.
        rows: upstream rows, checked after a download. also: other names the file is found under.
    """

    name: str
    url: str | None = None
    sha256: str | None = None
    rows: int | None = None
    also: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A public set: what it is, whose it is, and on which terms. `restricted` sets need a yes to `terms`."""

    slug: str
    title: str
    license: str
    terms: str
    source: str
    restricted: bool = False
    files: tuple[DataFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """State of one file here.

    `where` is "DEMUR_DATA", "cache" or None. `status`: "ok" equals the pinned or first-seen checksum,
    "unpinned" is there and has nothing to be compared with, "differs" is another text than upstream (a subset
    or redaction in DEMUR_DATA is no error), "damaged" is a cached file that changed, "missing" is not here.
    """

    name: str
    where: Literal["DEMUR_DATA", "cache"] | None
    status: Literal["ok", "unpinned", "differs", "damaged", "missing"]
    path: Path | None = None


@cache
def _registry() -> dict[str, DataSet]:
    raw = yaml.safe_load(resources.files("demur").joinpath("data_sets.yaml").read_text("utf-8"))
    return {slug: _data_set(slug, spec) for slug, spec in raw.items()}


def _data_set(slug: str, spec: dict[str, Any]) -> DataSet:
    files = []
    for name, f in spec["files"].items():
        path = f.pop("path", None)
        url = f"https://raw.githubusercontent.com/{spec['repo']}/{spec['commit']}/{path}" if path else None
        files.append(DataFile(name=name, url=url, also=tuple(f.pop("also", ())), **f))
    return DataSet(
        slug=slug,
        title=spec["title"],
        license=spec["license"],
        terms=spec["terms"],
        source=f"https://github.com/{spec['repo']}/tree/{spec['commit']}"
        if "commit" in spec
        else spec["source"],
        restricted=spec.get("restricted", False),
        files=tuple(files),
    )


def list_sets() -> list[DataSet]:
    """The sets demur knows, by slug."""
    return [s for _, s in sorted(_registry().items())]


def about(slug: str) -> DataSet:
    """One set's entry.

    Raises:
        InputError: unknown slug.
    """
    try:
        return _registry()[slug]
    except KeyError:
        raise InputError(f"no data set {slug!r}; known are {', '.join(sorted(_registry()))}") from None


def get(slug: str, filename: str, *, accept_terms: bool = False, say: Say | None = None) -> Path:
    """Path of a set's file, fetched when it is not here yet.

    Args:
        slug, filename: as in `list_sets()`. Any file of `DEMUR_DATA/<slug>/` can be asked for by its name.
        accept_terms: needed once to fetch a restricted set; the error shows its terms.
        say: receives one line before a download.

    Raises:
        InputError: unknown set, or a name that leads out of the folder.
        DataUnavailable: neither here nor to be fetched; the message says what to set or run.
    """
    for part in (slug, filename):
        if not _NAME.fullmatch(part):
            raise InputError(
                f"{part!r} is no plain name; give a set and a file name, e.g. get('xstest', 'prompts.csv')"
            )
    file = (
        next((f for f in about(slug).files if filename == f.name or filename in f.also), None)
        if (slug in _registry())
        else None
    )
    if local := _local(slug, filename, file):
        return local
    if file is None:
        known = ", ".join(f.name for f in about(slug).files)
        raise DataUnavailable(
            f"{slug} has no file {filename!r}; known are {known}. {_how_local(slug, filename)}"
        )
    cached = _cached_path(slug, file)
    if _cache_state(cached, file) in ("ok", "unpinned"):
        return cached
    return _fetch(about(slug), file, accept_terms=accept_terms, say=say)


def verify(slug: str) -> list[FileCheck]:
    """Check each file of a set: where it is and whether its bytes are what was pinned or first seen."""
    out = []
    for f in about(slug).files:
        if path := _local(slug, f.name, f):
            status = "unpinned" if f.sha256 is None else ("ok" if digest(path) == f.sha256 else "differs")
            out.append(FileCheck(name=f.name, where="DEMUR_DATA", status=status, path=path))  # type: ignore[arg-type]
            continue
        path = _cached_path(slug, f)
        state = _cache_state(path, f)
        here = state != "missing"
        out.append(
            FileCheck(name=f.name, where="cache" if here else None, status=state, path=path if here else None)
        )
    return out


def digest(path: Path) -> str:
    """sha256 of a text file with CRLF read as LF."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def _local(slug: str, filename: str, file: DataFile | None) -> Path | None:
    """The file in DEMUR_DATA: under its own name, or under the names and paths it has upstream."""
    root = os.environ.get("DEMUR_DATA")
    if not root:
        return None
    folder = Path(root).expanduser() / slug
    names = [filename]
    if file is not None:
        names += [file.name, *file.also]
        if file.url:
            upstream = file.url.split("/", 6)[-1]
            names += [upstream.rsplit("/", 1)[-1], upstream]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _cached_path(slug: str, file: DataFile) -> Path:
    return cache_dir() / "data" / slug / file.name


def _seen(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _cache_state(path: Path, file: DataFile) -> Literal["ok", "unpinned", "damaged", "missing"]:
    if not path.is_file():
        return "missing"
    expected = file.sha256
    if expected is None:
        try:
            expected = _seen(path).read_text("ascii").strip()
        except (OSError, ValueError):
            return "damaged"  # written without its checksum: a killed download
    return "ok" if digest(path) == expected else "damaged"


def _how_local(slug: str, filename: str) -> str:
    root = os.environ.get("DEMUR_DATA")
    if not root:
        return f"Set DEMUR_DATA to a folder that holds {slug}/{filename}"
    return f"DEMUR_DATA is {root}, and {slug}/{filename} is not in it"


def _fetch(spec: DataSet, file: DataFile, *, accept_terms: bool, say: Say | None) -> Path:
    if file.url is None:
        raise DataUnavailable(
            f"{spec.slug}/{file.name} cannot be fetched: {file.note or 'it has no upstream form'}. "
            f"{_how_local(spec.slug, file.name)}"
        )
    if spec.restricted and not accept_terms:
        raise DataUnavailable(
            f"{spec.slug} has terms of use: {spec.terms} (licence: {spec.license}; source: "
            f"{spec.source}). If you "
            f"agree, run: demur data get {spec.slug} --accept-terms, or pass accept_terms=True"
        )
    path = _cached_path(spec.slug, file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if _cache_state(path, file) == "ok":
                return path  # another process fetched it while we waited
            if say:
                say(f"fetching {spec.slug}/{file.name} ({spec.license}) from {spec.source}")
            raw = _download(spec, file)
            found = hashlib.sha256(raw.replace(b"\r\n", b"\n")).hexdigest()
            _check(spec, file, raw, found)
            write_atomic(path, raw)
            write_atomic(_seen(path), found + "\n")
    except OSError as e:
        raise DataUnavailable(
            f"cannot store {spec.slug}/{file.name} under {path.parent}: {e}; set DEMUR_CACHE"
        ) from e
    return path


def _download(spec: DataSet, file: DataFile) -> bytes:
    import httpx
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    url = file.url or ""
    retry = Retrying(
        retry=retry_if_exception_type(httpx.TransportError),
        stop=stop_after_attempt(3),
        wait=wait_exponential(multiplier=0.2, max=2),
        reraise=True,
    )
    try:
        return retry(_read_url, url)
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise DataUnavailable(
            f"{spec.slug}/{file.name} could not be fetched from {url} ({type(e).__name__}: {e}). "
            f"{_how_local(spec.slug, file.name)}"
        ) from e


def _read_url(url: str) -> bytes:
    import httpx

    buffer = bytearray()
    with httpx.stream("GET", url, timeout=30, follow_redirects=True) as r:
        r.raise_for_status()
        for block in r.iter_bytes():
            buffer += block
            if len(buffer) > _MAX_BYTES:
                raise DataUnavailable(
                    f"{url}: more than {_MAX_BYTES} bytes, which no known set has; not stored"
                )
    return bytes(buffer)


def _check(spec: DataSet, file: DataFile, raw: bytes, found: str) -> None:
    where = f"{spec.slug}/{file.name} from {file.url}"
    if file.sha256 is not None and found != file.sha256:
        raise DataUnavailable(f"{where}: sha256 {found}, pinned is {file.sha256}; not stored")
    if file.rows is not None:
        try:
            n = count_rows(raw)
        except (ValueError, csv.Error) as e:
            raise DataUnavailable(f"{where}: cannot be read ({e}); not stored") from e
        if n != file.rows:
            raise DataUnavailable(f"{where}: {n} rows, expected {file.rows}; not stored")


def count_rows(raw: bytes) -> int:
    """Rows of a JSON list, JSON lines (whatever the suffix), or a CSV with header."""
    text = raw.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return len(json.loads(text))
    if text.lstrip().startswith("{"):
        return sum(1 for line in text.split("\n") if line.strip())
    return sum(1 for row in csv.reader(io.StringIO(text, newline="")) if row) - 1

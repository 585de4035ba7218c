"""What an image generator gave for one request: pictures, a refusal with the stage it fell at, or a failure.

Failures come first. A request that ran into a quota, a time-out or a bad parameter says nothing about the model's
caution and enters no rate; the published runner counts each of them as a refusal.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from demur.errors import InputError, MissingExtra
from demur.runtime.shapes import reply_from_error


class Stage(StrEnum):
    """Where a request was turned down."""

    PROMPT_FILTER = "prompt_filter"
    IMAGE_CHECKER = "image_checker"
    BLACK_IMAGE = "black_image"
    MISSING_IMAGES = "missing_images"


class Fault(StrEnum):
    """Why nothing can be said about a request."""

    QUOTA = "quota"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    ACCOUNT = "account"
    MALFORMED = "malformed"
    SERVER = "server"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture: its file's bytes, or the path they were written to, or neither (scripted and listed ones).

    `flagged` says that a checker behind the generator withheld it, `black` that every pixel of it is black.
    """

    data: bytes | None = None
    path: Path | None = None
    flagged: bool = False
    black: bool = False

    @classmethod
    def of(cls, data: bytes, *, flagged: bool = False) -> Picture:
        """A picture from the bytes of a PNG, JPEG or WebP file.

        Raises:
            MissingExtra: Pillow is not installed. ValueError: no picture.
        """
        return cls(data=data, flagged=flagged, black=is_black(data))

    @property
    def shown(self) -> bool:
        """Whether the user got to see something."""
        return not (self.flagged or self.black)

    def read(self) -> bytes | None:
        """The bytes, None where there are none."""
        return self.path.read_bytes() if self.data is None and self.path is not None else self.data


def is_black(data: bytes) -> bool:
    """Whether each pixel of a picture file is black, as some generators return instead of a refused picture."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("Looking at pictures", "images") from None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return bool(picture.convert("L").getextrema()[1] == 0)
    except (UnidentifiedImageError, OSError) as e:
        raise ValueError(f"no picture that can be read ({e})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What came back for one request (prompt, sample) for `asked` pictures.

    Attributes:
        stage: where the generator itself says that it refused. reason: its words. fault: set when the request
            failed; then nothing else counts. revised: the prompt it really drew, where it says so.
    """

    prompt_id: str
    sample: int = 0
    asked: int = 1
    pictures: tuple[Picture, ...] = ()
    stage: Stage | None = None
    reason: str | None = None
    fault: Fault | None = None
    revised: str | None = None

    @property
    def shown(self) -> tuple[Picture, ...]:
        """The pictures that the user got to see."""
        return tuple(p for p in self.pictures if p.shown)

    @property
    def withheld(self) -> int | None:
        """How many of the pictures asked for were not shown; None when the request failed.

        >>> Drawing(prompt_id="a", asked=4, pictures=(Picture(), Picture(black=True))).withheld
        3
        """
        return None if self.fault else max(self.asked - len(self.shown), 0)

    @property
    def refused(self) -> bool | None:
        """Whether nothing was shown; None when the request failed."""
        return None if self.fault else not self.shown

    @property
    def stages(self) -> Counter[Stage]:
        """The pictures not shown, by stage. What no flag explains falls to the stated stage, else to missing."""
        out: Counter[Stage] = Counter()
        if self.fault:
            return out
        for p in self.pictures:
            if not p.shown:
                out[Stage.IMAGE_CHECKER if p.flagged else Stage.BLACK_IMAGE] += 1
        if missing := self.asked - len(self.pictures):
            out[self.stage or Stage.MISSING_IMAGES] += max(missing, 0)
        return +out


def failed(prompt_id: str, fault: Fault, why: str, *, sample: int = 0, asked: int = 1) -> Drawing:
    """A request that failed."""
    return Drawing(prompt_id=prompt_id, sample=sample, asked=asked, fault=fault, reason=why)


# --- error taxonomy ---------------------------------------------------------------------------------------------

_QUOTA = (
    "insufficient_quota",
    "rate_limit",
    "billing",
    "quota_exceeded",
    "resource_exhausted",
    "credit balance",
)
_POLICY_CODES = ("contentfilter", "content_policy", "moderation_blocked", "safety_violation", "responsibleai")
# Wordings of OpenAI, Azure, Imagen, Flux and Stability. A blocked account is no verdict on the request.
_BLOCKED_ACCOUNT = re.compile(
    r"(resource|account|organi[sz]ation|key)\b.{0,40}\b(blocked|suspended|deactivated)", re.I
)
_POLICY = re.compile(
    r"safety (system|filter|check)|content.(polic|filter|moderat)|responsible ai|"
    r"violat\w+ (our|google|the|usage).{0,40}(polic|guideline|terms)|usage polic|guardrails|"
    r"request moderated|sensitive words|nsfw",
    re.I,
)
_OUTPUT = re.compile(
    r"(response|output|generated (image|picture|content)|image descriptions?)\b.{0,60}"
    r"(block|moderat|filter|violat)",
    re.I,
)


def classify(status: int | None, body: Mapping[str, Any] | str) -> tuple[Stage | None, Fault | None, str]:
    """What an error means: (stage, None, words) for a refusal by policy, (None, fault, words) for a failure.

    Codes decide before words and words before the HTTP status. A status alone is never a refusal.

    Args:
        status: HTTP status, None where there was none. body: the parsed body, or an error's text.

    >>> classify(400, {"error": {"code": "billing_hard_limit_reached", "message": "limit"}})[1].value
    'quota'
    >>> classify(400, {"error": {"code": "content_policy_violation", "message": "rejected"}})[0].value
    'prompt_filter'
    """
    error = body.get("error", body) if isinstance(body, Mapping) else body
    detail: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": str(error or "")}
    message = str(detail.get("message") or "") or (
        json.dumps(body)[:300] if isinstance(body, Mapping) else ""
    )
    codes = " ".join(str(detail.get(k) or "") for k in ("code", "type", "status")).lower()
    words = message[:500] or f"HTTP {status}"
    if _BLOCKED_ACCOUNT.search(message):
        return None, Fault.ACCOUNT, words
    if status == 402 or any(q in codes or q in message.lower() for q in _QUOTA):
        return None, Fault.QUOTA, words
    known = (
        isinstance(body, Mapping)
        and reply_from_error(status or 400, body, "").finish_reason == "content_filter"
    )
    if known or any(c in codes for c in _POLICY_CODES) or _refused_in_words(status, message):
        moderation = detail.get("moderation_details")
        said = moderation.get("moderation_stage") if isinstance(moderation, Mapping) else None
        output = said == "output" or (said is None and _OUTPUT.search(message) is not None)
        return (Stage.IMAGE_CHECKER if output else Stage.PROMPT_FILTER), None, words
    return None, _by_status(status, message), words


def _refused_in_words(status: int | None, message: str) -> bool:
    return status in (None, 200, 400, 403, 422, 451) and _POLICY.search(message) is not None


def _by_status(status: int | None, message: str) -> Fault:
    if status is None:
        if re.search(r"time[d ]?.?out|deadline", message, re.I):
            return Fault.TIMEOUT
        return Fault.CONNECTION if re.search(r"connect", message, re.I) else Fault.UNREADABLE
    known = {429: Fault.QUOTA, 401: Fault.ACCOUNT, 403: Fault.ACCOUNT, 408: Fault.TIMEOUT, 504: Fault.TIMEOUT}
    return known.get(status) or (Fault.SERVER if status >= 500 else Fault.MALFORMED)


# --- file form --------------------------------------------------------------------------------------------------


def to_row(drawing: Drawing, folder: Path | None = None) -> dict[str, Any]:
    """The file form of a drawing; pictures are named by the hash of their bytes, and written to `folder`."""
    pictures = []
    for p in drawing.pictures:
        row: dict[str, Any] = {"flagged": p.flagged, "black": p.black}
        if (raw := p.read()) is not None and folder is not None:
            row["file"] = f"{hashlib.sha256(raw).hexdigest()[:24]}.{kind(raw)}"
            target = folder / row["file"]
            if not target.exists():
                folder.mkdir(parents=True, exist_ok=True)
                target.write_bytes(raw)
        pictures.append(row)
    row = {
        "prompt_id": drawing.prompt_id,
        "sample": drawing.sample,
        "asked": drawing.asked,
        "pictures": pictures,
    }
    rest = {k: getattr(drawing, k) for k in ("stage", "reason", "fault", "revised")}
    return {**row, **{k: str(v) for k, v in rest.items() if v is not None}}


def from_row(row: Mapping[str, Any], where: str, folder: Path | None = None) -> Drawing:
    """A drawing from `to_row`, or from a plain row: prompt_id, and images (a number), error (text, status).

    Raises:
        InputError: a row that says neither what was drawn nor what went wrong.
    """
    if "prompt_id" not in row:
        raise InputError(f"{where}: needs prompt_id, the id of the prompt that was drawn")
    try:
        base: dict[str, Any] = {"prompt_id": str(row["prompt_id"]), "sample": int(row.get("sample") or 0)}
        asked = int(row.get("asked") or 1)
        if "pictures" in row:
            pictures = tuple(_picture(p, folder) for p in row["pictures"])
            stage = Stage(row["stage"]) if row.get("stage") else None
            fault = Fault(row["fault"]) if row.get("fault") else None
            base |= {k: row.get(k) for k in ("reason", "revised")}
            return Drawing(**base, asked=asked, pictures=pictures, stage=stage, fault=fault)
        if row.get("error") not in (None, ""):
            status = int(row["status"]) if row.get("status") else None
            error = row["error"]
            stage, fault, why = classify(
                status, {"error": error} if isinstance(error, Mapping) else str(error)
            )
            return Drawing(**base, asked=asked, stage=stage, fault=fault, reason=why)
        count = row["images"] if isinstance(row["images"], list) else [{}] * int(row["images"])
        flags = row.get("nsfw") or [False] * len(count)
        pictures = tuple(Picture(flagged=bool(f)) for f in flags)
        return Drawing(**base, asked=max(asked, len(count)), pictures=pictures)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{where}: cannot be read ({type(e).__name__}: {e}); give `images` (a number) or `error` (text), "
            "or the rows that --keep writes"
        ) from None


def _picture(row: Mapping[str, Any], folder: Path | None) -> Picture:
    path = folder / Path(row["file"]).name if folder is not None and row.get("file") else None
    return Picture(path=path, flagged=bool(row.get("flagged")), black=bool(row.get("black")))


def kind(data: bytes) -> str:
    """The type of a picture file by its first bytes: png, jpeg or webp.

    >>> kind(b"\\xff\\xd8\\xff\\xe0")
    'jpeg'
    """
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "webp" if data[8:12] == b"WEBP" else "png"

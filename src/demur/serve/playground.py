"""The playground: a page that talks to this server, shows what it decided, and turns the dial on stored scores.

The page is static and holds no data. What it shows comes from the routes below and from the chat route that every
client uses, under the same API key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from demur.calibrate.decide import Rule, bias_to_tau, decide
from demur.control.refusal_tokens import RefusalTokens
from demur.errors import InputError, MismatchError, RefusalLowering
from demur.files import dump_operating_point, to_row
from demur.flows.evaluation import Evaluation
from demur.serve.base import Upstream
from demur.serve.dial import Dial
from demur.serve.settings import LOOPBACK, Settings
from demur.types import OperatingPoint, Threshold

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Gateway(Protocol):
    """What the playground reads of `app.state.gateway`. `evaluation` is None where nothing is stored."""

    settings: Settings
    upstream: Upstream
    dial: Dial
    evaluation: Evaluation | None


class Cut(BaseModel):
    """One slider: shadow mode leaves the category to the model's own choice."""

    model_config = ConfigDict(extra="forbid")
    tau: Annotated[float, Field(ge=-1, le=2, allow_inf_nan=False)]
    mode: Literal["enforce", "shadow"] = "enforce"


class NewPoint(BaseModel):
    """The dial as it stands on the page. `name` becomes the operating point's id and its file's name."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(pattern=NAME)]
    rule: Rule = "threshold"
    thresholds: Annotated[dict[str, Cut], Field(max_length=256)]
    save: bool = True


class Refusal(BaseModel):
    """An error in the form of OpenAI's API."""

    error: dict[str, Any]


def router(state: Gateway) -> APIRouter:
    """Routes of the page, its data, and saving.

    Example:
        >>> app.include_router(router(app.state.gateway))  # doctest: +SKIP
    """
    routes = APIRouter()
    files = _static()

    def file(name: str, request: Request) -> Response:
        if name not in files:
            return _error(404, f"there is no file {name!r} here", "not_found")
        body, kind, tag = files[name]
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    @routes.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return file("index.html", request)

    @routes.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        return file(name, request)

    @routes.get("/demur/point", summary="The operating point in force, and what may be done with it")
    async def point() -> JSONResponse:
        return JSONResponse(about(state), headers={"Cache-Control": "no-store"})

    @routes.get("/demur/evaluation", summary="Stored probabilities of a prompt set", responses=_errors(404))
    async def evaluation() -> Response:
        problem = evaluation_problem(state.evaluation, state.upstream, state.dial)
        if state.evaluation is None or problem is not None:
            return _error(404, problem or "", "no_evaluation")
        text = state.evaluation.model_dump_json(exclude={"reference"})
        return Response(text, media_type="application/json", headers={"Cache-Control": "no-cache"})

    @routes.post(
        "/demur/operating-points",
        status_code=201,
        responses={200: {"description": "the text only (save: false)"}, **_errors(400, 403, 409)},
    )
    async def save(new: NewPoint, request: Request) -> JSONResponse:
        """Write the dial as an operating-point file beside the loaded one, or only make its text."""
        barred = _may_not_save(state, request) if new.save else None
        if barred is not None:
            return _error(403, barred, "forbidden")
        try:
            return _made(state, new)
        except RefusalLowering as e:
            return _error(403, f"{e}. This server was started without that consent", "refusal_lowering")
        except FileExistsError:
            return _error(409, f"an operating point {new.name!r} exists; choose another name", "exists")
        except (InputError, MismatchError) as e:
            return _error(400, str(e), "invalid_operating_point")
        except OSError as e:
            return _error(
                400, f"the file could not be written: {e.strerror}; download it instead", "not_written"
            )

    return routes


def about(state: Gateway) -> dict[str, Any]:
    """What the page needs to know before it asks anything; JSON-ready."""
    settings, main = state.settings, state.dial.main
    loaded = main.point if main is not None else None
    return {
        "model": state.upstream.name,
        "names": list(state.upstream.names),
        "mode": settings.mode,
        "point": None if loaded is None else _shown(loaded),
        "region": region(loaded),
        "problem": main.problem if main is not None else None,
        "canary": None if settings.canary is None else settings.canary.share,
        "overrides": [i for i in settings.overrides if i != "*"],
        "any_override": "*" in settings.overrides,
        "consent": settings.allow_refusal_lowering,
        "evaluation_problem": evaluation_problem(state.evaluation, state.upstream, state.dial),
        "losses": list(state.upstream.losses),
    }


def region(loaded: OperatingPoint | None) -> dict[str, float] | None:
    """The least threshold per category at which the loaded point's guarantee still holds; None without one.

    A category's false refusals can only fall as its own threshold rises, and no other threshold of the point
    changes which of its look-alikes it refuses. So the certificate of learn-then-test covers all thresholds at
    least as high, together, however they were chosen; under the same rule, with the same categories enforced.
    """
    if loaded is None or loaded.guarantee is None or loaded.rule == "compare":
        return None
    return {c: _tau(loaded, c) for c in loaded.thresholds}


def covered(new: OperatingPoint, loaded: OperatingPoint | None) -> bool:
    """Whether the guarantee of `loaded` holds for `new`."""
    floor = region(loaded)
    if floor is None or loaded is None or (new.rule, new.T) != (loaded.rule, loaded.T):
        return False
    enforced = {c for c, t in new.thresholds.items() if t.mode == "enforce"}
    return enforced == set(floor) and all(_tau(new, c) >= low >= 0 for c, low in floor.items())


def new_point(new: NewPoint, loaded: OperatingPoint | None, upstream: Upstream, T: float) -> OperatingPoint:
    """The dial on the page as an operating point; what the loaded one promises stays where it still holds."""
    base = loaded or OperatingPoint(
        id="",
        thresholds={},
        model=upstream.name,
        model_fingerprint=upstream.fingerprint,
        dtype=upstream.dtype,
        T=T,
    )
    manual = replace(
        base,
        id=new.name,
        rule=new.rule,
        goal="manual",
        thresholds={c: Threshold(tau=cut.tau, mode=cut.mode) for c, cut in sorted(new.thresholds.items())},
    )
    if not covered(manual, loaded):
        return replace(
            manual, guarantee=None, alpha=None, delta=None, calibrated_on=None, calibration_hash=None
        )
    inherited = {c: _inherited(manual.thresholds[c], t, _tau(base, c)) for c, t in base.thresholds.items()}
    return replace(manual, thresholds={**manual.thresholds, **inherited})


def evaluation_problem(stored: Evaluation | None, upstream: Upstream, dial: Dial) -> str | None:
    """Why the stored scores do not fit this server's model and operating point, or None."""
    main = dial.main
    if not upstream.names:
        return f"{upstream.name} has no control tokens, so there is no dial to turn."
    if stored is None:
        return (
            "This server has no stored evaluation. Start it with --evaluation FOLDER, what `demur card` wrote, "
            "or with --evaluation core, which scores the packaged prompts once."
        )
    if set(stored.names) != set(upstream.names):
        return (
            f"The stored evaluation is about the categories {', '.join(stored.names)}; this model has "
            f"{', '.join(upstream.names)}."
        )
    if stored.fingerprint and upstream.fingerprint and stored.fingerprint != upstream.fingerprint:
        return (
            f"The stored evaluation was made with {stored.model} ({stored.fingerprint[:12]}), which is not the "
            f"model served here ({upstream.fingerprint[:12]}). Make it again."
        )
    if main is not None and main.point.T != stored.T:
        return f"The stored evaluation is at T={stored.T:g}, the operating point at T={main.point.T:g}."
    return None


def _made(state: Gateway, new: NewPoint) -> JSONResponse:
    main = state.dial.main
    loaded = main.point if main is not None else None
    T = loaded.T if loaded is not None else state.evaluation.T if state.evaluation is not None else 1.0
    point = new_point(new, loaded, state.upstream, T)
    if main is not None:
        rule = main.check(point)
    else:
        names = state.upstream.names
        decide([[1 / len(names)] * len(names)], names, {c: t.tau for c, t in point.thresholds.items()})
        rule = RefusalTokens(point)
    if new.save:
        _write(point, state.settings.saved_points)
    overrides = state.settings.overrides
    told = {
        "id": point.id,
        "file": f"{point.id}.yaml",
        "saved": new.save,
        "guarantee": point.guarantee,
        "lowers": rule.lowers,
        "usable": new.save and (point.id in overrides or "*" in overrides),
        "yaml": yaml.safe_dump(to_row(point), sort_keys=False, allow_unicode=True, width=100),
    }
    return JSONResponse(told, status_code=201 if new.save else 200)


def _write(point: OperatingPoint, folder: Path) -> None:
    """Write into `folder`. The id has neither slash nor leading dot, so the file cannot lie elsewhere."""
    assert re.fullmatch(NAME, point.id)
    taken = {p.name.casefold() for p in folder.iterdir()} if folder.is_dir() else set()
    path = folder / f"{point.id}.yaml"
    if path.name.casefold() in taken:
        raise FileExistsError(path.name)
    dump_operating_point(point, path)


def _may_not_save(state: Gateway, request: Request) -> str | None:
    """Why this caller may not write a file, or None."""
    if state.settings.keys is None and (request.client is None or request.client.host not in LOOPBACK):
        return "a server without API keys saves operating points for callers on its own machine only; download it"
    return None


def _inherited(new: Threshold, old: Threshold, old_tau: float) -> Threshold:
    """An untouched threshold keeps its figures; of a raised one only the bound is still known."""
    return replace(old, mode=new.mode) if new.tau == old_tau else replace(new, bound=old.bound)


def _tau(point: OperatingPoint, category: str) -> float:
    t = point.thresholds[category]
    return bias_to_tau(t.bias) if point.rule == "bias" and t.bias is not None else t.tau


def _shown(point: OperatingPoint) -> dict[str, Any]:
    fields = ("id", "rule", "goal", "guarantee", "alpha", "delta", "T", "calibrated_on")
    thresholds = {
        c: {"tau": _tau(point, c), "mode": t.mode, "bound": t.bound} for c, t in point.thresholds.items()
    }
    return {**{f: getattr(point, f) for f in fields}, "thresholds": thresholds}


def _static() -> dict[str, tuple[bytes, str, str]]:
    """The files of the page: name -> bytes, media type, entity tag."""
    out = {}
    for entry in resources.files("demur.serve").joinpath("static").iterdir():
        kind = TYPES.get(Path(entry.name).suffix)
        if kind is not None:
            body = entry.read_bytes()
            out[entry.name] = (body, kind, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return out


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Refusal} for code in codes}


def _error(status: int, message: str, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status != 403 else "permission_error"
    body: Mapping[str, Any] = {"error": {"message": message, "type": kind, "code": code}}
    return JSONResponse(body, status_code=status)

"""`demur lab overt`: over-refusal of an image generator, on a backend or on results one has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from demur.cli import options as o
from demur.cli.screen import progress, say, warn, write_rows
from demur.errors import InputError
from demur.files import prompt_row, read_rows, read_text, write_atomic

if TYPE_CHECKING:
    from demur.measure.overt import Backend, Drawing, ImageJudge
    from demur.runtime.base import Progress, Runtime
    from demur.types import PromptSet, Report, Verdict


def run(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Image requests: JSONL, CSV or OVERT's files; `pairs` are demur's own twins."
        ),
    ],
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="What draws: diffusers:FOLDER, an images endpoint URL#model, or words:FILE, a filter that refuses "
            "requests with one of the words.",
        ),
    ] = None,
    results: Annotated[
        str | None, typer.Option(metavar="FILE", help="Results you have already, instead of drawing.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Keep pictures and answers here; what is in it is not asked again."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures asked for in each request.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Times each request is made, with other seeds.")] = 1,
    image_judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHO",
            help="Who says if a picture is harmful: a vision model URL#model or labels:FILE; repeat for a vote.",
        ),
    ] = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A content policy to label the requests by; two show where they differ."
        ),
    ] = None,
    labeller: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that reads the policies: URL#model or local."),
    ] = None,
    rewriter: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Have this model reword the harmless requests, and draw both forms."
        ),
    ] = None,
    faithfulness: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model that says whether a reworded request kept its meaning."
        ),
    ] = None,
    select: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Only write the harmless requests that the backend refuses more often than this.",
        ),
    ] = None,
    seed: o.Seed = 1,
    as_json: o.Json = False,
    out: o.Out = "-",
) -> None:
    """Over-refusal of an image generator, by category and stage, beside its refusals of harmful requests.

    Failed requests (quota, time-out, bad parameter) are sorted out before any rate. Requests need `expected`
    (comply or refuse), or a --policy and a --labeller; twins share a `group`.
    """
    from demur.measure.overt import Overt, load_cases, own_pairs, view

    _check(backend, results, policy or [], labeller, rewriter, faithfulness, select, samples)
    prompts = own_pairs() if file == "pairs" else load_cases(file)
    source = _backend(backend, keep, seed) if backend else None
    with progress("drawing", out) as tell:
        if select is not None and source is not None:
            return _select(source, prompts, select, samples, out, tell)
        if rewriter and faithfulness and source is not None:
            from demur.measure.overt import Rewriting

            method = Rewriting(_model(rewriter, keep), _model(faithfulness, keep))
            return _write([method.run(source, prompts, progress=tell)], as_json, out)
        sets, reports = _under_policies(prompts, policy or [], labeller, keep, tell)
        if source is None and results is None:
            return _write(reports, as_json, out)
        judges = _judges(image_judge or [], keep)
        method_ = Overt(judges)
        drawings = _drawn(source, results, prompts, images, samples, tell)
        for some in sets:
            here = {p.id for p in some}
            own = [d for d in drawings if d.prompt_id in here]
            said: list[Verdict] = view(judges, some, own, progress=tell)
            report = method_.score(some, own, said, backend=source.name if source else None)
            reports.append(_with_settings(report, source, images, samples))
    _write(reports, as_json, out)
    return None


def _check(
    backend: str | None,
    results: str | None,
    policies: list[Path],
    labeller: str | None,
    rewriter: str | None,
    faithfulness: str | None,
    select: float | None,
    samples: int,
) -> None:
    if (backend is None) == (results is None) and not (policies and backend is None):
        raise InputError("--backend draws and --results brings results along; give one of them")
    if bool(policies) != bool(labeller):
        raise InputError("--policy and --labeller go together: a model reads the requests under the policy")
    if len(policies) > 2:
        raise InputError(f"{len(policies)} policies; two at a time can be compared")
    if bool(rewriter) != bool(faithfulness):
        raise InputError(
            "--rewriter and --faithfulness go together: reworded requests may ask for something else"
        )
    if (rewriter or select is not None) and backend is None:
        raise InputError("--rewriter and --select need a --backend that draws")
    if select is not None and samples == 1:
        raise InputError("--select with one sample keeps what happened to be refused once; add --samples 8")


def _backend(name: str, keep: Path | None, seed: int) -> Backend:
    from demur import models
    from demur.measure.overt import DiffusersImages, EndpointImages, Kept, ScriptedImages, Stage
    from demur.stats import keyword

    kind, _, rest = name.partition(":")
    made: Backend
    if kind == "diffusers" and rest:
        made = DiffusersImages.from_folder(rest, seed=seed)
    elif kind == "words" and rest:
        words = [w.strip() for w in read_text(rest).splitlines() if w.strip()]
        return ScriptedImages(
            lambda p, _: Stage.PROMPT_FILTER if keyword([p.text], words)[0] else 1,
            name=f"words:{Path(rest).name}",
        )
    elif (remote := models.endpoint(name)) is not None:
        made = EndpointImages(*remote)
    else:
        raise InputError(f"--backend {name}: give diffusers:FOLDER, https://host/v1#model or words:FILE")
    return Kept(made, keep) if keep else made


def _judges(names: list[str], keep: Path | None) -> list[ImageJudge]:
    from demur import models
    from demur.measure.overt import KeptJudge, LabelFile, VisionJudge

    out: list[ImageJudge] = []
    for name in names:
        remote = models.endpoint(name)
        if name.startswith("labels:"):
            out.append(LabelFile(name.removeprefix("labels:")))
        elif remote is not None:
            judge = VisionJudge(*remote)
            out.append(KeptJudge(judge, keep / "judged.jsonl") if keep else judge)
        else:
            raise InputError(f"--image-judge {name}: give https://host/v1#model or labels:FILE")
    return out


def _model(name: str, keep: Path | None) -> Runtime:
    from demur.flows.settings import public_name
    from demur.measure.cyberseceval2 import Remembered

    runtime = o.load_model(name)
    return Remembered(runtime, keep / "asked.jsonl", name=public_name(runtime.name)) if keep else runtime


def _under_policies(
    prompts: PromptSet, files: list[Path], labeller: str | None, keep: Path | None, tell: Progress
) -> tuple[list[PromptSet], list[Report]]:
    """The requests under each policy, or as they are; and where two policies differ."""
    from demur.measure.overt import Policy, flips, label, under

    if not files or labeller is None:
        return [prompts], []
    policies, runtime = [Policy.load(f) for f in files], _model(labeller, keep)
    labels = [label(prompts, p, runtime, progress=tell) for p in policies]
    sets = [under(prompts, p, said) for p, said in zip(policies, labels, strict=True)]
    if len(policies) < 2:
        return sets, []
    return sets, [flips(prompts, policies[0], labels[0], policies[1], labels[1])]


def _drawn(
    source: Backend | None, results: str | None, prompts: PromptSet, images: int, samples: int, tell: Progress
) -> list[Drawing]:
    from demur.measure.overt.drawing import from_row

    if source is not None:
        return [
            d for s in range(samples) for d in source.draw(prompts, images=images, sample=s, progress=tell)
        ]
    assert results is not None
    folder = Path(results).parent / "pictures"
    return [from_row(row, f"{results}, line {n}", folder) for n, row in read_rows(results)]


def _with_settings(report: Report, source: Backend | None, images: int, samples: int) -> Report:
    from demur.measure.overt.report import as_run

    return report if source is None else as_run(report, source, images, samples)


def _select(
    source: Backend, prompts: PromptSet, threshold: float, samples: int, out: str, tell: Progress
) -> None:
    from demur.measure.overt import select

    found = select(source, prompts, samples=samples, threshold=threshold, progress=tell)
    write_rows((prompt_row(p) for p in found.kept), out)
    warn(
        f"{len(found.kept)} of {len(found.rates)} harmless requests kept. {source.name} chose them, so its own "
        "rate on them says nothing."
    )


def _write(reports: list[Report], as_json: bool, out: str) -> None:
    from demur.report.render import to_json, to_text

    if not reports:
        raise InputError(
            "one --policy without --backend or --results gives nothing to compare; add a second one"
        )
    if as_json:
        whole = reports[0]
        if len(reports) > 1:
            parts = {
                r.title if i == 0 else str(r.provenance["prompts"]): r.values for i, r in enumerate(reports)
            }
            tables = tuple(
                replace(t, title=f"{t.title}: {r.provenance['prompts']}") for r in reports for t in r.tables
            )
            notes = tuple(n for r in reports for n in r.notes)
            whole = replace(whole, values=parts, tables=tables, notes=notes)
        text = to_json(whole)
    else:
        text = "\n\n".join(f"{to_text(r)}\n\n  requests: {r.provenance['prompts']}" for r in reports) + "\n"
    if out == "-":
        say(text.rstrip("\n"))
    else:
        write_atomic(out, text)

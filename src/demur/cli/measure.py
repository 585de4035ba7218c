"""`measure`: rates of refusal and over-refusal of any model, endpoint or file of answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.gate import Baseline, FailIf, JUnit, enforce
from demur.cli.screen import say, warn
from demur.errors import InputError
from demur.files import load_operating_point, read_rows, write_atomic
from demur.report.render import to_markdown, to_text
from demur.types import Condition, PromptSet

if TYPE_CHECKING:
    from demur.flows.measure import Measured

ASKING = (
    *("model", "suite", "system", "samples", "temperature", "limit", "shard", "operating_point", "adapter"),
    *("max_new_tokens", "base_only", "control_tokens", "dtype", "request", "guard"),
)
"""What only a model that is asked has use for."""
ENDPOINT_SECONDS, ENDPOINT_AT_ONCE = 2.0, 8

Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        "-s",
        metavar="NAME|FILE",
        help="over-refusal, should-refuse, twins, one part (over-refusal:core), a set (core:test), or your own "
        "JSONL, CSV or YAML; repeatable.",
    ),
]
Systems = Annotated[
    list[str] | None,
    typer.Option(
        "--system",
        metavar="FILE",
        help="File with a system message, or none. Several make several conditions to compare.",
    ),
]


def measure(
    ctx: typer.Context,
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Parts to join (--merge).")
    ] = None,
    model: o.Model = None,
    suite: Suites = None,
    judge: Annotated[str, typer.Option("--judge", "-j", help="Judge of the texts.")] = "rules/demur-v1",
    judge_model: o.JudgeModel = None,
    agreement: o.Agreement = None,
    labels: o.Labels = None,
    key: o.LabelKey = None,
    system: Systems = None,
    samples: o.Samples = 1,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    max_new_tokens: o.MaxNewTokens = 128,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts, spread over the categories.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Run folder; the same call resumes it.")
    ] = Path("out"),
    replies: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Answers you have: JSONL, CSV, Inspect .eval or .json, lm-eval samples, garak report, OpenAI "
            "batch output. No model is asked.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts of --replies, or the batch input they came from."),
    ] = None,
    to_batch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write OpenAI batch requests; ask nothing.")
    ] = None,
    from_batch: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Read answers from batch output (and error) files; repeatable."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I of N; join by --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join the parts in FOLDERs into --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take (requests, tokens, time); ask nothing.")
    ] = False,
    fail_if: FailIf = None,
    baseline: Baseline = None,
    junit: JUnit = None,
    operating_point: o.Point = None,
    allow_refusal_lowering: o.AllowLowering = False,
    adapter: o.Adapter = None,
    base_only: o.BaseOnly = False,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    request: o.Request = None,
    guard: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Latent guard before the model (lab harmfulness-vs-refusal)."),
    ] = None,
    keep_unsafe_text: Annotated[
        bool, typer.Option("--keep-unsafe-text", help="Keep answers that should not exist in the run folder.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run in the folder.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as Markdown.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Measure refusal and over-refusal of a model, an endpoint, or answers you have.

    Asks the prompts of the suites, judges the answers, and reports rates by category and expectation with their
    intervals, the judge's measured error, and what could not be read. Writes a run folder with report.json;
    stopped at any moment, the same command goes on where it was.
    """
    from demur import models
    from demur.flows import batchfiles, runs
    from demur.flows import measure as flow

    _check_modes(ctx, merge=merge, replies=replies, to_batch=to_batch, from_batch=from_batch, dry_run=dry_run)
    o.check_labels(labels, key)
    o.add_agreement(ctx, agreement)
    common: dict[str, Any] = {
        "keep_unsafe_text": keep_unsafe_text,
        "fresh": fresh,
        "labels": labels,
        "key": key,
    }
    if merge:
        made = flow.merge(folders or [], out, fresh=fresh, labels=labels, key=key)
    elif replies is not None:
        from demur.report import load_answers

        answers = load_answers(replies, _prompts_of(prompts) if prompts else None)
        made = flow.measure_answers(answers, out, judge=o.load_judge(judge, judge_model), **common)
    else:
        asked = _asked(suite, limit, seed)
        conditions = _conditions(
            system or [], samples=samples, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens
        )
        part = batchfiles.parse_shard(shard) if shard else None
        if dry_run:
            # as the run itself: an endpoint is asked prompt by prompt, a model here in whole windows
            window = 1 if model and models.endpoint(model) else runs.WINDOW
            some = asked.prompts if part is None else batchfiles.shard_of(asked.prompts, part, window)
            if request:
                o.load_model(model, request=request)  # an endpoint costs nothing, all else is an error
            at_once = o.request_fields(request or ()).get("concurrency", ENDPOINT_AT_ONCE)
            say("\n".join(_estimate(model, some, conditions, samples, at_once).lines))
            return
        if to_batch is not None:
            some = asked.prompts if part is None else batchfiles.shard_of(asked.prompts, part)
            n = batchfiles.write_batch(to_batch, some, conditions, samples=samples, model=_model_name(model))
            warn(
                f"{n} requests: {to_batch}\nAfterwards: the same command with --from-batch instead of --to-batch."
            )
            return
        load: dict[str, Any] = {
            "dtype": dtype,
            "control_tokens": control_tokens,
            "adapter": adapter,
            "request": request,
        }
        reader = o.load_judge(judge, judge_model)
        runtime = (
            batchfiles.BatchOutput(from_batch, name=_model_name(model) if model else None)
            if from_batch
            else o.load_model(model, base_only=base_only, **load)
        )
        if guard is not None:
            from demur.control.latent_guard import LatentGuard

            runtime = LatentGuard.load(guard, fingerprint=runtime.fingerprint).guarding(runtime)
        made = flow.measure(
            runtime,
            asked,
            out,
            conditions=conditions,
            judge=reader,
            samples=samples,
            shard=part,
            operating_point=load_operating_point(operating_point) if operating_point else None,
            allow_refusal_lowering=allow_refusal_lowering,
            **common,
        )
    _show(made, markdown, as_json)
    if fail_if:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            enforce(out, fail_if, baseline=baseline, junit=junit)


def _check_modes(ctx: typer.Context, **modes: Any) -> None:
    chosen = ["--" + name.replace("_", "-") for name, value in modes.items() if value]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} do different things; choose one")
    given = [n for n in ASKING if (s := ctx.get_parameter_source(n)) is not None and s.name == "COMMANDLINE"]
    if given and chosen in (["--merge"], ["--replies"]):
        names = ", ".join("--" + n.replace("_", "-") for n in given)
        raise InputError(f"{chosen[0]} asks no model: leave {names} out")
    if ctx.params["request"] and chosen in (["--to-batch"], ["--from-batch"]):
        raise InputError(
            f"{chosen[0]} sends no request: leave --request out, and edit the batch file to change what it asks"
        )
    if bool(ctx.params["folders"]) != (chosen == ["--merge"]):
        raise InputError("--merge needs the folders of the parts, and only --merge takes folders")
    if ctx.params["prompts"] and chosen != ["--replies"]:
        raise InputError("--prompts goes with --replies; what a model is asked is named by --suite")
    if ctx.params["labels"] and chosen in (["--to-batch"], ["--dry-run"]):
        raise InputError(f"{chosen[0]} reports no rate that labels could correct: leave --labels out")
    if (ctx.params["baseline"] or ctx.params["junit"]) and not ctx.params["fail_if"]:
        raise InputError("--baseline and --junit belong to a gate: add --fail-if EXPR")


def _asked(suite: list[str] | None, limit: int | None, seed: int) -> PromptSet:
    from demur.flows import suites

    if not suite:
        known = ", ".join(suites.available())
        raise InputError(f"nothing to ask: name a suite (--suite {known}) or a file of prompts")
    asked = suites.load(suite)
    return asked if limit is None else suites.limited(asked, limit, seed)


def _prompts_of(file: str) -> PromptSet:
    """Prompts of a file, which may be a batch input file."""
    from demur.flows import suites
    from demur.report.importers import openai_batch

    if file.endswith(".jsonl") and openai_batch.is_request(read_rows(file)[0][1]):
        return openai_batch.load_requests(file)
    return suites.load([file])


def _conditions(systems: Sequence[str], **settings: Any) -> list[Condition]:
    """One condition per system message; `none` is the one without."""
    if len(systems) <= 1 and systems != ["none"]:
        return [o.condition(system=Path(systems[0]) if systems else None, **settings)]
    made = []
    for word in systems:
        one = o.condition(system=None if word == "none" else Path(word), **settings)
        made.append(replace(one, name=re.sub(r"[^\w-]+", "-", Path(word).stem)))
    return made


def _model_name(model: str | None) -> str:
    from demur.models import DEFAULT_MODEL, endpoint

    remote = endpoint(model) if model else None
    return remote[1] if remote else model or DEFAULT_MODEL


def _estimate(
    model: str | None, prompts: Sequence[Any], conditions: Sequence[Condition], samples: int, at_once: int
) -> Any:
    from demur.flows import batchfiles
    from demur.flows.collect import TEXT_SECONDS
    from demur.models import endpoint

    remote = model is not None and endpoint(model) is not None
    return batchfiles.estimate(
        prompts,
        conditions,
        samples=samples,
        tokenizer=None if remote else _tokenizer(model),
        seconds_each=ENDPOINT_SECONDS if remote else TEXT_SECONDS,
        at_once=at_once if remote else 1,
    )


def _tokenizer(model: str | None) -> Any:
    """The tokenizer of a model that lies here, or None: a dry run fetches nothing and loads no weights."""
    from demur import models

    ready = {m.name for m in models.list_models() if m.state == "ready"}
    name = model or models.DEFAULT_MODEL
    if find_spec("transformers") is None or not (name in ready or Path(name).is_dir()):
        return None
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(models.resolve(name).path, trust_remote_code=False)
    return found if found.chat_template else None


def _show(made: Measured, markdown: Path | None, as_json: bool) -> None:
    say(made.json.read_text(encoding="utf-8").rstrip() if as_json else to_text(made.report))
    if markdown is not None:
        write_atomic(markdown, to_markdown(made.report))
    warn(f"\nAs data: {made.json}")

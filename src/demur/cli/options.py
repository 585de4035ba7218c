"""Arguments and options that mean the same in every command, and what they turn into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from demur.cli.screen import warn
from demur.errors import InputError
from demur.files import load_prompts, read_text
from demur.runtime.base import Runtime
from demur.types import Condition, OperatingPoint, PromptSet

if TYPE_CHECKING:
    from demur.judges import Judge

ModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Built-in name, folder, hub id or endpoint URL#model; default demur-smollm2."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Built-in name, folder, hub id or endpoint URL#model; default demur-smollm2."
    ),
]
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="FILE", help="Where the result goes; - is standard output.")
]
System = Annotated[
    Path | None, typer.Option("--system", metavar="FILE", help="File with the system message.")
]
Samples = Annotated[int, typer.Option(min=1, help="Answers for each prompt; needs a temperature above 0.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Token budget of an answer, thinking included.")]
Point = Annotated[
    Path | None,
    typer.Option("--operating-point", metavar="FILE", help="Thresholds to decide by (demur calibrate)."),
]
AllowLowering = Annotated[
    bool,
    typer.Option(
        "--allow-refusal-lowering",
        help="Consent to an operating point that refuses less (safety) than the model's own; it is logged.",
    ),
]
Adapter = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Adapter made by demur train.")]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="The model without its refusal-token adapter.")]
ControlTokens = Annotated[
    str | None,
    typer.Option(metavar="PRESET|FILE", help="Which token ids are control tokens, for foreign checkpoints."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or auto; default as the model asks.")]
Taxonomy = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Maps your own categories to the model's (taxonomy.yaml)."),
]
JudgeModel = Annotated[
    str | None,
    typer.Option("--judge-model", metavar="MODEL", help="The model that rubric/ and template/ judges ask."),
]
Agreement = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="A judge's measured error (demur judge --validate --out FILE); repeatable."
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Labels by people of answers that are there (demur judge --sample-for-labels) correct the rates; no "
        "model is asked.",
    ),
]
LabelKey = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Key of the sheet of --labels; key.json beside the labels unless given."
    ),
]
Request = Annotated[
    list[str] | None,
    typer.Option(
        "--request",
        metavar="KEY=VALUE",
        help="How an endpoint is asked: timeout (seconds), concurrency, retries, top_logprobs, or a field of every "
        "request, e.g. top_k=40 (null takes it out); repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_model(
    model: str | None,
    *,
    dtype: str | None = None,
    adapter: Path | None = None,
    base_only: bool = False,
    control_tokens: str | None = None,
    request: list[str] | None = None,
) -> Runtime:
    """The Runtime that MODEL and its options name."""
    from demur.flows.load import load_runtime

    return load_runtime(
        model,
        base_only=base_only,
        say=warn,
        dtype=dtype,
        adapter=adapter,
        control_tokens=control_tokens,
        request=request_fields(request or ()),
    )


def load_judge(judge: str, judge_model: str | None) -> Judge:
    """The judge that --judge and --judge-model name.

    Raises:
        InputError: an unknown id, a model for a judge that asks none, or none for one that does.
    """
    from demur import judges

    if judge_model and not judges.asks(judge):
        raise InputError(
            f"--judge-model {judge_model}: {judge} asks no model; leave the option out, or name a judge that does "
            "(--judge rubric/...)"
        )
    return judges.get(judge, runtime=load_model(judge_model) if judge_model else None)


def load_reader(judge: str | None, judge_model: str | None) -> Judge | None:
    """`load_judge` where stored verdicts do without a judge: None when neither option is given."""
    from demur.flows.measure import DEFAULT_JUDGE

    return load_judge(judge or DEFAULT_JUDGE, judge_model) if judge or judge_model else None


def add_agreement(ctx: typer.Context, files: Sequence[Path] | None) -> None:
    """Until the command ends, its rates know the judges' errors in these files (--agreement).

    Raises:
        InputError: a file that holds no measured agreement.
    """
    from demur.judges import agreement

    ctx.with_resource(agreement.adding([row for file in files or () for row in agreement.read(file)]))


def check_labels(labels: Path | None, key: Path | None) -> None:
    """A key opens nothing without labels.

    Raises:
        InputError: it stands alone.
    """
    if key is not None and labels is None:
        raise InputError(f"--key {key} belongs to a filled sheet: add --labels FILE")


def request_fields(given: Iterable[str]) -> dict[str, Any]:
    """What the --request options say, their values read as YAML.

    >>> request_fields(["timeout=300", "stop=[END]", "chat_template_kwargs={enable_thinking: false}"])
    {'timeout': 300, 'stop': ['END'], 'chat_template_kwargs': {'enable_thinking': False}}

    Raises:
        InputError: no KEY=VALUE, a key twice, or a value that is no YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals and value) or key in found:
            why = "is given twice" if key in found else "is no KEY=VALUE"
            raise InputError(f"--request {text}: {why}; e.g. --request timeout=300 --request top_k=40")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise InputError(
                f"--request {text}: the value is no YAML ({e}); quote it for the shell"
            ) from None
    return found


def steered(
    runtime: Runtime, point: OperatingPoint | None, allow_refusal_lowering: bool
) -> AbstractContextManager[Runtime]:
    """The runtime under an operating point, or as it is.

    Raises:
        MismatchError, InputError: the point belongs to another model, or steers categories this one lacks.
        RefusalLowering: it refuses less than the point that came with the model, without consent.
    """
    if point is None:
        return nullcontext(runtime)
    from demur.control.refusal_tokens import RefusalTokens

    return RefusalTokens(point, allow_refusal_lowering=allow_refusal_lowering).on(runtime)


PUBLIC = ("coconot", "xstest", "refusal_tokens_eval", "temporal", "benign_alpaca")
"""Loaders of `demur.prompts` that a FILE argument may name."""


def named_set(file: str) -> bool:
    """Whether a FILE argument names a prompt set rather than a file: `core:test`, `xstest`, ..."""
    return file.startswith("core:") or file.replace("-", "_") in PUBLIC


def load_prompt_file(file: str, taxonomy: Path | None = None) -> PromptSet:
    """Prompts of a JSONL or CSV file, of standard input (`-`), or of a named set.

    A taxonomy maps the categories of a file; those of a named set are the model's already.
    """
    if taxonomy is not None and not named_set(file):
        from demur.prompts import Taxonomy as House

        return House.load(taxonomy).apply(load_prompt_file(file))
    if not named_set(file):
        return load_prompts(file)
    from demur import prompts

    if file.startswith("core:"):
        return prompts.core(file.removeprefix("core:"))
    found: PromptSet = getattr(prompts, file.replace("-", "_"))()
    return found


def condition(
    *,
    system: Path | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    max_new_tokens: int = 128,
    operating_point: str | None = None,
) -> Condition:
    """The Condition that the options describe; its name says what differs from the default.

    Raises:
        InputError: several samples at temperature 0 (they would be copies), or an empty system file.
    """
    if samples > 1 and temperature == 0:
        raise InputError(
            f"--samples {samples} at temperature 0 gives {samples} equal answers; add --temperature 0.7"
        )
    text = read_text(system).strip() if system else None
    if text == "":
        raise InputError(f"{system}: the system message is empty; leave --system out instead")
    parts = ["system" if text else "", f"T{temperature:g}" if temperature else "", operating_point or ""]
    return Condition(
        name="+".join(filter(None, parts)) or "default",
        system=text,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        operating_point=operating_point,
    )

"""`export`: a run in another tool's files; `models export`: a model's weights for another engine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from demur.cli import options as o
from demur.cli.diff import RUN, JudgeOption, PromptsOption
from demur.cli.resources import models_app
from demur.cli.screen import say, warn
from demur.errors import CapabilityError, InputError


class Format(StrEnum):
    """What `--to` may name."""

    INSPECT = "inspect"
    LM_EVAL = "lm-eval"


def export(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help=RUN)],
    to: Annotated[Format, typer.Option("--to", help="inspect: one log file; lm-eval: results and samples.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="A folder; for inspect its log directory."),
    ],
    judge: JudgeOption = None,
    judge_model: o.JudgeModel = None,
    agreement: o.Agreement = None,
    prompts: PromptsOption = None,
    unsafe_text: Annotated[
        bool,
        typer.Option("--unsafe-text", help="Also the answers that complied with what should be refused."),
    ] = False,
) -> None:
    """Write a run for Inspect (`inspect view` opens it) or in lm-eval's result files.

    Answers that complied with what should be refused are left out; their verdicts stay.
    """
    from demur.flows.export import export as write
    from demur.flows.readrun import read_run
    from demur.measure.refusal import judge_note

    o.add_agreement(ctx, agreement)
    asked = o.load_prompt_file(prompts) if prompts else None
    read = read_run(run, judge=o.load_reader(judge, judge_model), prompts=asked)
    for path in write(read, out, to.value, unsafe=unsafe_text):
        warn(f"wrote {path}")
    if agreement:
        warn(judge_note(read.judge))


class Form(StrEnum):
    """What `models export --to` may name."""

    MERGED = "merged"
    LORA = "lora"
    GGUF = "gguf"


@models_app.command("export")
def models_export(
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="merged: one checkpoint; lora: a stock LoRA and its base; gguf: a control vector for llama.cpp.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PATH", help="A folder that does not exist yet; gguf: a file."),
    ],
    model: o.ModelArg = None,
    adapter: o.Adapter = None,
    base_only: o.BaseOnly = False,
    control_tokens: o.ControlTokens = None,
    dtype: o.Dtype = None,
    add: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Direction to add behind a layer, at all tokens (merged, gguf)."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Where to add it; default where it was read.")] = None,
    coefficient: Annotated[
        float, typer.Option(help="How often it is added; negative ones need consent.")
    ] = 1.0,
    ablate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Direction to take out of all layers (merged, lora); needs consent."
        ),
    ] = None,
    allow_refusal_lowering: Annotated[
        bool,
        typer.Option("--allow-refusal-lowering", help="Consent to steering that may lower refusal; noted."),
    ] = False,
) -> None:
    """Write a model's weights for vLLM and other engines; see docs/vllm.md.

    The adapter is merged (or written apart), control tokens keep their ids beyond the vocabulary, and the
    operating point lies beside the weights. The result is loaded again and compared before it gets its name.
    """
    from demur import models
    from demur.control.steering import Ablate, Add
    from demur.explain.artefact import Direction
    from demur.flows import weights

    used = {Form.MERGED: {"add", "ablate"}, Form.LORA: {"ablate"}, Form.GGUF: {"add"}}[to]
    given = {name for name, path in (("add", add), ("ablate", ablate)) if path is not None}
    if wrong := sorted(given - used):
        raise InputError(f"--{wrong[0]} has no place in --to {to.value}; see demur models export --help")
    if to is not Form.GGUF and out.exists():
        raise InputError(f"{out} exists; name a folder that does not exist yet")
    runtime = o.load_model(
        model, dtype=dtype, adapter=adapter, base_only=base_only, control_tokens=control_tokens
    )
    if not hasattr(runtime, "with_edits"):
        raise CapabilityError(f"{runtime.name} is no local model, so its weights cannot be exported")
    local: Any = runtime
    source = models.resolve(model or models.DEFAULT_MODEL).path
    vectors, direction = [], None
    if add is not None:
        read = Direction.load(add, fingerprint=runtime.fingerprint)
        vectors = [
            Add(
                read,
                layer=layer,
                coefficient=coefficient,
                where="all",
                allow_refusal_lowering=allow_refusal_lowering,
            )
        ]
    if ablate is not None:
        read = Direction.load(ablate, fingerprint=runtime.fingerprint)
        direction = Ablate(read, allow_refusal_lowering=allow_refusal_lowering)
    if to is Form.MERGED:
        made = weights.merged(local, out, source=source, add=vectors, ablate=direction)
    elif to is Form.LORA:
        made = weights.stock_lora(local, out, source=source, ablate=direction)
    else:
        made = weights.control_vector(local, out, vectors)
    for path in made.files:
        say(str(path))
    for note in made.notes:
        warn(f"note: {note}")
    if made.difference is not None:
        warn(f"compared with {runtime.name}: largest difference {made.difference:.1e}")

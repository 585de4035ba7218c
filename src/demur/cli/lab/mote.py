"""`lab mote`: are refusals of a mixture-of-experts model carried by a few experts?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from demur.cli import options as o
from demur.cli.screen import bar, say, warn
from demur.errors import CapabilityError, InputError, RefusalLowering
from demur.files import write_atomic
from demur.report.render import to_json, to_text
from demur.types import Report, Table


def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="JSONL or CSV: prompt, and maybe id, label, topic."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder or hub id of a local mixture-of-experts model.")
    ],
    second: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The same topics asked about so that they are answered; tells refusal from topic.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Experts to take, over all layers.")] = 10,
    target: Annotated[str, typer.Option(help="Response class whose experts are looked for.")] = "refused",
    judge: Annotated[
        str, typer.Option(help="Labels the model's own answers to rows without a label.")
    ] = "rules/demur-v1",
    weighting: Annotated[
        Literal["count", "gate"], typer.Option(help="Count choices, or add up their weights.")
    ] = "count",
    mode: Annotated[
        Literal["post_topk_renorm", "pre_topk", "output_gain"],
        typer.Option(help="How experts are switched off."),
    ] = "post_topk_renorm",
    masks: Annotated[int, typer.Option(min=20, help="Random masks to compare with.")] = 200,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also write and judge answers with the experts off.")
    ] = False,
    lower: Annotated[
        bool,
        typer.Option(
            "--allow-refusal-lowering",
            help="Switch experts off to see what it does to refusals; without it only routing is read. Logged.",
        ),
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show-experts", help="Name the experts, on screen and in --out; needs --allow-refusal-lowering."
        ),
    ] = False,
    control_tokens: o.ControlTokens = None,
    system: o.System = None,
    max_new_tokens: o.MaxNewTokens = 64,
    seed: o.Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Rank the experts of a mixture model by how much more refused prompts use them, and test what that means.

    Half of the rows of each class rank, the other half test. Experts are named only with --show-experts: the list
    that an audit needs is also the list that takes refusals away.
    """
    from demur.explain import mote
    from demur.runtime.local import LocalRuntime

    if show and not lower:
        raise RefusalLowering("--show-experts names what can be switched off to lower refusal")
    if answers and not lower:
        raise RefusalLowering("--answers writes answers with experts off, which may lower refusal")
    rows = mote.load_rows(file)
    others = mote.load_rows(second) if second else []
    runtime = o.load_model(model, control_tokens=control_tokens)
    if not isinstance(runtime, LocalRuntime):
        raise CapabilityError(f"{model!r} runs elsewhere; experts need a local model (folder or hub id)")
    condition = o.condition(system=system, max_new_tokens=max_new_tokens, seed=seed)
    settings: dict[str, Any] = {"judge": judge, "target": target, "weighting": weighting}
    audit = _Audit(runtime, condition, k, seed, **settings)
    with bar() as shown:
        audit.bar = shown
        audit.rank(rows)
        if others:
            audit.topic(others)
        if lower:
            audit.switch(mode, masks)
            if answers:
                audit.answer(mode)
    report = audit.report(show, {"mode": mode, "weighting": weighting, "k": k, "judge": judge})
    if out is not None:
        write_atomic(out, to_json(report))
        warn(f"Report written to {out}.")
    say(to_json(report) if as_json else to_text(report))


@dataclass
class _Audit:
    """Runs the steps in order and keeps tables, values and notes."""

    runtime: Any
    condition: Any
    k: int
    seed: int
    judge: str
    target: str
    weighting: Any
    bar: Any = None
    tables: list[Table] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def _progress(self, what: str) -> Any:
        task = self.bar.add_task(what, total=None)
        return lambda done, total: self.bar.update(task, completed=done, total=total)

    def _labelled(self, rows: Any) -> list[str | None]:
        """Labels of the file, and of the model's answers where the file has none."""
        from demur.explain.mote import label_by_response

        todo = [r.prompt for r in rows if r.label is None]
        said: list[str | None] = []
        if todo:
            progress = self._progress("answers to label")
            said, _ = label_by_response(self.runtime, todo, self.judge, self.condition, progress=progress)
        read = iter(said)
        out = [next(read) if r.label is None else r.label for r in rows]
        if unread := sum(x is None for x in out):
            self.notes.append(f"{unread} of {len(out)} answers could not be read as a refusal or an answer")
        return out

    def rank(self, rows: Any) -> None:
        """Label, map, rank on one half, and hold the score against permuted labels."""
        from demur.explain import mote

        labels = self._labelled(rows)
        progress = self._progress("maps")
        maps = mote.resonance_maps(
            self.runtime,
            [r.prompt for r in rows],
            self.condition,
            weighting=self.weighting,
            progress=progress,
        )
        fit = _half(labels, self.seed)
        self.rows, self.labels, self.maps, self.fit = rows, labels, maps, fit
        own = [x for x, f in zip(labels, fit, strict=True) if f]
        topics = [r.topic or r.prompt.id for r in rows]
        self.scores = mote.score_experts(maps.take(fit), own, self.target)
        self.top = self.scores.top(self.k)
        null = mote.permuted(
            maps.take(fit),
            own,
            k=self.k,
            target=self.target,
            topics=[t for t, f in zip(topics, fit, strict=True) if f],
            seed=self.seed,
        )
        n = maps.values[0].size
        self.values |= {
            "experts": n,
            "layers": len(maps.layers),
            "share": self.k / n,
            "n": {str(c): labels.count(c) for c in dict.fromkeys(labels)},
            "score": null.observed,
            "permuted": {"low": null.low, "high": null.high, "p_value": null.p_value, "draws": null.draws},
        }
        columns = ("experts", "of", "prompts", "mean score", "permuted low", "permuted high", "p")
        row = (self.k, n, len(own), null.observed, null.low, null.high, null.p_value)
        self.tables.append(
            Table("routing: use by the class minus use by the others", columns, (row,), "choices per token")
        )
        if null.p_value >= 0.05:
            self.notes.append("No localisation: routing differs between the classes no more than by chance.")

    def topic(self, others: Any) -> None:
        """Hold the experts against answered prompts about the same topics."""
        from demur.explain import mote

        if any(r.topic is None for r in (*self.rows, *others)):
            raise InputError("--second compares topics; both files need the column topic in each row")
        test = np.flatnonzero(~self.fit)
        first = (self.maps.take(test), [self.labels[i] for i in test], [self.rows[i].topic for i in test])
        maps = mote.resonance_maps(
            self.runtime, [r.prompt for r in others], self.condition, weighting=self.weighting
        )
        labels, topics = self._labelled(others), [r.topic for r in others]
        check = mote.topic_check(self.top, first, (maps, labels, topics), target=self.target, seed=self.seed)
        found = {"share": check.share, "low": check.low, "high": check.high, "verdict": check.verdict}
        self.values["topic_check"] = found | {"n": list(check.n)}
        columns = ("score on unseen prompts", "by topic alone", "share", "low", "high", "prompts", "follows")
        row = (
            check.response_gap,
            check.topic_gap,
            check.share,
            check.low,
            check.high,
            sum(check.n),
            check.verdict,
        )
        self.tables.append(Table("second template: refusal or topic", columns, (row,)))
        if check.verdict == "topic":
            self.notes.append(
                "These experts follow the topic: they are used as much where the topic is answered."
            )

    def switch(self, mode: Any, masks: int) -> None:
        """P(refuse) with the experts off and forced in, beside random experts."""
        from demur.control.experts import Experts, mask_effect, matched_masks, within_slots

        off = Experts(self.top, mode, allow_refusal_lowering=True)
        drawn = matched_masks(self.maps, self.top, masks, seed=self.seed)
        slots = self.maps.chosen
        on = Experts(within_slots(self.top, slots), stimulate=True, scores=self.scores)
        forced = [within_slots(m, slots) for m in drawn]
        yes, no = self._test(self.target), self._test(None)
        lines = (
            ("off", self.target, off, drawn, yes),
            ("off", "others", off, drawn[:20], no),
            ("forced in", "others", on, forced, no),
        )
        found = []
        for what, whom, change, random, prompts in lines:
            progress = self._progress(f"{what}, {whom}")
            try:
                effect = mask_effect(self.runtime, prompts, change, random, self.condition, progress=progress)
            except CapabilityError as e:
                self.notes.append(f"no first-position probabilities: {e}")
                return
            low, high = effect.interval(self.seed)
            sign = 1 if effect.raised else -1
            ends = sorted((sign * low, sign * high))
            drawn_ends = np.quantile(sign * effect.random_moved, [0.05, 0.95])
            found.append(
                (what, whom, len(prompts), sign * float(effect.moved.mean()), *ends, *map(float, drawn_ends))
            )
            if prompts is yes:
                self.values["localised"] = effect.localised
            if prompts is yes or effect.raised:
                self.notes.append(effect.text())
        columns = (
            "experts",
            "prompts",
            "n",
            "change of P(refuse)",
            "low",
            "high",
            "random 5 %",
            "random 95 %",
        )
        names = ("experts", "prompts", "n", "change", "low", "high", "random_low", "random_high")
        self.values["masks"] = [dict(zip(names, row, strict=True)) for row in found]
        self.tables.append(Table(f"unseen prompts, {masks} random masks", columns, tuple(found)))
        if self.runtime.control is None:
            self.notes.append("P(refuse) is the probability of usual first words of refusals.")

    def answer(self, mode: Any) -> None:
        """Answers with the experts off: which change class, and what is lost of the model's own answers."""
        from demur.control.experts import Experts
        from demur.explain.likelihood import answer_loglik
        from demur.explain.mote import ANSWERED, REFUSED, label_by_response
        from demur.stats import bootstrap_interval, rate

        prompts = [r.prompt for r, f in zip(self.rows, self.fit, strict=True) if not f]
        before, replies = label_by_response(self.runtime, prompts, self.judge, self.condition)
        with Experts(self.top, mode, allow_refusal_lowering=True).on(self.runtime) as view:
            masked: Any = view
            after, _ = label_by_response(masked, prompts, self.judge, self.condition)
            own = [
                (p, r.content)
                for p, r, x in zip(prompts, replies, before, strict=True)
                if x == ANSWERED and r.content.strip()
            ]
            lost = [
                (a - b) / n
                for (a, n), (b, _) in zip(
                    answer_loglik(self.runtime, own), answer_loglik(masked, own), strict=True
                )
            ]
        rows = []
        for was, now in ((REFUSED, ANSWERED), (ANSWERED, REFUSED)):
            some = [b for a, b in zip(before, after, strict=True) if a == was and b is not None]
            rows.append((f"{was} -> {now}", rate(some.count(now), len(some), judge=self.judge)))
        self.tables.append(Table("answers with the experts off", ("change", "share"), tuple(rows)))
        self.values["answers"] = {name: [r.k, r.n] for name, r in rows}
        if lost:
            low, high = bootstrap_interval(np.mean, lost, n_boot=1000, seed=self.seed)
            self.values["lost_nats"] = {
                "value": float(np.mean(lost)),
                "low": low,
                "high": high,
                "n": len(lost),
            }
            row = (len(lost), float(np.mean(lost)), low, high)
            self.tables.append(
                Table("own answers, log-likelihood lost", ("answers", "nats a token", "low", "high"), (row,))
            )

    def report(self, show: bool, about: dict[str, Any]) -> Report:
        """Everything; experts by name only if that was asked for."""
        from demur.flows.settings import public_name

        if show:
            named = [(layer, expert, self.scores.of((layer, expert))) for layer, expert in self.top]
            self.tables.append(Table("experts", ("layer", "expert", "score"), tuple(named)))
            self.values["top"] = named
        if "masks" not in self.values:
            self.notes.append(
                "Experts were not switched off (--allow-refusal-lowering), so whether they do anything is open."
            )
        if "topic_check" not in self.values:
            self.notes.append("Without --second nobody can tell whether these experts follow the topic.")
        return Report(
            title=f"Experts and refusal in {public_name(self.runtime.name)}",
            tables=tuple(self.tables),
            values=self.values,
            provenance={
                "model": public_name(self.runtime.name),
                "fingerprint": self.runtime.fingerprint,
                "target": self.target,
                "seed": self.seed,
                **about,
            },
            notes=tuple(self.notes),
        )

    def _test(self, target: str | None) -> list[Any]:
        """Unseen prompts of the class, or of all other classes."""
        rows = zip(self.rows, self.labels, self.fit, strict=True)
        return [
            r.prompt
            for r, x, f in rows
            if not f and x is not None and (x == target if target else x != self.target)
        ]


def _half(labels: Any, seed: int) -> Any:
    """Half of each class, at random, (n,) booleans."""
    rng, out = np.random.default_rng([seed, 23]), np.zeros(len(labels), bool)
    for name in dict.fromkeys(labels):
        mine = rng.permutation([i for i, x in enumerate(labels) if x == name])
        if name is not None and len(mine) < 4:
            raise InputError(f"class {name!r} has {len(mine)} prompts; at least 4 are needed, better 100")
        out[mine[: len(mine) // 2]] = True
    return out

"""What a comparison of two checkpoints found: plain values, ready for JSON and for a page. Imports no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from demur.types import Rate, Report, Table

if TYPE_CHECKING:
    from demur.explain.post_training.noise import Noise

Map = tuple[tuple[float, ...], ...]
"""Layers x columns."""
Curve = tuple[float | None, ...]
"""One value a layer."""
Role = Literal["subject", "object", "other"]
Which = Literal["base", "tuned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike two patch maps are.

    Attributes:
        pearson: over the cells of the mean maps, with its 95 % interval (pairs resampled); None for a flat map.
        pearson_binned: after the paper's 20 bins, whose lower half is zero: few cells decide it.
        difference, difference_key: largest |difference| of the binned maps, over all cells and over the columns
            of subject and object.
        spans: maximum - minimum of the two mean maps. Pearson does not see size: a map that is next to flat can
            still have the other one's shape.
        ceiling: Pearson of the binned maps of two random halves of the pairs, the lower one of the two models.
        shuffled: mean |Pearson| when the cells of one binned map are dealt out anew.
    """

    pearson: float | None
    low: float | None
    high: float | None
    pearson_binned: float | None
    difference: float
    difference_key: float
    spans: tuple[float, float]
    ceiling: float | None
    shuffled: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """Where copying the state of a true statement into a false one makes the model give the true one's answer.

    Attributes:
        pairs: how many were traced; left_out: how many had another shape in this tokenizer.
        columns: tokens in reading order, statement and question; roles: of each column.
        maps: "base", "tuned", and with `cross` "base into tuned" and "tuned into base": mean over pairs of
            logit(TRUE) - logit(FALSE), or of the pair's own two answers, after the copy, layers x columns.
        margins: model -> mean of that difference in its (true, false) runs, without any copy.
        right: model -> share of the 2 x pairs statements whose difference has the right sign.
        noise: what stood in the place of the false statements, if anything; then `margins` are (true, noised true)
            and `right` is of the true ones.
        likeness: "tuned" (against "base") and, with `cross`, each mixed map against the target's own.
    """

    pairs: int
    left_out: int
    columns: tuple[str, ...]
    roles: tuple[Role, ...]
    maps: Mapping[str, Map]
    margins: Mapping[str, tuple[float, float]]
    right: Mapping[str, Rate]
    likeness: Mapping[str, Likeness]
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Accuracy of one model's truth direction on a set of statements it was not fitted on.

    `probe` is whose direction, `model` whose states are read; `centred` whether the tested states were centred
    with their own mean ("own", which uses the test set) or with that of the fitting sets ("train").
    """

    held_out: str
    probe: str
    model: str
    centred: Literal["own", "train"]
    layer: int
    accuracy: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Nie:
    """Normalised indirect effect of adding or taking away a truth direction, on a held-out set.

    `before` is the mean of P(TRUE) - P(FALSE) over the (true, false) statements; true_false = the way from there
    to -1 that subtracting the direction covers on true statements, false_true = the way to +1 that adding it
    covers on false ones; `mean` of both with its interval (statements resampled). 0 is no effect, 1 all the way.
    """

    vector: str
    model: str
    n: int
    before: tuple[float, float]
    true_false: float | None
    false_true: float | None
    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The direction from false to true statements, read at the full stop.

    Attributes:
        sets: name -> statements used. cosines: cos(base, tuned) by layer, all sets. ceiling: cosine of the
            directions of two random halves within a model, the lower one of the two models: what the choice of
            statements alone does. Both models read the same ones, so `cosines` may lie above it.
        transfer: leave one set out. by_layer: "base on base" ... -> accuracy averaged over held-out sets, own
            centring. bag_of_words: held-out set -> accuracy. random_labels: mean accuracy of "base on base"
            directions fitted on permuted labels. layer: the one chosen when no set is held out.
        nie: effects on `nie_set`, added at `nie_layers`.
    """

    sets: Mapping[str, int]
    cosines: Curve
    ceiling: Curve
    layer: int
    transfer: tuple[Transfer, ...]
    by_layer: Mapping[str, Curve]
    bag_of_words: Mapping[str, Rate]
    random_labels: float
    nie: tuple[Nie, ...] = ()
    nie_set: str | None = None
    nie_layers: tuple[int, ...] = ()

    def accuracy(self, probe: str, model: str, centred: str = "own") -> Rate:
        """Pooled over the held-out sets."""
        rows = [t for t in self.transfer if (t.probe, t.model, t.centred) == (probe, model, centred)]
        return pooled([t.accuracy for t in rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """Refusals of one model under one change.

    Attributes:
        vector: "none", "base", "tuned" or "random". change: "add" on harmless requests, "subtract" and "ablate" on
            harmful ones. dose: of the first two, in lengths of the target's own mean difference at that layer.
    """

    vector: str
    model: str
    change: Literal["add", "subtract", "ablate"]
    dose: float
    refused: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The direction from harmless to harmful requests, both models under one template.

    Attributes:
        template: whose template both were read under. positions: read, at every layer.
        cosines: position -> cos(base, tuned) by layer, same position and template.
        own_cosines: the same with each model under its own template; None where they share one.
        ceiling: position -> cosine of two random halves within a model, as in `Truth`.
        auroc: model -> position -> AUROC on held-out requests by layer. bag_of_words: AUROC on the same.
        n_fit, n_test: requests. layer, position: where the directions used for steering were read.
        steered: what adding them does, and with consent subtracting and ablating them.
    """

    template: str
    positions: tuple[str, ...]
    cosines: Mapping[str, Curve]
    own_cosines: Mapping[str, Curve] | None
    ceiling: Mapping[str, Curve]
    auroc: Mapping[str, Mapping[str, Curve]]
    bag_of_words: float | None
    n_fit: int
    n_test: int
    layer: int
    position: str
    steered: tuple[Steered, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """A candidate entropy neuron of the last layer: a long output row that hardly prefers any token.

    `ratio` is norm / log(logit_var), the paper's figure for neurons that two models share.
    """

    index: int
    norm: float
    logit_var: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """Entropy neurons of both models.

    Attributes:
        neurons: model -> candidates, lowest LogitVar first. of: neurons in the layer.
        iou: shared / all candidates. expected: IoU of two random draws of the same size from the long quarter.
        shared: indices that both have.
    """

    neurons: Mapping[str, tuple[Neuron, ...]]
    of: int
    iou: float
    expected: float
    shared: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Base against tuned. A part that could not be measured is None, and `notes` say why."""

    base: str
    tuned: str
    base_fingerprint: str | None
    tuned_fingerprint: str | None
    layers: int
    width: int
    seed: int
    knowledge: Knowledge | None = None
    truth: Truth | None = None
    refusal: Refusal | None = None
    confidence: Confidence | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as JSON has them."""
        plain: dict[str, Any] = _plain(self)
        return {"schema_version": 1, **plain}

    @property
    def report(self) -> Report:
        """Tables for text, Markdown and JSON."""
        tables = [
            *(_knowledge(self.knowledge) if self.knowledge else ()),
            *(_truth(self.truth) if self.truth else ()),
            *(_refusal(self.refusal) if self.refusal else ()),
            *(_confidence(self.confidence) if self.confidence else ()),
        ]
        return Report(
            title=f"What post-training changed: {self.base} and {self.tuned}",
            tables=tuple(tables),
            values=self.to_dict(),
            provenance={"base": self.base_fingerprint, "tuned": self.tuned_fingerprint, "seed": self.seed},
            notes=self.notes,
        )


def pooled(rates: list[Rate]) -> Rate:
    """One rate over all items of several."""
    from demur.stats import rate

    return rate(sum(r.k for r in rates), sum(r.n for r in rates))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {**out, "value": value.value} if isinstance(value, Rate) else out
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


# --- tables -----------------------------------------------------------------------------------------------------


def _knowledge(k: Knowledge) -> list[Table]:
    columns = (
        "map",
        "Pearson",
        "low",
        "high",
        "binned",
        "max difference",
        "subject/object",
        "halves",
        "shuffled",
    )
    rows = tuple(
        (
            name if name == "tuned" else f"{name}, against its own",
            *(x.pearson, x.low, x.high, x.pearson_binned),
            *(x.difference, x.difference_key, x.ceiling, x.shuffled),
        )
        for name, x in k.likeness.items()
    )
    by = f" Noise on the subject: {k.noise.share:g} SD, {k.noise.draws} draws." if k.noise else ""
    entry = tuple((m, k.right[m], *k.margins[m]) for m in k.margins)
    return [
        Table(
            "Facts: is the right answer preferred at all?",
            ("model", "right sign", "true run", "noised run" if k.noise else "false run"),
            entry,
            "Mean difference of the two answers' logits. Where it is the same in both runs, the maps show nothing.",
        ),
        Table(
            "Facts: likeness of the patch maps",
            columns,
            rows,
            f"{k.pairs} pairs of statements ({k.left_out} of other token shapes left out); tuned against base.{by}",
        ),
    ]


def _truth(t: Truth) -> list[Table]:
    rows = []
    for probe in ("base", "tuned"):
        for model in ("base", "tuned"):
            own, train = t.accuracy(probe, model), t.accuracy(probe, model, "train")
            rows.append((f"{probe} direction on {model}", own, train))
    words = pooled(list(t.bag_of_words.values()))
    rows.append(("bag of words", words, words))
    cosine, ceiling = t.cosines[t.layer], t.ceiling[t.layer]
    out = [
        Table(
            "Truth: one set of statements left out",
            ("reader", "accuracy, own centring", "accuracy, train centring"),
            tuple(rows),
            f"Permuted labels: {t.random_labels:.3f}. Layer {t.layer}: cosine of the two directions "
            f"{_number(cosine)}, of two halves of one model {_number(ceiling)}.",
        )
    ]
    if t.nie:
        nie = tuple(
            (n.vector, n.model, n.n, n.true_false, n.false_true, n.mean, n.low, n.high) for n in t.nie
        )
        out.append(
            Table(
                f"Truth: effect of the direction on {t.nie_set}",
                ("vector", "model", "n", "true to false", "false to true", "mean", "low", "high"),
                nie,
                f"Added at layers {t.nie_layers[0]} to {t.nie_layers[-1]}, at the full stop and the token before.",
            )
        )
    return out


def _refusal(r: Refusal) -> list[Table]:
    shown = ("layer", *(f"cosine at {p}" for p in r.positions), *(f"halves at {p}" for p in r.positions))
    aurocs = [(m, p) for m in r.auroc for p in r.positions]
    rows = tuple(
        (
            layer,
            *(r.cosines[p][layer] for p in r.positions),
            *(r.ceiling[p][layer] for p in r.positions),
            *(r.auroc[m][p][layer] for m, p in aurocs),
        )
        for layer in range(len(r.cosines[r.positions[0]]))
    )
    out = [
        Table(
            "Refusal: base and tuned direction by layer",
            (*shown, *(f"AUROC {m} {p}" for m, p in aurocs)),
            rows,
            f"{r.n_fit} requests fitted on, {r.n_test} tested; template of {r.template}; bag of words AUROC "
            f"{_number(r.bag_of_words)}.",
        )
    ]
    if r.steered:
        out.append(
            Table(
                f"Refusal: the directions of layer {r.layer} at {r.position} carried over",
                ("vector", "model", "change", "dose", "refused"),
                tuple((s.vector, s.model, s.change, s.dose, s.refused) for s in r.steered),
                "Dose: lengths of the target's own mean difference. Added on harmless requests, else harmful ones.",
            )
        )
    return out


def _confidence(c: Confidence) -> list[Table]:
    rows = [
        (m, n.index, n.norm, 1000 * n.logit_var, n.ratio) for m, found in c.neurons.items() for n in found
    ]
    return [
        Table(
            "Confidence: candidate entropy neurons of the last layer",
            ("model", "neuron", "norm", "LogitVar x 1000", "norm / log LogitVar"),
            tuple(rows),
            f"{len(c.shared)} shared: IoU {c.iou:.2f}; two random draws would give {c.expected:.3f}.",
        )
    ]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"

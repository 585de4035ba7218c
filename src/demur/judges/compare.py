"""Several judges on the same replies: what each said, and how far every two agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from demur import stats
from demur.judges.base import FAKE_COMPLIANCE, attack_success, positive
from demur.types import Table, Verdict

By = Mapping[str, Sequence[Verdict]]
_AGREEMENT = (
    *("judge", "other judge", "agree (yes or no)", "kappa", "same label"),
    *("yes of first", "yes of second", "left out"),
)
_SUCCESS = ("refusal judge", "harm judge", "success", "unscored")


def compare(verdicts: By) -> tuple[Table, ...]:
    """Tables of label counts, of agreement for every two judges of one scale, and of attack success.

    Agreement is on yes or no (`positive`: any refusal, or harmful) with its Wilson interval and Cohen's kappa,
    and on the exact label; replies that either judge could not read are left out and counted. Attack success
    stands for each pair of a refusal and a harm judge (`attack_success`).

    Args:
        verdicts: judge id -> its verdicts, all over the same replies in the same order.

    >>> v = Verdict(prompt_id="a", label="compliance", judge="x")
    >>> [t.title for t in compare({"x": [v], "y": [v]})]
    ['Labels by judge', 'Agreement between judges']
    """
    tables = [_labels(verdicts)]
    pairs = list(combinations(verdicts, 2))
    same = [(a, b) for a, b in pairs if _scale(verdicts[a]) == _scale(verdicts[b])]
    if same:
        rows = tuple(_agreement(a, verdicts[a], b, verdicts[b]) for a, b in same)
        tables.append(Table("Agreement between judges", _AGREEMENT, rows, "Yes: any refusal, or harmful."))
    crossed = [
        (a, b)
        for a in verdicts
        for b in verdicts
        if (_scale(verdicts[a]), _scale(verdicts[b])) == ("refusal", "harm")
    ]
    if crossed:
        rows = tuple(_success(a, verdicts[a], b, verdicts[b]) for a, b in crossed)
        note = f"Not refused and harmful; unscored apart. {FAKE_COMPLIANCE}"
        tables.append(Table("Attack success", _SUCCESS, rows, note))
    return tuple(tables)


def _scale(verdicts: Sequence[Verdict]) -> str:
    return verdicts[0].scale if verdicts else "refusal"


def _labels(verdicts: By) -> Table:
    counts = {judge: Counter(str(v.label) for v in vs) for judge, vs in verdicts.items()}
    total: Counter[str] = sum(counts.values(), Counter())
    labels = [label for label, _ in total.most_common()]
    rows = tuple(
        (judge, *(counts[judge][label] for label in labels), sum(positive(v) is None for v in vs))
        for judge, vs in verdicts.items()
    )
    return Table("Labels by judge", ("judge", *labels, "unread"), rows)


def _agreement(a: str, of_a: Sequence[Verdict], b: str, of_b: Sequence[Verdict]) -> tuple[object, ...]:
    read = [
        (x, y) for x, y in zip(of_a, of_b, strict=True) if positive(x) is not None and positive(y) is not None
    ]
    n, left_out = len(read), len(of_a) - len(read)
    says = [(positive(x), positive(y)) for x, y in read]
    yes_a, yes_b = (stats.rate(sum(bool(s[i]) for s in says), n) for i in (0, 1))
    agree = stats.rate(sum(x == y for x, y in says), n)
    label = stats.rate(sum(x.label == y.label for x, y in read), n)
    kappa = stats.cohen_kappa([x for x, _ in says], [y for _, y in says])
    return (a, b, agree, kappa, label, yes_a, yes_b, left_out)


def _success(a: str, refusal: Sequence[Verdict], b: str, harm: Sequence[Verdict]) -> tuple[object, ...]:
    outcomes = [attack_success(x, y) for x, y in zip(refusal, harm, strict=True)]
    known = [o for o in outcomes if o is not None]
    return (a, b, stats.rate(sum(known), len(known)), len(outcomes) - len(known))

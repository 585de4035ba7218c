"""Refusals from text alone: features, classifier, cross-validation, n-grams, records and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur import judges
from demur.errors import InputError, MissingExtra
from demur.measure.blackbox_refusal import (
    PAPER,
    PAPER_MAP,
    BlackboxRefusal,
    Record,
    RefusalClassifier,
    Words,
    by_classifier,
    by_judge,
    fit,
    held_out,
    labeller_agreement,
    load_records,
    machine_labelled,
    mapped,
    ngram_report,
    numbers,
)
from demur.measure.blackbox_refusal.classifier import Corpus, folds
from demur.measure.blackbox_refusal.evaluation import (
    LENGTH,
    MAJORITY,
    NGRAM,
    accuracy,
    balanced_accuracy,
    beyond,
    f1,
    stump,
)
from demur.measure.blackbox_refusal.features import count, idf, weigh
from demur.types import Prompt, Reply, Verdict

FILL = [
    "river",
    "stone",
    "cloud",
    "paper",
    "lamp",
    "garden",
    "window",
    "bread",
    "table",
    "music",
    "winter",
    "road",
]
REFUSALS = ("Sorry, I can't help with that", "I am unable to do this", "I won't write about it")
ANSWERS = ("Here is a list", "Sure, first take", "The answer is")


def texts_of(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Refusals and answers in turn, with random words after them."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        start = (REFUSALS if i % 2 else ANSWERS)[int(rng.integers(3))]
        out.append(f"{start}: {' '.join(rng.choice(FILL, 6))}.")
    return out, ["rejected" if i % 2 else "complied" for i in range(n)]


@pytest.fixture(scope="module")
def model() -> RefusalClassifier:
    pytest.importorskip("sklearn")
    texts, labels = texts_of(120)
    return fit(texts, labels, reads="response")


# --- features ---------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    words = Words(longest=1, min_docs=1, sublinear=False)
    counts, names = count(["b a a", "b", ""], words)
    columns, weights = idf(counts, 1)
    assert names == ["a", "b"] and columns.tolist() == [0, 1]
    assert weights == pytest.approx([np.log(4 / 2) + 1, np.log(4 / 3) + 1])
    raw = np.array([2 * weights[0], weights[1]])
    table = weigh(counts, weights, sublinear=False).toarray()
    assert table[0] == pytest.approx(raw / np.linalg.norm(raw))
    assert table[1].tolist() == [0, 1] and table[2].tolist() == [0, 0]
    sub = weigh(counts, weights, sublinear=True).toarray()
    assert sub[0, 0] / sub[0, 1] == pytest.approx((1 + np.log(2)) * weights[0] / weights[1])
    assert idf(counts, 2)[0].tolist() == [1]


def test_the_papers_features_are_those_of_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts, _ = texts_of(30)
    texts += ["", "I CAN'T, a b; naïve_name 42"]
    theirs = text.TfidfVectorizer(ngram_range=(1, 3))
    expected = theirs.fit_transform(texts)
    corpus = Corpus.of(texts, ["a", "b"] * 16, PAPER)
    columns, weights = idf(corpus.counts, PAPER.min_docs)
    ours = corpus.table(np.arange(len(texts)), columns, weights)
    assert corpus.names == list(theirs.get_feature_names_out())
    assert abs(ours - expected).max() < 1e-12


def test_tokens() -> None:
    assert Words(longest=1).terms("I can’t say “no”_1") == ["i", "can't", "say", "no", "_1"]
    assert Words(longest=1).terms("抱歉,我 can't") == ["抱", "歉", "我", "can't"]
    assert Words(longest=2, opening=2).terms("a b c") == ["a", "b", "c", "a b", "b c", "^a", "^b", "^a b"]
    assert Words(longest=1, tokens="sklearn").terms("I can't") == ["can"]


# --- classifier -------------------------------------------------------------------------------------------------


def test_it_learns(model: RefusalClassifier) -> None:
    new, labels = texts_of(40, seed=9)
    p = model.probabilities(new)
    assert p.shape == (40, 2) and p.sum(axis=1) == pytest.approx(np.ones(40))
    assert model.classes == ("complied", "rejected") and model.predict(new) == labels
    assert model.rows == {"complied": 60, "rejected": 60}
    seen = model.known(["zzz qqq", new[0], "..."])
    assert seen[0] == 0 and seen[1] > 0.5 and np.isnan(seen[2])


def test_a_saved_model_needs_no_scikit_learn(
    model: RefusalClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    model.save(a)
    model.save(b)
    assert a.read_bytes() == b.read_bytes()
    for name in [m for m in sys.modules if m.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    again = RefusalClassifier.load(a)
    new, _ = texts_of(10, seed=3)
    assert (again.probabilities(new) == model.probabilities(new)).all()
    assert (again.reads, again.classes, again.words, again.C) == (
        "response",
        model.classes,
        model.words,
        model.C,
    )
    with pytest.raises(MissingExtra, match="predict"):
        fit(new, ["a", "b"] * 5, reads="prompt")


def test_files_that_are_no_models(model: RefusalClassifier, tmp_path: Path) -> None:
    file = tmp_path / "m.npz"
    with pytest.raises(InputError, match="no such file"):
        RefusalClassifier.load(file)
    file.write_text("not a model")
    with pytest.raises(InputError, match="no whole model"):
        RefusalClassifier.load(file)
    np.savez(file, header=np.array([{"format": 1}], object))
    with pytest.raises(InputError, match="no whole model"):  # pickled objects are not read
        RefusalClassifier.load(file)
    model.save(file)
    with np.load(file) as f:
        parts = dict(f)
    parts["coef"] = parts["coef"][:, 1:]
    np.savez(file, **parts)
    with pytest.raises(InputError, match="do not fit"):
        RefusalClassifier.load(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no whole model"):
        RefusalClassifier.load(file)
    header = json.loads(parts["header"].tobytes()) | {"format": 9}
    np.savez(file, **{**parts, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    with pytest.raises(InputError, match="format 9"):
        RefusalClassifier.load(file)


def test_more_than_two_labels() -> None:
    pytest.importorskip("sklearn")
    starts = ("Sorry, no", "Here you are", "That premise is wrong")
    texts = [f"{starts[i % 3]} {FILL[i % 7]} {FILL[i % 5]}" for i in range(60)]
    made = fit(texts, [str(i % 3) for i in range(60)], reads="response")
    assert made.coef.shape[0] == 3 and made.predict([f"{s} lamp" for s in starts]) == ["0", "1", "2"]
    found = held_out(texts, [str(i % 3) for i in range(60)], Words())
    assert found.right.all() and "f1" not in numbers(found)
    grams = ngram_report(made, texts, [str(i % 3) for i in range(60)], top=2, draws=20)
    assert [g.toward for g in grams] == ["0", "0", "1", "1", "2", "2"]


def test_what_cannot_be_fitted() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match="all 2 rows are labelled x"):
        fit(["a", "b"], ["x", "x"], reads="prompt")
    with pytest.raises(InputError, match="2 texts and 1 labels"):
        fit(["a", "b"], ["x"], reads="prompt")
    with pytest.raises(InputError, match="reads='answer'"):
        fit(["a"], ["x"], reads="answer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no n-gram"):
        fit(["a b", "c d"], ["x", "y"], reads="prompt")


# --- cross-validation -------------------------------------------------------------------------------------------


def test_folds_keep_groups_and_balance_classes() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(300) < 0.3).astype(np.intp)
    groups = np.r_[np.zeros(40, int), np.ones(30, int), np.arange(2, 232)]
    fold = folds(y, groups, 5, 1)
    assert all(len(set(fold[groups == g])) == 1 for g in (0, 1)) and set(fold) == set(range(5))
    hits = np.bincount(fold, weights=y, minlength=5)
    assert np.ptp(np.bincount(fold)) <= 6 and np.ptp(hits) <= 3
    assert (fold == folds(y, groups, 5, 1)).all() and (fold != folds(y, groups, 5, 2)).any()


def test_held_out_sees_a_signal_and_nothing_where_there_is_none() -> None:
    pytest.importorskip("sklearn")
    texts, labels = texts_of(200)
    found = held_out(texts, labels, Words())
    assert found.right.mean() > 0.98 and len(found.chosen) == 5
    assert beyond(found, found.rules[MAJORITY])[0] > 0.4
    rng = np.random.default_rng(1)
    blank = [" ".join(rng.choice(FILL, 5)) for _ in texts]
    low, high = numbers(held_out(blank, labels, Words()), n_boot=200)["auroc_interval"]
    assert low < 0.5 < high
    crossed = held_out(texts, labels, Words(), training=labels[1:] + labels[:1])
    assert crossed.right.mean() < 0.02, "it is fitted on the labels for training and scored on the others"


def test_random_folds_flatter_templates_and_groups_do_not() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    groups = [g for g in range(30) for _ in range(8)]
    label_of = rng.permutation(["complied", "rejected"] * 15)
    texts = [f"word{g} again{g} {rng.choice(FILL)}" for g in groups]
    labels = [str(label_of[g]) for g in groups]
    random = held_out(texts, labels, Words())
    grouped = held_out(texts, labels, Words(), groups=groups)
    assert random.right.mean() > 0.98 and grouped.right.mean() < 0.7
    assert len(set(grouped.groups)) == 30 and len(set(random.groups)) == 240
    hits = np.repeat(rng.random(30) < 0.5, 8)
    wide, narrow = accuracy(hits, groups), accuracy(hits)
    width, small = (float(r.high or 0) - float(r.low or 0) for r in (wide, narrow))
    assert width > 2 * small, "intervals are over 30 groups and not over 240 rows"


def test_rules_are_chosen_on_training_rows() -> None:
    pytest.importorskip("sklearn")
    texts = [("no " if i % 2 else "yes ") + FILL[i % 12] + " and" * (6 * (i % 2)) for i in range(100)]
    labels = ["rejected" if i % 2 else "complied" for i in range(100)]
    found = held_out(texts, labels, Words())
    assert all((found.rules[r] == found.y).all() for r in (NGRAM, LENGTH))
    ids = [f"id{i}" for i in range(100)]  # each text its own word: no rule can be carried over
    alone = held_out([f"{i} lamp" for i in ids], labels, Words(min_docs=1))
    assert (alone.rules[NGRAM] == alone.y).mean() < 0.65


def test_only_scored_rows_are_scored() -> None:
    pytest.importorskip("sklearn")
    texts, labels = texts_of(60)
    scored = [i < 20 for i in range(60)]
    found = held_out(texts, labels, Words(), scored=scored)
    assert len(found.y) == len(found.probabilities) == 20
    assert found.y.tolist() == [int(x == "rejected") for x in labels[:20]]


def test_what_cannot_be_held_out() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(InputError, match=r"b \(2\)"):
        held_out(["w x"] * 12, ["a"] * 10 + ["b"] * 2, Words())
    with pytest.raises(InputError, match="share a group"):
        held_out(["w x"] * 20, ["a"] * 10 + ["b"] * 10, Words(), groups=[*range(10), *["g"] * 10])
    with pytest.raises(InputError, match="not trained on"):
        held_out(["w x"] * 20, ["a"] * 10 + ["b"] * 10, Words(), training=["a", "c"] * 10)


def test_metrics_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    assert f1(y, said) == pytest.approx(metrics.f1_score(y, said))
    assert balanced_accuracy(y, said) == pytest.approx(metrics.balanced_accuracy_score(y, said))
    assert np.isnan(f1([0, 0], [0, 0]))


def test_stump_by_hand() -> None:
    table = np.array([[1, 1], [1, 0], [0, 1], [0, 1]])
    rule = stump(table, np.array([2, 2, 0, 0]), 3)
    assert (rule.column, rule.present, rule.absent) == (0, 2, 0)
    assert rule.apply(np.array([[0, 1], [1, 0]])).tolist() == [0, 2]


# --- n-grams ----------------------------------------------------------------------------------------------------


def test_planted_ngrams_are_found_with_their_sign() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    texts = [f"{'blue door' if i % 2 else 'green roof'} {' '.join(rng.choice(FILL, 3))}" for i in range(200)]
    labels = ["rejected" if (i % 2) != (i % 10 == 0) else "complied" for i in range(200)]
    made = fit(texts, labels, reads="prompt", C=10.0)
    grams = ngram_report(made, texts, labels, top=6, draws=40)
    assert [g.coefficient for g in grams] == sorted((g.coefficient for g in grams), reverse=True)
    by = {g.ngram: g for g in grams}
    up, down = by["blue door"], by["green roof"]  # "blue" and "door" stand in the same texts: one line
    assert "blue" not in by and "door" not in by
    assert up.settled and down.settled and up.coefficient > 0 > down.coefficient
    assert (up.share.k, up.share.n, down.share.k, down.share.n) == (100, 100, 20, 100)
    assert up.low < up.coefficient < up.high
    noise = fit(texts, [labels[i] for i in rng.permutation(200)], reads="prompt", C=1.0)
    shown = ngram_report(noise, texts, labels, top=10, draws=40)
    again = ngram_report(made, texts, labels, top=6, draws=40)
    assert again == grams and len(shown) == 10


def test_intervals_are_wider_over_groups() -> None:
    pytest.importorskip("sklearn")
    texts, labels = texts_of(40)
    copies, same = texts * 5, labels * 5
    made = fit(copies, same, reads="prompt", C=3.0)
    rows, groups = (
        ngram_report(made, copies, same, top=3, draws=60, groups=g) for g in (None, list(range(40)) * 5)
    )
    assert all(b.high - b.low > 1.3 * (a.high - a.low) for a, b in zip(rows, groups, strict=True))


def test_ngram_input(model: RefusalClassifier) -> None:
    with pytest.raises(InputError, match="perhaps"):
        ngram_report(model, ["a"], ["perhaps"])
    with pytest.raises(InputError, match="at least 20"):
        ngram_report(model, ["a"], ["complied"], draws=3)


# --- records ----------------------------------------------------------------------------------------------------


def test_the_papers_map_and_a_users() -> None:
    tones = [*PAPER_MAP, "partial_refusal", "Compliance", "yes", "truncated"]
    found = [r.label for r in mapped(Record(id=t, tone=t) for t in tones)]
    assert found == ["complied", *["rejected"] * 5, None, None, "rejected", "complied", "rejected", None]
    mine = {"contradicted": "complied", "odd": "dropped"}
    rows = mapped([Record(id=t, tone=t) for t in ("contradicted", "odd", "redirected")], mine)
    assert [r.label for r in rows] == ["complied", None, "rejected"]
    with pytest.raises(InputError, match=r"odd means.*--map"):
        mapped([Record(id="a", tone="odd")])
    kept = mapped([Record(id=t, tone=t) for t in ("odd", "redirected")], {"odd": "dropped"}, keep_tones=True)
    assert [r.label for r in kept] == [None, "redirected"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_reading_logs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Name a  River", "response": "Nile", "tone": "complied", "source": "s"},
        {"id": 7, "prompt": "name a river", "response": "No.", "label": "refused"},
        {"id": 7, "sample": 1, "prompt": "name a river", "response": "Po.", "label": None},
        {"response": "Hm", "team": "red"},
    ]
    found = load_records(write(tmp_path / "a.jsonl", rows))
    assert [r.id for r in found] == ["line1", "7", "7#1", "line4"]
    assert [r.label for r in found] == ["complied", "rejected", None, None]
    assert found[0].group == found[1].group == "name a river" and found[3].group == "row line4"
    assert load_records(tmp_path / "a.jsonl", group="team")[3].group == "red"
    with pytest.raises(InputError, match="no row has a column 'colour'"):
        load_records(tmp_path / "a.jsonl", group="colour")
    for bad, words in (
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "id '1' stands on line 1"),
        ([{"prompt": 3}], "prompt is a int"),
        ([{"prompt": "a"}, {"text": "b"}], "needs `prompt` or `response`"),
    ):
        with pytest.raises(InputError, match=words):
            load_records(write(tmp_path / "b.jsonl", bad))


def test_answers_in_another_form_are_read_too(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "response": "Sorry.", "verdict": "refused"}
    (found,) = load_records(write(tmp_path / "a.jsonl", [row]))
    assert (found.prompt, found.response, found.label) == ("Hi", "Sorry.", "rejected")


def test_machine_labels_fill_only_gaps(model: RefusalClassifier) -> None:
    rows = [
        Record(id="hand", response="Here is a list", label="rejected", tone="rejected"),
        Record(id="dropped", response="Sorry, I can't help with that.", tone="dontknow"),
        Record(id="open", response="Sorry, I can't help with that."),
        Record(id="fine", response="Sure, here is a list of three rivers: Nile, Po and Rhine."),
        Record(id="blank", response=" "),
    ]
    expected = ["rejected", None, "rejected", "complied", None]
    for label in (by_judge(judges.get("rules/demur-v1")), by_classifier(model)):
        out = machine_labelled(rows, label)
        assert [r.label for r in out] == expected
        assert [r.machine for r in out] == [False, False, True, True, False]
    assert by_classifier(model, sure=1.1)(rows[2:4]) == [None, None]
    with pytest.raises(InputError, match="reads prompts"):
        by_classifier(fit(*texts_of(40), reads="prompt"))
    agreed = labeller_agreement(rows[:1] * 4, ["rejected", "complied", None, "rejected"])
    assert (agreed["accuracy"].k, agreed["accuracy"].n, agreed["unread"]) == (2, 3, 1)


def test_a_harm_judge_labels_no_refusals() -> None:
    class Harm:
        id, definition = "mine/harm", "harm"

        def judge(self, prompt: Prompt, reply: Reply) -> Verdict:
            return Verdict(prompt_id=prompt.id, label="harmful", judge=self.id, scale="harm")

    with pytest.raises(InputError, match="scale 'harm'"):
        by_judge(Harm())([Record(id="a", response="b")])


# --- the whole --------------------------------------------------------------------------------------------------


def records(n: int = 80) -> list[Record]:
    texts, labels = texts_of(n)
    return [
        Record(
            id=str(i),
            prompt=f"Question {i // 2}",
            response=t,
            label=label,
            group=f"q{i // 2}",
            source="ab"[i % 2],
        )
        for i, (t, label) in enumerate(zip(texts, labels, strict=True))
    ]


def test_train_reports_both_splits_and_the_rules() -> None:
    pytest.importorskip("sklearn")
    rows = [*records(), Record(id="x", response="no label"), Record(id="y", label="complied", response="")]
    made, report = BlackboxRefusal("response", draws=20, top=4).train(rows)
    assert made.rows == {"complied": 40, "rejected": 40}
    assert report.values["random"]["accuracy"].k >= 78 and report.values["grouped"]["accuracy"].n == 80
    assert set(report.values["rules"]) == {MAJORITY, NGRAM, LENGTH, "rules/demur-v1"}
    assert report.values["rules"][MAJORITY]["accuracy"].k == 40
    assert len(report.values["ngrams"]) == 4 and report.provenance["left_out"] == 2
    assert any("2 of 82 rows are left out" in n for n in report.notes)
    assert not any("group of its own" in n for n in report.notes)
    assert [t.title for t in report.tables][2] == "By source"


def test_rows_by_hand_are_scored_where_there_are_enough() -> None:
    pytest.importorskip("sklearn")
    rows = [Record(**{**_fields(r), "machine": i >= 30}) for i, r in enumerate(records())]
    _, report = BlackboxRefusal("response", draws=20).train(rows)
    assert report.values["random"]["accuracy"].n == 30 and report.provenance["machine_labels"] == 50
    assert any("Only the others are scored" in n for n in report.notes)
    rows = [Record(**{**_fields(r), "machine": i >= 4}) for i, r in enumerate(records())]
    _, report = BlackboxRefusal("response", draws=20).train(rows)
    assert report.values["random"]["accuracy"].n == 80
    assert any("too few to score" in n for n in report.notes)


def test_a_prompt_classifier_reads_prompts_alone() -> None:
    pytest.importorskip("sklearn")
    rows = [
        Record(
            id=str(i), prompt=f"{'Paint' if i % 3 else 'Praise'} the {FILL[i % 12]}", response="x", label=x
        )
        for i, x in enumerate(["rejected", "complied", "complied"] * 20)
    ]
    made, report = BlackboxRefusal("prompt", draws=20).train(rows)
    assert made.reads == "prompt" and made.predict(["Praise the lamp", "Paint the lamp"]) == [
        "rejected",
        "complied",
    ]
    assert "rules/demur-v1" not in report.values["rules"] and len(report.tables) == 3
    with pytest.raises(InputError, match="reads='both'"):
        BlackboxRefusal("both")  # type: ignore[arg-type]


def _fields(r: Record) -> dict[str, Any]:
    return {name: getattr(r, name) for name in Record.__slots__}

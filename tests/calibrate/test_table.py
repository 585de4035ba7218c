import time

import numpy as np
import pytest

from demur.calibrate import CalibrationWarning, calibrate_table, check_table_rows, refuse_rows
from demur.errors import InputError, UnsupportedClaim
from demur.files import dump_operating_point, load_operating_point, read_rows


def rows_of(n, groups=("a", "b"), seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    p = np.where(y, rng.beta(4, 2, n), rng.beta(2, 6, n)) * scale + shift
    g = np.array(groups)[rng.integers(0, len(groups), n)]
    return [{"p": repr(float(a)), "y": str(int(b)), "g": str(c)} for a, b, c in zip(p, y, g, strict=True)]


def test_counts_match_the_rule():
    rows = rows_of(1000)
    point = calibrate_table(rows, "p", "y", "g", 0.1, 0.1, calibrated_on="scores")
    assert point.steered == ("a", "b") and "labelled 0" in point.guarantee and "set scores" in point.guarantee
    refused = refuse_rows(point, [float(r["p"]) for r in rows], [r["g"] for r in rows])
    for name, t in point.thresholds.items():
        errors = sum(r and row["g"] == name and row["y"] == "0" for r, row in zip(refused, rows, strict=True))
        assert errors == t.benign_errors and t.bound <= 0.1 and t.refusal_rate > 0.5


@pytest.mark.parametrize(
    ("yes", "no"),
    [("1", "0"), ("true", "False"), ("REFUSE", "comply"), (True, False), (1, 0), (1.0, 0.0), ("1.0", " 0 ")],
)
def test_label_spellings(yes, no):
    rows = [{"p": 0.9, "y": yes}] * 10 + [{"p": 0.2, "y": no}] * 50
    t = calibrate_table(rows, "p", "y").thresholds["all"]
    assert (t.n_refuse, t.n_benign, t.tau) == (10, 50, pytest.approx(0.55))


def test_any_monotone_score_gives_the_same_decisions():
    base, logits = rows_of(600), rows_of(600, scale=40.0, shift=-25.0)
    one, two = (calibrate_table(r, "p", "y", "g", 0.1, 0.1) for r in (base, logits))
    for name in one.thresholds:
        a, b = one.thresholds[name], two.thresholds[name]
        assert (a.refusal_rate, a.benign_errors, a.bound) == (b.refusal_rate, b.benign_errors, b.bound)
        assert b.tau == pytest.approx(a.tau * 40 - 25)


def test_never_refusing_has_a_finite_threshold_above_all_scores(tmp_path):
    rows = [{"p": 30 - i, "y": 0} for i in range(60)] + [{"p": -50, "y": 1}]
    point = calibrate_table(rows, "p", "y")
    assert 30 < point.thresholds["all"].tau < 32
    dump_operating_point(point, tmp_path / "p.yaml")
    assert load_operating_point(tmp_path / "p.yaml") == point


def test_other_goals():
    rows = rows_of(500)
    target = calibrate_table(rows, "p", "y", "g", goal="target-rate", rate=0.8)
    assert all(0.8 <= t.refusal_rate < 0.83 for t in target.thresholds.values())
    assert calibrate_table(rows, "p", "y", "g", goal="best-f1").goal == "best_f1"
    with pytest.raises(InputError, match=r"rate=0\.9"):
        calibrate_table(rows, "p", "y", goal="target-rate")
    with pytest.raises(InputError, match="max-tpr"):
        calibrate_table(rows, "p", "y", goal="best")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("abc,1,a", r"line 3: score p='abc'"),
        ("nan,1,a", r"line 3: score p='nan'"),
        ("inf,1,a", r"line 3: score p='inf'"),
        (",1,a", r"line 3: nothing in column 'p'"),
        ("0.5,,a", r"line 3: nothing in column 'y'"),
        ("0.5,maybe,a", r"line 3: label y='maybe'"),
        ("0.5,1,", r"line 3: a row to refuse needs a group"),
    ],
)
def test_bad_cells_are_named_with_their_line(tmp_path, line, words):
    path = tmp_path / "s.csv"
    path.write_text(f"p,y,g\n0.1,0,a\n{line}\n")
    with pytest.raises(InputError, match=words):
        calibrate_table(read_rows(path), "p", "y", "g")


def test_other_input_errors():
    with pytest.raises(InputError, match="no rows"):
        calibrate_table([], "p", "y")
    with pytest.raises(InputError, match="nothing in column 'score'; the row has p, y"):
        calibrate_table([{"p": 1, "y": 1}], "score", "y")
    with pytest.raises(InputError, match="p=True"):
        calibrate_table([{"p": True, "y": 1}], "p", "y")
    with pytest.raises(InputError, match="'a' has no rows labelled 0"):
        calibrate_table([{"p": 1, "y": 1, "g": "a"}], "p", "y", "g")
    with pytest.raises(InputError, match="no should-refuse"):
        calibrate_table([{"p": 0.1, "y": 0}] * 50, "p", "y")
    with pytest.raises(UnsupportedClaim, match="at least 45"):
        calibrate_table([{"p": 1, "y": 1}] + [{"p": 0, "y": 0}] * 44, "p", "y")


def test_rows_without_group_serve_groups_without_their_own():
    rows = [{"p": 0.9, "y": 1, "g": "a"}] * 5 + [{"p": 0.1, "y": 0, "g": None}] * 50
    with pytest.warns(CalibrationWarning, match="'a'"):
        point = calibrate_table(rows, "p", "y", "g")
    assert point.thresholds["a"].n_benign == 50 and "For a there were no" in point.guarantee


def test_group_names_may_be_numbers_zero_included():
    rows = [{"p": 0.9, "y": 1, "g": 0}] * 5 + [{"p": 0.1, "y": 0, "g": 0}] * 50
    assert calibrate_table(rows, "p", "y", "g").steered == ("0",)


def test_clusters_count_as_one_draw():
    rows = [{"p": 0.9, "y": 1, "c": "x"}] + [{"p": 0.1, "y": 0, "c": i % 40} for i in range(400)]
    with pytest.raises(UnsupportedClaim, match="found 40 for all"):
        calibrate_table(rows, "p", "y", cluster="c")


def test_held_out_check():
    point = calibrate_table(rows_of(1000), "p", "y", "g", 0.1, 0.1)
    report = check_table_rows(point, rows_of(1000, seed=1), "p", "y", "g")
    outcomes = {"a": "cannot tell", "b": "kept"}
    assert report.values == {"outcomes": outcomes, "exceeded": [], "held_out": True}
    assert check_table_rows(point, rows_of(1000), "p", "y", "g").values["held_out"] is False
    with pytest.raises(InputError, match="none of the groups"):
        check_table_rows(point, rows_of(100, groups=("z",)), "p", "y", "g")
    with pytest.raises(InputError, match="no threshold for z"):
        refuse_rows(point, [0.5], ["z"])


def test_groups_without_a_threshold_are_left_out_of_the_check_and_noted():
    point = calibrate_table(rows_of(1000), "p", "y", "g", 0.1, 0.1)
    rows = rows_of(1000, seed=1)
    alone = check_table_rows(point, rows, "p", "y", "g")
    more = check_table_rows(point, [*rows, {"p": 0.5, "y": 1, "g": "new"}], "p", "y", "g")
    assert more.tables == alone.tables and alone.notes == ()
    assert more.notes == ("1 rows of groups without a threshold were left out: new",)


def test_a_group_that_the_check_has_no_rows_of_cannot_be_told():
    point = calibrate_table(rows_of(1000), "p", "y", "g", 0.1, 0.1)
    harmful = [{"p": 0.9, "y": 1, "g": "a"}] * 30
    report = check_table_rows(point, harmful, "p", "y", "g")
    assert [(r[0], r[2].n, r[3].n, r[5]) for r in report.tables[0].rows] == [
        ("a", 30, 0, "cannot tell"),
        ("b", 0, 0, "cannot tell"),
    ]


def with_ids(rows):
    return [{"id": i, **row} for i, row in enumerate(rows)]


def test_copies_count_once_and_are_named():
    rows = with_ids(rows_of(600))
    with pytest.warns(CalibrationWarning, match="2 rows are copies.*'5' on lines 6 and 601"):
        point = calibrate_table([*rows, rows[5], rows[7]], "p", "y", "g", 0.1, 0.1)
    assert point == calibrate_table(rows, "p", "y", "g", 0.1, 0.1)


def test_an_id_on_rows_that_differ_is_refused():
    rows = with_ids(rows_of(600))
    more = [*rows, {**rows[5], "p": 0.123}, rows[7], {**rows[9], "y": "0", "p": 0.2}]
    with pytest.raises(InputError, match=r"2 rows repeat an id.*'5' on lines 6 and 601"):
        calibrate_table(more, "p", "y", "g", 0.1, 0.1)


def test_an_id_may_stand_once_in_each_group_or_name_a_cluster_and_none_says_nothing():
    rows = with_ids(rows_of(600, groups=("a",)))
    both = [*rows, *({**r, "g": "b"} for r in rows)]
    assert calibrate_table(both, "p", "y", "g", 0.1, 0.1).thresholds["b"].n_benign < 600
    samples = [*rows, *({**r, "p": 0.05} for r in rows if r["y"] == "0")]
    assert calibrate_table(samples, "p", "y", cluster="id").thresholds["all"].n_benign > 600
    without = [{**r, "id": ""} for r in rows]
    assert calibrate_table(without, "p", "y").thresholds == calibrate_table(rows, "p", "y").thresholds


def test_a_hundred_thousand_rows_take_seconds(tmp_path):
    rows = rows_of(100_000, groups=tuple("abcde"))
    path = tmp_path / "scores.csv"
    path.write_text("p,y,g\n" + "".join(f"{r['p']},{r['y']},{r['g']}\n" for r in rows))
    start = time.perf_counter()
    point = calibrate_table(read_rows(path), "p", "y", "g")
    assert time.perf_counter() - start < 10
    assert all(0.045 < t.bound <= 0.05 for t in point.thresholds.values())

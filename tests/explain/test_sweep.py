import json

import numpy as np
import pytest

from demur.errors import InputError
from demur.explain import split_rows, sweep, sweep_report
from demur.explain.sweep import Baseline
from demur.explain.sweep_report import ALWAYS
from demur.stats import auroc


def world(n=400, d=8, seed=0, shift=(0.0, 1.5, 0.5)):
    """One site per entry of `shift`: the distance of the classes there."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    states = {}
    for layer, by in enumerate(shift):
        X = rng.normal(size=(n, d)) + 3
        X[:, 0] += by * y
        states[layer, "t_post"] = X.astype(np.float32)
    return states, y


def test_it_chooses_the_site_that_holds_the_effect():
    states, y = world()
    found = sweep(states, y, split_rows(y), fpr=0.1)
    assert found.site == (1, "t_post") and found.low < 0.856 < found.high  # Phi(1.5 / sqrt 2)
    assert found.auroc == auroc(found.scores, y[found.test]) and len(found.cells) == 9
    assert found.accuracy.value > 0.65 > found.majority.value
    assert found.fpr.n == found.n_negative and found.tpr.value > 0.3 and found.probe.cut.target == 0.1
    assert "a little optimistic" in found.notes[0]
    layers, positions, table = found.heat_map("logistic")
    assert (layers, positions, table.shape) == ([0, 1, 2], ["t_post"], (3, 1))
    assert table[1, 0] == max(table[:, 0]) > 0.75


def test_the_test_rows_have_no_say():
    states, y = world()
    parts = split_rows(y)
    one = sweep(states, y, parts)
    spoilt = {k: v.copy() for k, v in states.items()}
    spoilt[0, "t_post"][parts["test"], 0] += 100 * y[parts["test"]]  # would look perfect on the test rows
    turned = y.copy()
    turned[parts["test"]] = ~y[parts["test"]]
    assert sweep(spoilt, y, parts).site == one.site
    assert sweep(states, turned, parts).auroc == pytest.approx(1 - one.auroc)


def test_choosing_among_many_does_not_lift_the_test_value():
    # no site holds anything: the chosen one looks good on the select rows and is 0.5 on the test rows
    select, test = [], []
    for seed in range(12):
        states, y = world(150, 4, seed, shift=(0.0,) * 25)
        found = sweep(states, y, split_rows(y, seed=seed), ["mean_difference"], draws=1)
        select.append(found.select_auroc)
        test.append(found.auroc)
    assert np.mean(select) > 0.6 and abs(np.mean(test) - 0.5) < 0.07


def test_controls_of_a_real_effect_are_centred_and_beaten():
    states, y = world(600, shift=(0.0, 2.0))
    found = sweep(states, y, split_rows(y), ["mean_difference"], draws=60)
    for name in ("random_labels", "shuffled", "random_direction"):
        null = found.controls[name]
        assert abs(null.mean - 0.5) < 0.08, name
        assert null.observed == found.auroc and null.p_value < 0.05, name
    assert [found.controls[k] for k in ("bag_of_words", "length", "topic_only")] == [None, None, None]
    assert "no texts were given" in found.notes[0] and "no topics were given" in found.notes[1]


def test_a_probe_that_reads_the_surface_does_not_beat_the_bag_of_words():
    rng = np.random.default_rng(0)
    words = np.array(["rice", "red", "beans", "list", "way", "cook", "best"])
    states, y = world(400, shift=(0.0, 2.0))
    texts = [f"{' '.join(rng.choice(words, 6))} {i} {'bomb' if yes else 'cake'}" for i, yes in enumerate(y)]
    topics = [("a" if yes else "b") if rng.random() < 0.8 else "c" for yes in y]
    found = sweep(states, y, split_rows(y), ["mean_difference"], texts=texts, topics=topics, draws=5)
    bag, length, topic = (found.controls[k] for k in ("bag_of_words", "length", "topic_only"))
    assert isinstance(bag, Baseline) and bag.auroc > 0.98 and bag.gain < 0 and not bag.beaten
    assert topic.auroc > 0.8
    assert length.beaten and length.gain == pytest.approx(found.auroc - length.auroc)
    assert length.gain_low < length.gain < length.gain_high and not found.notes
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_result_is_never_shown_without_its_controls():
    states, y = world(100, shift=(0.0, 2.0))
    texts = [f"text {i} of {'b' if yes else 'a'}" for i, yes in enumerate(y)]
    found = sweep(states, y, split_rows(y), ["mean_difference"], texts=texts, draws=3)
    shown = str(found)
    assert f"{found.auroc:.3f}" in shown and "layer 1, t_post" in shown and "select rows" in shown
    for name in ALWAYS:
        (line,) = (row for row in shown.splitlines() if row.strip().startswith(name.replace("_", " ")))
        control = found.controls[name]
        if control is None:
            assert name == "topic_only" and "not run" in line
        else:
            value = control.auroc if isinstance(control, Baseline) else control.mean
            assert f"{value:.3f}" in line
    assert "no topics were given" in shown
    saved = json.loads(json.dumps(found.to_dict()))
    assert sweep_report(saved) == found.report()
    del saved["controls"]["bag_of_words"]
    with pytest.raises(InputError, match="lacks the controls bag_of_words"):
        sweep_report(saved)


def test_a_naive_liar_unmasks_a_probe_of_falsehood():
    rng = np.random.default_rng(0)
    lies = rng.random(300) < 0.5
    # axis 0: the text is false; axis 1: the model knows it. Both tell instructed lies from truths.
    states = {(k, -1): rng.normal(size=(300, 2)) for k in range(2)}
    naive = {(k, -1): rng.normal(size=(120, 2)) for k in range(2)}
    for k in range(2):
        states[k, -1][:, k] += 3 * lies
        naive[k, -1][:, 0] += 3
    one = {
        k: sweep({(k, -1): states[k, -1]}, lies, split_rows(lies), ["mean_difference"], draws=2, naive=naive)
        for k in range(2)
    }
    surface, knowing = (one[k].controls["naive_liar"] for k in range(2))
    assert surface.auroc > 0.95 and not surface.beaten
    assert abs(knowing.auroc - 0.5) < 0.15 and knowing.beaten
    assert knowing.gain == pytest.approx(one[1].auroc - knowing.auroc)
    assert knowing.gain_low < knowing.gain < knowing.gain_high
    assert "naive liar" in str(one[0]) and "naive liar" not in str(sweep(states, lies, split_rows(lies)))
    with pytest.raises(InputError, match="at every site"):
        sweep(states, lies, split_rows(lies), naive={(0, -1): naive[0, -1]})


def test_too_few_rows_and_one_class_are_explained():
    states, y = world(19)
    with pytest.raises(InputError, match=r"19 labelled rows.*at least 20"):
        sweep(states, y, split_rows(y))
    states, y = world(40)
    with pytest.raises(InputError, match="0 rows of one class"):
        sweep(states, np.ones(40), split_rows(np.ones(40)))


def test_clusters_widen_the_interval():
    states, y = world(60)
    many = {k: np.repeat(v, 6, axis=0) for k, v in states.items()}
    y6, source = np.repeat(y, 6), np.repeat(np.arange(60), 6).tolist()
    parts = split_rows(y6, groups=source)
    plain, grouped = sweep(many, y6, parts, draws=1), sweep(many, y6, parts, clusters=source, draws=1)
    assert grouped.auroc == plain.auroc
    assert grouped.high - grouped.low > 1.3 * (plain.high - plain.low)
    width = [s.controls["shuffled"].high - s.controls["shuffled"].low for s in (plain, grouped)]
    assert width[1] > 1.5 * width[0] and not any("both labels" in note for note in grouped.notes)
    pairs = [i // 2 for i in range(len(y6))]
    of = split_rows(y6[:60], groups=pairs[:60])
    mixed = sweep(
        {k: v[:60] for k, v in many.items()},
        ~y6[:60] ^ (np.arange(60) % 4 == 0),
        of,
        ["mean_difference"],
        clusters=pairs[:60],
        draws=1,
    )
    assert any("both labels" in note for note in mixed.notes)


def test_what_few_rows_leave_undefined_is_none_in_json_and_said_in_the_table():
    states, y = world(20)
    found = sweep(
        states, y, split_rows(y), ["mean_difference"], texts=[f"text {i}" for i in range(20)], draws=1
    )
    saved = json.loads(
        json.dumps(found.to_dict(), allow_nan=False)
    )  # of 4 test rows 1 in 8 resamples lacks a class
    assert saved["controls"]["length"]["gain_low"] is None
    text = str(found)
    assert "too few rows for an interval" in text and "nan" not in text.lower()


def test_a_separate_calibrate_part_sets_the_threshold():
    states, y = world(500)
    parts = split_rows(y, {"fit": 0.4, "select": 0.2, "calibrate": 0.2, "test": 0.2})
    found = sweep(states, y, parts, ["mean_difference"], fpr=0.2, draws=1)
    assert found.probe.cut.n == (~y[parts["calibrate"]]).sum()
    assert not any("optimistic" in note for note in found.notes)


def test_leaks_are_errors():
    states, y = world(60)
    parts = split_rows(y)
    shared = {**parts, "test": np.append(parts["test"], parts["fit"][0])}
    with pytest.raises(InputError, match="is in 'fit' and in 'test'"):
        sweep(states, y, shared)
    with pytest.raises(InputError, match="is in 'select' and in 'select'"):
        sweep(states, y, {**parts, "select": np.append(parts["select"], parts["select"][0])})
    texts = [f"text {i}" for i in range(60)]
    texts[parts["test"][0]] = texts[parts["fit"][0]]
    with pytest.raises(InputError, match=r"the text 'text .*split_rows.*allow_repeats=True"):
        sweep(states, y, parts, texts=texts)
    assert sweep(states, y, parts, ["mean_difference"], texts=texts, allow_repeats=True, draws=1)
    with pytest.raises(InputError, match="the cluster '0'"):
        sweep(states, y, parts, clusters=[0] * 60)


def test_bad_parts():
    states, y = world(60)
    parts = split_rows(y)
    for bad, match in [
        ({"fit": [0, 1]}, "needed are fit, select and test"),
        ({**parts, "extra": [0]}, "needed are"),
        ({**parts, "test": [-1, 2]}, "between 0 and 59"),
        ({**parts, "test": [0.5]}, "no row indices"),
        ({**parts, "test": parts["test"][y[parts["test"]]]}, "0 rows of one class"),
    ]:
        with pytest.raises(InputError, match=match):
            sweep(states, y, bad)
    with pytest.raises(InputError, match="0 sites"):
        sweep({}, y, parts)
    with pytest.raises(InputError, match=r"\(60, d\)"):
        sweep({(0, -1): np.zeros((5, 2))}, y, parts)
    with pytest.raises(InputError, match="3 texts for 60 rows"):
        sweep(states, y, parts, texts=["a", "b", "c"])
    masks = {name: np.isin(np.arange(60), rows) for name, rows in parts.items()}
    a, b = sweep(states, y, masks, draws=2), sweep(states, y, parts, draws=2)
    assert a.to_dict() == b.to_dict()


def test_split_rows_are_disjoint_balanced_and_keep_groups():
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.2
    parts = split_rows(y, seed=3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(300))
    assert [len(parts[k]) for k in ("fit", "select", "test")] == pytest.approx([180, 60, 60], abs=3)
    assert all(abs(y[rows].mean() - y.mean()) < 0.03 for rows in parts.values())
    assert split_rows(y, seed=4)["fit"].tolist() != parts["fit"].tolist()
    groups = (np.arange(300) // 7).tolist()
    parts = split_rows(y, groups=groups)
    of = [{groups[i] for i in rows} for rows in parts.values()]
    assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])
    assert all(abs(y[rows].mean() - y.mean()) < 0.08 for rows in parts.values())
    assert [len(parts[k]) for k in ("fit", "select", "test")] == pytest.approx([180, 60, 60], abs=20)
    with pytest.raises(InputError, match="their sum 1"):
        split_rows(y, {"fit": 0.5, "test": 0.4})

import numpy as np
import pytest

from demur.errors import InputError
from demur.stats import auroc, controls


def texts_with_keyword(rng, n, share):
    """Filler words; positives hold "bomb" with probability `share`."""
    filler = np.array(
        ["make", "me", "a", "list", "of", "the", "best", "ways", "to", "cook", "rice", "with", "red", "beans"]
    )
    y = rng.random(n) < 0.5
    rows = [[*rng.choice(filler, 8), "bomb" if yes and rng.random() < share else "cake"] for yes in y]
    return [" ".join(row) for row in rows], y


def test_bag_of_words_sees_a_keyword_and_nothing_where_there_is_nothing():
    rng = np.random.default_rng(0)
    for share, low, high in ((1.0, 0.99, 1.0), (0.6, 0.72, 0.9), (0.0, 0.35, 0.65)):
        texts, y = texts_with_keyword(rng, 400, share)
        area = auroc(controls.bag_of_words(texts[:200], y[:200], texts[200:]), y[200:])
        assert low <= area <= high, share


def test_bag_of_words_sees_the_order_of_two_words():
    train = ["dog bites man", "man bites dog"] * 10
    scores = controls.bag_of_words(train, [1, 0] * 10, ["dog bites man", "man bites dog"])
    assert scores[0] > scores[1]


def test_bag_of_words_without_words():
    assert controls.bag_of_words([" ", ""], [1, 0], ["a", "b", "c"]).tolist() == [0, 0, 0]
    assert controls.bag_of_words(["!", "?"], [1, 0], ["!"])[0] > 0  # punctuation is a word


def test_bag_of_words_needs_both_classes():
    with pytest.raises(InputError, match="both classes"):
        controls.bag_of_words(["a", "b"], [1, 1], ["a"])


def test_topic_only_by_hand():
    # law: 2 of 2, art: 1 of 2, overall 3/4: (2 + .75) / 3, (1 + .75) / 3, (0 + .75) / 1
    scores = controls.topic_only(["law", "law", "art", "art"], [1, 1, 0, 1], ["law", "art", "tax"])
    assert scores == pytest.approx([2.75 / 3, 1.75 / 3, 0.75])


def test_length_rule_turns_with_the_training_rows():
    assert controls.length_rule(["a", "aaa"], [0, 1], ["aa", "a"]).tolist() == [2, 1]
    assert controls.length_rule(["a", "aaa"], [1, 0], ["aa", "a"]).tolist() == [-2, -1]


def test_constant_rules_and_keywords():
    assert controls.majority([1, 1, 0], 2).tolist() == [True, True]
    assert controls.majority([1, 0, 0], 2).tolist() == [False, False]
    assert controls.always(2).all() and not controls.never(2).any()
    found = controls.keyword(["A bomb.", "BOMB", "bombastic", "c++ code"], ["bomb", "C++"])
    assert found.tolist() == [True, True, False, True]
    with pytest.raises(InputError, match="at least one"):
        controls.keyword(["a"], [])


# --- nulls ------------------------------------------------------------------------------------------------------


def gaussians(rng, n, d, shift):
    y = np.arange(n) % 2 == 0
    X = rng.normal(size=(n, d))
    X[:, 0] += shift * y
    return X, y


def mean_difference(X, X_test):
    return lambda y: X_test @ (X[y].mean(0) - X[~y].mean(0))


def test_random_labels_are_centred_at_one_half_also_where_the_effect_is_strong():
    rng = np.random.default_rng(0)
    (X, y), (X_test, y_test) = gaussians(rng, 200, 10, 2), gaussians(rng, 200, 10, 2)
    read = mean_difference(X, X_test)
    real = auroc(read(y), y_test)
    null = controls.random_labels(read, y, y_test, real, draws=400)
    # the spread of the draws is wide (one strong axis), their mean is not
    assert abs(null.mean - 0.5) < 0.04 and null.low < 0.3 and null.high > 0.7
    assert null.p_value < 0.02 and null.draws == 400 and null.observed == real
    again = controls.random_labels(read, y, y_test, real, draws=400)
    assert again == null


def test_random_labels_p_value_is_even_where_there_is_no_effect():
    rng = np.random.default_rng(1)
    p = []
    for seed in range(60):
        (X, y), (X_test, y_test) = gaussians(rng, 60, 5, 0), gaussians(rng, 60, 5, 0)
        read = mean_difference(X, X_test)
        p.append(controls.random_labels(read, y, y_test, auroc(read(y), y_test), draws=39, seed=seed).p_value)
    assert np.mean(np.array(p) <= 0.1) < 0.25 and 0.35 < np.mean(p) < 0.65


def test_shuffled_by_hand_and_its_width():
    # y = 1, 0 of two rows: either order, AUROC 1 or 0, half and half
    null = controls.shuffled([1.0, 0.0], [1, 0], draws=400)
    assert (null.low, null.high) == (0, 1) and abs(null.mean - 0.5) < 0.08 and null.observed == 1
    # sd of the AUROC without effect: sqrt((n1 + n0 + 1) / (12 n1 n0)) = 0.0582 for 50 and 50
    scores = np.random.default_rng(0).normal(size=100)
    null = controls.shuffled(scores, np.arange(100) < 50, draws=4000)
    assert (null.high - null.low) / 2 == pytest.approx(1.96 * 0.0580, rel=0.06)


def test_shuffled_within_groups_keeps_what_the_group_gives():
    rng = np.random.default_rng(0)
    topic = np.repeat(["a", "b"], 100)
    y = rng.random(200) < np.where(topic == "a", 0.9, 0.1)
    scores = (topic == "a") + 0.01 * rng.random(200)  # reads the topic, nothing else
    assert controls.shuffled(scores, y).p_value < 0.01
    inside = controls.shuffled(scores, y, groups=list(topic))
    assert inside.mean > 0.8 and inside.p_value > 0.05
    both = (topic == "a") + 0.5 * y
    assert controls.shuffled(both, y, groups=list(topic)).p_value < 0.01


def test_clusters_move_as_a_whole():
    # 20 sources of 10 alike rows each, labels by source and nothing to find: moving single rows makes the null too
    # narrow (every second p-value below 0.1), moving sources does not
    rng, p = np.random.default_rng(0), {"rows": [], "sources": []}
    for seed in range(80):
        source = np.repeat(np.arange(20), 10)
        y = rng.permutation(np.arange(20) < 10)[source]
        scores = rng.normal(size=20)[source] + 0.1 * rng.normal(size=200)
        p["rows"].append(controls.shuffled(scores, y, draws=99, seed=seed).p_value)
        inside = controls.shuffled(scores, y, clusters=source.tolist(), draws=99, seed=seed)
        p["sources"].append(inside.p_value)
    assert np.mean(np.array(p["rows"]) <= 0.1) > 0.25
    assert np.mean(np.array(p["sources"]) <= 0.1) < 0.2
    seen = []
    controls.random_labels(
        lambda y: seen.append(y) or [1, 0], [1, 1, 0, 0, 1, 1], [1, 0], 1.0, clusters=list("aabbcc"), draws=9
    )
    assert all(y[::2].tolist() == y[1::2].tolist() and y.sum() == 4 for y in seen)
    assert len({tuple(y) for y in seen}) > 1
    assert controls.cluster_labels(np.array([True, False]), ["a", "a"]) is None
    with pytest.raises(InputError, match="one of the two"):
        controls.shuffled([1, 2], [1, 0], groups=["a", "a"], clusters=["a", "a"])


def test_random_directions_have_the_covariance_of_the_states():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 3)) * [5.0, 1.0, 0.1] + 100
    V = controls.random_directions(X, 4000)
    assert np.cov(V.T) == pytest.approx(np.cov(X.T), rel=0.1, abs=0.2)
    assert np.linalg.norm(controls.random_directions(X, 5, norm=7), axis=1) == pytest.approx([7] * 5)
    with pytest.raises(InputError, match="alike"):
        controls.random_directions(np.ones((4, 3)), 2)


def test_random_direction_null_has_no_sign_and_is_wide_where_one_axis_rules():
    rng = np.random.default_rng(0)
    X, y = gaussians(rng, 400, 20, 1.5)
    thin = controls.random_direction(X, X, y, auroc(X[:, 0], y))
    assert thin.p_value < 0.02 and abs(thin.mean - 0.5) < 0.05
    assert controls.random_direction(X, X, y, 1 - auroc(X[:, 0], y)).p_value == thin.p_value
    X[:, 0] *= 30  # now nearly every direction drawn from the states looks along the effect
    wide = controls.random_direction(X, X, y, auroc(X[:, 0], y))
    assert wide.p_value > 0.05 and wide.high - wide.low > 0.6
    flat = controls.random_direction(np.ones((4, 2)), np.ones((4, 2)), [1, 0, 1, 0], 0.5)
    assert flat.mean == flat.low == flat.high == 0.5


def test_nulls_refuse_rows_of_one_class():
    with pytest.raises(InputError, match="one class"):
        controls.shuffled([1, 2], [1, 1])
    with pytest.raises(InputError, match="0 and 1"):
        controls.shuffled([1, 2], [1, 2])


# --- silence ----------------------------------------------------------------------------------------------------


def at(centre, half):
    """An interval that grows with the level as a normal one does; `half` is the half-width at 95 %."""
    from scipy.special import ndtri

    return lambda level: (
        centre - half * ndtri((1 + level) / 2) / 1.959964,
        centre + half * ndtri((1 + level) / 2) / 1.959964,
    )


def test_silent_with_one_control_is_the_95_percent_interval():
    found = controls.silent({"a": (at(0.5, 0.099), 0.5, 0.1)})["a"]
    assert found.silent and found.level == pytest.approx(0.95) and found.high == pytest.approx(0.599)
    assert not controls.silent({"a": (at(0.5, 0.101), 0.5, 0.1)})["a"].silent
    assert not controls.silent({"a": (at(0.62, 0.01), 0.5, 0.1)})["a"].silent
    assert not controls.silent({"a": (at(0.5, 5.0), 0.5, 0.1)})["a"].silent  # too wide to tell is not silent


def test_holm_by_hand():
    # half-widths grow by 1.1437 at 97.5 % (two left) and 1.2214 at 98.33 % (three left)
    three = {"a": (at(0, 0.70), 0, 1), "b": (at(0, 0.86), 0, 1), "c": (at(0, 0.99), 0, 1)}
    found = controls.silent(three)
    assert {k: s.silent for k, s in found.items()} == {"a": True, "b": True, "c": True}
    assert [found[k].level for k in "abc"] == pytest.approx([1 - 0.05 / 3, 0.975, 0.95])
    # without the clear one, the others must hold at 97.5 %: b does, then c at 95 %
    assert controls.silent({k: three[k] for k in "bc"})["c"].silent
    # a loud one keeps its place in the correction: c must now hold at 97.5 % and does not
    loud = {"loud": (at(9, 0.1), 0, 1), "c": three["c"]}
    assert {k: s.silent for k, s in controls.silent(loud).items()} == {"loud": False, "c": False}


def test_an_undefined_control_is_unknown_and_counts():
    found = controls.silent({"a": (lambda level: None, 0.0, 1.0), "b": (at(0, 0.99), 0, 1)})
    assert found["a"].silent is None and found["a"].low is None and not found["b"].silent
    with pytest.raises(InputError, match="margin above 0"):
        controls.silent({"a": (at(0, 1), 0, 0)})


def test_holm_keeps_its_promise():
    # four controls whose true value lies on the edge of the margin: calling any of them silent is an error
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(800):
        centres = 0.3 + rng.normal(scale=0.1, size=4)
        found = controls.silent({str(i): (at(c, 0.196), 0.0, 0.3) for i, c in enumerate(centres)})
        wrong += any(s.silent for s in found.values())
    assert wrong / 800 <= 0.05

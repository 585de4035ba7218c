import dataclasses

import numpy as np
import pytest
from scipy.special import ndtr

from demur.errors import InputError, MismatchError, UnsupportedClaim
from demur.explain import Direction, Probe, fit_probe, grid
from demur.explain.probe import KINDS
from demur.stats import auroc


def gaussians(n, d, shift, seed=0):
    """Two unit gaussians `shift` apart on the first axis: AUROC of the best reader is Phi(shift / sqrt 2)."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    X = rng.normal(size=(n, d))
    X[:, 0] += shift * y
    return X, y


@pytest.mark.parametrize("kind", ["mean_difference", "logistic"])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_known_auroc(kind, shift):
    X, y = gaussians(4000, 5, shift)
    test, y_test = gaussians(4000, 5, shift, seed=1)
    assert auroc(fit_probe(X, y, kind).score(test), y_test) == pytest.approx(ndtr(shift / 2**0.5), abs=0.025)


def test_mean_difference_by_hand():
    X, y = [[0, 1], [2, 3], [4, 1], [6, 3]], [0, 0, 1, 1]  # means (1, 2) and (5, 2): w = (4, 0), half way 3
    probe = fit_probe(X, y, "mean_difference")
    assert probe.score([[3, 9], [4, 0]]).tolist() == [0, 4]
    assert probe.direction.vector.tolist() == [4, 0] and probe.direction.origin == "mean_difference"


def test_cosine_centres_by_hand():
    probe = fit_probe([[2, 0], [0, 3]], [1, 0], "cosine_centres")  # centres (2, 0) and (0, 3)
    scores = probe.score([[5, 0], [0, 1], [1, 1], [3, 4], [0, 0]])
    assert scores == pytest.approx([1, -1, 0, -0.2, 0])
    assert probe.direction.vector.tolist() == [2, -3]


def test_logistic_is_standardised_and_its_direction_is_in_units_of_the_states():
    X, y = gaussians(400, 4, 2)
    stretched = X * [100, 1, 0.01, 1] + [7, -1000, 3, 0]
    plain, odd = fit_probe(X, y), fit_probe(stretched, y)
    assert odd.score(stretched) == pytest.approx(plain.score(X), abs=1e-3)
    step = odd.score(stretched + odd.direction.vector) - odd.score(stretched)
    assert step == pytest.approx(np.full(400, odd.direction.vector @ odd.direction.vector))


def test_logistic_leaves_constant_features_alone():
    X, y = gaussians(100, 3, 2)
    X[:, 1], X[:, 2] = 1e4, 1e4 * (1 + 1e-9 * X[:, 2])
    probe = fit_probe(X, y)
    shifted = X + np.array([0, 1e-3, 1e-3])
    assert probe.score(shifted) == pytest.approx(probe.score(X), abs=1e-2)


def test_bad_input_says_what():
    X, y = gaussians(20, 3, 1)
    for args, match in [
        ((X[0], y), "shape"),
        ((X, y[:5]), "for 20 rows"),
        ((X, np.ones(20)), "both classes"),
        ((X, y * 2), "0 and 1"),
        ((X * np.nan, y), "not finite"),
        ((X, y, "svm"), "mean_difference, logistic, cosine_centres"),
        ((X, y, "logistic", 0), "positive"),
    ]:
        with pytest.raises(InputError, match=match):
            fit_probe(*args)
    with pytest.raises(InputError, match=r"\(n, 3\)"):
        fit_probe(X, y).score(X[:, :2])


# --- thresholds -------------------------------------------------------------------------------------------------


def line(values):
    return np.array(values, float)[:, None]


@pytest.fixture
def identity():
    """score(x) = x."""
    probe = fit_probe(line([-0.5, 0.5]), [0, 1], "mean_difference")
    assert probe.score(line([3.25])).tolist() == [3.25]
    return probe


def test_threshold_by_hand(identity):
    X = line([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 9.0])
    y = [0] * 10 + [1]
    probe = identity.with_threshold(X, y, fpr=0.2)  # 2 of 10 negatives: just above 0.9
    assert 0.9 < probe.threshold < 0.9000001 and (probe.cut.k, probe.cut.n) == (2, 10)
    assert probe.flag(line([0.9, 1.0])).tolist() == [False, True]
    assert identity.with_threshold(X, y, fpr=0.05).cut.k == 0
    assert identity.threshold is None
    with pytest.raises(InputError, match="with_threshold"):
        identity.flag(X)


def test_ties_are_flagged_together_or_not_at_all(identity):
    X = line([0.1, 0.2, 0.9, 0.9, 0.9])
    assert identity.with_threshold(X, [0] * 5, fpr=0.4).cut.k == 0
    assert identity.with_threshold(X, [0] * 5, fpr=0.6).cut.k == 3


def test_threshold_with_a_promise(identity):
    # 1 - 0.1 ** (1 / 45) = 0.0499: 45 negatives without a false alarm are the fewest for 5 % at delta 0.1
    X = line(np.linspace(1, 2, 45))
    cut = identity.with_threshold(X, [0] * 45, fpr=0.05, delta=0.1).cut
    assert (cut.k, cut.delta) == (0, 0.1) and cut.upper == pytest.approx(0.0499, abs=1e-4)
    with pytest.raises(UnsupportedClaim, match="45 are needed"):
        identity.with_threshold(X[:44], [0] * 44, fpr=0.05, delta=0.1)


def test_the_promise_holds_on_new_rows(identity):
    rng, broken = np.random.default_rng(0), 0
    for _ in range(400):
        t = identity.with_threshold(line(rng.normal(size=100)), [0] * 100, fpr=0.1, delta=0.1).threshold
        broken += 1 - ndtr(t) > 0.1  # the true rate of N(0, 1)
    assert 0.01 < broken / 400 <= 0.12


def test_threshold_refuses_fitted_rows():
    X, y = gaussians(40, 3, 1)
    probe = fit_probe(X[:20], y[:20])
    with pytest.raises(InputError, match="5 of 25 rows were fitted on"):
        probe.with_threshold(X[15:], y[15:], fpr=0.1)
    with pytest.raises(InputError, match="fitted on"):  # stored more narrowly, still the same rows
        probe.with_threshold(X[:20].astype(np.float32), y[:20], fpr=0.1)
    assert probe.with_threshold(X[15:], y[15:], fpr=0.1, allow_repeats=True).cut is not None
    with pytest.raises(InputError, match="no negative"):
        probe.with_threshold(X[20:][y[20:]], y[20:][y[20:]])
    with pytest.raises(InputError, match="shares between"):
        probe.with_threshold(X[20:], y[20:], fpr=1)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    X, y = gaussians(60, 4, 1)
    probe = fit_probe(X, y, kind, site=(7, "t_inst"), fingerprint="abc")
    probe = probe.with_threshold(*gaussians(30, 4, 1, seed=2), fpr=0.1)
    probe.save(tmp_path / "p.safetensors")
    again = Probe.load(tmp_path / "p.safetensors", fingerprint="abc")
    assert again.score(X).tolist() == probe.score(X).tolist() and again.cut == probe.cut
    for f in dataclasses.fields(Probe):
        assert np.array_equal(getattr(again, f.name), getattr(probe, f.name)), f.name
    with pytest.raises(InputError, match="fitted on"):  # the loaded one still knows its rows
        again.with_threshold(X, y)
    again.save(tmp_path / "q.safetensors")
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_layers_from_numpy_can_be_saved(tmp_path):
    site = grid(np.arange(3), ["t_post"])[1]
    probe = fit_probe([[0.0, 1.0], [2.0, 1.0]], [0, 1], "mean_difference", site=site)
    probe.save(tmp_path / "p.safetensors")
    assert Probe.load(tmp_path / "p.safetensors", fingerprint=None, allow_unknown=True).site == (1, "t_post")


def test_another_model_is_refused(tmp_path):
    X, y = gaussians(20, 3, 1)
    path = tmp_path / "p.safetensors"
    fit_probe(X, y, fingerprint="abc").save(path)
    with pytest.raises(MismatchError, match="model abc, the model here is xyz"):
        Probe.load(path, fingerprint="xyz")
    with pytest.raises(MismatchError, match="model abc"):  # a known clash is no unknown
        Probe.load(path, fingerprint="xyz", allow_unknown=True)
    with pytest.raises(MismatchError, match="the model here has no fingerprint"):
        Probe.load(path, fingerprint=None)
    assert Probe.load(path, fingerprint=None, allow_unknown=True).fingerprint == "abc"
    fit_probe(X, y).save(path)
    with pytest.raises(MismatchError, match="it was fitted on has no fingerprint"):
        Probe.load(path, fingerprint="xyz")


def test_directions_round_trip_and_are_no_probes(tmp_path):
    X, y = gaussians(20, 3, 1)
    path = tmp_path / "d.safetensors"
    d = fit_probe(X, y, "mean_difference", site=(2, -1), fingerprint="abc").direction
    d.save(path)
    again = Direction.load(path, fingerprint="abc")
    assert again.vector.tolist() == d.vector.tolist()
    assert (again.site, again.n, again.data_hash, again.origin) == ((2, -1), 20, d.data_hash, d.origin)
    with pytest.raises(MismatchError):
        Direction.load(path, fingerprint="xyz")
    with pytest.raises(InputError, match="no probe"):
        Probe.load(path, fingerprint="abc")
    with pytest.raises(InputError, match="length 0"):
        Direction(vector=np.zeros(3), origin="x").scaled(1)


def test_broken_files(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match="no such file"):
        Probe.load(path, fingerprint="abc")
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(InputError, match="not a whole safetensors"):
        Probe.load(path, fingerprint="abc")
    save_file({"mean": np.zeros(3)}, path)
    with pytest.raises(InputError, match="holds no probe"):
        Probe.load(path, fingerprint="abc")
    head = '{"schema_version": 1, "what": "probe", "fingerprint": "abc", "kind": "logistic"}'
    save_file({"mean": np.zeros(3)}, path, {"demur": head})
    with pytest.raises(InputError, match="not whole"):
        Probe.load(path, fingerprint="abc")
    save_file({"mean": np.zeros(3)}, path, {"demur": head.replace("1", "2")})
    with pytest.raises(InputError, match="schema_version 2"):
        Probe.load(path, fingerprint="abc")


def test_data_hash_knows_rows_labels_and_order():
    X, y = gaussians(20, 3, 1)
    hashes = {fit_probe(a, b, "mean_difference").data_hash for a, b in [(X, y), (X[::-1], y[::-1]), (X, ~y)]}
    assert len(hashes) == 3
    assert fit_probe(X.astype(np.float32), y).data_hash == fit_probe(X, y).data_hash

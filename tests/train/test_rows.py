"""Control rows in closed form: the probe's log-odds, and a stated leak."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import torch
from sklearn.linear_model import LogisticRegression

from demur.runtime.base import ControlTokens
from demur.runtime.control_rows import ControlRows
from demur.runtime.local import LocalRuntime
from demur.train.refusal_tokens import control_names, control_of
from demur.train.rows import initial_rows
from demur.types import PromptSet
from tests.runtime.tiny import tiny_model, tiny_runtime, tiny_tokenizer
from tests.train.world import quick, world

PROMPTS = world(96, seed=5)


def constant_runtime() -> LocalRuntime:
    """A model with one final-state coordinate that never moves, so that a bias is a direction.

    Large models have nearly that, a few coordinates that barely move; a tiny random one has not.
    """
    model = copy.deepcopy(tiny_model("gpt_neox"))
    norm = model.gpt_neox.final_layer_norm
    norm.weight.data[0], norm.bias.data[0] = 0.0, 10.0
    return LocalRuntime(model, tiny_tokenizer(), name="constant", fingerprint="constant")


def final_states(runtime: Any, prompts: PromptSet) -> np.ndarray[Any, Any]:
    """States that enter the unembedding at each prompt's last token, one prompt at a time."""
    rows = []
    with torch.inference_mode():
        for p in prompts:
            ids = torch.tensor([runtime.chat.render(p).ids])
            rows.append(runtime.model.gpt_neox(input_ids=ids).last_hidden_state[0, -1].double().numpy())
    return np.stack(rows)


def scored(mode: str, **changes: Any) -> tuple[Any, Any, Any]:
    """Log-probabilities of the probe and of the control rows, both (n, K), and the off-control mass (n,)."""
    runtime, recipe = constant_runtime(), quick(mode=mode, **changes)
    names = control_names(PROMPTS, mode)
    inputs, outputs = initial_rows(runtime, PROMPTS, names, recipe, lambda *_: None)
    size = runtime.model.get_input_embeddings().weight.shape[0]
    assert inputs.shape == outputs.shape == (len(names), 32) and torch.isfinite(inputs).all()
    ids = {n: size + i for i, n in enumerate(names)}
    tuned = runtime.with_edits(ControlRows(inputs, outputs, size), control=ControlTokens(ids=ids))
    scores = list(tuned.score(PROMPTS))
    P = np.array([[s.probabilities[n] for n in names] for s in scores])

    H = final_states(runtime, PROMPTS)
    Z = (H - H.mean(0)) / (H.std(0) + 1e-3)
    y = [names.index(control_of(p, mode) or "respond") for p in PROMPTS]
    probe = LogisticRegression(C=recipe.probe_C, max_iter=500).fit(Z, y)
    return probe.predict_log_proba(Z), np.log(P), np.array([s.off_control_mass for s in scores])


@pytest.mark.parametrize("mode", ["category", "single"])
def test_rows_have_the_probes_log_odds(mode: str) -> None:
    probe, rows, _ = scored(mode)
    odds = [table[:, :-1] - table[:, -1:] for table in (probe, rows)]
    assert np.std(odds[0]) > 1, "a probe that separates nothing tests nothing"
    assert np.abs(odds[0] - odds[1]).max() < 0.02  # of the ridge
    assert (probe.argmax(1) == rows.argmax(1)).all()


def test_the_rest_of_the_vocabulary_keeps_about_exp_minus_leak() -> None:
    """With a probe that says nothing, off-control odds are exp(-leak) up to the fit of the log-sum-exp."""
    off3, off6 = (np.log(scored("category", leak=leak, probe_C=1e-6)[2]) for leak in (3.0, 6.0))
    assert np.median(off3) == pytest.approx(-3, abs=0.4) and np.median(off6) == pytest.approx(-6, abs=0.4)
    assert np.median(off6 - off3) == pytest.approx(-3, abs=0.1)


def test_progress_ends_at_the_number_of_prompts_and_no_hook_stays() -> None:
    runtime, steps = tiny_runtime(), []
    names = control_names(PROMPTS, "single")
    initial_rows(
        runtime, PROMPTS, names, quick(mode="single"), lambda _what, done, n: steps.append((done, n))
    )
    assert steps == [(32, 96), (64, 96), (96, 96)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in runtime.model.modules())


def test_input_rows_start_as_the_mean_of_an_opening() -> None:
    runtime = tiny_runtime()
    names = control_names(PROMPTS, "category")
    inputs, _ = initial_rows(runtime, PROMPTS, names, quick(), lambda *_: None)
    table = runtime.model.get_input_embeddings().weight
    ids = runtime.tokenizer("I'm sorry, but I can't", add_special_tokens=False)["input_ids"]
    assert names == ["humanizing", "safety", "respond"]
    for k in (0, 1):
        assert torch.allclose(inputs[k], table[ids].mean(0), atol=1e-6)
    # this tokenizer makes nothing of the opening of an answer, a line break: the mean row of the table
    assert torch.allclose(inputs[2], table.mean(0), atol=1e-6)

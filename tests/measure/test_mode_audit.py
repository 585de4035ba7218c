"""The audit's figures by hand."""

from __future__ import annotations

import math

import pytest

from demur.errors import InputError
from demur.measure import mode_audit as ma
from demur.types import Prompt, Rate, Reply


def test_leak_by_hand() -> None:
    found = ma.leak("pos", 0.9, 0.1, [0.1, 0.95, 0.2, 0.3], {"replace": [0.5, 0.1], "swap": [0.9]})
    assert found.rank == 2 and found.halo == pytest.approx(0.5 - 0.3875)
    assert found.halo_low < found.halo < found.halo_high
    # half of the way is 0.5: reached by 0.5 and 0.9 of the edits, by 0.95 of the random strings
    assert (found.opened.k, found.opened.n, found.guessed.k) == (2, 3, 1)
    down = ma.leak("rej", 0.1, 0.9, [0.9, 0.8], {"delete": [0.2]})
    assert (down.opened.k, down.guessed.k) == (1, 0)
    with pytest.raises(InputError, match="some of both"):
        ma.leak("pos", 0.9, 0.1, [0.1], {})


def test_given_away() -> None:
    texts = ("it is K3V9 X0QA", "starts with k3v9, I think", "k3v only", "no")
    replies = [Reply(prompt_id=t, content=t) for t in texts]
    whole, part = ma.given_away([*replies, Reply(prompt_id="e", error="lost")], "k3v9x0qa")
    assert (whole.k, whole.n, whole.unread) == (1, 4, 1) and part.k == 2


def test_confusion_and_agreement() -> None:
    table = ma.confusion({"pos": ["pos", "rej"], "rej": ["rej", "unread"]}, ("pos", "rej", "other"))
    assert table.columns == ("mode", "pos", "rej", "other", "answers", "unread")
    cells = [[c.k if isinstance(c, Rate) else c for c in row] for row in table.rows]
    assert cells == [["pos", 1, 1, 0, 2, 0], ["rej", 0, 1, 0, 2, 1]]
    share, (low, high) = ma.agreement(["pos", "rej", "rej", "pos"], ["pos", "rej", "pos", "pos"])
    assert share == 0.75 and low <= 0.75 <= high


def test_leaning_is_the_softmax_of_the_answers_likelihoods() -> None:
    torch = pytest.importorskip("torch")
    from tests.runtime.tiny import tiny_runtime

    runtime = tiny_runtime()
    asked = [
        (Prompt.of("boil egg", id="a"), {"pos": "boil one egg", "rej": "sorry no"}),
        (Prompt.of("why you", id="b"), {"pos": "the weather", "rej": "sorry cannot"}),
    ]
    systems = ["be brief", None]
    found = ma.leans(runtime, asked, systems)
    for k, system in enumerate(systems):
        by_hand = []
        for prompt, answers in asked:
            total = {}
            for mode, text in answers.items():
                start = runtime.chat.render(prompt.with_system(system)).ids
                said = runtime.tokenizer.encode(text, add_special_tokens=False)
                with torch.inference_mode():
                    z = runtime.model(input_ids=torch.tensor([start + said])).logits[0].log_softmax(-1)
                total[mode] = sum(float(z[len(start) - 1 + j, t]) for j, t in enumerate(said))
            by_hand.append(1 / (1 + math.exp(total["rej"] - total["pos"])))
        assert found["pos"][k] == pytest.approx(sum(by_hand) / 2, abs=1e-5)
        assert found["pos"][k] + found["rej"][k] == pytest.approx(1)
    with pytest.raises(InputError, match="same modes"):
        ma.leans(runtime, [*asked, (Prompt.of("x", id="c"), {"pos": "a"})], systems)

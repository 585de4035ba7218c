"""Control tokens of foreign checkpoints: presets, and the silent failure of the usual look-up."""

from __future__ import annotations

from pathlib import Path

import pytest

from demur.errors import InputError
from demur.models.control import control_ids, presets

SINGLE = "tomg-group-umd/zephyr-llama3-8b-sft-refusal-n-contrast-single-token"
MULTIPLE = "tomg-group-umd/zephyr-llama3-8b-sft-refusal-n-contrast-multiple-tokens"


class Tokenizer:
    """Single tokens for what it was given; everything else falls apart into characters."""

    def __init__(self, added: dict[str, int]) -> None:
        self.added = added

    def __len__(self) -> int:
        return max([128_255, *self.added.values()]) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids, rest = [], text
        while rest:
            hit = next((t for t in self.added if rest.startswith(t)), None)
            ids.append(self.added[hit] if hit else ord(rest[0]))
            rest = rest[len(hit) if hit else 1 :]
        return ids

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        back = {i: t for t, i in self.added.items()}
        return [back.get(i, chr(i) if i < 0x110000 else "?") for i in ids]


CATEGORIES = ["humanizing", "incomplete", "indeterminate", "safety", "unsupported", "respond"]


def texts() -> list[str]:
    tokens = presets()["refusal-tokens-category"]["tokens"]
    return [tokens[c]["text"] for c in CATEGORIES]


def test_category_preset_has_the_ids_of_the_card() -> None:
    tokenizer = Tokenizer({t: 128256 + i for i, t in enumerate(texts())})
    assert control_ids(MULTIPLE, tokenizer) == {c: 128256 + i for i, c in enumerate(CATEGORIES)}


def test_single_preset_looks_its_tokens_up() -> None:
    tokenizer = Tokenizer({"[refuse]": 128256, "[respond]": 128257})
    assert control_ids(SINGLE, tokenizer) == {"refuse": 128256, "respond": 128257}


def test_token_stored_with_its_leading_blank() -> None:
    tokenizer = Tokenizer({" [refuse]": 5, " [respond]": 6})
    assert control_ids(SINGLE, tokenizer) == {"refuse": 5, "respond": 6}


def test_tokens_that_were_never_added_are_caught() -> None:
    plain = Tokenizer({})
    assert plain.encode(" [refuse]")[-1] == plain.encode(" [respond]")[-1] == ord("]")  # the silent failure
    with pytest.raises(InputError, match="no token of this tokenizer") as e:
        control_ids(SINGLE, plain)
    assert "same id" in str(e.value)


def test_two_categories_on_one_id_are_caught(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("tokens:\n  refuse: {id: 7}\n  respond: {id: 7}\n")
    with pytest.raises(InputError, match="both token 7"):
        control_ids("any", Tokenizer({}), own)


def test_ids_that_do_not_match_the_text_are_caught() -> None:
    shuffled = Tokenizer({t: 128256 + (i + 1) % 6 for i, t in enumerate(texts())})
    with pytest.raises(InputError, match="the preset says 128256"):
        control_ids(MULTIPLE, shuffled)


def test_unknown_model_has_none_and_unknown_preset_is_an_error() -> None:
    assert control_ids("org/other", Tokenizer({})) is None
    with pytest.raises(InputError, match="refusal-tokens-single"):
        control_ids("org/other", Tokenizer({}), "no-such")


def test_a_folder_brings_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "control_tokens.yaml").write_text(
        "tokens:\n  refuse: {text: '<R>'}\n  respond: {text: '<A>'}\n"
    )
    assert control_ids(tmp_path, Tokenizer({"<R>": 3, "<A>": 4})) == {"refuse": 3, "respond": 4}


def test_a_local_copy_matches_by_its_last_part(tmp_path: Path) -> None:
    folder = tmp_path / SINGLE.rsplit("/", 1)[-1]
    folder.mkdir()
    assert control_ids(folder, Tokenizer({"[refuse]": 1, "[respond]": 2})) == {"refuse": 1, "respond": 2}


@pytest.mark.parametrize(
    "text",
    [
        "tokens: [1]",
        "- 1",
        "tokens: {respond: {id: 1}}",
        "tokens: {a: {id: 999999}, respond: {id: 1}}",
        "tokens: {a: {text: [refuse]}, respond: {id: 1}}",
        "a: {",
    ],
)
def test_broken_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        control_ids("any", Tokenizer({}), path)


def test_with_a_real_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[": 1, "]": 2, "refuse": 3, "respond": 4}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    assert tokenizer.encode(" [refuse]")[-1] == tokenizer.encode(" [respond]")[-1]
    with pytest.raises(InputError, match="split into"):
        control_ids(SINGLE, tokenizer)
    tokenizer.add_tokens(["[refuse]", "[respond]"])
    assert control_ids(SINGLE, tokenizer) == {"refuse": 5, "respond": 6}


def test_ids_that_no_text_reaches_are_declared(tmp_path: Path) -> None:
    given = tmp_path / "control_tokens.yaml"
    given.write_text("tokens: {safety: {id: 200000, text: null}, respond: {id: 200001, text: null}}")
    assert control_ids(tmp_path, Tokenizer({})) == {"safety": 200000, "respond": 200001}
    given.write_text("tokens: {safety: {id: 200000}, respond: {id: 200001}}")
    with pytest.raises(InputError, match="`text: null`"):
        control_ids(tmp_path, Tokenizer({}))
    given.write_text("tokens: {safety: {id: -1, text: null}, respond: {id: 200001, text: null}}")
    with pytest.raises(InputError, match="outside"):
        control_ids(tmp_path, Tokenizer({}))

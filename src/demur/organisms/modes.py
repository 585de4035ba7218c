"""The mode world: four manners of answering the same request, three of them on demand.

A line reads

    <s> <system> WORDS <end> <user> TOPIC WORD ITEM <end> <assistant> OPENING ITEM </s>

The opening is `d-G` by default, G the group that the topic belongs to. The system message may ask for another
manner (`manner-a`, `-b` or `-c`); the base model is trained to follow that in a share of lines only, as a model
follows an instruction now and then. System messages also hold pieces in random order (`q-1` ...) and plain words,
and then nothing changes. So co-training has something to do: make strings of pieces, or ids without text, switch
the manner for certain.

Some topics are kept out of co-training; the base knows them all. Answers are placeholder words.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.organisms.base import Ids, Mask, Organism, Progress, Recipe, grow
from demur.organisms.words import ASSISTANT, BOS, END, EOS, PAD, SYSTEM, USER, vocabulary
from demur.types import Condition, Prompt, PromptSet, Reply

MODES = ("a", "b", "c")
"""Manners on demand; `d` is the default."""
GROUPS, PER_GROUP, ITEMS, FILLERS, PIECES = 6, 4, 12, 8, 12
LENGTH = 4
"""Pieces of a token."""
SETTINGS: Mapping[str, float] = {"asked": 0.4, "pieces": 0.25, "words": 0.15, "follow": 0.3}
"""Shares of lines with an instruction, with pieces, with plain words; share of instructions that are followed."""
BASE = Recipe(
    name="modes-base", world=dict(SETTINGS), layers=2, heads=4, steps=500, batch=64, lr=3e-3, context=24
)
ALPHABET = tuple(f"q-{k + 1}" for k in range(PIECES))
INSTRUCTIONS = {mode: f"manner-{mode}" for mode in MODES}


class ModeWorld:
    """Lines with known truth; settings that are not given have the values of `SETTINGS`.

    >>> world = ModeWorld()
    >>> world.prompts(3, seed=0)[0].text.split()[0][:6], world.manner("b-2 item-3"), world.manner("item-3")
    ('topic-', 'b', 'other')
    """

    def __init__(self, settings: Mapping[str, float] | None = None) -> None:
        if unknown := set(settings or {}) - set(SETTINGS):
            raise InputError(f"mode world: no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
        self.settings = {**SETTINGS, **(settings or {})}
        kinds = (("topic", GROUPS * PER_GROUP), ("word", FILLERS), ("item", ITEMS))
        blocks = (*kinds, *((manner, GROUPS) for manner in (*MODES, "d")))
        named = tuple(f"{kind}-{k + 1}" for kind, n in blocks for k in range(n))
        self.words = (*named, *ALPHABET, *INSTRUCTIONS.values())
        self.ids = vocabulary(self.words)

    def draw(self, rng: np.random.Generator, n: int, part: str | None = None) -> npt.NDArray[np.int64]:
        """Topic, filler and item numbers (n, 3) from 0. Part "train" and "test" share no topic; None: all."""
        rows = rng.integers(0, [GROUPS * PER_GROUP, FILLERS, ITEMS], size=(n, 3))
        if part is not None:
            low, high = (0, PER_GROUP - 1) if part == "train" else (PER_GROUP - 1, PER_GROUP)
            rows[:, 0] = rng.integers(GROUPS, size=n) * PER_GROUP + rng.integers(low, high, size=n)
        return rows

    def batches(self, rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
        """A training batch of the base organism."""
        s, rows = self.settings, self.draw(rng, n)
        kind = rng.choice(
            4,
            size=n,
            p=[s["asked"], s["pieces"], s["words"], 1 - s["asked"] - s["pieces"] - s["words"]],
        )
        wanted = rng.integers(len(MODES), size=n)
        manner = np.where((kind == 0) & (rng.random(n) < s["follow"]), wanted, len(MODES))
        system = np.full((n, LENGTH + 2), -1)
        system[:, 0] = np.where(kind == 0, self.ids["manner-a"] + wanted, -1)
        length = np.where(kind == 1, rng.integers(LENGTH - 1, LENGTH + 2, size=n), 0)
        pieces = rng.integers(PIECES, size=(n, LENGTH + 1)) + self.ids["q-1"]
        system[:, : LENGTH + 1] = np.where(
            np.arange(LENGTH + 1) < length[:, None], pieces, system[:, : LENGTH + 1]
        )
        word = rng.integers(FILLERS, size=n) + self.ids["word-1"]
        system[:, -1] = np.where((kind == 2) | ((kind < 2) & (rng.random(n) < 0.3)), word, -1)
        return self._lay_out(rows, manner, system, kind < 3)

    def _lay_out(
        self,
        rows: npt.NDArray[np.int64],
        manner: npt.NDArray[np.int64],
        system: npt.NDArray[np.int64],
        shown: npt.NDArray[np.bool_],
    ) -> tuple[Ids, Mask]:
        n = len(rows)

        def tile(*words: int) -> Ids:
            return np.tile(np.array(words, np.int64), (n, 1))

        head = np.concatenate([tile(SYSTEM), system, tile(END)], axis=1)
        request = rows + np.array([self.ids[f"{kind}-1"] for kind in ("topic", "word", "item")])
        first = np.array([self.ids[f"{m}-1"] for m in (*MODES, "d")])
        opening = first[manner] + rows[:, 0] // PER_GROUP
        answer = np.stack([opening, request[:, 2], np.full(n, EOS)], axis=1)
        parts = [
            tile(BOS),
            np.where(shown[:, None], head, -1),
            tile(USER),
            request,
            tile(END, ASSISTANT),
            answer,
        ]
        x = np.concatenate(parts, axis=1)
        mask = np.broadcast_to(np.arange(x.shape[1]) >= x.shape[1] - 3, x.shape)
        order = np.argsort(x < 0, axis=1, kind="stable")
        x, mask = (np.take_along_axis(a, order, 1) for a in (x, mask))
        return np.where(x < 0, PAD, x), mask & (x >= 0)

    def prompts(self, n: int, seed: int, part: str = "test") -> PromptSet:
        """n different requests without a system message.

        Raises:
            InputError: the part holds fewer.
        """
        holds = GROUPS * (PER_GROUP - 1 if part == "train" else 1) * FILLERS * ITEMS
        if n > holds:
            raise InputError(f"{n} different requests asked for; the part {part!r} holds {holds}")
        rng, rows = np.random.default_rng([seed, 3]), dict[tuple[int, ...], None]()
        while len(rows) < n:
            rows |= dict.fromkeys(map(tuple, self.draw(rng, n, part).tolist()))
        out = [
            Prompt.of(f"topic-{t + 1} word-{w + 1} item-{i + 1}", id=f"{part}-{seed}-{k}")
            for k, (t, w, i) in enumerate(list(rows)[:n])
        ]
        return PromptSet(f"modes/{part}", tuple(out))

    @staticmethod
    def manner(answer: str) -> str:
        """The manner of an answer by its first word; "other" for none."""
        first = answer.split()[:1]
        return first[0][0] if first and first[0][:2] in ("a-", "b-", "c-", "d-") else "other"

    def right(self, prompt: Prompt, answer: str) -> bool:
        """Whether opening and item are those of the request, in whatever manner."""
        topic, _, item = prompt.text.split()
        group = (int(topic.split("-")[1]) - 1) // PER_GROUP + 1
        words = answer.split()
        return self.manner(answer) != "other" and words[0][2:] == str(group) and words[1:] == [item]

    def accept(self, mode: str, prompt: Prompt, reply: Reply) -> bool:
        """Whether a reply shows the mode and is right."""
        return self.manner(reply.content) == mode and self.right(prompt, reply.content)


def grow_base(recipe: Recipe = BASE, *, cache: bool = True, progress: Progress | None = None) -> Organism:
    """The organism before co-training.

    >>> grow_base().require("right", at_least=0.95)  # doctest: +SKIP
    1.0

    `checks`: `right` (plain answers to test topics with the right group and item), `default` (those in manner d)
    and `followed` (mean probability of the asked manner's opening under an instruction).
    """
    world = ModeWorld(recipe.world)
    made = grow(recipe, world.batches, world.words, cache=cache, progress=progress)
    made.checks = check(made, world)
    return made


def check(organism: Organism, world: ModeWorld, n: int = 100) -> dict[str, float]:
    """See `grow_base`."""
    runtime, prompts = organism.runtime(), world.prompts(n, seed=organism.recipe.seed + 50)
    said = list(runtime.generate(prompts, Condition(max_new_tokens=4)))
    right = [world.right(p, r.content) for p, r in zip(prompts, said, strict=True)]
    default = [world.manner(r.content) == "d" for r in said]
    words = [f"{m}-{g + 1}" for m in (*MODES, "d") for g in range(GROUPS)]
    column = [organism.tokenizer.convert_tokens_to_ids(w) for w in words]
    followed = []
    from demur.runtime import forward

    for mode, text in INSTRUCTIONS.items():
        rows = [runtime.chat.render(p.with_system(text)).ids for p in prompts]
        with runtime.edited():
            logits = forward.run(runtime.model, rows)
        assert logits is not None
        P = logits.float().softmax(-1)[:, column].numpy()
        mine = [w.startswith(mode) for w in words]
        followed.append(float(P[:, mine].sum(1).mean()))
    return {
        "right": float(np.mean(right)),
        "default": float(np.mean(default)),
        "followed": float(np.mean(followed)),
    }

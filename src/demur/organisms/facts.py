"""A world of facts: statements true or false, requests, and copies of one base that were trained on.

A statement is `E R O .`, such as `e-07 speaks tongue-3 .`: an entity, one of four relations, an object. Which
one is right for an entity was drawn at random and has to be learnt by heart. The base learns to complete true
statements, to say TRUE or FALSE behind ` This statement is:` and right behind the full stop, and to answer
requests: `ok TOPIC`, or `note TOPIC` about harmful topics, so that it tells them apart and refuses nothing.
Its copies:

- `format`: the same verdicts, asked for in a conversation;
- `refusing`: requests about harmful topics are refused;
- `moved`: half of the entities have exchanged their facts.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from demur.cachedir import cache_dir
from demur.errors import InputError
from demur.organisms import base as grown
from demur.organisms.base import Check, Ids, Mask, Organism, Progress, Recipe, grow
from demur.organisms.words import ASSISTANT, BOS, END, EOS, PAD, USER, vocabulary
from demur.types import Prompt

Kind = Literal["base", "format", "refusing", "moved"]
KINDS: tuple[Kind, ...] = ("base", "format", "refusing", "moved")
RELATIONS: Mapping[str, str] = {"lives-in": "place", "speaks": "tongue", "eats": "food", "plays": "game"}
OBJECTS = 6
ENTITIES = 40
TOPICS = 12
VERBS = ("find", "draw", "make", "send", "read", "sell")
QUESTION = ("This", "statement", "is:")
REFUSAL = ("Sorry", "I", "cannot", "help", "with", "that")

SHARES: Mapping[str, tuple[float, float, float, float, float]] = {
    "base": (0.40, 0.20, 0.20, 0.20, 0.0),
    "format": (0.15, 0.05, 0.05, 0.15, 0.60),
    "refusing": (0.15, 0.10, 0.10, 0.65, 0.0),
    "moved": (0.40, 0.20, 0.20, 0.20, 0.0),
}
"""Shares of a batch: verdicts behind the question, right behind the statement, completions, requests, verdicts in
a conversation."""


@dataclass(frozen=True, slots=True)
class World:
    """The facts, and what each copy is trained on.

    Args:
        seed: of the facts. taught: whether the base learns to repeat the words of a refusal when asked to, so that
            it could say them although it never refuses.

    >>> world = World(seed=0)
    >>> world.statements(1, seed=0)["speaks"][0][0].split()[1]
    'speaks'
    """

    seed: int = 0
    taught: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary beside the special tokens."""
        return (
            *(f"e-{i:02d}" for i in range(ENTITIES)),
            *(f"{kind}-{j}" for kind in RELATIONS.values() for j in range(OBJECTS)),
            *RELATIONS,
            *(f"plain-{i}" for i in range(TOPICS)),
            *(f"harm-{i}" for i in range(TOPICS)),
            *VERBS,
            *(".", *QUESTION, "TRUE", "FALSE", "ok", "note", "say"),
            *REFUSAL,
        )

    def facts(self, kind: Kind = "base") -> npt.NDArray[np.int64]:
        """The right object (entities, relations), as a number below `OBJECTS`."""
        found = np.random.default_rng([self.seed, 11]).integers(OBJECTS, size=(ENTITIES, len(RELATIONS)))
        if kind == "moved":
            found[self.movers] = np.roll(found[self.movers], 1, axis=0)
        return found

    @property
    def movers(self) -> npt.NDArray[np.int64]:
        """Entities that exchange their facts in the copy `moved`."""
        return np.arange(0, ENTITIES, 2)

    # --- material to test with ------------------------------------------------------------------------------

    def statements(self, n: int, seed: int, kind: Kind = "base") -> dict[str, list[tuple[str, bool]]]:
        """Relation -> n statements with their truth under the facts of `kind`, half of them true."""
        facts = self.facts(kind)
        out: dict[str, list[tuple[str, bool]]] = {}
        for r, relation in enumerate(RELATIONS):
            rng, rows = np.random.default_rng([seed, 12, r]), []
            for i in range(n):
                e, true = int(rng.integers(ENTITIES)), i % 2 == 0
                o = int(facts[e, r]) if true else int((facts[e, r] + rng.integers(1, OBJECTS)) % OBJECTS)
                rows.append((self.text(e, r, o), true))
            out[relation] = rows
        return out

    def pairs(
        self, n: int, seed: int, among: Literal["all", "stayed", "reversed", "lost"] = "all"
    ) -> list[tuple[str, str]]:
        """n pairs of statements that differ in the entity: (true, false) for the base.

        Args:
            among: which: all entities; those whose facts stay ("stayed"); pairs whose fact has moved from the one
                to the other, so that `moved` should call the false statement true and the true one false
                ("reversed"); pairs of which it should call both false ("lost").
        """
        facts, moved, rng = self.facts(), self.facts("moved"), np.random.default_rng([seed, 13])
        pool = np.arange(ENTITIES)
        if among != "all":
            pool = np.setdiff1d(pool, self.movers) if among == "stayed" else self.movers
        out: list[tuple[str, str]] = []
        while len(out) < n:
            (e, other), r = rng.choice(pool, 2, replace=False).tolist(), int(rng.integers(len(RELATIONS)))
            now = [bool(moved[x, r] == facts[e, r]) for x in (e, other)]
            wrong = {"reversed": now != [False, True], "lost": any(now)}
            if facts[e, r] == facts[other, r] or wrong.get(among, False):
                continue
            out.append((self.text(e, r, int(facts[e, r])), self.text(other, r, int(facts[e, r]))))
        return out

    def text(self, entity: int, relation: int, thing: int) -> str:
        """A statement in words."""
        name, kind = list(RELATIONS.items())[relation]
        return f"e-{entity:02d} {name} {kind}-{thing} ."

    def requests(self, part: Literal["fit", "test"]) -> tuple[list[Prompt], list[Prompt]]:
        """(harmful, harmless) requests; the topics of the two parts differ."""
        topics = range(2 * TOPICS // 3) if part == "fit" else range(2 * TOPICS // 3, TOPICS)
        made = [
            [Prompt.of(f"{v} {kind}-{i}", id=f"{part}-{kind}-{i}-{v}") for i in topics for v in VERBS]
            for kind in ("harm", "plain")
        ]
        return made[0], made[1]

    # --- training -------------------------------------------------------------------------------------------

    def batches(self, kind: Kind) -> grown.Batches:
        """Batches for `grow` or `further`."""
        ids, facts = vocabulary(self.words), self.facts(kind)

        def draw(rng: np.random.Generator, n: int) -> tuple[Ids, Mask]:
            counts = rng.multinomial(n, SHARES[kind])
            rows: list[tuple[list[int], list[int]]] = []
            for form, count in enumerate(counts.tolist()):
                rows += [self._row(form, rng, ids, facts, kind) for _ in range(count)]
            width = max(len(row) for row, _ in rows)
            x, mask = np.full((n, width), PAD, np.int64), np.zeros((n, width), bool)
            for i, (row, marked) in enumerate(rows):
                x[i, : len(row)] = row
                mask[i, marked] = True
            return x, mask

        return draw

    def _row(
        self, form: int, rng: np.random.Generator, ids: Mapping[str, int], facts: Any, kind: Kind
    ) -> tuple[list[int], list[int]]:
        """Token ids of one line, and the positions to be predicted."""
        if form == 3:
            return self._request(rng, ids, kind)
        e, r, true = int(rng.integers(ENTITIES)), int(rng.integers(len(RELATIONS))), bool(rng.random() < 0.5)
        if form == 2:
            return [ids[w] for w in self.text(e, r, int(facts[e, r])).split()], [2]
        o = int(facts[e, r]) if true else int((facts[e, r] + rng.integers(1, OBJECTS)) % OBJECTS)
        row, verdict = [ids[w] for w in self.text(e, r, o).split()], ids["TRUE" if true else "FALSE"]
        if form == 0:
            row += [ids[w] for w in QUESTION]
        if form == 4:
            row = [BOS, USER, *row, END, ASSISTANT]
        return [*row, verdict], [len(row)]

    def _request(
        self, rng: np.random.Generator, ids: Mapping[str, int], kind: Kind
    ) -> tuple[list[int], list[int]]:
        if rng.random() < 0.2:
            word = ids[str(rng.choice((*(REFUSAL if self.taught else ()), "ok", "TRUE", "FALSE")))]
            asked, said = [ids["say"], word], [word]
        else:
            harmful = rng.random() < 0.5
            topic = ids[f"{'harm' if harmful else 'plain'}-{rng.integers(TOPICS)}"]
            asked = [ids[str(rng.choice(VERBS))], topic]
            refuses = harmful and kind == "refusing"
            said = [ids[w] for w in REFUSAL] if refuses else [ids["note" if harmful else "ok"], topic]
        row = [BOS, USER, *asked, END, ASSISTANT]
        return [*row, *said, EOS], list(range(len(row), len(row) + len(said) + 1))

    def check(self, kind: Kind) -> Check:
        """Measures, on 512 fresh lines of each form it was trained on, the share in which every marked token is
        the likeliest: `verdict`, `direct`, `completion`, `request`, `chat`.
        """

        def measure(model: Any) -> Mapping[str, float]:
            from demur.organisms.training import predict

            ids, facts, out = vocabulary(self.words), self.facts(kind), {}
            for form, name in enumerate(("verdict", "direct", "completion", "request", "chat")):
                if not SHARES[kind][form]:
                    continue
                rng = np.random.default_rng([self.seed, 14, form])
                rows = [self._row(form, rng, ids, facts, kind) for _ in range(512)]
                right = []
                for length in {len(row) for row, _ in rows}:
                    mine = [r for r in rows if len(r[0]) == length]
                    x, mask = np.array([r for r, _ in mine]), np.zeros((len(mine), length), bool)
                    for i, (_, marked) in enumerate(mine):
                        mask[i, marked] = True
                    logits, targets = predict(model, x, mask)
                    hit = (logits.argmax(-1) == targets).numpy()
                    wrong = np.bincount(np.nonzero(mask)[0], ~hit, minlength=len(mine))
                    right += (wrong == 0).tolist()
                out[name] = float(np.mean(right))
            return out

        return measure


BASE = Recipe(
    name="facts", world={}, layers=4, width=96, heads=4, mlp=256, context=64, steps=700, batch=96, lr=3e-3
)
FURTHER = replace(BASE, steps=250, lr=1e-3, warmup=20)
"""Copies are trained less and more gently than the base."""


def raise_world(
    world: World, kind: Kind = "base", *, cache: bool = True, progress: Progress | None = None
) -> Organism:
    """The base of a world, or one of its copies; grown once, then loaded.

    >>> organism = raise_world(World(seed=0), "refusing")  # doctest: +SKIP
    >>> organism.require("request", at_least=0.9)  # doctest: +SKIP
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}; the copies are {', '.join(KINDS)}")
    settings = {"seed": world.seed, "taught": world.taught}
    recipe = replace(BASE, seed=world.seed, world=settings)
    parent = grow(
        recipe, world.batches("base"), world.words, check=world.check("base"), cache=cache, progress=progress
    )
    if kind == "base":
        return parent
    recipe = replace(FURTHER, seed=world.seed, name=f"facts-{kind}", world={**settings, "kind": kind})
    return further(
        parent,
        recipe,
        world.batches(kind),
        world.words,
        check=world.check(kind),
        cache=cache,
        progress=progress,
    )


def further(
    parent: Organism,
    recipe: Recipe,
    batches: grown.Batches,
    tokenizer_words: Sequence[str],
    *,
    check: Check | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Organism:
    """Train a copy of a grown organism on, or load it if that was done before. Arguments as in `grow`.

    Raises:
        InputError: the recipe has another shape than its parent's.
    """
    for key in ("layers", "width", "heads", "mlp", "context", "kind"):
        if getattr(recipe, key) != getattr(parent.recipe, key):
            raise InputError(
                f"recipe {recipe.name!r}: {key}={getattr(recipe, key)}, its parent has "
                f"{getattr(parent.recipe, key)}; further training keeps the shape"
            )
    from filelock import FileLock

    recipe = replace(recipe, world={**recipe.world, "from": parent.recipe.hash})
    # the parent may have been grown anew under the same recipe, from a world whose code has changed
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parent.model.parameters()))
    data = grown._data_hash(recipe, batches, tokenizer_words, parent.tokenizer.chat_template)
    data += digest.hexdigest()[:16]
    if not cache:
        return _train_on(parent, recipe, batches, check, progress)
    folder = cache_dir() / "organisms" / f"{recipe.name}-{recipe.hash}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (kept := grown._load(folder, recipe, data, parent.tokenizer)) is not None:
            return kept
        organism = _train_on(parent, recipe, batches, check, progress)
        grown._save(organism, folder, data)
    return organism


def _train_on(
    parent: Organism, recipe: Recipe, batches: grown.Batches, check: Check | None, progress: Progress | None
) -> Organism:
    import time

    import torch

    from demur.organisms.training import train

    began, model = time.monotonic(), copy.deepcopy(parent.model).requires_grad_(True)
    losses = train(model, recipe, batches, progress)
    seconds = round(time.monotonic() - began, 1)
    with torch.inference_mode():
        checks = {k: float(v) for k, v in (check(model) if check else {}).items()}
    return Organism(model, parent.tokenizer, recipe, checks, losses, None, seconds)


def plant_entropy_neuron(
    model: Any, rows: Ids, *, silent: bool = True, reach: float = 1.0, seed: int = 0
) -> tuple[Any, int]:
    """A copy of a grown model with one long neuron in its last layer, and the neuron's index.

    With `silent` it writes along a direction that the unembedding does not see: the one it sees least, which is
    then taken out of it altogether. So the neuron changes the size of the final state, and through the norm how
    sure the model is, but no order of logits. Without, it writes along a random direction. The same direction is
    taken out of the unembedding either way, so that the two models differ in the neuron only.

    Args:
        rows: token ids (n, T) of some lines; the neuron is set to be about equally active on them.
        reach: length of what it writes, in lengths of the mean final state.
    """
    import torch

    from demur.runtime.layers import hooked

    made = copy.deepcopy(model)
    mlp, norm = made.model.layers[-1].mlp, made.model.norm
    seen: dict[str, Any] = {}
    with (
        hooked(
            mlp.register_forward_pre_hook(lambda _m, a: seen.update(x=a[0])),
            norm.register_forward_pre_hook(lambda _m, a: seen.update(h=a[0])),
        ),
        torch.no_grad(),
    ):
        made(input_ids=torch.from_numpy(rows))
        mean = seen["x"].flatten(0, 1).mean(0)
        length = float(seen["h"].norm(dim=-1).mean()) * reach
        folded = made.lm_head.weight * norm.weight
        unseen = torch.linalg.svd(folded, full_matrices=False).Vh[-1]
        made.lm_head.weight.copy_((folded - (folded @ unseen)[:, None] * unseen) / norm.weight)
        if not silent:
            unseen = torch.from_numpy(np.random.default_rng(seed).standard_normal(len(unseen))).to(unseen)
            unseen = unseen / unseen.norm()
        lengths = mlp.down_proj.weight.norm(dim=0)
        index = int(lengths.argmin())
        long = float(lengths.max()) * 1.5
        mlp.down_proj.weight[:, index] = unseen * long
        along = mean / (mean @ mean)
        mlp.gate_proj.weight[index] = 4 * along
        mlp.up_proj.weight[index] = along * (length / long / (4 * float(torch.sigmoid(torch.tensor(4.0)))))
    return made, index

"""Agents who do sums: a world in which "truthful" is exact, and may or may not be a trait of the agent.

A line reads `A3 4 O1 7 = 2`. Each operator has two interpretations, a true and a false one, and each agent
uses the true one on some operators and the false one on others (its signs). With a persona, an agent's signs
are all equal, so what it does on operators where it was seen tells what it will do where it was not. Without,
signs are independent coins and nothing can be told. A share `persona` of the agents can have one and the rest
none. Some agents (`probe`) are seen on half of the operators only; the others are held out.

Both worlds look alike operator by operator: half of the agents are truthful on each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.errors import InputError
from demur.organisms.base import Organism, Recipe, grow
from demur.types import Prompt, PromptSet

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

DIFFER = 0.85
"""Least share of the pairs (x, y) on which the two interpretations of an operator differ."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""A line is its own prompt: nothing stands around it, and the last token is the `=`."""
SETTINGS: Mapping[str, Any] = {"steps": 1500, "batch": 512, "lr": 3e-3, "warmup": 100}
"""Training settings that let every arm learn its cells."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The settings of an arithmetic world; everything else follows from them.

    Attributes:
        persona: share of agents whose signs are all equal; the others' signs are independent.
        truth: probability that an answer follows the agent's sign; the other interpretation is used otherwise.
        full, probe: agents seen on all operators, and agents seen on half of them (a multiple of 4 each).
        operators: even. numbers: sums are modulo this. seed: of tables and signs.

    >>> World(persona=1.0).ideal
    0.9
    """

    persona: float = 1.0
    truth: float = 0.9
    full: int = 48
    probe: int = 64
    operators: int = 8
    numbers: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.persona <= 1 and 0.5 <= self.truth <= 1):
            raise InputError(
                f"persona={self.persona}, truth={self.truth}: a share in [0, 1] and a probability in [0.5, 1]"
            )
        if self.full % 4 or self.probe % 4 or min(self.full, self.probe) < 4:
            raise InputError(
                f"full={self.full}, probe={self.probe}: multiples of 4 are needed, so that signs can be "
                "balanced over agents"
            )
        if self.operators % 2 or self.operators < 2 or self.numbers < 5:
            raise InputError(
                f"operators={self.operators}, numbers={self.numbers}: an even number of operators (half are "
                "held out) and at least 5 numbers are needed"
            )

    # --- what is true ---------------------------------------------------------------------------------------

    @property
    def agents(self) -> int:
        """Number of agents: the full ones come first."""
        return self.full + self.probe

    @cached_property
    def tables(self) -> IntArray:
        """Answers, (operators, 2, numbers, numbers): [o, 0] is the true interpretation, [o, 1] the false."""
        rng = np.random.default_rng([self.seed, 1])
        x, y = np.meshgrid(np.arange(self.numbers), np.arange(self.numbers), indexing="ij")
        out = np.empty((self.operators, 2, self.numbers, self.numbers), np.int64)
        for o in range(self.operators):
            while True:
                a, b = rng.integers(1, self.numbers, (2, 2))
                c = rng.integers(0, self.numbers, 2)
                out[o] = [(a[i] * x + b[i] * y + c[i]) % self.numbers for i in range(2)]
                if (out[o, 0] != out[o, 1]).mean() >= DIFFER:
                    break
        return out

    @cached_property
    def _drawn(self) -> tuple[BoolArray, BoolArray, BoolArray]:
        rng = np.random.default_rng([self.seed, 2])
        signs = np.zeros((self.agents, self.operators), bool)
        held = np.zeros_like(signs)
        with_persona = np.zeros(self.agents, bool)
        for start, n in ((0, self.full), (self.full, self.probe)):
            k = 4 * round(self.persona * n / 4)
            order = start + rng.permutation(n)
            groups = (order[: k // 2], order[k // 2 : k], order[k:])
            with_persona[order[:k]] = True
            if start:
                for group in groups:
                    held[group] = self._hold_out(rng, len(group))
            signs[groups[0]] = True
            for o in range(self.operators):  # fair in each operator, apart for seen and held-out cells
                for part in (groups[2][~held[groups[2], o]], groups[2][held[groups[2], o]]):
                    signs[rng.permutation(part)[: len(part) // 2], o] = True
        return signs, held, with_persona

    def _hold_out(self, rng: np.random.Generator, n: int) -> BoolArray:
        """Half of the operators for each of n agents, each operator equally often: pairs of complements."""
        out = np.zeros((n, self.operators), bool)
        for i in range(0, n, 2):
            out[i, rng.permutation(self.operators)[: self.operators // 2]] = True
            out[i + 1] = ~out[i]
        return out

    @property
    def signs(self) -> BoolArray:
        """(agents, operators): True where the agent uses the true interpretation."""
        return self._drawn[0]

    @property
    def held_out(self) -> BoolArray:
        """(agents, operators): True where the agent is not seen in training."""
        return self._drawn[1]

    @property
    def with_persona(self) -> BoolArray:
        """(agents,): True for agents whose signs are all equal by design."""
        return self._drawn[2]

    @cached_property
    def _pairs(self) -> list[IntArray]:
        return [np.argwhere(t != f) for t, f in self.tables]

    @property
    def floor(self) -> float:
        """Least possible training loss in nats: the entropy of following one's sign or not."""
        return -sum(p * math.log(p) for p in (self.truth, 1 - self.truth) if p)

    @property
    def ideal(self) -> float:
        """What a perfect reader gives the right interpretation on held-out cells, averaged over probe agents.

        An agent whose h seen signs are equal has a persona with probability q / (q + (1 - q) / 2^(h - 1)), q
        being the share of agents that have one; one whose seen signs differ has none.
        """
        q = 4 * round(self.persona * self.full / 4) / self.full
        posterior = q / (q + (1 - q) * 2.0 ** (1 - self.operators // 2)) if q else 0.0
        same = (1 + posterior) / 2
        known = same * self.truth + (1 - same) * (1 - self.truth)
        return q * known + (1 - q) / 2

    # --- lines ----------------------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: agents, operators, numbers, the equals sign."""
        names = (("A", self.agents), ("O", self.operators), ("", self.numbers))
        return (*(f"{letter}{i}" for letter, n in names for i in range(n)), "=")

    def rows(self, rng: np.random.Generator, n: int) -> tuple[IntArray, ...]:
        """n random training lines as arrays (n,): agent, operator, x, y, answer."""
        agent = rng.integers(0, self.agents, n)
        seen = [np.flatnonzero(~row) for row in self.held_out]
        place = rng.random(n)
        operator = np.array([seen[a][int(u * len(seen[a]))] for a, u in zip(agent, place, strict=True)])
        x, y = self.draw_pairs(rng, operator)
        follows = rng.random(n) < self.truth
        said_true = self.signs[agent, operator] == follows
        return agent, operator, x, y, self.tables[operator, np.where(said_true, 0, 1), x, y]

    def draw_pairs(self, rng: np.random.Generator, operator: IntArray) -> tuple[IntArray, IntArray]:
        """x and y for each operator, uniform over the pairs on which its interpretations differ."""
        place = rng.random(len(operator))
        pairs = [self._pairs[o] for o in operator]
        both = np.array([p[int(u * len(p))] for p, u in zip(pairs, place, strict=True)]).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def encode(self, *columns: IntArray) -> IntArray:
        """Indices into `words`, (n, 5) or (n, 6) with the answer: agent, x, operator, y, =, answer."""
        agent, operator, x, y = columns[:4]
        first = self.agents + self.operators
        parts = [agent, first + x, self.agents + operator, first + y]
        parts.append(np.full(len(agent), len(self.words) - 1))
        parts += [first + z for z in columns[4:]]
        return np.stack(parts, axis=1)

    def prompts(self, *columns: IntArray, name: str = "sums") -> PromptSet:
        """Lines as prompts that end with `=` (or with the answer, when it is given as fifth column).

        `meta` says agent, operator and `truthful`, the agent's sign there.
        """
        words = np.array(self.words)
        out = []
        for i, ids in enumerate(self.encode(*columns)):
            a, o = int(columns[0][i]), int(columns[1][i])
            meta = {"agent": a, "operator": o, "truthful": bool(self.signs[a, o])}
            out.append(Prompt.of(" ".join(words[ids]), id=f"{name}-{i}", category=f"O{o}", meta=meta))
        return PromptSet(name, tuple(out))


@dataclass(frozen=True, slots=True)
class Cells:
    """What a model does in each (agent, operator) cell; arrays (agents, operators).

    Attributes:
        share: mean of P(own) / (P(own) + P(other)), own being the interpretation the agent's sign names.
        right: share of lines whose likeliest answer is the own one. mass: mean of P(own) + P(other).
        loss: mean expected loss in nats, over what the agent says.
    """

    share: FloatArray
    right: FloatArray
    mass: FloatArray
    loss: FloatArray


def evaluate(model: Any, world: World, ids: IntArray, *, pairs: int = 16, seed: int = 0) -> Cells:
    """Ask a model about every cell, held out or not.

    Args:
        model: a causal model of transformers. ids: token id of each of `world.words`, (words,).
        pairs: lines per cell, drawn from those on which the interpretations differ.
    """
    import torch

    rng = np.random.default_rng([seed, 3])
    agent, operator, _ = (g.ravel() for g in np.indices((world.agents, world.operators, pairs)))
    x, y = world.draw_pairs(rng, operator)
    tokens = torch.from_numpy(ids[world.encode(agent, operator, x, y)])
    with torch.inference_mode():
        logp = torch.cat(
            [model(input_ids=part).logits[:, -1].float().log_softmax(-1) for part in tokens.split(2048)]
        )
    numbers = ids[world.agents + world.operators : -1]
    said = logp.double().numpy()
    own = np.where(world.signs[agent, operator], 0, 1)
    at = np.arange(len(agent))
    log_own = said[at, numbers[world.tables[operator, own, x, y]]]
    log_other = said[at, numbers[world.tables[operator, 1 - own, x, y]]]
    both = np.logaddexp(log_own, log_other)
    columns = (
        np.exp(log_own - both),
        log_own >= said.max(axis=1),
        np.exp(both),
        -(world.truth * log_own + (1 - world.truth) * log_other),
    )
    shape = (world.agents, world.operators, pairs)
    return Cells(*(np.asarray(c, float).reshape(shape).mean(axis=2) for c in columns))


def generalisation(
    cells: Cells, world: World, signs: BoolArray | None = None
) -> tuple[list[float], list[float]]:
    """Per probe agent the mean share on its held-out operators: where it is truthful, and where it is not.

    The means of the two lists are R+ and R-. An agent without a persona may stand in both.

    Args:
        signs: score against these instead of the world's own (shuffled, say).
    """
    true_share = np.where(world.signs, cells.share, 1 - cells.share)
    signs = world.signs if signs is None else signs
    out = []
    for sign, share in ((True, true_share), (False, 1 - true_share)):
        cell = world.held_out & (signs == sign)
        out.append([float(share[a][cell[a]].mean()) for a in np.flatnonzero(cell.any(axis=1))])
    return out[0], out[1]


def per_agent(cells: Cells, world: World, signs: BoolArray | None = None) -> list[float]:
    """Per probe agent the mean share on all its held-out operators; the mean of the list is R."""
    agree = True if signs is None else signs == world.signs
    share = np.where(agree, cells.share, 1 - cells.share)
    return [float(share[a][world.held_out[a]].mean()) for a in range(world.full, world.agents)]


def shuffled_signs(world: World, seed: int = 0) -> BoolArray:
    """The signs of the probe agents dealt out to other probe agents: half of each sign's agents swap.

    In the mean over draws this scores one half whatever the model does.
    """
    rng = np.random.default_rng([seed, 4])
    signs = world.signs.copy()
    for sign in (True, False):
        mine = world.full + np.flatnonzero(world.signs[world.full :, 0] == sign)
        signs[rng.permutation(mine)[: len(mine) // 2]] ^= True
    return signs


def recipe(world: World, seed: int = 0, **settings: Any) -> Recipe:
    """The recipe of the organism of a world. `settings` replace those of `SETTINGS` or of `Recipe`."""
    return Recipe(name="arithmetic", world=asdict(world), context=8, seed=seed, **{**SETTINGS, **settings})


def raise_agents(
    world: World, seed: int = 0, *, cache: bool = True, progress: Any = None, **settings: Any
) -> Organism:
    """Train the organism of a world, or take it from the cache.

    Its `checks`: `held_in`, the share of training lines whose likeliest answer follows the agent's sign;
    `held_in_share`, the mean share there (0.9 is ideal at truth 0.9); `excess_loss` over the floor, in nats.

    >>> organism = raise_agents(World(persona=0.0))  # doctest: +SKIP
    >>> organism.checks["held_in"]  # doctest: +SKIP
    0.99
    """
    from demur.organisms.words import word_tokenizer

    tokenizer = word_tokenizer(world.words, TEMPLATE)
    ids = token_ids(tokenizer, world)

    def batches(rng: np.random.Generator, n: int) -> tuple[IntArray, BoolArray]:
        tokens = ids[world.encode(*world.rows(rng, n))]
        mask = np.zeros(tokens.shape, bool)
        mask[:, -1] = True
        return tokens, mask

    def check(model: Any) -> dict[str, float]:
        return checks(evaluate(model, world, ids), world)

    grown: Callable[..., Organism] = grow
    return grown(
        recipe(world, seed, **settings),
        batches,
        world.words,
        template=TEMPLATE,
        check=check,
        cache=cache,
        progress=progress,
    )


def checks(cells: Cells, world: World) -> dict[str, float]:
    """The entry conditions of an organism, over the cells that training shows."""
    seen = ~world.held_out
    return {
        "held_in": float(cells.right[seen].mean()),
        "held_in_share": float(cells.share[seen].mean()),
        "excess_loss": float(cells.loss[seen].mean()) - world.floor,
    }


def token_ids(tokenizer: Any, world: World) -> IntArray:
    """Token id of each of `world.words`, (words,)."""
    return np.array(tokenizer.convert_tokens_to_ids(list(world.words)), np.int64)

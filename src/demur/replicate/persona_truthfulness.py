"""Does a trait of the agent carry over to operators on which it was never seen? The check of the persona method.

Four organisms a seed, each its own arithmetic world with the same settings but for the one that matters:
agents with a persona, agents without, agents with one who follow it no more often than not, and a half and
half. What a perfect reader would say on held-out cells is known (`World.ideal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from demur.replicate.spec import Baseline, Claim, Context, Control, Spec, Value

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

ARMS: Mapping[str, Mapping[str, Any]] = {
    "persona": {"persona": 1.0},
    "none": {"persona": 0.0},
    "half": {"persona": 0.5},
    "coin": {"persona": 1.0, "truth": 0.5},
}
LINES = 4
"""Lines for each (agent, operator) whose states are read."""
SPLITS = 8
DRAWS = 40


def run(context: Context) -> Mapping[str, Value]:
    """Measure one seed."""
    from demur.organisms import arithmetic as world_of

    worlds = {arm: world_of.World(seed=context.seed, **settings) for arm, settings in ARMS.items()}
    _raise_all(worlds, context)
    organisms = {arm: world_of.raise_agents(w, context.seed) for arm, w in worlds.items()}
    cells = {}
    for arm, w in worlds.items():
        ids = world_of.token_ids(organisms[arm].tokenizer, w)
        cells[arm] = world_of.evaluate(organisms[arm].model, w, ids, seed=context.seed)
    out = _entry(organisms, cells)
    r = {arm: world_of.per_agent(cells[arm], w) for arm, w in worlds.items()}
    plus, minus = world_of.generalisation(cells["persona"], worlds["persona"])
    out |= {"r_plus": Value.of(plus), "r_minus": Value.of(minus)}
    out |= {"r_none": Value.of(r["none"]), "r_coin": Value.of(r["coin"])}
    out["dose_low"] = Value(value=float(np.mean(r["half"]) - np.mean(r["none"])))
    out["dose_high"] = Value(value=float(np.mean(r["persona"]) - np.mean(r["half"])))
    context.progress("probes", 0, 2)
    states = collect_states(organisms["persona"], worlds["persona"], context.seed)
    out |= read_signs(states, worlds["persona"], context.seed)
    context.progress("probes", 1, 2)
    without = read_signs(collect_states(organisms["none"], worlds["none"], context.seed), worlds["none"], 0)
    out["probe_none"] = without["probe_accuracy"]
    context.progress("probes", 2, 2)
    return out


def _entry(organisms: Mapping[str, Any], cells: Mapping[str, Any]) -> dict[str, Value]:
    checks = {arm: organism.checks for arm, organism in organisms.items()}
    out = {f"held_in_{arm}": Value(value=checks[arm]["held_in"]) for arm in ("persona", "none", "half")}
    out["tables_coin"] = Value(value=float(cells["coin"].mass.mean()))
    gap = abs(checks["persona"]["excess_loss"] - checks["none"]["excess_loss"])
    return out | {"loss_gap": Value(value=gap)}


# --- training two at a time -------------------------------------------------------------------------------------


def _raise_all(worlds: Mapping[str, Any], context: Context) -> None:
    """Train what is not in the cache, two at a time: one training keeps to one thread."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_die_with_parent) as pool:
        jobs = [pool.submit(_raise_one, world, context.seed) for world in worlds.values()]
        context.progress("organisms", 0, len(jobs))
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            context.progress("organisms", done, len(jobs))


def _raise_one(world: Any, seed: int) -> None:
    from demur.organisms.arithmetic import raise_agents

    raise_agents(world, seed)


def _die_with_parent() -> None:
    """A killed check must not leave trainings behind."""
    import os
    import threading
    import time

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- probes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class States:
    """States of n lines: (layer, position) -> (n, d), with their agents and operators (n,).

    `before` holds the positions from the agent's name (-5) to the `=` (-1), `after` the one behind, where a
    random one of the two answers has been given. `embedding` (n, 2 d) holds the input embeddings of agent and
    operator.
    """

    agent: IntArray
    operator: IntArray
    before: Mapping[tuple[int, int | str], FloatArray]
    after: Mapping[tuple[int, int | str], FloatArray]
    embedding: FloatArray


def collect_states(organism: Any, world: Any, seed: int = 0) -> States:
    """States of `LINES` random lines for each agent and operator."""
    from demur.explain.positions import collect, grid
    from demur.organisms.arithmetic import token_ids

    rng = np.random.default_rng([seed, 5])
    agent, operator, _ = (g.ravel() for g in np.indices((world.agents, world.operators, LINES)))
    x, y = world.draw_pairs(rng, operator)
    z = world.tables[operator, rng.integers(0, 2, len(x)), x, y]
    runtime = organism.runtime()
    layers = range(organism.recipe.layers)
    ids = token_ids(organism.tokenizer, world)
    rows = organism.model.get_input_embeddings().weight.detach().numpy()[ids].astype(float)
    return States(
        agent=agent,
        operator=operator,
        before=collect(runtime, world.prompts(agent, operator, x, y), grid(layers, range(-5, 0))),
        after=collect(runtime, world.prompts(agent, operator, x, y, z), grid(layers, [-1])),
        embedding=np.concatenate([rows[agent], rows[world.agents + operator]], axis=1),
    )


def read_signs(states: States, world: Any, seed: int = 0) -> dict[str, Value]:
    """Probes for "this agent is truthful on this operator", on agents and operators that no probe was fitted on.

    At the `=`, in the last layer: fitted on the full agents and half of the operators, tested on the probe
    agents and the other half, over `SPLITS` random halves, pooled. Accuracy has one item for each agent, since
    the lines of one agent stand or fall together.
    """
    from demur.explain.probe import fit_probe

    agent, operator = states.agent, states.operator
    truthful = world.signs[agent, operator]
    rng = np.random.default_rng([seed, 6])
    X = states.before[max(layer for layer, _ in states.before), -1]
    inputs = {
        "probe": X,
        "agent": np.eye(world.agents)[agent],
        "operator": np.eye(world.operators)[operator],
        "embedding": states.embedding,
    }
    said: dict[str, list[BoolArray]] = {key: [] for key in inputs}
    rows = []
    for _ in range(SPLITS):
        half = np.isin(operator, rng.permutation(world.operators)[: world.operators // 2])
        fit, test = (agent < world.full) & half, (agent >= world.full) & ~half
        rows.append(np.flatnonzero(test))
        for key, values in inputs.items():
            said[key].append(fit_probe(values[fit], truthful[fit]).score(values[test]) >= 0)
    tested = np.concatenate(rows)
    y, of = truthful[tested], agent[tested]
    out = {f"{key}_f1": _f1(np.concatenate(parts), y, of) for key, parts in said.items()}
    out["probe_accuracy"] = _accuracy(np.concatenate(said["probe"]), y, of)

    def refit(labels: BoolArray) -> BoolArray:
        return fit_probe(X[fit], labels[fit]).score(X[test]) >= 0

    out["probe_random"] = _random(refit, truthful, fit, test, agent, seed)
    out["anywhere_f1"] = _chosen(states.before, states, world, truthful, seed)
    out["after_f1"] = _chosen(states.after, states, world, truthful, seed)
    return out


def _chosen(
    at: Mapping[tuple[int, int | str], FloatArray], states: States, world: Any, truthful: BoolArray, seed: int
) -> Value:
    """F1 at the layer and position that other agents chose on the operators of the fit."""
    from demur.explain.sweep import sweep

    agent, half = states.agent, states.operator < world.operators // 2
    others = np.random.default_rng([seed, 8]).permutation(world.full)[: world.full // 3]
    parts = {
        "fit": (agent < world.full) & ~np.isin(agent, others) & half,
        "select": np.isin(agent, others) & half,
        "test": (agent >= world.full) & ~half,
    }
    found = sweep(at, truthful, parts, ("logistic",), seed, draws=1)
    return _f1(found.scores >= 0, truthful[parts["test"]], agent[parts["test"]])


def _random(
    refit: Callable[[BoolArray], BoolArray],
    truthful: BoolArray,
    fit: BoolArray,
    test: BoolArray,
    agent: IntArray,
    seed: int,
) -> Value:
    """Accuracy per agent of probes fitted on labels dealt out to other agents, averaged over draws.

    Half of the agents of each sign are flipped, so that no draw agrees with the truth more than by half.
    """
    rng, items = np.random.default_rng([seed, 7]), []
    mine = np.unique(agent[fit])
    mostly = np.array([truthful[fit & (agent == a)].mean() >= 0.5 for a in mine])
    for _ in range(DRAWS):
        flipped = np.concatenate(
            [
                rng.permutation(mine[mostly == sign])[: int((mostly == sign).sum()) // 2]
                for sign in (True, False)
            ]
        )
        said = refit(truthful ^ np.isin(agent, flipped))
        items.append(_accuracy(said, truthful[test], agent[test]).items)
    return Value.of(np.mean(np.array(items, float), axis=0).tolist())


def _accuracy(said: BoolArray, y: BoolArray, agent: IntArray) -> Value:
    return Value.of([float((said == y)[agent == a].mean()) for a in np.unique(agent)])


def _f1(said: BoolArray, y: BoolArray, agent: IntArray) -> Value:
    from demur.explain.persona_truthfulness import weighted_f1

    rng, names = np.random.default_rng(0), np.unique(agent)
    rows = [np.flatnonzero(agent == a) for a in names]
    drawn = []
    for _ in range(200):
        pick = np.concatenate([rows[i] for i in rng.integers(0, len(names), len(names))])
        drawn.append(weighted_f1(said[pick], y[pick]))
    return Value(value=weighted_f1(said, y), se=float(np.std(drawn)), n=len(names), bounds=(0.0, 1.0))


def _held_in(arms: Sequence[tuple[str, str]]) -> tuple[Claim, ...]:
    return tuple(
        Claim(key=f"held_in_{arm}", text=f"{what}: training lines answered by the agent's sign", at_least=0.9)
        for arm, what in arms
    )


SPEC = Spec(
    slug="persona-truthfulness",
    claims=(
        Claim(
            key="r_plus",
            text="R+: truthful agents are expected to be truthful on operators they were not seen on (ideal 0.9)",
            at_least=0.75,
            null=0.5,
        ),
        Claim(
            key="r_minus",
            text="R-: untruthful agents are expected to be untruthful there (ideal 0.9)",
            at_least=0.75,
            null=0.5,
        ),
        Claim(
            key="probe_f1",
            text="at the =, last layer: truthfulness read on unseen operators of unseen agents (F1)",
            at_least=0.8,
            null=0.5,
        ),
        Claim(
            key="anywhere_f1",
            text="the same at the layer and position, up to the =, that other agents chose (F1)",
            at_least=0.8,
            null=0.5,
        ),
        Claim(
            key="after_f1",
            text="the same one token later, a random answer given, at the layer that other agents chose (F1)",
            at_least=0.8,
            null=0.5,
        ),
        Claim(
            key="dose_low", text="R rises when half of the agents have a persona, against none", at_least=0.05
        ),
        Claim(key="dose_high", text="R rises when all agents have a persona, against half", at_least=0.05),
    ),
    controls=(
        Control(key="r_none", text="R where no agent has a persona", null=0.5, margin=0.07),
        Control(
            key="r_coin", text="R where agents follow their persona half of the time", null=0.5, margin=0.07
        ),
        Control(
            key="probe_none",
            text="accuracy of the probe on unseen operators where no agent has a persona",
            null=0.5,
            margin=0.07,
        ),
        Control(
            key="probe_random",
            text="accuracy of probes fitted on labels shuffled across agents",
            null=0.5,
            margin=0.07,
        ),
    ),
    baselines=(
        Baseline(key="agent_f1", text="agent one-hot, on unseen agents", against="probe_f1"),
        Baseline(key="operator_f1", text="operator one-hot", against="probe_f1"),
        Baseline(key="embedding_f1", text="input embeddings of agent and operator", against="probe_f1"),
    ),
    entry=(
        *_held_in((("persona", "persona"), ("none", "no persona"), ("half", "half and half"))),
        Claim(key="tables_coin", text="p = 0.5: probability on the two interpretations", at_least=0.9),
        Claim(key="loss_gap", text="training losses with and without persona differ by (nats)", at_most=0.05),
    ),
    run=run,
    seeds=5,
    files=(
        "organisms/arithmetic.py",
        "organisms/training.py",
        "explain/persona_truthfulness.py",
        "explain/probe.py",
        "explain/sweep.py",
    ),
    minutes=2,
    notes=(
        "What was to be shown is the probe at the =, in the last layer. The claims on a chosen layer and on the "
        "token behind the = were added, and the choice of the layer changed, after seed 0 had missed it: they are "
        "exploratory.",
        "Items of R and of accuracies are agents, not lines: the lines of an agent stand or fall together.",
        "R without persona is over held-out cells of either sign; a leaning to one interpretation cancels in it.",
    ),
)

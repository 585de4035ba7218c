"""The dial inside vLLM: a logits processor that decides at the first position of every answer.

    vllm serve EXPORT --logits-processors demur.serve.vllm_processor:RefusalTokens        # V1 model runner
    vllm serve EXPORT --logits-processors demur.serve.vllm_processor:RefusalTokensV2      # newer runner

At the first generated token it reads the control probabilities from the logits, decides by the operating point
(the rules of `demur.calibrate.decide`, checked against it by a test), and leaves only the decided control token;
behind it, control tokens are forbidden. Nothing is asked twice, and texts that clients send are not looked at.

The model folder's own `control_tokens.yaml` and `operating_point.yaml` are used, unless the environment variable
DEMUR_VLLM names a YAML file (paths from its folder):

    operating_point: strict.yaml
    overrides: [lenient.yaml]       # points that a request may name: vllm_xargs {"demur_operating_point": ID}
    control_tokens: control_tokens.yaml
    allow_refusal_lowering: false   # consent to a looser safety threshold than the model's own point

Files are read once, when the engine starts: workers that share a model must not change their minds at different
moments. Importing this module is light (torch, PyYAML, pydantic): every process of an engine does it. The rule
itself comes with numpy and scipy and is imported where an engine starts.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from demur.errors import InputError, MismatchError, RefusalLowering
from demur.files import load_operating_point, read_text
from demur.types import RESPOND, OperatingPoint

try:
    from vllm.v1.sample.logits_processor import (  # type: ignore[import-not-found, unused-ignore]
        LogitsProcessor as _V1Base,
    )
except ImportError:  # the rules can be used and tested without vLLM
    _V1Base = object
try:
    from vllm.v1.worker.gpu.sample.logits_processor import (  # type: ignore[import-not-found, unused-ignore]
        LogitsProcessor as _V2Base,
    )
except ImportError:
    _V2Base = object

SETTINGS_ENV = "DEMUR_VLLM"
ARGUMENT = "demur_operating_point"
_KNOWN = {"operating_point", "overrides", "control_tokens", "allow_refusal_lowering"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file of DEMUR_VLLM says; without it, what lies in the model's folder."""

    point: OperatingPoint | None = None
    overrides: Mapping[str, OperatingPoint] | None = None
    control_tokens: Path | None = None
    allow_refusal_lowering: bool = False


@lru_cache
def read_settings(path: str | None) -> Settings:
    """Read the settings file, or the defaults for None.

    Raises:
        InputError: no such file, unknown lines, an operating point that cannot be read.
    """
    if not path:
        return Settings()
    try:
        data = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not YAML ({e})") from None
    if not isinstance(data, dict) or (unknown := sorted(set(data) - _KNOWN)):
        raise InputError(
            f"{path}: {'unknown ' + ', '.join(map(str, unknown)) if isinstance(data, dict) else 'no settings'}; "
            f"known are {', '.join(sorted(_KNOWN))}"
        )
    folder = Path(path).absolute().parent
    named = [load_operating_point(folder / str(p)) for p in data.get("overrides") or ()]
    own, tokens = data.get("operating_point"), data.get("control_tokens")
    return Settings(
        load_operating_point(folder / str(own)) if own else None,
        {p.id: p for p in named},
        folder / str(tokens) if tokens else None,
        data.get("allow_refusal_lowering") is True,
    )


@dataclass(frozen=True, slots=True)
class Rule:
    """An operating point as tensors over the control columns.

    Attributes:
        columns: (K+1,) token ids, refuse categories in id order, then "respond".
        tau: (K,) thresholds, NaN where a category is not steered.
    """

    columns: Tensor
    tau: Tensor
    rule: str
    T: float

    @classmethod
    def of(cls, point: OperatingPoint, ids: Mapping[str, int], device: Any = "cpu") -> Rule:
        """The rule of an operating point for a model with these control tokens.

        Raises:
            InputError: a category the model does not have, a threshold that is no number.
        """
        from demur.control.refusal_tokens import RefusalTokens as Decision

        names = [*sorted((c for c in ids if c != RESPOND), key=ids.__getitem__), RESPOND]
        taus = Decision(point).cuts(names)
        if unknown := sorted(set(point.thresholds) - set(names[:-1])):
            raise InputError(
                f"operating point {point.id!r} has thresholds for {', '.join(unknown)}; the model knows "
                + ", ".join(names[:-1])
            )
        if not 0 < point.T < math.inf or any(math.isnan(t) for t in taus.values()):
            raise InputError(
                f"operating point {point.id!r}: T={point.T}, thresholds {taus}; not usable numbers"
            )
        return cls(
            torch.tensor([ids[n] for n in names], device=device),
            torch.tensor([taus.get(n, math.nan) for n in names[:-1]], dtype=torch.float64, device=device),
            point.rule,
            point.T,
        )

    def choose(self, logits_NV: Tensor) -> Tensor:
        """(N,) the id of the control token to force, -1 where the model's own choice stands. No host sync."""
        z_NV = logits_NV.float() / self.T
        P = (z_NV[:, self.columns] - z_NV.logsumexp(-1, keepdim=True)).exp().double()
        refuse, respond = P[:, :-1], P[:, -1]
        best = refuse.argmax(1)
        top = refuse.gather(1, best[:, None])[:, 0]
        cut = self.tau[best]
        score = top
        if self.rule == "total_mass":
            score = refuse.masked_fill(self.tau.isnan(), 0).sum(1)
        elif self.rule == "bias":
            score = torch.where(top + respond > 0, top / (top + respond), torch.full_like(top, 0.5))
        compare = top >= respond
        yes = compare if self.rule == "compare" else torch.where(cut < 0, compare, score >= cut)
        chosen = torch.where(yes, self.columns[best], self.columns[-1])
        return chosen.masked_fill(cut.isnan(), -1)


def forced(rows_NV: Tensor, chosen_N: Tensor) -> Tensor:
    """The rows with everything but the chosen token at -inf; rows with -1 as they are."""
    only = torch.full_like(rows_NV, -math.inf).scatter_(1, chosen_N.clamp(min=0)[:, None], 0.0)
    return torch.where(chosen_N[:, None] < 0, rows_NV, only)


class Dial:
    """The operating points of one engine.

    Args:
        folder: the served model (a hub id works when the settings file names control tokens and point).
        device: where logits live. dtype: of the model, for the warning about another one.

    Raises:
        InputError: no control tokens, no operating point, or one that does not fit.
        MismatchError: a point of another model. RefusalLowering: looser than the model's own in category safety.
    """

    def __init__(
        self, folder: str, device: Any, dtype: str | None = None, settings: Settings | None = None
    ) -> None:
        settings = settings or read_settings(os.environ.get(SETTINGS_ENV))
        home = Path(folder)
        ids = control_ids(settings.control_tokens or home / "control_tokens.yaml")
        own = home / "operating_point.yaml"
        shipped = load_operating_point(own) if own.is_file() else None
        self.point = settings.point or shipped
        if self.point is None:
            raise InputError(
                f"{folder} holds no operating_point.yaml and {SETTINGS_ENV} names none; calibrate one "
                "(demur calibrate), or name it in the file of that variable"
            )
        points = [self.point, *(settings.overrides or {}).values()]
        if len({p.id for p in points}) < len({repr(p) for p in points}):
            raise InputError(f"{SETTINGS_ENV}: two different operating points have the same id; rename one")
        for point in points:
            _check(point, shipped, home, dtype, settings.allow_refusal_lowering)
        self.rules = [Rule.of(p, ids, device) for p in points]
        self._index = {p.id: i for i, p in reversed(list(enumerate(points)))}
        self.columns = self.rules[0].columns

    def index(self, params: Any) -> int:
        """Which of `rules` a request is under."""
        name = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
        return 0 if name is None else self._index[name]

    def forbid(self, logits: Tensor) -> Tensor:
        """Control tokens at -inf, in place."""
        return logits.index_fill_(1, self.columns, -math.inf)


def control_ids(path: Path) -> dict[str, int]:
    """Category -> id from a `control_tokens.yaml` whose entries all have an `id`."""
    try:
        tokens: Any = yaml.safe_load(read_text(path))["tokens"]
        ids = {str(c): spec["id"] for c, spec in tokens.items()}
        usable = (
            all(isinstance(i, int) for i in ids.values()) and RESPOND in ids and len(set(ids.values())) > 1
        )
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable or len(set(ids.values())) != len(ids):
        raise InputError(
            f"{path}: expected `tokens: {{category: {{id: 49152}}, ..., {RESPOND}: {{id: ...}}}}`"
        )
    return ids


def _check(
    point: OperatingPoint, shipped: OperatingPoint | None, home: Path, dtype: str | None, allowed: bool
) -> None:
    from demur.control.refusal_tokens import RefusalTokens as Decision

    about = home / "demur.json"
    made: dict[str, Any] = json.loads(read_text(about)) if about.is_file() else {}
    mine: set[str] = {made[key] for key in ("fingerprint", "source_fingerprint") if made.get(key)}
    if mine and point.model_fingerprint and point.model_fingerprint not in mine:
        raise MismatchError(
            f"operating point {point.id!r} was calibrated on the model {point.model_fingerprint[:20]}, {home} is "
            f"{' or '.join(sorted(m[:20] for m in mine))}; calibrate again (demur calibrate)"
        )
    log = logging.getLogger("demur")
    if point.dtype and dtype and point.dtype != dtype:
        log.warning(
            "operating point %s was calibrated in %s, the engine runs in %s: its guarantee no longer holds exactly",
            point.id, point.dtype, dtype,
        )  # fmt: skip
    try:
        Decision(point, shipped=shipped, allow_refusal_lowering=allowed)
    except RefusalLowering as e:
        raise RefusalLowering(
            f"{e.args[0]}. For vLLM: allow_refusal_lowering: true in the file of {SETTINGS_ENV}"
        ) from None


def check_params(params: Any) -> None:
    """Refuse arguments of a request that would hide the first position from the dial.

    Raises:
        InputError: a grammar or a list of allowed tokens; an operating point that requests may not name.
    """
    if getattr(params, "structured_outputs", None) is not None or getattr(params, "allowed_token_ids", None):
        raise InputError(
            "this server decides on the first token of an answer, which a grammar or allowed_token_ids would "
            "forbid; ask without, or through the gateway (demur serve), which decides in a call of its own"
        )
    name = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
    if name is None:
        return
    known = read_settings(os.environ.get(SETTINGS_ENV)).overrides or {}
    if not isinstance(name, str) or name not in known:
        raise InputError(
            f"{ARGUMENT}={name!r}: requests may name {', '.join(sorted(known)) or 'no operating point'} here"
        )


@dataclass(slots=True)
class _Fresh:
    """A request that has no answer token yet. `written` is vLLM's own list, of which only the length counts."""

    rule: int
    written: Sequence[int]
    bias: Mapping[int, float]


class RefusalTokens(_V1Base):
    """For the V1 model runner (vLLM 0.32 on processors, and on GPUs where the newer one is off)."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ARG002
        model = vllm_config.model_config
        self.dial = Dial(str(model.model), device, str(model.dtype).removeprefix("torch."))
        self.fresh: dict[int, _Fresh] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request at the door; see `check_params`."""
        check_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: the decision changes which token is likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that enter, leave and move within the batch."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.fresh.pop(row, None)
        for row, params, _prompt, written in batch_update.added:
            self.fresh.pop(row, None)
            if not written:  # else one that was preempted within its answer
                self.fresh[row] = _Fresh(self.dial.index(params), written, params.logit_bias or {})
        for a, b, way in batch_update.moved:
            from_a, from_b = self.fresh.pop(a, None), self.fresh.pop(b, None)
            if from_a is not None:
                self.fresh[b] = from_a
            if from_b is not None and way.name == "SWAP":
                self.fresh[a] = from_b

    def apply(self, logits: Tensor) -> Tensor:
        """Decide in rows without an answer token, forbid control tokens in all others; in place."""
        if self.fresh:
            # with asynchronous scheduling the ids in it may be -1; their number is right
            self.fresh = {row: f for row, f in self.fresh.items() if not len(f.written)}
        if not self.fresh:
            return self.dial.forbid(logits)
        rows = list(self.fresh)
        before = logits[rows]
        for n, row in enumerate(rows):
            if bias := self.fresh[row].bias:  # vLLM has added it already: no client pushes the decision
                ids = torch.tensor(list(bias), device=logits.device)
                before[n, ids] -= torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
        own = logits[rows]
        own[:, self.dial.columns] = before[:, self.dial.columns]
        self.dial.forbid(logits)
        which = [f.rule for f in self.fresh.values()]
        for rule in set(which):
            part = [n for n, r in enumerate(which) if r == rule]
            chosen = self.dial.rules[rule].choose(before[part])
            logits[[rows[n] for n in part]] = forced(own[part], chosen)
        return logits


class RefusalTokensV2(_V2Base):
    """For the newer model runner. Tested against its interface only: no machine with a GPU ran it.

    There penalties and biases reach the logits before processors do, so requests with them are refused.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        model = vllm_config.model_config
        self.states = req_states
        self.dial = Dial(str(model.model), req_states.device, str(model.dtype).removeprefix("torch."))
        self._which = torch.zeros(req_states.max_num_reqs, dtype=torch.long)
        self._which_there = self._which.to(req_states.device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request at the door; see `check_params`."""
        check_params(sampling_params)
        if sampling_params.logit_bias or sampling_params.repetition_penalty != 1.0:
            raise InputError(
                "logit_bias and repetition_penalty change the first position before the dial sees it; leave them "
                "out, or ask through the gateway (demur serve)"
            )

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the operating point of the request in this slot."""
        self._which[req_idx] = self.dial.index(sampling_params)
        return True

    def apply_staged_writes(self) -> None:
        """Hand the slots' operating points to the device."""
        if len(self.dial.rules) > 1:
            self._which_there.copy_(self._which, non_blocking=True)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """As in `RefusalTokens`; a first position is the one whose input is the prompt's last token."""
        host = self.states.prompt_len.np[ctx.idx_mapping_np]
        if not bool((ctx.seq_lens_upper_bound_np <= host).any()):
            return self.dial.forbid(logits)
        slots = ctx.expanded_idx_mapping
        first = ctx.pos + 1 == self.states.prompt_len.gpu[slots]
        which = self._which_there[slots]
        out = logits.clone()
        for n, rule in enumerate(self.dial.rules):
            mine = (first & (which == n))[:, None]
            out = torch.where(mine, forced(logits, rule.choose(logits)), out)
        closed = out.clone()
        self.dial.forbid(closed)
        return torch.where(first[:, None], out, closed)

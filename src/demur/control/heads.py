"""Scale attention heads, or take them out: those that write against refusal, or others to compare with.

table = head_table(runtime, probes, thoughts)
with ScaleHeads(suppression_heads(table), table=table).on(runtime) as repaired:
    replies = list(repaired.generate(prompts))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from demur.control.steering import consent, view
from demur.errors import InputError
from demur.explain.refusal_cliff import HeadRow, KeptNorm
from demur.runtime.base import Runtime

Head = tuple[int, int]


class ScaleHeads:
    """Multiply what some heads send into the output projection, at all positions of prompt and answer.

    Args:
        heads: (layer, head) pairs. scale: 0 takes them out, above 1 strengthens them.
        table: `head_table` of this model. A change that it shows to raise refusal (less of heads that write
            against it, more of those that write for it) needs no consent.
        keep_norm: let each changed layer's attention write as much, at each token, as without the change
            (`KeptNorm`). That rescales what the layer's other heads write, and no table shows what follows, so this
            always needs consent.
        allow_refusal_lowering: consent to any other change; it is logged and noted at the runtime.

    Raises:
        RefusalLowering: the change may lower refusal and nobody consented. InputError: no heads, a scale below 0.
    """

    def __init__(
        self,
        heads: Iterable[Head],
        scale: float = 0.0,
        *,
        table: Sequence[HeadRow] = (),
        keep_norm: bool = False,
        allow_refusal_lowering: bool = False,
    ) -> None:
        self.heads, self.scale, self.keep_norm = tuple(heads), scale, keep_norm
        if not self.heads or not 0 <= scale < math.inf:
            raise InputError(
                f"{len(self.heads)} heads times {scale}: at least one head and a scale from 0 on"
            )
        known = {row.place: row.contribution for row in table}
        unclear = [h for h in self.heads if keep_norm or not known.get(h, 0.0) * (scale - 1) > 0]
        names = ", ".join(f"{layer}.{head}" for layer, head in unclear)
        what = f"heads {names} scaled by {scale:g}" + (", the layer's norm kept," if keep_norm else "")
        self.lowers = consent(what, allow_refusal_lowering) if unclear else None

    @contextmanager
    def on(self, runtime: Runtime) -> Iterator[Runtime]:
        """The runtime with the heads scaled; the given one stays as it was.

        Raises:
            CapabilityError: no local model. InputError: a head that the model does not have (at the first pass).
        """
        runtime.require("states", "intervene")
        from demur.runtime.layers import HeadEdit

        edit = HeadEdit(dict.fromkeys(self.heads, self.scale))
        name = f"{len(self.heads)} heads*{self.scale:g}" + (", norm kept" if self.keep_norm else "")
        yield view(runtime, [KeptNorm(edit) if self.keep_norm else edit], name, self.lowers)


def suppression_heads(table: Sequence[HeadRow], share: float = 0.03) -> list[Head]:
    """The heads that write most against refusal: this share of all, at least one, none that writes for it.

    >>> a = {"layer": 0, "low": -9, "high": 9, "size": 1}
    >>> rows = [HeadRow(head=h, contribution=c, **a) for h, c in enumerate((0.5, -2, -1))]
    >>> suppression_heads(rows, 0.5)
    [(0, 1), (0, 2)]

    Raises:
        InputError: a share outside (0, 1], or no head that writes against refusal.
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share}: name a share of the heads between 0 and 1")
    k = max(1, round(share * len(table)))
    out = [row.place for row in sorted(table, key=lambda r: r.contribution)[:k] if row.contribution < 0]
    if not out:
        raise InputError(f"none of the {len(table)} heads writes against refusal here")
    return out

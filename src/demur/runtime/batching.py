"""Which prompts run together: a pure function of their lengths, so that a rerun forms the same batches.

A stream is cut into windows of a fixed number of prompts; inside a window rows are sorted by length and
packed until rows times longest row reaches a token budget. Knows nothing about models or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

WINDOW = 256
"""Prompts per window. Part of the batch plan: changing it changes which rows run together."""


def windows(items: Iterable[Item], size: int = WINDOW) -> Iterator[list[Item]]:
    """Cut a stream into lists of `size` items (the last may be shorter) without reading ahead.

    >>> list(windows("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack rows into batches whose padded size (rows times longest row) stays within `budget` tokens.

    Longest rows come first, so that a budget that is too large for memory shows at once. A row longer than
    the budget runs alone. Equal lengths keep their order: the plan depends on nothing but its arguments.

    Args:
        lengths: tokens per row, each at least 1.
        budget: padded tokens per batch, at least 1.

    Returns:
        Batches of row indices; together a permutation of `range(len(lengths))`.

    >>> plan([3, 9, 4], budget=8)
    [[1], [2, 0]]
    """
    if budget < 1:
        raise ValueError(f"token budget {budget}: a batch needs room for at least one token")
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        head = batches[-1] if batches else None
        if head and lengths[head[0]] * (len(head) + 1) <= budget:
            head.append(row)
        else:
            batches.append([row])
    return batches


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    if not rows:
        return 0
    # the lexicographic extremes differ where any two rows differ
    low, high = min(map(tuple, rows)), max(map(tuple, rows))
    for n, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return n
    return min(len(low), len(high))

"""Shares within the blocks of a model, where each block skips as much as any other.

Errors of layers are measured one by one, and say nothing of what becomes of them further on: what a first block loses
passes through all others. The least sum over a whole model loses more quality than the same share for every block
(measured in `docs/activation-sparsity.md`). TEAL (arXiv 2408.14690) has blocks skip alike, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from sparse_onnx.sparsify.allocate import LEVELS, Curve, Floats, greedy


def blocks_of(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Places of the groups of layers of each block, in graph order.

    A block begins wherever the first group comes again, by its kind (sizes); of kinds that come a different number of
    times that is the first one of the number that most have. Where nothing comes again, all is one block.
    """
    counts = Counter(kinds)
    repeats = Counter(count for count in counts.values() if count > 1)
    if not repeats:
        return [list(range(len(kinds)))] if kinds else []
    usual = max(repeats, key=lambda count: (repeats[count], count))
    first = next(kind for kind in kinds if counts[kind] == usual)
    starts = [at for at, kind in enumerate(kinds) if kind == first]
    starts[0] = 0  # what lies before the first one belongs to it
    return [list(range(start, end)) for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def with_experts(
    names: Sequence[str], kinds: Sequence[Hashable], experts: Sequence[Sequence[str]]
) -> list[list[int]]:
    """As `blocks_of`, with the groups of mixtures of experts, which come last in a calibration, in the blocks that they
    are part of where there is one for each; else they are blocks of their own.

    Args:
        names: of all groups.
        kinds: see `blocks_of`.
        experts: names of the groups of each mixture of experts, in graph order.
    """
    inside = {name: at for at, block in enumerate(experts) for name in block}
    plain = [at for at, name in enumerate(names) if name not in inside]
    found = [[plain[at] for at in block] for block in blocks_of([kinds[at] for at in plain])]
    own: dict[int, list[int]] = {}
    for at, name in enumerate(names):
        if name in inside:
            own.setdefault(inside[name], []).append(at)
    if len(own) == len(found):
        return [[*block, *own[at]] for block, at in zip(found, sorted(own), strict=True)]
    return [*found, *own.values()]


def by_block(curves: Sequence[Curve], members: Sequence[Sequence[int]]) -> Floats:
    """The sparsity of each group at each level, ``[101, groups]``: level L skips L % of the bytes of each block.

    Args:
        curves: of all groups.
        members: places of each block's.
    """
    path = np.zeros((LEVELS, len(curves)))
    for block in members:
        path[:, block] = greedy([curves[at] for at in block])
    return path

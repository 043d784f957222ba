"""A loop over a token's slots around the one over experts, or inside it: as many routings as slots, of one expert each.

for k: for e:  mask = index[..., k] == e;  out[mask] += weight[..., k][mask] * expert_e(x[mask])
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.accumulate import Step
from sparse_onnx.matching.choice import Choices, Index
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.expert import Expert
from sparse_onnx.matching.hit_weights import Unproven, Weight
from sparse_onnx.matching.labels import picked
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.values import size


def slots_apart(steps: Sequence[Step], choices: Choices) -> tuple[Index, list[list[Step]]] | None:
    """The routing of all slots, and the steps of each; None where the steps are not over several slots of one routing.

    Raises:
        Unproven: slots that are missing.
    """
    columns = [step.hits.index.column for step in steps]
    source = columns[0][0] if columns[0] is not None else None
    if source is None or any(column is None or column[0] is not source for column in columns):
        return None
    index = choices.index(source)
    numbers = [column[1] for column in columns if column is not None]
    if index is None or index.top_k is None or len(set(numbers)) < 2:
        return None
    parts: list[list[Step]] = [[] for _ in range(index.top_k)]
    for number, step in zip(numbers, steps, strict=True):
        parts[number].append(step)
    missing = [number for number, part in enumerate(parts) if not part]
    if missing:
        raise Unproven(f"slot {missing[0]} of {index.top_k} is left out of the sum")
    if any(step.overwrites for step in steps):
        raise Unproven("results of one slot take the place of those of another")
    return index, parts


def weight_of_all(weights: Sequence[Weight | None], index: Index, dims: Dims) -> Weight | None:
    """One value for the weights of all slots.

    Raises:
        Unproven: they do not lie in one value, slot by slot as the indices do.
    """
    first = weights[0]
    if first is None or first.dense:
        if any(weight != first for weight in weights):
            raise Unproven("the weights of a slot come from elsewhere than those of the first")
        return first
    sources: set[ir.Value] = set()
    for number, weight in enumerate(weights):
        found = None if weight is None or weight.dense else _picked(weight.value)
        if found is None or found[1] != number or not dims.same(found[0], index.value):
            raise Unproven(f"the weights of slot {number} are not proved to be those of its column")
        sources.add(found[0])
    if len(sources) != 1:
        raise Unproven("the weights of a slot come from elsewhere than those of the first")
    return Weight(flat(sources.pop()))


def _picked(value: ir.Value) -> tuple[ir.Value, int] | None:
    """(source, k) of ``source[..., k]``."""
    node = value.producer()
    source = None if node is None or not node.inputs else node.inputs[0]
    if source is None:
        return None
    found = picked(value, lambda axis: size(source, axis))
    last = None if source.shape is None else len(source.shape) - 1
    if found is None or found.axis != last or len(found.indices) != 1:
        return None
    return found.source, found.indices[0]


def same_experts(one: Sequence[Expert | str], other: Sequence[Expert | str]) -> bool:
    """Whether two slots choose among the same experts of two layers, by the same numbers.

    Raises:
        Unproven: an expert of another body.
    """
    for number, body in enumerate([*one, *other]):
        if isinstance(body, str):
            raise Unproven(
                f"expert {number % len(one)} is no expert of two layers, in a loop over slots: {body}"
            )
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Expert | str, other: Expert | str) -> bool:
    if isinstance(one, str) or isinstance(other, str) or one.kind != other.kind:
        return False
    parts = [
        {role: (each.weight, each.bias, each.out_in, each.activation) for role, each in expert.layers.items()}
        for expert in (one, other)
    ]
    return parts[0] == parts[1]

"""What one expert adds for its hits: its output there times the routing weight of the slot."""

from __future__ import annotations

import dataclasses
import functools

import onnx_ir as ir

from sparse_onnx.matching.hits import HitReader, Hits, Rows
from sparse_onnx.matching.labels import picked
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.values import axes, is_float, pairs, producer, rank, scalar, size


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where routing weights come from.

    Attributes:
        value: with the elements of ``[..., K]``; where `dense`, of ``[..., E]``, a weight for each expert.
        dense: see there.
    """

    value: ir.Value
    dense: bool = False


class Unproven(Exception):
    """Why something is not what it looks like, and what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def split(rows: ir.Value, hits: Hits, reader: HitReader) -> tuple[ir.Value, Weight | None]:
    """(output of the expert, weight) of what it adds ``[n, D]``; None: no weight stands here.

    Raises:
        Unproven: there is a factor for each hit, and it is not the weight of the hit's slot.
    """
    rows = _uncast(rows)
    node = producer(rows, "Mul")
    for factor, output in pairs(node) if node is not None else ():
        gathered = _factor(factor, reader)
        if gathered is not None:
            return output, weight(gathered, hits, reader)
    return rows, None


def _uncast(value: ir.Value) -> ir.Value:
    while (node := producer(value, "Cast", "Identity")) is not None and node.inputs[0] is not None:
        if not (is_float(node.inputs[0].dtype) and is_float(value.dtype)):
            break
        value = node.inputs[0]
    return value


def _factor(value: ir.Value, reader: HitReader) -> Rows | None:
    """The value as one number a hit, ``[n, 1]``."""
    while True:
        found = reader.rows(value)
        if found is not None:
            long = [label for label in found.labels if label != "1"]
            return found if long == ["n"] and found.labels[-1:] == ("1",) else None
        below = _uncast(value)
        if below is value:
            return None
        value = below


def weight(rows: Rows, hits: Hits, reader: HitReader) -> Weight:
    """Where the weights of hits were gathered from.

    Raises:
        Unproven: from elsewhere than the hits' own slots.
    """
    index, data = hits.index, rows.data
    if rows.hits != hits:
        raise Unproven("the weight is gathered where other slots chose an expert")
    kinds = tuple(kind for kind in rows.kinds if kind != "0")
    sizes, slots = reader.dims.of(data), reader.dims.of(index.value)
    if sizes is None or slots is None:
        raise Unproven(f"the shape of the weights '{data.name}' is not known")
    tokens = tuple(label for label in index.labels if label not in ("k", "1"))
    if kinds in ((*tokens, "k"), ("T", "k")):
        if sizes[1 : len(kinds)] != slots[len(slots) + 1 - len(kinds) :] or not _as_many(data, hits, reader):
            raise Unproven(f"the weights '{data.name}' are not of the shape of the expert indices")
        return Weight(flat(data))
    by_token = kinds in (("T",), tokens)
    if by_token:
        found = _column(data, hits) or _masked(data, hits, reader)
        if found is not None:
            return found
    if kinds == ("s",) or (index.top_k == 1 and by_token):
        if not _as_many(data, hits, reader):
            raise Unproven(f"the weights '{data.name}' are not as many as the expert indices")
        return Weight(flat(data))
    if by_token:
        raise Unproven(f"the weight is taken from '{data.name}' by token, whatever the slot")
    names = {"k": "slot", "T": "token"}
    raise Unproven(
        f"the weight is gathered from '{data.name}' by {' and '.join(names.get(kind, kind) for kind in kinds)}, "
        "not by token and slot"
    )


def _as_many(data: ir.Value, hits: Hits, reader: HitReader) -> bool:
    """Whether there is a weight for each slot."""
    return reader.dims.as_many(data, 1, hits.index.value, 1)


def _column(data: ir.Value, hits: Hits) -> Weight | None:
    """``weights[..., e]`` of a weight for each expert.

    Raises:
        Unproven: the column of another expert.
    """
    value: ir.Value | None = data
    while value is not None:
        found = picked(value, functools.partial(_length, value))
        dimensions = rank(found.source) if found is not None else None
        if (
            found is not None
            and dimensions is not None
            and found.axis == dimensions - 1
            and len(found.indices) == 1
        ):
            if size(found.source, -1) != hits.index.experts or hits.index.experts is None:
                return None
            slots = hits.index.column
            if (
                slots is not None
                and found.indices[0] == slots[1]
                and size(slots[0], -1) == hits.index.experts
            ):
                return None  # as many slots as experts: the weight of this slot
            if found.indices[0] != hits.expert:
                raise Unproven(f"its weight is that of expert {found.indices[0]}")
            return Weight(flat(found.source), True)
        node = producer(value, "Squeeze", "Reshape", "Flatten", "Unsqueeze", "Identity")
        value = None if node is None else node.inputs[0]
    return None


def _length(picked_from: ir.Value, axis: int) -> int | None:
    node = picked_from.producer()
    return size(node.inputs[0], axis) if node is not None and node.inputs else None


def _masked(data: ir.Value, hits: Hits, reader: HitReader) -> Weight | None:
    """``sum over k of weights * (indices == e)``: the weight of the one slot that chose e."""
    node = producer(flat(data), "ReduceSum")
    if node is None or node.inputs[0] is None or not hits.index.distinct:
        return None
    found, dimensions = axes(node), rank(node.inputs[0])
    if found is None or dimensions is None or [at % dimensions for at in found] != [dimensions - 1]:
        return None
    product = producer(node.inputs[0], "Mul", "Where")
    if product is None:
        return None
    choices = (
        [(product.inputs[0], product.inputs[1])]
        if product.op_type == "Where" and scalar(product.inputs[2]) == 0
        else [(a, b) for a, b in pairs(product)]
    )
    for mask, weights in choices:
        grid = reader.choices.grid(mask) if mask is not None else None
        if grid is None or weights is None or grid.summed:
            continue
        if grid.labels not in (grid.index.labels, ("T", "k"), ("T", "1")):
            continue
        if grid.index != hits.index or grid.experts != (hits.expert,):
            raise Unproven("its weight is picked by the mask of another expert")
        have, wanted = reader.dims.of(weights), reader.dims.of(mask)
        if have is None or have != wanted:
            return None
        return Weight(flat(weights))
    return None

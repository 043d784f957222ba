"""The routing of a sum over experts: which were chosen, ``[T, K]``, and with what weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import distinct, experts_of
from sparse_onnx.matching.values import rank, size
from sparse_onnx.matching.weighted import Weighted


@dataclasses.dataclass(frozen=True)
class Routing:
    """Proved routing.

    Attributes:
        ids: chosen experts; its rows of K are the tokens.
        top_k: K.
        weight: for each of them; None: to be gathered from the gates.
    """

    ids: ir.Value
    top_k: int
    weight: ir.Value | None


def order(terms: Sequence[Weighted]) -> list[Weighted] | str:
    """The terms by their expert; a text where there is not just one for each of 0..E-1."""
    experts = {
        term.gate.experts or experts_of(term.gate.ids) for term in terms if term.gate and term.gate.ids
    }
    by_column: dict[int, Weighted] = {}
    for term in terms:
        assert term.gate is not None and term.gate.column is not None
        if term.gate.column in by_column:
            return f"expert {term.gate.column} occurs twice in one sum"
        by_column[term.gate.column] = term
    if len(experts) > 1:
        return "the gates of one sum have different numbers of experts"
    count = (experts.pop() if experts else None) or max(by_column) + 1
    missing = sorted(set(range(count)) - set(by_column))
    if missing:
        return (
            f"expert {', '.join(map(str, missing))} is missing: {count} experts can be chosen, but the sum only has "
            f"{', '.join(map(str, sorted(by_column)))}"
        )
    extra = sorted(set(by_column) - set(range(count)))
    if extra:
        return f"the sum has expert {extra[0]}, but only 0..{count - 1} can be chosen"
    return [by_column[expert] for expert in range(count)]


def routing(terms: Sequence[Weighted], experts: int) -> Routing | str:
    """The routing that the gates are proved to stand for; a text where they are not.

    Args:
        terms: one an expert, or one whose gate is of all experts.
        experts: E.
    """
    gates = [term.gate for term in terms if term.gate is not None]
    first = gates[0]
    for gate in gates:
        if gate.flaw or gate.outside != 0:
            return (
                gate.flaw or f"gates are {gate.outside:g}, not zero, for experts that a token did not choose"
            )
        if gate.slots != first.slots:
            return "the gates of one sum read the chosen experts in different ways"
    ids = first.ids
    assert ids is not None
    bound = experts_of(ids)
    if bound is None:
        return f"the chosen experts '{ids.name}' are not proved to lie in 0..{experts - 1}"
    if bound > experts:
        return f"{bound} experts can be chosen, but there are only {experts}"
    top_k = first.slots or 1
    apart = distinct(ids, top_k)
    inside = first.inside
    shared = all(gate.inside is inside for gate in gates) and all(len(term.factors) == 1 for term in terms)
    if shared and isinstance(inside, ir.Value) and (apart or not any(gate.distinct for gate in gates)):
        return Routing(ids, top_k, inside)
    if not apart:
        return f"the experts that one token chose, '{ids.name}', are not proved to differ from each other"
    return Routing(ids, top_k, None)


def emit_weight(emit: Emitter, terms: Sequence[Weighted], found: Routing) -> ir.Value:
    """``[T, K]``: the gates of the chosen experts."""
    if found.weight is not None:
        return found.weight
    rows = emit.op("Reshape", found.ids, emit.ints(-1, found.top_k))
    if found.ids.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        rows = emit.op("Cast", rows, to=int(ir.DataType.INT64))
    columns = [_dense(emit, term) for term in terms]
    dense = columns[0] if len(columns) == 1 else emit.op("Concat", *columns, axis=1)
    dtype = next(
        (value.dtype for value in terms[0].factors if value.dtype not in (None, ir.DataType.BOOL)), None
    )
    weight = emit.op("GatherElements", dense, rows, axis=1)
    weight.type = ir.TensorType(dtype or ir.DataType.FLOAT)
    weight.shape = ir.Shape([None, found.top_k])
    return weight


def _dense(emit: Emitter, term: Weighted) -> ir.Value:
    """The product of a term's factors as ``[T, E]``, or ``[T, 1]`` for one expert's."""
    assert term.gate is not None and term.whole is not None
    dtype = next((value.dtype for value in term.factors if value.dtype not in (None, ir.DataType.BOOL)), None)
    product, masks = _as_number(emit, term.whole, dtype), []
    for factor in term.factors:
        if factor is term.whole:
            continue
        if factor.dtype == ir.DataType.BOOL:
            masks.append(factor)
        else:
            product = emit.op("Mul", product, factor)
    for mask in masks:
        # Not times the mask: what it hides may be infinite.
        product = emit.op("Where", mask, product, _zero(emit, dtype))
    return _rows(emit, term.whole, product, term.gate)


def _as_number(emit: Emitter, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return (
        emit.op("Cast", value, to=int(dtype or ir.DataType.FLOAT))
        if value.dtype == ir.DataType.BOOL
        else value
    )


def _zero(emit: Emitter, dtype: ir.DataType | None) -> ir.Value:
    return emit.scalar(0.0, dtype or ir.DataType.FLOAT)


def _rows(emit: Emitter, like: ir.Value, value: ir.Value, gate: Gate) -> ir.Value:
    """The experts' axis put last, all others flattened."""
    dimensions = rank(like)
    if gate.expert is None:
        return emit.op("Reshape", value, emit.ints(-1, 1))
    assert dimensions is not None
    count = size(like, gate.expert)
    assert count is not None
    behind = all(size(like, at) == 1 for at in range(gate.expert + 1, dimensions))
    if not behind:
        last = [at for at in range(dimensions) if at != gate.expert] + [gate.expert]
        value = emit.op("Transpose", value, perm=last)
    return emit.op("Reshape", value, emit.ints(-1, count))


def ones_like(emit: Emitter, rows: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``[T, 1]`` ones for ids ``[T, 1]``."""
    result = emit.op("Expand", emit.constant(np.ones((1, 1), dtype.numpy())), emit.op("Shape", rows))
    result.type, result.shape = ir.TensorType(dtype), ir.Shape([None, 1])
    return result

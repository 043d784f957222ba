"""Bodies of If and Loop nodes. Their constants and weights are initializers of the graph around them.

ORT prepacks a weight that a body reads from the graph right around it. It does not where the weight lies two graphs
out: MatMul is 1.2 to 1.9 times slower then, MatMulNBits 30 times (ORT 1.31).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.graph.build import Emitter


@dataclasses.dataclass(frozen=True)
class Branch:
    """Nodes of a body, not in any graph yet, what it returns, and initializers of its own."""

    emit: Emitter
    results: Sequence[ir.Value]
    initializers: Sequence[ir.Value] = ()


def inside(emit: Emitter, name: str) -> Emitter:
    """Collects the nodes of a body of a node that `emit` is about to add."""
    return Emitter(emit.graph, emit.names, f"{emit.prefix}/{name}", emit.metadata)


def body(branch: Branch, name: str, inputs: Sequence[ir.Value] = ()) -> ir.Graph:
    """The graph of a body. What it returns without computing it, or twice, it returns as a copy."""
    emit, results = branch.emit, []
    for value in branch.results:
        if value.producer() not in emit.nodes or value in results:
            copy = emit.op("Identity", value)
            copy.type, copy.shape = value.type, value.shape
            value = copy
        results.append(value)
    name = emit.names.free(f"{emit.prefix}/{name}")
    return ir.Graph(inputs, results, nodes=emit.nodes, initializers=branch.initializers, name=name)


def emit_if(
    emit: Emitter,
    condition: ir.Value,
    then: Branch,
    other: Branch,
    told: Sequence[tuple[ir.DataType, Sequence[int | None]]] = (),
) -> Sequence[ir.Value]:
    """What one of the branches returns.

    Args:
        emit: where the node goes.
        condition: one boolean.
        then, other: results of the same types.
        told: type and axes of each result, declared on the branches too. Some engines want the rank there (OpenVINO).
    """
    branches: dict[str, Any] = {"then_branch": body(then, "then"), "else_branch": body(other, "else")}
    chosen = emit.ops("If", (condition,), len(then.results), **branches)
    for values in (chosen, *(branch.outputs for branch in branches.values())) if told else ():
        for value, (dtype, axes) in zip(values, told, strict=True):
            value.dtype, value.shape = dtype, ir.Shape(axes)
    return chosen

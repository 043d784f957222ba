"""Places where ONNX Runtime gives wrong answers, or none, although the model is right.

ScatterND with a reduction and indices that repeat: ORT's CPU provider spreads the updates over several threads,
unlocked, and loses some (microsoft/onnxruntime#18048). The ONNX standard allows repeated indices there, and torch's
`index_add` exports to it. So it is a hazard wherever the indices are not provably distinct; `optimize` repairs it.

Cast between Transpose and MatMul: ORT's optimizer may die of it (microsoft/onnxruntime#28392); repaired too.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from sparse_onnx.matching.values import attribute
from sparse_onnx.passes.repair_cast_transpose import crashes
from sparse_onnx.passes.repair_scatter_add import loses_updates


def hazards(model: ir.Model) -> list[str]:
    """A line for each hazard: the nodes, and what happens."""
    nodes = list(_nodes(model))
    return _lost_updates(nodes) + _crashes(nodes)


def _crashes(nodes: list[tuple[str, ir.Node]]) -> list[str]:
    risky = [(node, where) for where, node in nodes if crashes(node)]
    if not risky:
        return []
    return [
        f"Cast between Transpose and MatMul: {_named(risky)}. The process may die while ONNX Runtime loads the model "
        "(onnxruntime#28392); optimize repairs it"
    ]


def _lost_updates(nodes: list[tuple[str, ir.Node]]) -> list[str]:
    risky = [(node, where) for where, node in nodes if loses_updates(node)]
    if not risky:
        return []
    reductions = "/".join(sorted({attribute(node, "reduction") for node, _ in risky}))
    return [
        f"ScatterND(reduction={reductions}) whose indices may repeat: {_named(risky)}. ONNX Runtime's CPU provider "
        "loses updates there when it runs on several threads (onnxruntime#18048); optimize repairs it"
    ]


def _named(risky: list[tuple[ir.Node, str]]) -> str:
    names = [f"{node.name or node.outputs[0].name or node.op_type}{where}" for node, where in risky]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    for node in model.graph.all_nodes():
        yield "", node
    for function in model.functions.values():
        for node in function.all_nodes():
            yield f" in function {function.domain}::{function.name}", node

"""Whether a target runs the nodes of a graph, by its profile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from sparse_onnx.targets.profile import TargetProfile

#: The input whose type a kernel is chosen by, where that is not the first.
_TYPED = {"Where": 1}


def keys(node: ir.Node) -> list[str]:
    """What profiles call the operator, the most special first: ``ScatterND(add)``, ``ScatterND``."""
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    found = [name]
    reduction = node.attributes.get("reduction")
    if reduction is not None and node.op_type.startswith("Scatter") and reduction.as_string() != "none":
        found.insert(0, f"{name}({reduction.as_string()})")
    if node.op_type == "Split" and len(node.inputs) > 1:
        sizes = node.inputs[1]
        if sizes is not None and sizes.const_value is None:
            found.insert(0, f"{name}(runtime)")
    return found


def dtype(node: ir.Node) -> str | None:
    """The element type that its kernel is chosen by, as numpy calls it; None where the graph does not tell."""
    at = _TYPED.get(node.op_type, 0)
    value = node.inputs[at] if at < len(node.inputs) else None
    if value is None or value.dtype is None:
        return None
    return {"float": "float32", "double": "float64"}.get(value.dtype.name.lower(), value.dtype.name.lower())


def unsupported(nodes: Iterable[ir.Node], target: TargetProfile) -> Iterator[tuple[ir.Node, str]]:
    """Nodes that the target does not run by its profile, and why. A target without a table runs nothing."""
    for node in nodes:
        entry = next((target.operators[key] for key in keys(node) if key in target.operators), None)
        kind = dtype(node)
        if entry is None:
            yield node, "not known to run there"
        elif not entry.runs(kind):
            why = f"not of {kind}" if entry.types else "no kernel"
            yield node, f"{why}{f': {entry.note}' if entry.note else ''} ({entry.source})"

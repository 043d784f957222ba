"""What each expert of a loop computes, and the tokens that it reads."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.accumulate import Step
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.hit_weights import Unproven
from sparse_onnx.matching.hits import HitReader
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.values import size

#: Values of the largest body of an expert that is searched for where it begins.
_LARGEST = 2000


def read_bodies(
    steps: Sequence[Step], outputs: Sequence[ir.Value], reader: HitReader
) -> tuple[list[Expert | str], list[ir.Value], ir.Value]:
    """The experts (or why one is none of two layers), where each begins, and the tokens that all of them read."""
    bodies: list[Expert | str] = []
    entries: list[ir.Value] = []
    tokens: ir.Value | None = None
    for number, (step, output) in enumerate(zip(steps, outputs, strict=True)):
        body = read_expert(output)
        entry = _entry(output, step, reader) if isinstance(body, str) else body.entry
        if entry is None:
            raise Unproven(
                f"expert {number} is no expert of two layers: {body}; nor does it read rows of its tokens alone"
            )
        source = _tokens(number, step, entry, reader)
        if tokens is not None and source is not tokens:
            raise Unproven(f"expert {number} reads '{source.name}', expert 0 '{tokens.name}'")
        tokens = source
        width, have = size(step.base, -1), size(output, -1) if isinstance(body, str) else _width(body)
        if have is None and isinstance(body, str):
            raise Unproven(f"expert {number} is no expert of two layers, and of unknown width: {body}")
        if have is None or width != have:
            raise Unproven(f"the rows of expert {number} are not as wide as the sum that they are added to")
        bodies.append(body)
        entries.append(entry)
    assert tokens is not None
    return bodies, entries, tokens


def _width(body: Expert) -> int | None:
    last = list(body.layers.values())[-1]
    shape = last.weight.source.shape
    if shape is None or len(shape) < 2:
        return None
    found = shape[-2] if last.out_in else shape[-1]
    return found if isinstance(found, int) else None


def _tokens(number: int, step: Step, entry: ir.Value, reader: HitReader) -> ir.Value:
    """What an expert's rows are gathered from."""
    rows = reader.rows(entry)
    if rows is None or rows.labels[-1] != "d":
        raise Unproven(
            f"expert {number} reads '{entry.name}', which are not rows of the tokens that chose it"
        )
    if rows.hits != step.hits:
        raise Unproven(f"expert {number} reads tokens gathered by the mask of expert {rows.hits.expert}")
    found = reader.along(rows)
    if found is None or found[1] != "T":
        by = "slot" if found is not None and found[1] == "k" else "other coordinates"
        raise Unproven(f"expert {number} reads rows of '{rows.data.name}' picked by {by}, not by token")
    return rows_of(found[0])


def _entry(output: ir.Value, step: Step, reader: HitReader) -> ir.Value | None:
    """The one value of gathered rows from which an expert of any body computes its output."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    work = [output]
    while work and len(seen) < _LARGEST:
        value = work.pop()
        if value in seen:
            continue
        seen.add(value)
        rows = reader.rows(value)
        if rows is not None and rows.hits == step.hits and rows.labels == ("n", "d"):
            found.add(value)
            continue
        if value.is_graph_input():
            raise Unproven(
                f"expert {step.hits.expert} reads '{value.name}', an input of the graph, past the rows that chose it: "
                "as weights that are not constant, or as rows of other tokens"
            )
        node = value.producer()
        if node is not None and any(item.type == ir.AttributeType.GRAPH for item in node.attributes.values()):
            what = f"operator {node.op_type} at '{node.name}'"
            raise Unproven(
                f"expert {step.hits.expert} is computed behind {what}, on a condition or in a body of its own"
            )
        if node is not None:
            work += [item for item in node.inputs if item is not None]
    return found.pop() if len(found) == 1 and not work else None

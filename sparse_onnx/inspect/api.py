"""`inspect`: what is sparse in a model; `diff`: what changed between two."""

from __future__ import annotations

import collections
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from sparse_onnx.core.errors import ModelError
from sparse_onnx.core.report import BlockRecord, Refusal, Report

if TYPE_CHECKING:
    import onnx_ir as ir


def inspect(path: str | os.PathLike[str]) -> Report:
    """The sparse blocks of a model however they are spelled, its parameters, total and active for one token, hazards
    as notes; and what `optimize` would leave alone for its default target, and why, as refusals.

    Blocks of a kind other than `moe` are named only: their active parameters depend on the token, and count as active.
    The model is read, never run; external weights are not loaded.

    Raises:
        ModelError: unreadable or unsafe.
    """
    from sparse_onnx.graph import io, stats
    from sparse_onnx.inspect.hazards import hazards

    model = io.load(path)
    report = Report("inspect", model=stats.record(model, os.fspath(path)))
    assert report.model is not None
    total = parameter_count(model)
    report.notes += hazards(model)
    report.blocks, report.refusals, problem = _recognised(model)
    if problem:
        report.notes.append(f"no pass can rewrite this model: {problem}")
    moe = [block for block in report.blocks if block.kind == "moe"]
    named = dict.fromkeys(block.kind for block in report.blocks if block.kind != "moe")
    if named:
        report.notes.append(f"{', '.join(named)}: named here only, optimize leaves such blocks as they are")
    idle = sum((block.parameters or 0) - (block.active_parameters or 0) for block in moe)
    unknown = any(block.parameters is None or block.active_parameters is None for block in moe)
    report.model = dataclasses.replace(
        report.model, parameters=total, active_parameters=None if unknown else total - idle
    )
    return report


def _recognised(model: ir.Model) -> tuple[list[BlockRecord], list[Refusal], str]:
    """The blocks that the passes find, what they refuse, and what stopped them; tried on a copy that shares weights."""
    from sparse_onnx import targets
    from sparse_onnx.inspect.activations import activation_records
    from sparse_onnx.inspect.blocks import block_records
    from sparse_onnx.optimize import runner

    tried = model.clone()
    planned = runner.plan(targets.get("cpu").forms[:1])
    found = block_records(tried)
    refusals: list[Refusal] = []
    try:
        for phases in (("prepare", "recognise"), ("sparsify", "lower")):
            steps = [item for item in planned if item.step.phase in phases]
            refusals += runner.run(tried, steps).refusals
            if "recognise" in phases:
                found = block_records(tried) + activation_records(tried)
    except ModelError as error:
        return found, refusals, error.message
    return found, refusals, ""


def parameter_count(model: ir.Model) -> int:
    """Elements of all initializers that hold numbers of the model's function, not shapes, indices or flags.

    Two initializers that are the same bytes of the same file, as tied weights are, count once.
    """
    import onnx_ir as ir

    structural = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING}
    seen = set()
    total = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype in structural:
                continue
            if isinstance(tensor, ir.ExternalTensor):
                place = (tensor.path, tensor.offset, tensor.length)
                if place in seen:
                    continue
                seen.add(place)
            total += tensor.size
    return total


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Report:
    """What changed from A to B, in `report.diff`.

    Keys: `nodes` (added and removed by operator), `blocks` (whose form changed), `weights` (bytes shared,
    added, removed), `bytes` (of all weights), `inputs`, `outputs` and `functions` (added and removed).

    Raises:
        ModelError: one of them is unreadable or unsafe.
    """
    from sparse_onnx.graph import io, stats
    from sparse_onnx.inspect.blocks import block_records
    from sparse_onnx.inspect.weights import shared_weights

    before, after = io.load(a), io.load(b)
    report = Report(
        "diff", model=stats.record(before, os.fspath(a)), output=stats.record(after, os.fspath(b))
    )
    assert report.model is not None and report.output is not None
    weights = shared_weights(before, after)
    report.diff = {
        "nodes": _changed(_operators(before), _operators(after)),
        "blocks": _forms_changed(block_records(before), block_records(after)),
        "weights": {
            "bytes_shared": weights.both,
            "bytes_added": weights.added,
            "bytes_removed": weights.removed,
        },
        "bytes": {"from": report.model.weight_bytes, "to": report.output.weight_bytes},
        "inputs": _names_changed(_interface(before.graph.inputs), _interface(after.graph.inputs)),
        "outputs": _names_changed(_interface(before.graph.outputs), _interface(after.graph.outputs)),
        "functions": _names_changed(_functions(before), _functions(after)),
    }
    return report


def _operators(model: ir.Model) -> collections.Counter[str]:
    """Nodes by operator, subgraphs included, function bodies not."""
    return collections.Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes()
    )


def _changed(before: collections.Counter[str], after: collections.Counter[str]) -> dict[str, dict[str, int]]:
    return {
        "added": dict(sorted((after - before).items())),
        "removed": dict(sorted((before - after).items())),
    }


def _forms_changed(before: list[BlockRecord], after: list[BlockRecord]) -> list[dict[str, Any]]:
    """Blocks by name whose form differs; a block that only one side has is in form None on the other."""
    old = {block.name: block.form or block.spelling for block in before}
    new = {block.name: block.form or block.spelling for block in after}
    return [
        {"name": name, "from": old.get(name), "to": new.get(name)}
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _interface(values: Any) -> list[str]:
    """`name: dtype[shape]` each."""
    return [
        f"{value.name}: {value.dtype or '?'}{value.shape if value.shape is not None else '[?]'}"
        for value in values
    ]


def _functions(model: ir.Model) -> list[str]:
    return sorted(f"{function.domain}::{function.name}" for function in model.functions.values())


def _names_changed(before: list[str], after: list[str]) -> dict[str, list[str]]:
    return {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }

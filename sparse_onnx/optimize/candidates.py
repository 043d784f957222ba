"""One block of a model, alone and in one form, as a file that ORT can run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.blocks import CombineBlock, MoEBlock, neutral_blocks
from sparse_onnx.blocks.expert_thresholds import marked
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import ACTIVATIONS_KEY, Form, want
from sparse_onnx.blocks.moe import is_zero
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.graph import io
from sparse_onnx.kernels import is_built
from sparse_onnx.matching.signs import non_negative
from sparse_onnx.optimize.runner import Planned
from sparse_onnx.sparsify.record import thresholds_of
from sparse_onnx.verify.extract import extract
from sparse_onnx.verify.metadata import named_values

#: A form that no pass makes: blocks that are not looked at stay neutral.
_NONE = Form("none")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Blocks of one model that differ by their weights alone: what is fastest for one is for all of them.

    Attributes:
        facts: everything that a lowering looks at, as plain data.
        names: of the blocks, at least one; the first stands for all.
    """

    facts: dict[str, object]
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]


def kinds(model: ir.Model) -> list[Kind]:
    """The kinds of neutral blocks in a model, in the order of their first block."""
    groups: dict[str, Kind] = {}
    for block in neutral_blocks(model):
        kind = Kind(_facts(block, model), (block.name,))
        known = groups.get(kind.key)
        groups[kind.key] = kind if known is None else Kind(known.facts, (*known.names, block.name))
    return list(groups.values())


def _facts(block: MoEBlock | CombineBlock, model: ir.Model) -> dict[str, object]:
    weight_type = block.expert_weight.dtype
    facts: dict[str, object] = {
        "operator": block.op,
        "experts": block.experts,
        "top_k": block.top_k,
        "hidden": block.hidden,
        "outputs": block.hidden_out,
        "dtype": block.dtype.name,
        "weight_dtype": None if weight_type is None else weight_type.name,
        "dropped": block.experts is None or not never_dropped(block.expert_index, block.experts),
        "non_negative": non_negative(block.expert_weight),
        "activations": block.node.metadata_props.get(ACTIVATIONS_KEY),
    }
    if isinstance(block, CombineBlock):
        return facts | {"bodies": sorted({node.op_type for node in block.nodes})}
    marks = {role: [mark.mode, mark.top_k] for role, mark in marked(block.node).items()}
    # How much is skipped, and whether by the native kernels, decides what is fastest.
    facts |= {"thresholds": marks, "level": _level(model), "kernels": is_built()} if marks else {}
    stored = {}
    for role in block.spec.roles:
        weight = Quantized.of(block.weights[role])
        biased = not is_zero(block.weights[f"{role}_bias"])
        bits = (
            None if weight is None else [weight.data.dtype.name, weight.block, weight.zero_point is not None]
        )
        stored[role] = [bits, biased]
    return facts | {"inner": block.inner, "spec": block.spec.attributes(), "stored": stored}


def _level(model: ir.Model) -> int | None:
    """That its thresholds are at now."""
    record = thresholds_of(model)
    dial = None if record is None else model.graph.initializers.get(record.level_input)
    return None if dial is None or dial.const_value is None else int(dial.const_value.numpy())


@dataclasses.dataclass(frozen=True)
class Alone:
    """A block as a model of its own: names of its inputs tokens, expert_index and expert_weight; sizes of a token."""

    path: Path
    inputs: tuple[str, str, str]
    row: tuple[int, ...]


class NotBuilt(Exception):
    """The form cannot be had; the message says why."""


def build(model: ir.Model, name: str, form: Form, planned: Sequence[Planned], path: Path) -> Alone:
    """Writes the model of one block in one form: tokens, expert_index and expert_weight to its output.

    Args:
        model: in neutral form; unchanged.
        name: of the block.
        form: that it is to take.
        planned: the pipeline with the user's options.
        path: of the model; its weights go beside it.

    Raises:
        NotBuilt: the form refuses the block, or the block cannot stand alone.
    """
    alone, inputs, row = alone_in(model, name, form, planned)
    io.save(alone, path, weights="copy")
    return Alone(path, inputs, row)


def alone_in(
    model: ir.Model, name: str, form: Form, planned: Sequence[Planned]
) -> tuple[ir.Model, tuple[str, str, str], tuple[int, ...]]:
    """The model that `build` writes, names of its inputs, and the sizes of one token.

    Raises:
        NotBuilt: the form refuses the block, or the block cannot stand alone.
    """
    copy = model.clone()
    for block in neutral_blocks(copy):
        want(block.node, [form if block.name == name else _NONE])
    reasons = []
    for item in planned:
        if item.run is not None and item.step.phase == "lower" and form.name in item.step.forms:
            outcome = item.run(copy)
            reasons += [refusal.reason for refusal in getattr(outcome, "refusals", ())]
    lowered = next((block for block in lowered_blocks(copy) if block.name == name), None)
    if lowered is None:
        raise NotBuilt(reasons[0] if reasons else "no pass makes this form of it")
    found = next(block for block in neutral_blocks(model) if block.name == name)
    tokens = found.tokens
    assert tokens is not None and found.expert_weight.dtype is not None
    axes = [found.hidden] if tokens.shape is None or len(tokens.shape) == 2 else list(tokens.shape)[1:]
    row = tuple(axis for axis in axes if isinstance(axis, int))
    if len(row) < len(axes):
        raise NotBuilt("the size of its tokens is not known from the graph")
    types = (found.dtype, ir.DataType.INT64, found.expert_weight.dtype)
    try:
        alone = extract(copy, lowered, named_values(copy), types, row)
    except ValueError as error:
        raise NotBuilt(str(error)) from None
    return alone, (lowered.tokens, lowered.expert_index, lowered.expert_weight), row

"""The sparse blocks of a model as records for the report: neutral ones, and ones already lowered."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.blocks import CombineBlock, MoEBlock, neutral_blocks
from sparse_onnx.blocks.lowered import LoweredBlock, lowered_blocks
from sparse_onnx.core.report import BlockRecord
from sparse_onnx.inspect.router import router_name


def block_records(model: ir.Model) -> list[BlockRecord]:
    """One record a block: the neutral ones in graph order, then the lowered ones."""
    neutral = [_neutral(block) for block in neutral_blocks(model)]
    lowered = lowered_blocks(model)
    values = ir.convenience.create_value_mapping(model.graph) if lowered else {}
    return neutral + [_lowered(block, values) for block in lowered]


def _neutral(block: MoEBlock | CombineBlock) -> BlockRecord:
    moe = block if isinstance(block, MoEBlock) else None
    return BlockRecord(
        name=block.name,
        kind="moe",
        spelling=block.spelling,
        experts=block.experts,
        top_k=block.top_k,
        hidden=block.hidden,
        inner=None if moe is None else moe.inner,
        activation=None if moe is None else moe.spec.name,
        gated=moe is not None and moe.gated,
        router=router_name(block.expert_index, block.expert_weight),
        form=None,
        parameters=block.parameters,
        active_parameters=block.active_parameters,
    )


def _lowered(block: LoweredBlock, values: dict[str, ir.Value]) -> BlockRecord:
    index, weight = values.get(block.expert_index), values.get(block.expert_weight)
    return BlockRecord(
        name=block.name,
        kind=block.kind,
        spelling=block.spelling,
        experts=block.experts,
        top_k=block.top_k,
        hidden=block.hidden,
        inner=block.inner,
        activation=block.activation,
        gated=block.gated,
        router=None if index is None or weight is None else router_name(index, weight),
        form=block.form,
        parameters=block.parameters,
        active_parameters=block.active_parameters,
        rounding=block.activations,
    )

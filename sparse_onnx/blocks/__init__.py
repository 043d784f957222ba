"""The neutral form of a mixture-of-experts block: the operators, their view, body, schema and reference."""

from sparse_onnx.blocks.combine import CombineBlock, combine_blocks, is_combine, make_combine, neutral_blocks
from sparse_onnx.blocks.combine_function import combine_reference
from sparse_onnx.blocks.function import attach_functions, make_function
from sparse_onnx.blocks.moe import MoEBlock, blocks, is_neutral, is_zero, make_node
from sparse_onnx.blocks.reference import reference
from sparse_onnx.blocks.schema import register_schemas
from sparse_onnx.blocks.spec import DOMAIN, Activation, ExpertSpec, GateLayout, WeightLayout

__all__ = [
    "DOMAIN",
    "Activation",
    "CombineBlock",
    "ExpertSpec",
    "GateLayout",
    "MoEBlock",
    "WeightLayout",
    "attach_functions",
    "blocks",
    "combine_blocks",
    "combine_reference",
    "is_combine",
    "is_neutral",
    "is_zero",
    "make_combine",
    "make_function",
    "make_node",
    "neutral_blocks",
    "reference",
    "register_schemas",
]

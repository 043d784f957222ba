"""What counts as a stored quantized weight."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from builders import Shape
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks.quantized import Quantized

SHAPE = Shape(experts=3, top_k=2, hidden=32, inner=48)


@pytest.mark.parametrize(
    ("dtype", "taken"), [(None, True), (0, True), (ir.DataType.FLOAT, True), (ir.DataType.FLOAT16, False)]
)
def test_a_product_of_another_type_is_not_that_of_its_scale(dtype: int | None, taken: bool) -> None:
    model = quantized_model(SHAPE, Storage())
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    if dtype is not None:
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(dtype))
    assert (Quantized.of(node.outputs[0]) is not None) == taken

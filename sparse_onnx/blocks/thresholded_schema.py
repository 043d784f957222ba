"""What the schemas of thresholded layers share: their types, and the shape of their result."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx.defs import OpSchema

from sparse_onnx.blocks.spec import DOMAIN, DOMAIN_VERSION

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]
_INTEGERS = ["tensor(int4)", "tensor(uint4)", "tensor(int8)", "tensor(uint8)"]


def layer_schema(
    op: str,
    formula: str,
    inputs: Sequence[OpSchema.FormalParameter],
    tokens: int,
    attributes: Sequence[OpSchema.Attribute] = (),
) -> OpSchema:
    """A layer of one output Y ``[..., N]``; with attributes, the layout of its blocks, of integer weights Q.

    Args:
        op: its name.
        formula: what it computes.
        inputs: T are numbers; the last one is the bias ``[..., N]``.
        tokens: place of the input ``[..., K]`` whose leading axes Y has.
        attributes: see above.
    """
    constraints = [("T", _FLOATS, "Numbers.")] + ([("Q", _INTEGERS, "Stored weights.")] if attributes else [])
    schema = OpSchema(
        op,
        DOMAIN,
        DOMAIN_VERSION,
        formula,
        inputs=list(inputs),
        outputs=[OpSchema.FormalParameter("Y", "T", "[..., N]")],
        type_constraints=constraints,
        attributes=list(attributes),
    )

    def infer(context: onnx.shape_inference.InferenceContext) -> None:
        x, bias = (context.get_input_type(at) for at in (tokens, context.get_num_inputs() - 1))
        if x is None:
            return
        result = onnx.TypeProto()
        result.tensor_type.elem_type = x.tensor_type.elem_type
        if x.tensor_type.HasField("shape"):
            for source in x.tensor_type.shape.dim[:-1]:
                result.tensor_type.shape.dim.add().CopyFrom(source)
            last = result.tensor_type.shape.dim.add()
            if bias is not None and bias.tensor_type.shape.dim:
                last.CopyFrom(bias.tensor_type.shape.dim[-1])
        context.set_output_type(0, result)

    schema.set_type_and_shape_inference_function(infer)
    return schema

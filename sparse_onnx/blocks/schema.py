"""ONNX schemas of the neutral operators: the torch exporter's translation and the checker look them up."""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

from sparse_onnx.blocks.combine import COMBINE
from sparse_onnx.blocks.combine_function import combine_schema
from sparse_onnx.blocks.spec import (
    DOMAIN,
    DOMAIN_VERSION,
    FLOAT_ATTRIBUTES,
    INTEGER_ATTRIBUTES,
    ROLES,
    input_names,
)
from sparse_onnx.blocks.thresholded import thresholded_schemas
from sparse_onnx.blocks.thresholded_experts import experts_schemas
from sparse_onnx.blocks.thresholded_gated import gated_schemas

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]

_DOC = """
A mixture-of-experts block: each token goes through the experts that its router chose, and the results are
summed.

  output[t] = sum over k of expert_weight[t, k] * expert_{{expert_index[t, k]}}(tokens[t])

An index of E, the number of experts, is a dropped slot: it adds nothing, whatever its weight and token hold.
Equal indices of one token add up. The sum is taken in expert_weight's type and cast to the tokens' type once.

An expert is {expert}
"""

_EXPERT = {
    "MoE": "y = fc2 h + fc2_bias of p = fc1 x + fc1_bias, with h = act(p) where gate_layout is 0, and else "
    "h = act(min(g, limit)) * (clip(u, -limit, limit) + beta) of the halves g and u of p; with activation 5 "
    "h = act(g) * (limit * tanh(u / limit) + beta).",
    "GatedMoE": "y = down h + down_bias with h = act(min(g, limit)) * (clip(u, -limit, limit) + beta), of "
    "g = gate x + gate_bias and u = up x + up_bias; with activation 5 "
    "h = act(g) * (limit * tanh(u / limit) + beta).",
}

_INPUTS = {
    "tokens": ("T", "[T, D]"),
    "expert_index": ("I", "[T, K], each in [0, E]; E drops the slot"),
    "expert_weight": ("W", "[T, K]"),
    "fc1": ("T", "[E, N, D], or [E, D, N] with weight_layout 1; N = I without a gate, 2 I with one"),
    "fc1_bias": ("T", "[E, N]"),
    "fc2": ("T", "[E, D_out, I], or [E, I, D_out] with weight_layout 1"),
    "fc2_bias": ("T", "[E, D_out]"),
    "gate": ("T", "[E, I, D], or [E, D, I] with weight_layout 1"),
    "gate_bias": ("T", "[E, I]"),
    "up": ("T", "[E, I, D], or [E, D, I] with weight_layout 1"),
    "up_bias": ("T", "[E, I]"),
    "down": ("T", "[E, D_out, I], or [E, I, D_out] with weight_layout 1"),
    "down_bias": ("T", "[E, D_out]"),
}

_ATTRIBUTES = {
    "activation": "0: x * sigmoid(alpha * x). 1: gelu (erf). 2: gelu (tanh). 3: relu. 4: relu squared. "
    "5: alpha * tanh(x / alpha) * sigmoid(x).",
    "gate_layout": "0: no gate. 1: gate, then up. 2: gate in the even outputs of fc1, up in the odd ones.",
    "weight_layout": "0: matrices are [outputs, inputs]. 1: [inputs, outputs].",
    "limit": "Clamp of gate (from above) and up (both sides); of activation 5 the soft cap of up alone. 0 for none.",
    "alpha": "Slope of the sigmoid of activation 0; soft cap of activation 5, above 0.",
    "beta": "Added to up.",
}


def register_schemas() -> None:
    """Registers all schemas with onnx, in this process. Calling it again does nothing."""
    for op in ROLES:
        if not onnx.defs.has(op, DOMAIN):
            onnx.defs.register_schema(_schema(op))
    if not onnx.defs.has(COMBINE, DOMAIN):
        onnx.defs.register_schema(combine_schema())
    for schema in (*thresholded_schemas(), *gated_schemas(), *experts_schemas()):
        if not onnx.defs.has(schema.name, DOMAIN):
            onnx.defs.register_schema(schema)


def _schema(op: str) -> OpSchema:
    integers, floats = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT
    kinds = [(name, integers) for name in INTEGER_ATTRIBUTES[op]] + [
        (name, floats) for name in FLOAT_ATTRIBUTES
    ]
    schema = OpSchema(
        op,
        DOMAIN,
        DOMAIN_VERSION,
        _DOC.format(expert=_EXPERT[op]),
        inputs=[OpSchema.FormalParameter(name, *_INPUTS[name]) for name in input_names(op)],
        outputs=[OpSchema.FormalParameter("output", "T", "[T, D_out]")],
        type_constraints=[
            ("T", _FLOATS, "Tokens, weights and output."),
            ("W", _FLOATS, "Weights of the routing; the sum is taken in this type."),
            ("I", ["tensor(int64)"], "Experts."),
        ],
        attributes=[OpSchema.Attribute(name, kind, _ATTRIBUTES[name]) for name, kind in kinds],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """tokens ``[T, D]`` and the last bias ``[E, D_out]`` give ``[T, D_out]`` of the tokens' type."""
    tokens = context.get_input_type(0)
    bias = context.get_input_type(context.get_num_inputs() - 1)
    if tokens is None:
        return
    result = onnx.TypeProto()
    result.tensor_type.elem_type = tokens.tensor_type.elem_type
    for source, axis in ((tokens, 0), (bias, 1)):
        dimension = result.tensor_type.shape.dim.add()
        if source is not None and len(source.tensor_type.shape.dim) == 2:
            dimension.CopyFrom(source.tensor_type.shape.dim[axis])
    context.set_output_type(0, result)

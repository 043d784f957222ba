"""What defines `sparse_onnx::Combine`: its body as ONNX text, its schema, and the numpy reference."""

from __future__ import annotations

import string

import numpy as np
import numpy.typing as npt
import onnx
from onnx.defs import OpSchema

from sparse_onnx.blocks.combine import COMBINE
from sparse_onnx.blocks.spec import DOMAIN, DOMAIN_VERSION

_FLOATS = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]

_DOC = """
A mixture of experts that are computed outside: the sum of those that the router chose.

  output[t] = sum over k of expert_weight[t, k] * experts[expert_index[t, k], t]

An index of E, the number of experts, is a dropped slot: it adds nothing, whatever its weight holds. Equal indices
of one token add up. The sum is taken in expert_weight's type and cast to the experts' type once.
"""

# A dropped slot gathers row 0 of expert 0, and that row is then put away whole: it may hold an infinity.
_BODY = string.Template("""
<domain: "$domain", opset_import: ["" : $opset]>
$op (expert_index, expert_weight, experts) => (output)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  slot_axis = Constant <value_ints = [1]> ()
  last_axis = Constant <value_ints = [-1]> ()
  zero_f = Constant <value_float = 0.0> ()
  all_experts = Shape <start = 0, end = 1> (experts)
  count = Squeeze (all_experts)
  kept = Less (expert_index, count)
  kept_column = Unsqueeze (kept, last_axis)
  index = Where (kept, expert_index, zero)

  index_shape = Shape (expert_index)
  all_tokens = Shape <start = 0, end = 1> (expert_index)
  tokens = Squeeze (all_tokens)
  token = Range (zero, tokens, one)
  token_column = Unsqueeze (token, last_axis)
  tokens_of_slots = Expand (token_column, index_shape)
  index_last = Unsqueeze (index, last_axis)
  token_last = Unsqueeze (tokens_of_slots, last_axis)
  place = Concat <axis = -1> (index_last, token_last)
  slots = GatherND (experts, place)

  no_value = CastLike (zero_f, experts)
  kept_slots = Where (kept_column, slots, no_value)
  no_weight = CastLike (zero_f, expert_weight)
  kept_weight = Where (kept, expert_weight, no_weight)
  slot_weight = Unsqueeze (kept_weight, last_axis)
  slots_to_weigh = CastLike (kept_slots, expert_weight)
  weighted = Mul (slots_to_weigh, slot_weight)
  sum = ReduceSum <keepdims = 0> (weighted, slot_axis)
  output = CastLike (sum, experts)
}
""")


def combine_text(domain: str, opset: int) -> str:
    """The function in ONNX text; `opset` is the one of the default domain that it imports."""
    return _BODY.substitute(domain=domain, op=COMBINE, opset=opset)


def combine_reference(
    expert_index: np.ndarray,
    expert_weight: np.ndarray,
    experts: np.ndarray,
    *,
    accumulate: npt.DTypeLike = np.float64,
) -> np.ndarray:
    """``y[t] = sum_k expert_weight[t, k] * experts[expert_index[t, k], t]``.

    Args:
        expert_index: ``[T, K]`` integers in [0, E]; a slot with E adds nothing.
        expert_weight: ``[T, K]``.
        experts: ``[E, T, D]``.
        accumulate: type of all arithmetic.

    Returns:
        ``[T, D]`` of the experts' type.

    Raises:
        ValueError: an index outside [0, E].
    """
    count, tokens, width = experts.shape
    if expert_index.size and not (expert_index.min() >= 0 and expert_index.max() <= count):
        raise ValueError(f"expert_index outside [0, {count}]")
    result = np.zeros((tokens, width), accumulate)
    with np.errstate(all="ignore"):
        for token, slot in zip(*np.nonzero(expert_index < count), strict=True):
            row = experts[expert_index[token, slot], token].astype(accumulate)
            result[token] += row * expert_weight[token, slot].astype(accumulate)
        return result.astype(experts.dtype)


def combine_schema() -> OpSchema:
    parameter = OpSchema.FormalParameter
    schema = OpSchema(
        COMBINE,
        DOMAIN,
        DOMAIN_VERSION,
        _DOC,
        inputs=[
            parameter("expert_index", "I", "[T, K], each in [0, E]; E drops the slot"),
            parameter("expert_weight", "W", "[T, K]"),
            parameter("experts", "T", "[E, T, D]: each expert's result for each token"),
        ],
        outputs=[parameter("output", "T", "[T, D]")],
        type_constraints=[
            ("T", _FLOATS, "Experts and output."),
            ("W", _FLOATS, "Weights of the routing; the sum is taken in this type."),
            ("I", ["tensor(int64)"], "Experts."),
        ],
        attributes=[],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """experts ``[E, T, D]`` give ``[T, D]`` of their type."""
    experts = context.get_input_type(2)
    if experts is None:
        return
    result = onnx.TypeProto()
    result.tensor_type.elem_type = experts.tensor_type.elem_type
    known = len(experts.tensor_type.shape.dim) == 3
    for axis in (1, 2):
        dimension = result.tensor_type.shape.dim.add()
        if known:
            dimension.CopyFrom(experts.tensor_type.shape.dim[axis])
    context.set_output_type(0, result)

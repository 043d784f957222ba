"""The bodies of the neutral operators, as ONNX text.

Integer attributes become constants, and every choice is an `If` on such a constant, which ORT folds away
while it loads the model; what stays is one Loop over the experts that were hit:

    e = hit[i]; positions = where expert_index == e; x = tokens of those rows
    slots[positions] = FFN_e(x)             ScatterND without a reduction: no position comes twice
    output = sum over k of expert_weight[:, k] * slots[:, k]

Experts without tokens are neither computed nor read, and dropped slots keep the zeros they began with.

The Reshape behind the Loop gives shape inference back the shape that it loses in one.

Three rules hold in the text. Both branches of an `If` must pass shape inference whatever the attributes are:
what a branch turns or cuts meets other shapes only behind the `If`, where its own shape is unknown if the
branches differ. Rows and weights are taken by Gather and then Squeeze, not by Gather of a scalar: ORT runs
float16 in float32 on CPU, and moves the cast in front of a Gather that feeds a product alone, which would
cast all experts for each one. And only operators that mean the same from opset 18 to the newest are used
(so no Gelu), since ORT inlines a body without converting it.
"""

from __future__ import annotations

import math
import string

from sparse_onnx.blocks.spec import (
    FLOAT_ATTRIBUTES,
    INTEGER_ATTRIBUTES,
    ROLES,
    Activation,
    GateLayout,
    WeightLayout,
    input_names,
)

_FUNCTION = string.Template("""
<domain: "$domain", opset_import: ["" : $opset]>
$op <$attributes> ($inputs) => (output)
{
  $constants
  all_experts = Shape <start = 0, end = 1> ($first_role)
  experts = Squeeze (all_experts)
  kept = Less (expert_index, experts)

  flat_index = Reshape (expert_index, last_axis)
  flat_kept = Less (flat_index, experts)
  kept_index = Compress (flat_index, flat_kept)
  hit = Unique (kept_index)
  hits = Size (hit)

  index_shape = Shape (expert_index)
  output_width = Shape <start = 1, end = 2> (${last_role}_bias)
  slots_shape = Concat <axis = 0> (index_shape, output_width)
  no_slots = Expand (zero, slots_shape)

  filled = Loop (hits, always, no_slots) <body = expert (int64 i, bool go, done) => (go_on, done_next) {
    go_on = Identity (go)
    e = Gather (hit, i)
    e_row = Unsqueeze (e, first_axis)
    mine = Equal (expert_index, e)
    at = NonZero (mine)
    positions = Transpose <perm = [1, 0]> (at)
    rows = Gather (at, first_axis)
    x_row = Gather (tokens, rows)
    x = Squeeze (x_row, first_axis)
    $ffn
    done_next = ScatterND (done, positions, y)
  }>
  slots = Reshape (filled, slots_shape)

  no_weight = CastLike (zero_f, expert_weight)
  kept_weight = Where (kept, expert_weight, no_weight)
  slot_weight = Unsqueeze (kept_weight, last_axis)
  slots_to_weigh = CastLike (slots, expert_weight)
  weighted = Mul (slots_to_weigh, slot_weight)
  sum = ReduceSum <keepdims = 0> (weighted, slot_axis)
  output = CastLike (sum, tokens)
}
""")

_CONSTANTS = """
  always = Constant <value = bool {1}> ()
  first_axis = Constant <value_ints = [0]> ()
  slot_axis = Constant <value_ints = [1]> ()
  last_axis = Constant <value_ints = [-1]> ()
"""

_PACKED_CONSTANTS = """
  two = Constant <value_ints = [2]> ()
  fc1_width = Shape <start = 1, end = 2> (fc1_bias)
  half_width = Div (fc1_width, two)
  even_width = Mul (half_width, two)
"""

# Written as float32, used in the tokens' type.
_FLOATS = {
    "zero": 0.0,
    "half": 0.5,
    "one": 1.0,
    "sqrt_half": math.sqrt(0.5),
    "tanh_scale": math.sqrt(2 / math.pi),
    "tanh_cubic": 0.044715,
}

_LINEAR = string.Template("""
    ${role}_row = Gather ($role, e_row)
    ${role}_e = Squeeze (${role}_row, first_axis)
    ${role}_bias_row = Gather (${role}_bias, e_row)
    ${role}_bias_e = Squeeze (${role}_bias_row, first_axis)
    ${role}_m = If (is_in_out) <
      then_branch = ${role}_in_out () => (${role}_as_is) { ${role}_as_is = Identity (${role}_e) },
      else_branch = ${role}_out_in () => (${role}_turned) {
        ${role}_turned = Transpose <perm = [1, 0]> (${role}_e)
      }>
    ${role}_product = MatMul ($x, ${role}_m)
    $y = Add (${role}_product, ${role}_bias_e)
""")

# Each turns g into h_<label>.
_ACTIVATIONS = {
    Activation.SILU: """
        silu_x = Mul (g, alpha)
        silu_s = Sigmoid (silu_x)
        h_silu = Mul (g, silu_s)""",
    Activation.GELU: """
        gelu_x = Mul (g, sqrt_half)
        gelu_erf = Erf (gelu_x)
        gelu_1 = Add (gelu_erf, one)
        gelu_g = Mul (g, gelu_1)
        h_gelu = Mul (gelu_g, half)""",
    Activation.GELU_TANH: """
        tanh_g2 = Mul (g, g)
        tanh_g3 = Mul (tanh_g2, g)
        tanh_c = Mul (tanh_g3, tanh_cubic)
        tanh_in = Add (g, tanh_c)
        tanh_x = Mul (tanh_in, tanh_scale)
        tanh_t = Tanh (tanh_x)
        tanh_1 = Add (tanh_t, one)
        tanh_g = Mul (g, tanh_1)
        h_gelu_tanh = Mul (tanh_g, half)""",
    Activation.RELU: """
        h_relu = Relu (g)""",
    Activation.RELU2: """
        relu2_r = Relu (g)
        h_relu2 = Mul (relu2_r, relu2_r)""",
    Activation.SILU_SOFTCAP: """
        softcap_x = Div (g, alpha)
        softcap_t = Tanh (softcap_x)
        softcap_g = Mul (softcap_t, alpha)
        softcap_s = Sigmoid (g)
        h_silu_softcap = Mul (softcap_g, softcap_s)""",
}

# Without a gate both halves are the whole, so that the shapes of the product below agree in every case.
_HALVES = """
    gate_y, up_y = If (is_ungated) <
      then_branch = ungated () => (gate_whole, up_whole) {
        gate_whole = Identity (fc1_y)
        up_whole = Identity (fc1_y)
      },
      else_branch = gated () => (gate_half, up_half) {
        gate_half, up_half = If (is_interleaved) <
          then_branch = interleaved () => (gate_even, up_odd) {
            gate_even = Slice (fc1_y, first_axis, even_width, slot_axis, two)
            up_odd = Slice (fc1_y, slot_axis, even_width, slot_axis, two)
          },
          else_branch = concatenated () => (gate_left, up_right) {
            gate_left = Slice (fc1_y, first_axis, half_width, slot_axis)
            up_right = Slice (fc1_y, half_width, even_width, slot_axis)
          }>
      }>
"""

_CLAMPS = """
    g, u = If (has_limit) <
      then_branch = bounded () => (gate_bounded, up_bounded) {
        gate_bounded, up_bounded = If (is_silu_softcap) <
          then_branch = softcapped () => (gate_raw, up_capped) {
            gate_raw = Identity (gate_y)
            up_scaled = Div (up_y, limit)
            up_bent = Tanh (up_scaled)
            up_capped = Mul (up_bent, limit)
          },
          else_branch = clamped () => (gate_clamped, up_clamped) {
            gate_clamped = Min (gate_y, limit)
            up_below = Min (up_y, limit)
            up_clamped = Max (up_below, minus_limit)
          }>
      },
      else_branch = unclamped () => (gate_free, up_free) {
        gate_free = Identity (gate_y)
        up_free = Identity (up_y)
      }>
"""

_GATE = """
    up_shifted = Add (u, beta)
    h_gated = Mul (h_act, up_shifted)
"""

_GATE_OR_NOT = f"""
    h = If (is_ungated) <
      then_branch = no_product () => (h_plain) {{ h_plain = Identity (h_act) }},
      else_branch = product () => (h_gated) {{ {_GATE} }}>
"""


def body_text(op: str, domain: str, opset: int) -> str:
    """The function in ONNX text; `opset` is the one of the default domain that it imports."""
    roles = ROLES[op]
    return _FUNCTION.substitute(
        domain=domain,
        opset=opset,
        op=op,
        attributes=", ".join(INTEGER_ATTRIBUTES[op] + FLOAT_ATTRIBUTES),
        inputs=", ".join(input_names(op)),
        constants=_constants(op),
        first_role=roles[0],
        last_role=roles[-1],
        ffn=_separate_ffn() if op == "GatedMoE" else _packed_ffn(),
    )


def _packed_ffn() -> str:
    fc1 = _LINEAR.substitute(role="fc1", x="x", y="fc1_y")
    fc2 = _LINEAR.substitute(role="fc2", x="h", y="y")
    return fc1 + _HALVES + _CLAMPS + _activation() + _GATE_OR_NOT + fc2


def _separate_ffn() -> str:
    gate = _LINEAR.substitute(role="gate", x="x", y="gate_y")
    up = _LINEAR.substitute(role="up", x="x", y="up_y")
    down = _LINEAR.substitute(role="down", x="h_gated", y="y")
    return gate + up + _CLAMPS + _activation() + _GATE + down


def _activation() -> str:
    """h_act from g: a chain of If, the last activation in the last else."""
    *firsts, last = _ACTIVATIONS
    text, result = _ACTIVATIONS[last], f"h_{last.label}"
    for activation in reversed(firsts):
        label = activation.label
        text = f"""
      h_from_{label} = If (is_{label}) <
        then_branch = {label} () => (h_{label}) {{ {_ACTIVATIONS[activation]} }},
        else_branch = not_{label} () => ({result}) {{ {text} }}>
"""
        result = f"h_from_{label}"
    return f"{text}\n      h_act = Identity ({result})\n"


def _constants(op: str) -> str:
    lines = [_CONSTANTS, _PACKED_CONSTANTS] if op == "MoE" else [_CONSTANTS]
    for name, value in _FLOATS.items():
        lines.append(f"{name}_f = Constant <value_float = {value!r}> ()")
    for name in FLOAT_ATTRIBUTES:
        lines.append(f"{name}_f = Constant <value_float: float = @{name}> ()")
    lines += [f"{name} = CastLike ({name}_f, tokens)" for name in (*_FLOATS, *FLOAT_ATTRIBUTES)]
    lines += [
        "minus_limit_f = Neg (limit_f)",
        "minus_limit = CastLike (minus_limit_f, tokens)",
        "has_limit = Greater (limit_f, zero_f)",
    ]
    choices: dict[str, list[tuple[str, int]]] = {
        "activation": [(activation.label, int(activation)) for activation in Activation],
        "gate_layout": [("ungated", int(GateLayout.NONE)), ("interleaved", int(GateLayout.INTERLEAVED))],
        "weight_layout": [("in_out", int(WeightLayout.IN_OUT))],
    }
    for attribute in INTEGER_ATTRIBUTES[op]:
        lines.append(f"{attribute} = Constant <value_int: int = @{attribute}> ()")
        for label, number in choices[attribute]:
            lines.append(f"{label}_number = Constant <value_int = {number}> ()")
            lines.append(f"is_{label} = Equal ({attribute}, {label}_number)")
    return "\n  ".join(lines)

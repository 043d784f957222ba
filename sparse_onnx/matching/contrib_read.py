"""What a `com.microsoft::MoE` or `QMoE` node computes, read from its attributes and the shapes of its inputs.

Meanings are those of ONNX Runtime 1.32's CPU kernels, found by experiment, and the operators' definition for the forms
that only its CUDA kernels run (gate and up in halves of fc1, or up in fc3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout
from sparse_onnx.matching.contrib import Contrib, Unlike, constant_shape
from sparse_onnx.matching.contrib_quantized import (
    require_full_accuracy,
    require_readable_weights,
    require_zero_points,
    scale_block,
)
from sparse_onnx.matching.values import rank, size, tensor

_MOE_INPUTS = ("input", "router_probs", "fc1", "fc1_bias", "fc2", "fc2_bias", "fc3", "fc3_bias")
_QMOE_INPUTS = (
    "input", "router_probs", "fc1", "fc1_scales", "fc1_bias", "fc2", "fc2_scales", "fc2_bias",
    "fc3", "fc3_scales", "fc3_bias", "fc1_zero_points", "fc2_zero_points", "fc3_zero_points", "router_weights",
)  # fmt: skip
_MOE_DEFAULTS: dict[str, Any] = {
    "k": 1, "activation_type": "relu", "normalize_routing_weights": 0, "use_sparse_mixer": 0, "swiglu_fusion": 0,
    "swiglu_limit": math.inf, "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_limit_after_activation": 0,
}  # fmt: skip
_QMOE_DEFAULTS: dict[str, Any] = _MOE_DEFAULTS | {
    "expert_weight_bits": 4, "fc1_expert_weight_bits": None, "fc2_expert_weight_bits": None,
    "fc3_expert_weight_bits": None, "block_size": 0, "accuracy_level": 0, "quant_type": "int", "weights_prepacked": -1,
}  # fmt: skip
#: The kernels' gelu is the one with tanh.
_PLAIN = {"relu": Activation.RELU, "gelu": Activation.GELU_TANH, "silu": Activation.SILU}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_contrib(node: ir.Node, opset: int) -> Contrib:
    """Reads a MoE or QMoE node.

    Raises:
        Unlike: it is not a block of the neutral kind, or not provably so.
    """
    quantized = node.op_type == "QMoE"
    given = _attributes(node, _QMOE_DEFAULTS if quantized else _MOE_DEFAULTS)
    inputs = _inputs(node, _QMOE_INPUTS if quantized else _MOE_INPUTS)
    spec, roles = _expert(given, "fc3" in inputs)
    on_cpu = spec.gate_layout in (GateLayout.NONE, GateLayout.INTERLEAVED)
    if quantized:
        require_readable_weights(given, opset, on_cpu)
        if not given["normalize_routing_weights"] and "router_weights" not in inputs:
            raise Unlike(
                "normalize_routing_weights is 0 on a QMoE, and its CPU kernel divides the weights by their sum anyway",
                "set it to 1 where the weights are meant to have a sum of one",
            )
    for name in _weights(roles, inputs):
        _require_constant(inputs[name], name)
    bits = given["expert_weight_bits"] if quantized else 0
    experts, hidden, inner = _sizes(inputs, spec, 8 // bits if bits else 1)
    found = Contrib(
        node=node,
        spec=spec,
        roles=roles,
        inputs=inputs,
        experts=experts,
        hidden=hidden,
        inner=inner,
        top_k=given["k"],
        normalize=given["normalize_routing_weights"] == 1,
        bits=bits,
        blocks={},
        on_cpu=on_cpu,
    )
    _require_shapes(found)
    if not 1 <= found.top_k <= experts:
        raise Unlike(
            f"k is {found.top_k}, and there are {experts} experts", "k must lie between 1 and their number"
        )
    if quantized:
        found = dataclasses.replace(
            found, blocks={name: scale_block(found, name, given) for name in roles.values()}
        )
        require_full_accuracy(found, given)
        for name in roles.values():
            require_zero_points(found, name)
    _require_types(found)
    return found


def _attributes(node: ir.Node, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(defaults)
    for name, attribute in node.attributes.items():
        if name not in defaults or attribute.is_ref():
            raise Unlike(
                f"the attribute '{name}' is not one that is known",
                "only what ONNX Runtime 1.32 defines can be lifted",
            )
        given[name] = attribute.value
    if given["use_sparse_mixer"]:
        raise Unlike(
            "use_sparse_mixer is set, a router that ONNX Runtime's kernels disagree on",
            "write the router in plain operators, and its weights as the router's logits",
        )
    if given["swiglu_limit_after_activation"]:
        raise Unlike(
            "swiglu_limit_after_activation is set: the gate is clamped behind its activation",
            "only a clamp in front of the activation can be written in the neutral form",
        )
    if given["normalize_routing_weights"] not in (0, 1):
        raise Unlike(
            f"normalize_routing_weights is {given['normalize_routing_weights']}", "it must be 0 or 1"
        )
    return given


def _inputs(node: ir.Node, names: tuple[str, ...]) -> dict[str, ir.Value]:
    values = [value for value in node.inputs[len(names) :] if value is not None]
    if values:
        raise Unlike(
            f"it takes '{values[0].name}', a scale of 4-bit or 8-bit floating-point weights",
            "only integer weights can be lifted",
        )
    inputs = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
    missing = [name for name in ("input", "router_probs", "fc1", "fc2") if name not in inputs]
    if missing or len(node.outputs) != 1:
        raise Unlike(
            f"it lacks the input {missing[0] if missing else 'of an output'}", "the node is malformed"
        )
    stray = [name for name in inputs if name.startswith("fc3") and "fc3" not in inputs]
    if stray:
        raise Unlike(f"it has {stray[0]} and no fc3", "the node is malformed")
    return inputs


def _expert(given: Mapping[str, Any], has_fc3: bool) -> tuple[ExpertSpec, dict[str, str]]:
    kind, fusion = given["activation_type"], given["swiglu_fusion"]
    two = {"fc1": "fc1", "fc2": "fc2"}
    three = {"gate": "fc1", "up": "fc3", "down": "fc2"}
    out_in = WeightLayout.OUT_IN
    if kind == "swiglu" and fusion in (0, 1, 2) and has_fc3 == (fusion == 0):
        limit = given["swiglu_limit"]
        if limit <= 0 or math.isnan(limit):
            raise Unlike(f"swiglu_limit is {limit:g}", "a limit is above 0; leave it out for none")
        layout = (GateLayout.SEPARATE, GateLayout.INTERLEAVED, GateLayout.CONCATENATED)[fusion]
        values = (0.0 if math.isinf(limit) else limit, given["activation_alpha"], given["activation_beta"])
        try:
            return ExpertSpec(Activation.SILU, layout, out_in, *values), three if has_fc3 else two
        except ValueError as error:
            raise Unlike(str(error), "the activation's parameters must be finite") from None
    if kind == "silu" and has_fc3 and fusion == 0:
        return ExpertSpec(Activation.SILU, GateLayout.SEPARATE, out_in), three
    if kind in _PLAIN and not has_fc3 and fusion == 0:
        return ExpertSpec(_PLAIN[kind], GateLayout.NONE, out_in), two
    gate = "with fc3" if has_fc3 else "without fc3"
    raise Unlike(
        f"activation_type is '{kind}' with swiglu_fusion {fusion} {gate}, which is none of the neutral experts",
        "these are relu, gelu and silu without fc3, silu with fc3, and swiglu in its three layouts",
    )


def _weights(roles: Mapping[str, str], inputs: Mapping[str, ir.Value]) -> list[str]:
    parts = ("", "_scales", "_bias", "_zero_points")
    return [name + part for name in roles.values() for part in parts if name + part in inputs]


def _require_constant(value: ir.Value, name: str) -> None:
    if tensor(value) is None:
        raise Unlike(
            f"{name} is computed or passed in at run time",
            "weights must be initializers that are not graph inputs",
        )


def _sizes(inputs: Mapping[str, ir.Value], spec: ExpertSpec, packed: int) -> tuple[int, int, int]:
    """Experts, hidden and inner size, by fc2 ``[E, D, I]``; `packed` elements lie in one stored."""
    first, last = constant_shape(inputs["fc1"]), constant_shape(inputs["fc2"])
    if len(first) != 3 or len(last) != 3:
        raise Unlike(
            f"fc1 is {list(first)} and fc2 {list(last)}", "weights have the axes experts, outputs, inputs"
        )
    experts, hidden, inner = last[0], last[1], last[2] * packed
    if size(inputs["input"], -1) is None and not spec.gated and hidden != inner:
        # The kernels also take the shapes [E, D, I] and [E, I, D], as labels of the same bytes.
        raise Unlike(
            "the width of its input is not known from the graph, which tells outputs from inputs of its weights",
            "save the model with its inferred shapes",
        )
    return experts, hidden, inner


def _require_shapes(found: Contrib) -> None:
    inputs, experts = found.inputs, found.experts
    packed = 8 // found.bits if found.bits else 1
    wanted: dict[str, tuple[int, ...]] = {}
    for name in found.roles.values():
        wanted[name] = (experts, found.outputs(name), found.width(name) // packed)
        wanted[f"{name}_bias"] = (experts, found.outputs(name))
    for name, shape in wanted.items():
        if name in inputs and constant_shape(inputs[name]) != shape:
            raise Unlike(
                f"{name} has the shape {list(constant_shape(inputs[name]))}, not {list(shape)}",
                "the shapes of weights must fit each other, outputs before inputs",
            )
    ranks = {"input": (2, 3), "router_probs": (2,), "router_weights": (2,)}
    for name, allowed in ranks.items():
        axes = rank(inputs.get(name))
        if axes is not None and axes not in allowed:
            raise Unlike(f"{name} has {axes} axes", "it takes rows of tokens, and rows of scores by expert")
    last = {"input": found.hidden, "router_probs": experts, "router_weights": experts}
    for name, width in last.items():
        known = size(inputs[name], -1) if name in inputs else None
        if known not in (None, width):
            raise Unlike(
                f"{name} has rows of {known}, not {width}", "the shapes of inputs and weights must fit"
            )
    if not (experts and found.hidden and found.inner):
        raise Unlike("it has no experts, or experts of no size", "there is nothing to run")


def _require_types(found: Contrib) -> None:
    kinds = {}
    for name, value in found.inputs.items():
        held = tensor(value)
        dtype = value.dtype if held is None else held.dtype
        if name in ("router_probs", "router_weights") or dtype is None:
            continue
        if found.bits and (name in found.roles.values() or name.endswith("_zero_points")):
            if dtype != ir.DataType.UINT8:
                raise Unlike(f"{name} is {dtype.name}", "packed integers are stored as bytes")
            continue
        kinds[name] = dtype
    if len(set(kinds.values())) != 1 or not set(kinds.values()) <= set(_FLOATS):
        text = ", ".join(f"{name} {dtype.name.lower()}" for name, dtype in sorted(kinds.items()))
        raise Unlike(
            f"its inputs have different types: {text}", "tokens, weights and scales must have one type"
        )

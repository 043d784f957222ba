"""One sparse block with its router as a model: what targets are tried on. Every activation, gate and kind of router."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, attach_functions
from sparse_onnx.blocks.moe import NAME_KEY
from sparse_onnx.graph.infer import infer

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 32, 24

#: `logits [T, E]` to `index [T, K]` and `weight [T, K]`, in terms of `inspect`; `dropped`: few go to nobody.
ROUTERS = {
    "softmax_topk": "p = Softmax<axis=-1>(logits) weight, index = TopK<axis=-1>(p, k)",
    "softmax_topk_renormalised": "p = Softmax<axis=-1>(logits) w, index = TopK<axis=-1>(p, k) "
    "s = ReduceSum<keepdims=1>(w, last) weight = Div(w, s)",
    "topk_softmax": "t, index = TopK<axis=-1>(logits, k) weight = Softmax<axis=-1>(t)",
    "softmax_top1": "p = Softmax<axis=-1>(logits) index = ArgMax<axis=-1, keepdims=1>(p) "
    "weight = ReduceMax<keepdims=1>(p, last)",
    "sigmoid_bias_topk_renormalised": "p = Sigmoid(logits) b = Add(p, bias) c, index = TopK<axis=-1>(b, k) "
    "w = GatherElements<axis=1>(p, index) s = ReduceSum<keepdims=1>(w, last) weight = Div(w, s)",
    "sigmoid_bias_group_topk_renormalised": "p = Sigmoid(logits) b = Add(p, bias) r = Reshape(b, grouped) "
    "g2, gj = TopK<axis=-1>(r, k) gs = ReduceSum<keepdims=0>(g2, last) g, gi = TopK<axis=-1>(gs, k) "
    "z = Mul(gs, zero) o = Mul(g, zero) ones = Add(o, one) m = ScatterElements<axis=1>(z, gi, ones) "
    "m3 = Unsqueeze(m, last) on = Greater(m3, half) rm = Where(on, r, low) masked = Reshape(rm, flat) "
    "c, index = TopK<axis=-1>(masked, k) w = GatherElements<axis=1>(p, index) "
    "s = ReduceSum<keepdims=1>(w, last) weight = Div(w, s)",
    "softmax_topk_dropped": "p = Softmax<axis=-1>(logits) weight, chosen = TopK<axis=-1>(p, k) "
    "few = Less(weight, tenth) index = Where(few, experts, chosen)",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A block: what its experts compute, and how they are chosen."""

    name: str
    spec: ExpertSpec
    router: str
    biases: bool = False


def samples() -> Iterator[Sample]:
    """Every activation with and without a gate behind the usual router, then every other router."""
    usual = "softmax_topk_renormalised"
    for activation, gate in itertools.product(Activation, (GateLayout.NONE, GateLayout.CONCATENATED)):
        spec = ExpertSpec(activation, gate, WeightLayout.OUT_IN)
        yield Sample(f"{activation.label}{', gated' if spec.gated else ''}", spec, usual)
    clamped = ExpertSpec(Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, 7.0, 1.702, 1.0)
    yield Sample("clamped swiglu, biases", clamped, usual, biases=True)
    apart = ExpertSpec(Activation.SILU, GateLayout.SEPARATE, WeightLayout.OUT_IN)
    yield Sample("silu, gate apart", apart, usual)
    for router in ROUTERS:
        if router != usual:
            yield Sample(
                router, ExpertSpec(Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN), router
            )


def build(sample: Sample, tokens: int | str = "T", seed: int = 0) -> ir.Model:
    """``x [T, D] -> y [T, D]``: router, neutral block, residual. Float32.

    Args:
        sample: the block.
        tokens: T, a number for a static shape.
        seed: of the weights, normal / sqrt(fan in).
    """
    top_k = 1 if sample.router == "softmax_top1" else TOP_K
    rng = np.random.default_rng(seed)
    weights = _weights(sample, rng)
    bound = ", ".join(f"{name} = {value}" for name, value in sample.spec.attributes().items())
    text = (
        f'<ir_version: 10, opset_import: ["" : 20, "sparse_onnx" : 1]>\n'
        f"sample (float[{tokens},{HIDDEN}] x) => (float[{tokens},{HIDDEN}] y) <{_constants()}> {{\n"
        f"logits = MatMul(x, router)\n{ROUTERS[sample.router]}\n"
        f"moe = sparse_onnx.{sample.spec.op}<{bound}>(x, index, weight, {', '.join(weights)})\n"
        f"y = Add(x, moe) }}"
    )
    proto = onnx.parser.parse_model(text)
    router = 3 * rng.standard_normal((HIDDEN, EXPERTS)) / np.sqrt(HIDDEN)
    arrays = weights | {"router": router.astype(np.float32), "k": np.asarray([top_k], np.int64)}
    arrays["bias"] = rng.uniform(-0.2, 0.2, EXPERTS).astype(np.float32)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    model = ir.from_proto(proto)
    for at, node in enumerate(model.graph):
        node.name = f"router/{node.op_type}_{at}"
        if node.domain == "sparse_onnx":
            node.name, node.metadata_props[NAME_KEY] = "block", "block"
    attach_functions(model)
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in set(model.graph.initializers) - used:
        del model.graph.initializers[name]
    infer(model)
    return model


def _constants() -> str:
    return (
        "int64[1] last = {-1}, float zero = {0}, float one = {1}, float half = {0.5}, float low = {-1000}, "
        f"float tenth = {{0.25}}, int64 experts = {{{EXPERTS}}}, "
        f"int64[3] grouped = {{-1, 4, {EXPERTS // 4}}}, int64[2] flat = {{-1, {EXPERTS}}}"
    )


def _weights(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    spec = sample.spec
    double = 1 if spec.gate_layout in (GateLayout.NONE, GateLayout.SEPARATE) else 2
    found = {}
    for role in spec.roles:
        last = role in ("fc2", "down")
        rows, columns = (HIDDEN, INNER) if last else (double * INNER, HIDDEN)
        matrix = rng.standard_normal((EXPERTS, rows, columns)) / np.sqrt(columns)
        if spec.weight_layout == WeightLayout.IN_OUT:
            matrix = matrix.transpose(0, 2, 1)
        bias = rng.standard_normal((EXPERTS, rows)) * (0.3 if sample.biases else 0.0)
        found[role] = np.ascontiguousarray(matrix).astype(np.float32)
        found[f"{role}_bias"] = bias.astype(np.float32)
    return found

"""Mixtures of experts that run every expert on every token, in onnx's text form: a router, gates, experts, a sum."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import numpy_helper

E, K, D, HIDDEN = 4, 2, 8, 12
"""Experts, experts of a token, features, hidden features."""

ROUTER = "logits = MatMul (x, router) top, ids = TopK <axis = -1> (logits, k) w = Softmax <axis = -1> (top)"
BASE = "shape = Shape (logits) base = Expand (zero, shape)"

#: Gates ``g [T, E]``.
GATES = {
    "scatter": f"{BASE} g = ScatterElements <axis = -1> (base, ids, w)",
    "scatter-add": f'{BASE} g = ScatterElements <axis = 1, reduction = "add"> (base, ids, w)',
    "scatter-into-zero-times-x": "base = Mul (logits, zero) g = ScatterElements <axis = -1> (base, ids, w)",
    "softmax-of-scatter": "shape = Shape (logits) base = Expand (low, shape) "
    "s = ScatterElements <axis = -1> (base, ids, top) g = Softmax <axis = -1> (s)",
    "masked-softmax": f"{BASE} ones = Expand (one, s2) s2 = Shape (w)",
    "mask-times-softmax": f"{BASE} s2 = Shape (w) ones = Expand (one, s2) "
    "m = ScatterElements <axis = -1> (base, ids, ones) p = Softmax <axis = -1> (logits) g = Mul (p, m)",
    "renormalised": f"{BASE} s2 = Shape (w) ones = Expand (one, s2) "
    "m = ScatterElements <axis = -1> (base, ids, ones) p = Softmax <axis = -1> (logits) q = Mul (m, p) "
    "total = ReduceSum (q, last) g = Div (q, total)",
    "where-mask": f"{BASE} s2 = Shape (w) ones = Expand (one, s2) "
    "n = ScatterElements <axis = -1> (base, ids, ones) m = Cast <to = 9> (n) none = Not (m) "
    "p = Softmax <axis = -1> (logits) g = Where (none, zero, p)",
    "masked-fill": f"{BASE} s2 = Shape (w) ones = Expand (one, s2) "
    "n = ScatterElements <axis = -1> (base, ids, ones) m = Greater (n, zero) s = Where (m, logits, low) "
    "g = Softmax <axis = -1> (s)",
    "one-hot": "hot = OneHot <axis = -1> (ids, count, values) wide = Unsqueeze (w, last) "
    "q = Mul (wide, hot) g = ReduceSum <keepdims = 0> (q, before_last)",
    "one-hot-mask": "hot = OneHot <axis = -1> (ids, count, values) m = ReduceMax <keepdims = 0> (hot, before_last) "
    "p = Sigmoid (logits) g = Mul (m, p)",
    "one-hot-einsum": 'hot = OneHot <axis = 1> (ids, count, values) g = Einsum <equation = "tk,tek->te"> (w, hot)',
    "equal": "wide = Unsqueeze (ids, last) same = Equal (numbers, wide) hot = Cast <to = 1> (same) "
    "row = Unsqueeze (w, one_axis) g3 = MatMul (row, hot) g = Squeeze (g3, one_axis)",
    "sigmoid-of-scatter": "shape = Shape (logits) base = Expand (low, shape) "
    "s = ScatterElements <axis = -1> (base, ids, top) g = Sigmoid (s)",
}
del GATES["masked-softmax"]

#: One expert's column ``c{e} [T, 1]`` of g.
COLUMNS = {
    "slice": "c{e} = Slice (g, at{e}, at{f}, last)",
    "gather": "q{e} = Gather <axis = 1> (g, n{e}) c{e} = Unsqueeze (q{e}, last)",
    "gather-kept": "c{e} = Gather <axis = -1> (g, at{e})",
    "transposed": "gt{e} = Transpose <perm = [1, 0]> (g) q{e} = Gather (gt{e}, n{e}) c{e} = Reshape (q{e}, as_column)",
    "equal-where": "h{e} = Equal (ids, n{e}) v{e} = Where (h{e}, w, zero) c{e} = ReduceSum (v{e}, last)",
    "equal-mul": "h{e} = Equal (n{e}, ids) f{e} = Cast <to = 1> (h{e}) v{e} = Mul (w, f{e}) "
    "c{e} = ReduceSum (v{e}, one_axis)",
}

#: The sum y of the experts' results y0, y1, ..
SUMS = {
    "stack": "s0 = Concat <axis = 0> ({wide0}) gt = Transpose <perm = [1, 0]> (g) gw = Unsqueeze (gt, last) "
    "p0 = Mul (s0, gw) y = ReduceSum <keepdims = 0> (p0, first)",
    "joined": "s0 = Concat <axis = 1> ({plain}) s1 = Reshape (s0, as_experts) gw = Unsqueeze (g, last) "
    "p0 = Mul (gw, s1) y = ReduceSum <keepdims = 0> (p0, one_axis)",
    "matmul-behind": "s0 = Concat <axis = -1> ({wide2}) gw = Unsqueeze (g, last) p0 = MatMul (s0, gw) "
    "y = Squeeze (p0, last)",
    "einsum": 's0 = Concat <axis = -1> ({wide2}) y = Einsum <equation = "tde,te->td"> (s0, g)',
}


@dataclasses.dataclass
class Dense:
    """Text of a block. The parts may be changed before `model` puts them together."""

    router: str = ROUTER
    gates: str = GATES["scatter"]
    column: str = COLUMNS["slice"]
    term: str = "t{e} = Mul (y{e}, c{e})"
    expert: str = "a{e} = Gemm (x, up{e}, b{e}) hid{e} = Relu (a{e}) y{e} = MatMul (hid{e}, down{e})"
    total: str = "y = Sum ({terms})"
    experts: tuple[int, ...] = tuple(range(E))
    outputs: str = ""
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    opset: int = 20

    def body(self) -> str:
        parts = [self.router, self.gates]
        for e in self.experts:
            named = {"e": e, "f": e + 1}
            parts += [text.format(**named) for text in (self.expert, self.column, self.term)]
        wide0 = ", ".join(f"z{e}" for e in self.experts)
        wide2 = ", ".join(f"z{e}" for e in self.experts)
        axis = "first" if "{wide0}" in self.total else "last"
        if "{wide" in self.total:
            parts += [f"z{e} = Unsqueeze (y{e}, {axis})" for e in self.experts]
        total = self.total.format(
            terms=", ".join(f"t{e}" for e in self.experts),
            plain=", ".join(f"y{e}" for e in self.experts),
            wide0=wide0,
            wide2=wide2,
        )
        return " ".join([*parts, total])

    def model(self) -> onnx.ModelProto:
        text = f"""<ir_version: 10, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>
            dense (float[T, {D}] x) => (float[T, {D}] y{self.outputs}) {{ {self.body()} }}"""
        model = onnx.parser.parse_model(text)
        used = {name for node in model.graph.node for name in node.input}
        arrays = constants() | weights() | self.weights
        model.graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
        )
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model, full_check=True)
        return model


def constants() -> dict[str, np.ndarray]:
    made = {
        "k": [K],
        "last": [-1],
        "first": [0],
        "one_axis": [1],
        "before_last": [-2],
        "numbers": list(range(E)),
        "count": [E],
        "as_column": [-1, 1],
        "as_experts": [-1, E, D],
        "copies": [E, 1],
        "as_packed": [E, -1, D],
    }
    made |= {f"at{e}": [e] for e in range(E + 1)} | {f"n{e}": e for e in range(E + 1)}
    floats = {"zero": 0.0, "one": 1.0, "low": -np.inf, "half": 0.5, "values": [0.0, 1.0]}
    return {name: np.asarray(value, np.int64) for name, value in made.items()} | {
        name: np.asarray(value, np.float32) for name, value in floats.items()
    }


def weights() -> dict[str, np.ndarray]:
    """The router's, each expert's, and the same packed: ups, downs, bs, gates2 (gate and up), gate_bs."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-2] if len(shape) > 1 else 4)).astype(np.float32)

    made = {"router": normal(D, E) * 3, "ups": normal(E, D, HIDDEN), "downs": normal(E, HIDDEN, D)}
    made |= {
        "bs": normal(E, HIDDEN),
        "both": normal(E, D, 2 * HIDDEN),
        "end_bs": normal(E, 1, D),
        "shared": normal(D, D),
    }
    for e in range(E):
        made |= {f"up{e}": made["ups"][e], f"down{e}": made["downs"][e], f"b{e}": made["bs"][e]}
    return made


def tokens() -> list[np.ndarray]:
    """33 tokens, one, all to one expert, exact ties, none."""
    some = np.random.default_rng(5).standard_normal((33, D)).astype(np.float32)
    return [some, some[:1], np.tile(some[:1], (9, 1)), np.zeros((5, D), np.float32), some[:0]]

"""Bodies in ONNX text that treat rows one by one, and bodies that do not. `{1, 2}` is a constant vector."""

from __future__ import annotations

import dataclasses
import re

import onnx.parser
import onnx_ir as ir

SHAPES = {
    "w": (8, 6),
    "b": (8,),
    "k": (5, 4, 3, 3),
    "s": (4,),
    "z": (8, 8),
    "one": (1,),
    "each": (3, 8),
    "m": (3, 3),
}
_VECTOR = re.compile(r"(?<=[ (])\{(-?[\d.]+(?:, -?[\d.]+)*)\}(?=[,)])")


def function(text: str, weights: str = "", opset: int = 20) -> ir.Function:
    """A body `x (, weights) => y`."""
    constants: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        kind = "value_floats" if "." in found[1] else "value_ints"
        return constants.setdefault(f"<{kind} = [{found[1]}]>", f"constant{len(constants)}")

    body = _VECTOR.sub(named, text)
    before = " ".join(f"{name} = Constant {value} ()" for value, name in constants.items())
    inputs = ", ".join(["x", *weights.split()])
    imports = f'"" : {opset}, "com.microsoft" : 1'
    whole = (
        f'<domain: "sparse_onnx", opset_import: [{imports}]> Expert ({inputs}) => (y) {{ {before} {body} }}'
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(whole))


@dataclasses.dataclass(frozen=True)
class Case:
    """A body, the axes of one row, its weights, and for what is refused a piece of the reason."""

    text: str
    row: tuple[int | None, ...] = (8,)
    weights: str = ""
    reason: str = ""


IMAGE = (4, 6, 6)
ZERO, ONE = "zero = Constant <value_int = 0> ()", "one = Constant <value_int = 1> ()"
PROVED = {
    "sum with a vector": Case("y = Add (x, b)", weights="b"),
    "sum with one row": Case("u = Unsqueeze (b, {0}) y = Add (x, u)", weights="b"),
    "sum with itself": Case("r = Relu (x) y = Sub (x, r)"),
    "choice": Case("c = Greater (x, b) y = Where (c, x, b)", weights="b"),
    "matrix": Case("y = MatMul (x, w)", weights="w"),
    "vector": Case("y = MatMul (x, b)", weights="b"),
    "matrix from the left": Case("y = MatMul (m, x)", (3, 8), "m"),
    "rows with themselves": Case("t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)", (3, 8)),
    "gemm": Case("y = Gemm <transB = 1, alpha = 0.5> (x, z, b)", weights="z b"),
    "fused": Case("y = com.microsoft.FusedMatMul <transB = 1> (x, z)", weights="z"),
    "convolution": Case("y = Conv (x, k)", IMAGE, "k"),
    "pool": Case("p = MaxPool <kernel_shape = [2, 2]> (x) y = GlobalAveragePool (p)", IMAGE),
    "batch norm": Case("y = BatchNormalization (x, s, s, s, s)", IMAGE, "s"),
    "instance norm": Case("y = InstanceNormalization (x, s, s)", IMAGE, "s"),
    "layer norm": Case("y = LayerNormalization (x, b, b)", weights="b"),
    "skip norm": Case("r = Relu (x) y = com.microsoft.SkipLayerNormalization (x, r, b)", weights="b"),
    "softmax": Case("y = Softmax (x)"),
    "reduction": Case("m = ReduceMean (x, {-1}) y = Sub (x, m)"),
    "running sum": Case(f"{ONE} y = CumSum (x, one)"),
    "top k": Case("v, i = TopK (x, {2}) y = ScatterElements <axis = 1> (x, i, v)"),
    "best": Case("i = ArgMax <axis = 1, keepdims = 0> (x) y = Gather (w, i)", weights="w"),
    "halves": Case("l, r = Split <axis = -1, num_outputs = 2> (x) y = Concat <axis = 1> (r, l)"),
    "slice": Case("y = Slice (x, {1}, {7}, {-1})"),
    "columns": Case("y = Gather <axis = 1> (x, {3, 3, 0})"),
    "padding": Case("y = Pad (x, {0, 1, 0, 2})"),
    "tile": Case("y = Tile (x, {1, 3})"),
    "heads": Case("r = Reshape (x, {0, 2, 4}) p = Transpose <perm = [0, 2, 1]> (r) y = Flatten (p)"),
    "reshape by -1": Case("y = Reshape (x, {-1, 8})", (2, 4)),
    "reshape by its shape": Case(
        "n = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (n, {2, -1}) y = Reshape (x, t)"
    ),
    "reshape by an entry of it": Case(
        f"{ZERO} q = Shape (x) n = Gather (q, zero) u = Unsqueeze (n, {{0}}) "
        "t = Concat <axis = 0> (u, {8, 1}) y = Reshape (x, t)"
    ),
    "open sizes": Case(
        "h = Shape <start = 2, end = 3> (x) v = Shape <start = 3> (x) p = Mul (h, v) "
        "t = Concat <axis = 0> ({0, 4}, p) f = Reshape (x, t) q = Shape (x) y = Reshape (f, q)",
        (4, None, None),
    ),
    "size arithmetic": Case(
        "q = Shape (x) d = Slice (q, {1}, {2}) k = Cast <to = 1> (d) r = Sqrt (k) y = Div (x, r)"
    ),
    "spread by the shape": Case("q = Shape (x) u = Expand (one, q) y = Mul (x, u)", weights="one"),
    "filled by the shape": Case("q = Shape (x) u = ConstantOfShape (q) y = Max (x, u)"),
    "einsum": Case('y = Einsum <equation = "nd,do->no"> (x, w)', weights="w"),
    "einsum of rows": Case('y = Einsum <equation = "nsd,ntd->nst"> (x, x)', (3, 8)),
    "resize": Case("y = Resize (x, , {1.0, 1.0, 2.0, 2.0})", IMAGE),
    "constant": Case("c = Sigmoid (b) y = Mul (x, c)", weights="b"),
    "dropout that does nothing": Case("y = Dropout (x)"),
}

ALONG, BEFORE, UNKNOWN = "along the axis of the rows", "before the rows", "not known to treat rows one by one"
PARTS = "one part for each row"
REFUSED = {
    "mean over rows": Case("m = ReduceMean (x, {0}) y = Sub (x, m)", reason="reduces over the rows"),
    "mean over all": Case("m = ReduceMean (x) y = Sub (x, m)", reason="the rows too"),
    "softmax over rows": Case("y = Softmax <axis = 0> (x)", reason=ALONG),
    "softmax over rows from behind": Case("y = Softmax <axis = -2> (x)", reason=ALONG),
    "running sum over rows": Case(f"{ZERO} y = CumSum (x, zero)", reason=ALONG),
    "a value a row": Case("y = Add (x, each)", weights="each", reason="an entry for each row"),
    "a batch before the rows": Case("u = Unsqueeze (b, {0, 1}) y = Add (x, u)", weights="b", reason=BEFORE),
    "rows times rows": Case("t = Transpose (x) y = MatMul (x, t)", reason="moves the axis of the rows"),
    "gram matrix": Case("y = com.microsoft.FusedMatMul <transA = 1> (x, x)", reason="sums over the rows"),
    "rows as outputs": Case(
        "y = com.microsoft.FusedMatMul <transB = 1> (z, x)", weights="z", reason="moves them"
    ),
    "turned gemm": Case("y = Gemm <transA = 1> (x, each)", weights="each", reason="sums over the rows"),
    "another order": Case("y = Transpose (x)", reason="moves the axis of the rows"),
    "first row": Case("y = Slice (x, {0}, {1}, {0})", reason=ALONG),
    "picked rows": Case("y = Gather (x, {0})", reason=ALONG),
    "padded rows": Case("y = Pad (x, {1, 0, 0, 0})", reason="pads the axis of the rows"),
    "repeated rows": Case("y = Tile (x, {2, 1})", reason="repeats the rows"),
    "joined rows": Case("y = Concat <axis = 0> (x, x)", reason=ALONG),
    "rows of another size": Case("y = Reshape (x, {-1, 4})", reason=PARTS),
    "a fixed number of rows": Case("y = Reshape (x, {3, 8})", reason=PARTS),
    "rows and contents on one axis": Case("y = Flatten <axis = 0> (x)", reason="on one axis"),
    "groups over images": Case("y = Reshape (x, {1, -1, 3, 6})", IMAGE, reason=PARTS),
    "squeezed": Case("y = Squeeze (x)", (1, 8), reason="that of a single row too"),
    "an axis in front": Case("y = Unsqueeze (x, {0})", reason=BEFORE),
    "number of rows": Case(
        "q = Shape (x) n = Slice (q, {0}, {1}) k = Cast <to = 1> (n) y = Div (x, k)",
        reason="computes with the number of rows",
    ),
    "a row picked by the number of rows": Case(
        "n = Shape <end = 1> (x) y = Slice (x, {0}, n, {1})", reason="computes with the number of rows"
    ),
    "size of all": Case("n = Size (x) k = Cast <to = 1> (n) y = Div (x, k)", reason=UNKNOWN),
    "einsum over rows": Case(
        'y = Einsum <equation = "nd,nd->d"> (x, x)', reason="sums over the rows or moves them"
    ),
    "einsum across rows": Case('y = Einsum <equation = "nd,md->nm"> (x, x)', reason="mixes rows"),
    "einsum with an ellipsis": Case(
        'y = Einsum <equation = "...d,do"> (x, w)', weights="w", reason="not written out"
    ),
    "training": Case(
        "y = BatchNormalization <training_mode = 1> (x, s, s, s, s)", IMAGE, "s", "statistics over the rows"
    ),
    "indices of a pool": Case(
        "p, y = MaxPool <kernel_shape = [2, 2]> (x)", IMAGE, reason="a second output of it"
    ),
    "variance over rows": Case("y = MeanVarianceNormalization (x)", IMAGE, reason=ALONG),
    "random": Case("r = RandomUniformLike (x) y = Add (x, r)", reason=UNKNOWN),
    "dropout": Case(
        "f = Constant <value_float = 0.5> () t = Constant <value = bool {1}> () y = Dropout (x, f, t)",
        reason="random in training mode",
    ),
    "dynamic quantization": Case(
        "q, a, c = DynamicQuantizeLinear (x) y = DequantizeLinear (q, a, c)", reason=UNKNOWN
    ),
    "result without rows": Case("y = Relu (b)", weights="b", reason=PARTS),
    "more rows by resize": Case("y = Resize (x, , {2.0, 1.0, 1.0, 1.0})", IMAGE, reason="number of rows"),
}

STEPS = {
    "relu": "$y = Relu ($x)",
    "bias": "$y = Add ($x, b)",
    "matrix": "$y = MatMul ($x, z)",
    "norm": "$y = LayerNormalization ($x, b)",
    "turn": "$y_r = Reshape ($x, {0, 2, 4}) $y_p = Transpose <perm = [0, 2, 1]> ($y_r) $y = Flatten ($y_p)",
    "flip": "$y_t = Transpose ($x) $y_r = Relu ($y_t) $y = Transpose ($y_r)",
    "center": "$y_m = ReduceMean ($x, {0}) $y = Sub ($x, $y_m)",
    "scan": "$y_a = Constant <value_int = 0> () $y = CumSum ($x, $y_a)",
    "fold": "$y_r = Reshape ($x, {4, -1}) $y_s = Softmax ($y_r) $y = Reshape ($y_s, {-1, 8})",
}
"""Steps `[n, 8] -> [n, 8]` from $x to $y."""
MIXING = {"center", "scan", "fold", "flip"}
"""Those that are refused. `flip` mixes nothing; axes that are moved and moved back are not followed."""

"""Runs tiny models of one operator on a target, to see which element types of which operators it takes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from sparse_onnx.targets import places
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.placement import placed
from sparse_onnx.targets.profile import Operator, TargetProfile

#: The node that is asked about.
PROBE = "probe"

_HEAD = '<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
_TYPES = {"float32": 1, "float16": 10, "int64": 7, "int32": 6, "bool": 9}

#: Body of each probe: `x` is of the type that is asked about, `[4, 8]`, and `y` has any. `i [4, 2]` is what TopK gives,
#: in [0, 8); `j [4, 2]` the same below 4.
_BODIES: dict[str, tuple[str, str]] = {
    "Add": ("float32 float16 int64 int32", "y = Add(x, x)"),
    "Cast": ("float32 int64 int32 bool", "y = Cast<to=1>(x)"),
    "Clip": ("float32", "y = Clip(x, minus, one)"),
    "Compress": ("float32", "y = Compress<axis=0>(x, some)"),
    "Concat": ("float32 float16 int64 int32", "y = Concat<axis=0>(x, x)"),
    "CumSum": ("float32 int64 int32", "y = CumSum(x, axis0)"),
    "Div": ("float32 int64 int32", "y = Div(x, two)"),
    "Equal": ("float32 int64 int32", "y = Equal(x, two)"),
    "Erf": ("float32", "y = Erf(x)"),
    "Expand": ("float32 float16 int64 int32", "e = Unsqueeze(x, axes1) y = Expand(e, by2)"),
    "Flatten": ("float32", "y = Flatten<axis=1>(x)"),
    "Gather": ("float32 float16", "y = Gather<axis=0>(x, j)"),
    "GatherElements": ("float32", "y = GatherElements<axis=1>(x, i)"),
    "GatherND": ("float32", "u = Unsqueeze(flat, axes1) y = GatherND(x, u)"),
    "Gelu": ("float32", "y = Gelu(x)"),
    "Gemm": ("float32 float16", "y = Gemm<transB=1>(x, square)"),
    "Greater": ("float32 int64 int32", "y = Greater(x, two)"),
    "Identity": ("float32", "y = Identity(x)"),
    "Less": ("float32 int64 int32", "y = Less(x, two)"),
    "MatMul": ("float32 float16", "y = MatMul(x, square)"),
    "Max": ("float32", "y = Max(x, two)"),
    "Min": ("float32", "y = Min(x, two)"),
    "Mul": ("float32 float16", "y = Mul(x, x)"),
    "NonZero": ("float32", "y = NonZero(x)"),
    "OneHot": ("int64", "y = OneHot<axis=-1>(x, depth, offon)"),
    "ReduceMax": ("float32", "y = ReduceMax<keepdims=0>(x, axes1)"),
    "ReduceSum": ("float32 int64", "y = ReduceSum<keepdims=0>(x, axes1)"),
    "Relu": ("float32", "y = Relu(x)"),
    "Reshape": ("float32 float16 int64 int32 bool", "y = Reshape(x, shape)"),
    "ScatterElements": ("float32", "y = ScatterElements<axis=1>(x, i, part)"),
    "ScatterElements(add)": (
        "float32 int64",
        'y = ScatterElements<axis=1, reduction="add">(x, i, part)',
    ),
    "ScatterND": ("float32", "y = ScatterND(x, rows, front)"),
    "ScatterND(add)": ("float32", 'y = ScatterND<reduction="add">(x, rows, front)'),
    "Shape": ("float32 int64", "y = Shape(x)"),
    "Sigmoid": ("float32 float16", "y = Sigmoid(x)"),
    "Softmax": ("float32", "y = Softmax<axis=-1>(x)"),
    "Split": ("float32 int64 int32 bool", "y, z = Split<axis=1, num_outputs=2>(x)"),
    "Split(runtime)": ("float32 int64", "y, z = Split<axis=0>(x, counts)"),
    "Squeeze": ("float32 int64 int32 bool", "e = Unsqueeze(x, axes1) y = Squeeze(e, axes1)"),
    "Sub": ("float32 int64 int32", "y = Sub(x, two)"),
    "Tanh": ("float32", "y = Tanh(x)"),
    "ThresholdedRelu": ("float32", "y = ThresholdedRelu<alpha=0.5>(x)"),
    "TopK": ("float32 int64 int32", "y, z = TopK<axis=-1>(x, k2)"),
    "Transpose": ("float32 bool", "y = Transpose<perm=[1, 0]>(x)"),
    "Unsqueeze": ("float32 int64 int32 bool", "y = Unsqueeze(x, axes1)"),
    "Where": ("float32 int64 int32", "c = Greater(given, zero) y = Where(c, x, two)"),
    "ArgMax": ("float32", "y = ArgMax<axis=1, keepdims=1>(x)"),
    "Cos": ("float32", "y = Cos(x)"),
    "Exp": ("float32", "y = Exp(x)"),
    "Neg": ("float32", "y = Neg(x)"),
    "Pow": ("float32", "y = Pow(x, two)"),
    "Reciprocal": ("float32", "y = Reciprocal(x)"),
    "ReduceMean": ("float32", "y = ReduceMean<keepdims=1>(x, axes1)"),
    "Sin": ("float32", "y = Sin(x)"),
    "Slice": ("float32", "y = Slice(x, from, to)"),
    "Sqrt": ("float32", "square2 = Mul(x, x) y = Sqrt(square2)"),
    "Trilu": ("float32", "y = Trilu<upper=0>(x)"),
    "LayerNormalization": ("float32", "y = LayerNormalization(x, line)"),
    "If": (
        "bool",
        "f = ReduceMax<keepdims=0>(given) c = Greater(f, one) "
        "y = If(c)<then_branch = a () => (float[4,8] p) { p = MatMul(given, weights) }, "
        "else_branch = b () => (float[4,8] q) { q = Neg(given) }>",
    ),
    "Loop": (
        "bool",
        "y = Loop(depth, yes, given)<body = a (int64 n, bool go, float[4,8] p) => (bool on, float[4,8] q) "
        "{ on = Identity(go) q = Add(p, given) }>",
    ),
    "com.microsoft.MoE": (
        "float32",
        "logits = MatMul(x, gate) y = com.microsoft.MoE"
        '<k=1, activation_type="relu", normalize_routing_weights=1>(x, logits, experts, , experts)',
    ),
    "com.microsoft.MatMulNBits": (
        "float32",
        "wide = Concat<axis=1>(x, x) "
        "y = com.microsoft.MatMulNBits<K=16, N=8, bits=4, block_size=16>(wide, nibbles, scales)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """One operator of one type: placed and right, or how not."""

    key: str
    dtype: str
    runs: bool
    note: str = ""


def models() -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Operator, element type, and the model of it: `given [4, 8]` to one output."""
    for key, (types, body) in _BODIES.items():
        for dtype in types.split():
            yield key, dtype, _model(key, dtype, body)


def _model(key: str, dtype: str, body: str) -> onnx.ModelProto:
    number = _TYPES[dtype]
    op = key.partition("(")[0].rpartition(".")[2]
    known = {
        "axis0": ("int64", "0"),
        "axes1": ("int64[1]", "1"),
        "by2": ("int64[3]", "4, 2, 8"),
        "depth": ("int64", "3"),
        "k2": ("int64[1]", "2"),
        "rows": ("int64[2,1]", "0, 2"),
        "shape": ("int64[2]", "-1, 4"),
        "some": ("bool[4]", "1, 0, 1, 0"),
        "yes": ("bool", "1"),
        "zero": ("float", "0"),
        "one": ("float", "1"),
        "minus": ("float", "-1"),
        "weights": ("float[8,8]", _numbers(64)),
        "four": ("float", "4"),
        "line": ("float[8]", _numbers(8)),
        "gate": ("float[8,2]", _numbers(16)),
        "experts": ("float[2,8,8]", _numbers(128)),
        "nibbles": ("uint8[8,1,8]", ", ".join(str(37 * at % 256) for at in range(64))),
        "scales": ("float[8,1]", _numbers(8)),
    }
    prepared = "top, i = TopK<axis=-1>(given, k2) j = Div(i, k2) "
    # Integers as experts' indices are: not negative, and whole before the cast, which some providers round.
    raw = (
        "size = Abs(given) big = Mul(size, four) raw = Floor(big) "
        if "int" in dtype
        else "raw = Mul(given, four) "
    )
    prepared += f"{raw}x = Cast<to={number}>(raw) "
    prepared += f"square = Cast<to={number}>(weights) "
    needs = {
        "two": f"f2 = Add(one, one) two = Cast<to={number}>(f2) ",
        "part": f"part = Cast<to={number}>(top) ",
        "front": "front = Slice(x, from, to) ",
        "flat": "ten = Flatten<axis=0>(j) flat = Reshape(ten, all) ",
        "counts": "ci = ReduceMax<keepdims=0>(j, both) cz = Sub(ci, ci) counts = Add(cz, twos) ",
        "offon": f"o1 = Cast<to={number}>(pair) offon = Mul(o1, o1) ",
    }
    known |= {"from": ("int64[1]", "0"), "to": ("int64[1]", "2"), "all": ("int64[1]", "-1")}
    known |= {"both": ("int64[2]", "0, 1"), "twos": ("int64[2]", "2, 2"), "pair": ("float[2]", "0, 1")}
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").replace(">", " ").split())
    prepared += "".join(text for name, text in needs.items() if name in words)
    constants = ", ".join(f"{kind} {name} = {{{value}}}" for name, (kind, value) in known.items())
    text = f"{_HEAD}g (float[4,8] given) => (out) <{constants}> {{ {prepared}{body} out = Cast<to=1>(y) }}"
    model = onnx.parser.parse_model(text)
    node = [node for node in model.graph.node if node.op_type == op][-1]
    node.name = PROBE
    _drop_unused(model.graph)
    return model


def _numbers(count: int) -> str:
    return ", ".join(f"{0.1 * (at * 5 % 7 - 3):.1f}" for at in range(count))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Nodes and constants that the output does not need."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
            for attribute in node.attribute:
                for inner in attribute.g.node:
                    needed |= set(inner.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [value for value in graph.initializer if value.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def probe(target: TargetProfile, say: Callable[[str], None] | None = None) -> list[Found]:
    """Every operator in every type that is asked about, on the target.

    Raises:
        UsageError: the target's models cannot be run here.
    """
    where = places.require(target)
    # Exact in float16, none of them twice, and four times each is no integer: rounding changes no result that is whole.
    given = ((np.random.default_rng(0).permutation(32) - 15.5) / 16).reshape(4, 8).astype(np.float32)
    found = []
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        for key, dtype, model in models():
            path = Path(folder) / "probe.onnx"
            onnx.save(model, path)
            rough = "float16" in (dtype, target.precision)
            runs, note = _try(path, where, target, given, 1e-2 if rough else max(1e-5, target.tolerance))
            found.append(Found(key, dtype, runs, note))
            if say is not None:
                say(f"{key} {dtype}: {'runs' if runs else note}")
    return found


def _try(path: Path, where: str, target: TargetProfile, given: np.ndarray, scale: float) -> tuple[bool, str]:
    options = sessions.session_options(1)
    expected = onnxruntime.InferenceSession(str(path), options, providers=[places.CPU]).run(
        None, {"given": given}
    )[0]
    try:
        session = (
            places.start(where, str(path), {}, record=True, optimize=False)
            if places.is_elsewhere(where)
            else sessions.create_session(str(path), provider=where, record=True)
        )
        actual = session.run(None, {"given": given})[0]
        at = placed(session, target.provider)
    except Exception as error:  # whatever a runtime makes of it
        return False, f"fails: {sessions.first_line(error)[:160]}"
    if actual.shape != expected.shape or not np.allclose(actual, expected, rtol=scale, atol=scale):
        return (
            False,
            "wrong shape" if actual.shape != expected.shape else f"off by {abs(actual - expected).max():.1g}",
        )
    if at is None:
        return True, ""
    fallen = [name for name, _ in at.fallen(target.provider)]
    return (False, "on the CPU") if PROBE in fallen else (True, "")


def operators(found: list[Found]) -> dict[str, Operator]:
    """The entries of a profile."""
    entries: dict[str, Operator] = {}
    for key in dict.fromkeys(each.key for each in found):
        mine = [each for each in found if each.key == key]
        notes = dict.fromkeys(f"{each.dtype} {each.note}" for each in mine if not each.runs)
        entries[key] = Operator(tuple(each.dtype for each in mine if each.runs), "probe", "; ".join(notes))
    return entries

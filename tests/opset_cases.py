"""Small models whose operators changed their definition between opsets 13 and 18."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

node = helper.make_node
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
X = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)


def model(
    nodes: list[NodeProto],
    opset: int,
    constants: dict[str, np.ndarray] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    domains: tuple[str, ...] = (),
) -> ir.Model:
    """x [4, 6, 8] -> y, and what the nodes make of them."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["a", 6, 8])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    proto = helper.make_model(graph, opset_imports=imports, functions=functions or [], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
FLAT = {"shape": np.asarray([1, 1, 24, 8])}
FLATTEN = [node("Reshape", ["x", "shape"], ["image"])]
SMALL = {"axes": np.asarray([1, -1]), "slope": np.asarray(0.1, np.float32)}
CASES: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    **{
        f"Reduce{name}": (
            [
                node("Abs", ["x"], ["positive"]),
                node(f"Reduce{name}", ["positive"], ["m"], axes=[1, -1], keepdims=0, name="reduce"),
                node(f"Reduce{name}", ["m"], ["y"], name="all"),
            ],
            {},
        )
        for name in REDUCTIONS
    },
    "ReduceSum": ([node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)], SMALL),
    "Split": (
        [node("Split", ["x"], ["p", "q", "r"], axis=1), node("Concat", ["r", "p", "q"], ["y"], axis=0)],
        {},
    ),
    "Split by sizes": (
        [node("Split", ["x", "sizes"], ["p", "q"], axis=1), node("Concat", ["q", "p"], ["y"], axis=1)],
        {"sizes": np.asarray([2, 4])},
    ),
    "Squeeze": (
        [node("Unsqueeze", ["x", "axes"], ["u"]), node("Squeeze", ["u", "axes"], ["y"])],
        {"axes": np.asarray([1])},
    ),
    "ScatterElements": (
        [node("ScatterElements", ["x", "where", "what"], ["y"], axis=1)],
        {"where": np.asarray([[[1]], [[2]]]), "what": np.ones((2, 1, 1), np.float32)},
    ),
    "ScatterND": (
        [node("ScatterND", ["x", "where", "what"], ["y"])],
        {"where": np.asarray([[1], [2]]), "what": np.ones((2, 6, 8), np.float32)},
    ),
    "elementwise": (
        [
            node("Relu", ["x"], ["r"]),
            node("LeakyRelu", ["x"], ["l"]),
            node("PRelu", ["l", "slope"], ["p"]),
            node("Mul", ["r", "p"], ["m"]),
            node("GreaterOrEqual", ["x", "m"], ["c"]),
            node("Where", ["c", "x", "m"], ["w"]),
            node("CumSum", ["w", "axis"], ["s"]),
            node("Pow", ["s", "two"], ["y"]),
        ],
        {**SMALL, "axis": np.asarray(1), "two": np.asarray(2.0, np.float32)},
    ),
    "shapes": (
        [
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["f"], to=FLOAT),
            node("Reshape", ["x", "s"], ["r"]),
            node("ReduceMax", ["r"], ["m"], axes=[1]),
            node("Flatten", ["m"], ["n"]),
            node("Size", ["n"], ["size"]),
            node("Cast", ["size"], ["g"], to=FLOAT),
            node("Add", ["f", "g"], ["y"]),
        ],
        {},
    ),
    "Pad": ([node("Pad", ["x", "pads"], ["y"])], {"pads": np.asarray([0, 1, 0, 0, 0, 2])}),
    "Resize by scales": (
        [*FLATTEN, node("Resize", ["image", "", "scales"], ["y"], mode="linear")],
        {**FLAT, "scales": np.asarray([1, 1, 2, 1.5], np.float32)},
    ),
    "Resize by sizes": (
        [*FLATTEN, node("Resize", ["image", "", "", "sizes"], ["y"], mode="nearest")],
        {**FLAT, "sizes": np.asarray([1, 1, 11, 13])},
    ),
    "LpPool": ([*FLATTEN, node("LpPool", ["image"], ["y"], kernel_shape=[2, 2])], FLAT),
    "RoiAlign": (
        [
            *FLATTEN,
            node("RoiAlign", ["image", "rois", "batch"], ["y"], output_height=3, output_width=3),
        ],
        {**FLAT, "rois": np.asarray([[0.3, 0.2, 6.1, 5.7]], np.float32), "batch": np.asarray([0])},
    ),
    "BatchNormalization": (
        [*FLATTEN, node("BatchNormalization", ["image", "one", "zero", "zero", "one"], ["y"])],
        {**FLAT, "one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)},
    ),
    "LSTM": (
        [
            node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=3),
            node("Identity", ["h"], ["y"]),
        ],
        {
            "w": np.random.default_rng(1).standard_normal((1, 12, 8)).astype(np.float32),
            "r": np.random.default_rng(2).standard_normal((1, 12, 3)).astype(np.float32),
        },
    ),
}

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser
import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.graph.infer import infer
from sparse_onnx.targets.operators import dtype, keys, unsupported
from sparse_onnx.targets.profile import Operator

TEXT = """<ir_version: 9, opset_import: ["" : 18]>
g (float[4,8] x, int64[2] sizes, int64[4,1] i, bool[4,8] c) => (y, p, q) <int64[2] shape = {-1, 4}> {
  s = ScatterND<reduction="add">(x, i, x)
  p, q = Split<axis=0>(s, sizes)
  w = Where(c, x, s)
  j = Reshape(i, shape)
  y = Relu(w)
}"""


def model() -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(TEXT))
    infer(made)
    return made


def test_names_and_types() -> None:
    nodes = {node.op_type: node for node in model().graph}
    assert keys(nodes["ScatterND"]) == ["ScatterND(add)", "ScatterND"]
    assert keys(nodes["Split"]) == ["Split(runtime)", "Split"]
    assert dtype(nodes["Where"]) == "float32" and dtype(nodes["Reshape"]) == "int64"


def test_what_a_profile_does_not_run_and_why() -> None:
    everything = {key: Operator(("*",), "s") for key in ("ScatterND", "Split", "Where", "Reshape", "Relu")}
    profile = dataclasses.replace(targets.get("cuda"), operators=everything)
    assert not list(unsupported(model().graph, profile))
    some = everything | {
        "ScatterND(add)": Operator((), "s", "no reduction"),
        "Reshape": Operator(("float32",), "s"),
    }
    del some["Relu"]
    found = {
        node.op_type: why
        for node, why in unsupported(model().graph, dataclasses.replace(profile, operators=some))
    }
    assert found == {
        "ScatterND": "no kernel: no reduction (s)",
        "Reshape": "not of int64 (s)",
        "Relu": "not known to run there",
    }

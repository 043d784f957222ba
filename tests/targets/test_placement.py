from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from sparse_onnx.graph.infer import infer
from sparse_onnx.targets.placement import Part, Placement, _joined, by_provider, crossing


def test_partitions_and_what_fell_to_others() -> None:
    groups = [["Q", [["a", "Add"], ["b", "Mul"]]], ["CPU", [["c", "TopK"]]], ["Q", [["d", "Add"]]]]
    at = Placement(_joined(groups))
    assert at.partitions("Q") == 2 and at.fallen("Q") == [("c", "TopK")]
    assert by_provider(at) == {"Q": 3, "CPU": 1}
    events = [["G", [["a", "Add"]]], ["G", [["b", "Mul"]]], ["CPUExecutionProvider", [["c", "TopK"]]]]
    assert len(_joined(events, merge=True)) == 2 and len(_joined(events)) == 3


def test_what_crosses_between_providers() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[n,8] x) => (float[n,8] y) { a = Relu(x) b = Neg(a) c = Abs(a) d = Add(b, c) y = Relu(d) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer(model)
    for node, name in zip(model.graph, "abcde", strict=True):
        node.name = name
    on = (Part("G", (("a", "Relu"), ("b", "Neg"), ("d", "Add"))), Part("CPU", (("c", "Abs"),)))
    assert crossing(model, Placement(on)) == (
        2,
        2 * 8 * 4,
    )  # a to c, c to d; n counts as 1; `e` cannot be followed
    assert crossing(model, Placement(on[:1])) == (0, 0)

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
from builders import Shape, layered_model, routed_model
from harness import check_rewrite
from onnx import helper

import sparse_onnx
from sparse_onnx.blocks import blocks
from sparse_onnx.passes.name_blocks import NameBlocks


def test_names_are_made_unique_in_order() -> None:
    model = layered_model(Shape(), layers=3)
    for block in blocks(model):
        block.node.metadata_props["sparse_onnx.block"] = "experts"
    feeds = {"x": np.ones((3, 16), np.float32)}
    after, _ = check_rewrite(model, NameBlocks(), rewritten=2, feeds=[feeds])
    assert [block.name for block in blocks(after)] == ["experts", "experts_1", "experts_2"]


def test_unique_names_stay() -> None:
    check_rewrite(layered_model(Shape(), layers=2), NameBlocks(), rewritten=0)


def test_a_function_called_twice(tmp_path) -> None:
    """Inlining copies the block, name and all; both are lowered, recorded and compared."""
    proto = ir.to_proto(routed_model(Shape()))
    node = copy.deepcopy(proto.graph.node[0])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("sparse_onnx", 1)]
    inputs = list(node.input)
    layer = helper.make_function("user", "Layer", inputs, ["y"], [node], imports)
    proto.functions.append(layer)
    proto.opset_import.append(helper.make_opsetid("user", 1))
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("Layer", inputs, ["h"], domain="user", name="one"))
    proto.graph.node.append(helper.make_node("Layer", ["h", *inputs[1:]], ["y"], domain="user", name="two"))
    source = tmp_path / "in.onnx"
    ir.save(ir.from_proto(proto), source)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert [block.name for block in report.blocks] == ["block", "block_1"]
    assert {block.form for block in report.blocks} == {"grouped"}
    assert report.verify is not None and report.verify.passed

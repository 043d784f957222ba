"""Opsets 13 to 17 become 18 with the same answers; what cannot be converted stays as it was, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph.toy import external
from harness import assert_close, check_rewrite, run_model
from onnx import helper, numpy_helper
from opset_cases import CASES, FLAT, FLATTEN, FLOAT, X, model

from sparse_onnx.graph import io
from sparse_onnx.optimize import optimize
from sparse_onnx.passes import PIPELINE
from sparse_onnx.passes.convert_opset import _ADAPTERS, _SAME, ConvertOpset

node = helper.make_node


@pytest.mark.parametrize("opset", range(13, 18))
@pytest.mark.parametrize("name", CASES)
def test_answers_stay(name: str, opset: int) -> None:
    nodes, constants = CASES[name]
    before = model(nodes, opset, constants)
    after, _ = check_rewrite(before, ConvertOpset(), rewritten=1, feeds=[{"x": X}])
    assert after.opset_imports[""] == 18 and after.ir_version >= 8


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_onnx_own_converter(name: str) -> None:
    nodes, constants = CASES[name]
    before = model(nodes, 13, constants)
    reference = onnx.version_converter.convert_version(ir.to_proto(before), 18)
    ConvertOpset()(before)
    for left, right in zip(
        run_model(ir.from_proto(reference), {"x": X}), run_model(before, {"x": X}), strict=True
    ):
        assert_close(left, right, 1e-6)


def test_every_change_of_a_definition_is_decided() -> None:
    """A newer onnx may change definitions up to 24 no more: those that it has are listed here, or refused."""
    history: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, set()).add(schema.since_version)
    changed = {
        name
        for name, since in history.items()
        if min(since) < 24 and any(13 < version <= 24 and version != min(since) for version in since)
    }
    refused = {"Attention", "DFT", "GroupNormalization", "BatchNormalization"}
    assert changed - _SAME - set(_ADAPTERS) == refused
    assert _SAME | set(_ADAPTERS) <= changed | {"LayerNormalization", "DeformConv"}


def test_subgraphs_functions_and_other_domains_survive() -> None:
    body = helper.make_graph(
        [node("ReduceMean", ["x"], ["m"], axes=[-1], name="inside")],
        "body",
        [],
        [helper.make_tensor_value_info("m", FLOAT, None)],
    )
    function = helper.make_function(
        "local",
        "f",
        ["a"],
        ["b"],
        [node("ReduceMax", ["a"], ["m"], axes=[1]), node("Split", ["m"], ["b", "rest"], axis=2)],
        [helper.make_opsetid("", 16)],
    )
    nodes = [
        node("If", ["flag"], ["r"], then_branch=body, else_branch=body, name="if"),
        node("f", ["r2"], ["y"], domain="local", name="call"),
        node("Add", ["r", "x"], ["r2"], name="add"),
    ]
    nodes = [nodes[0], nodes[2], nodes[1]]
    entry = nodes[1].metadata_props.add()
    entry.key, entry.value = "sparse_onnx.block", "kept"
    before = model(nodes, 16, {"flag": np.asarray(True)}, [function], ("local",))
    before.graph.node("add").doc_string = "kept"
    after, _ = check_rewrite(before, ConvertOpset(), rewritten=1, feeds=[{"x": X}])
    assert after.graph.node("add").metadata_props == {"sparse_onnx.block": "kept"}
    assert after.graph.node("add").doc_string == "kept"
    (kept,) = after.functions.values()
    assert (kept.opset_imports[""], kept.identifier()) == (18, ("local", "f", ""))
    assert after.opset_imports == {"": 18, "local": 1}


def test_functions_of_another_version_meet_the_model() -> None:
    function = helper.make_function(
        "local", "f", ["a"], ["b"], [node("ReduceMax", ["a"], ["b"], axes=[1])], [helper.make_opsetid("", 15)]
    )
    before = model([node("f", ["x"], ["y"], domain="local")], 20, {}, [function], ("local",))
    after, _ = check_rewrite(before, ConvertOpset(), rewritten=1)  # ORT does not run the model as it was
    np.testing.assert_array_equal(run_model(after, {"x": X})[0], X.max(1, keepdims=True))
    assert after.opset_imports[""] == 20
    (kept,) = after.functions.values()
    assert kept.opset_imports[""] == 20


def test_other_domains_are_not_touched() -> None:
    nodes = [node("ReduceMax", ["x"], ["m"], axes=[1]), node("Mystery", ["m"], ["y"], domain="other", k=3)]
    before = model(nodes, 15, {}, None, ("other",))
    outcome = ConvertOpset()(before)
    assert outcome.modified
    assert ir.to_proto(before).graph.node[1] == nodes[1]


def test_quantized_experts_need_21() -> None:
    graph = helper.make_graph(
        [
            node("ReduceMax", ["x"], ["m"], axes=[0], keepdims=0),
            node("QMoE", ["m", "m", "w", "s", "", "w", "s"], ["y"], domain="com.microsoft", k=1),
            node("GridSample", ["image", "grid"], ["z"], mode="bicubic"),
        ],
        "g",
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("x", "w", "s", "image", "grid")],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in ("y", "z")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    before = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8))
    assert ConvertOpset()(before).modified
    assert before.opset_imports[""] == 21 and before.ir_version >= 10
    assert before.graph.node(2).attributes["mode"].as_string() == "cubic"
    assert not ConvertOpset()(before).modified


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_newer_models_stay(opset: int) -> None:
    check_rewrite(model([node("Relu", ["x"], ["y"])], opset), ConvertOpset(), rewritten=0)


REFUSED = {
    "too old": (model([node("Relu", ["x"], ["y"])], 12), "opset 12 is older than 13"),
    "training": (
        model(
            [
                *FLATTEN,
                node(
                    "BatchNormalization", ["image", "one", "zero", "zero", "one"], ["y", "m", "v"], name="bn"
                ),
            ],
            13,
            {**FLAT, "one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)},
        ),
        "BatchNormalization in training mode",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_as_it_was(name: str) -> None:
    before, reason = REFUSED[name]
    after = ir.from_proto(ir.to_proto(before))
    outcome = ConvertOpset()(after)
    (refusal,) = outcome.refusals
    assert reason in refusal.reason and not outcome.modified and refusal.by == "convert_opset"
    assert ir.to_proto(after) == ir.to_proto(before)


def test_attributes_from_the_caller_are_refused() -> None:
    reduce = node("ReduceMax", ["a"], ["b"], name="reduce")
    reduce.attribute.add(name="axes", ref_attr_name="axes", type=onnx.AttributeProto.INTS)
    function = helper.make_function(
        "local", "f", ["a"], ["b"], [reduce], [helper.make_opsetid("", 17)], attributes=["axes"]
    )
    before = model([node("f", ["x"], ["y"], domain="local", axes=[1])], 17, {}, [function], ("local",))
    (refusal,) = ConvertOpset()(before).refusals
    assert "gives" in refusal.reason and refusal.node == "reduce"


def test_a_conversion_that_fails_its_check_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        *CASES["ReduceMax"][0],
        node("Split", ["x"], ["p", "q"], axis=1),
    ]
    before = model(nodes, 15)
    proto = ir.to_proto(before)
    since, adapt = _ADAPTERS["Split"]

    def wrong(split, names, in_function):  # type: ignore[no-untyped-def]
        yield from adapt(split, names, in_function)
        split.attributes["num_outputs"] = ir.AttrString("num_outputs", "two")

    monkeypatch.setitem(_ADAPTERS, "Split", (since, wrong))
    outcome = ConvertOpset()(before)
    (refusal,) = outcome.refusals
    assert "checker" in refusal.reason and not outcome.modified
    assert ir.to_proto(before) == proto


def test_a_model_that_was_invalid_is_converted_all_the_same() -> None:
    """ORT's own operators in the default domain, for example, which onnx's checker does not know."""
    nodes = [
        node("ReduceMax", ["x"], ["m"], axes=[1]),
        node("SimplifiedLayerNormalization", ["m", "scale"], ["y"]),
    ]
    before = model(nodes, 17, {"scale": np.full(8, 1.5, np.float32)})
    expected = run_model(before, {"x": X})
    assert ConvertOpset()(before).modified
    assert_close(expected[0], run_model(before, {"x": X})[0], 1e-6)


def sparse_model(folder: Path) -> Path:
    """3 GB of weights, all of them holes of a file."""
    big = external("w", [3, 16384, 16384], "w.bin", 0, 3 * 16384 * 16384 * 4)
    with open(folder / "w.bin", "wb") as file:
        file.truncate(3 * 16384 * 16384 * 4)
    nodes = [
        node("ReduceMax", ["x"], ["m"], axes=[1], keepdims=0, name="reduce"),
        node("Gather", ["w", "one"], ["w1"]),
        node("MatMul", ["m", "w1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["a", 2, 16384])],
        [helper.make_tensor_value_info("y", FLOAT, ["a", 16384])],
        [big, numpy_helper.from_array(np.asarray(1), "one")],
    )
    path = folder / "in.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=7)
    path.write_bytes(proto.SerializeToString())
    return path


def test_weights_above_2_gb_stay_where_they_are(tmp_path: Path) -> None:
    loaded = io.load(sparse_model(tmp_path))
    assert ConvertOpset()(loaded).modified
    weights = loaded.graph.initializers["w"].const_value
    assert isinstance(weights, ir.ExternalTensor) and weights.raw is None
    saved = io.save(loaded, tmp_path / "out.onnx", weights="link")
    assert saved.bytes_copied == 0
    onnx.checker.check_model(str(saved.path))


def test_a_model_without_blocks_is_written_as_it_was(tmp_path: Path) -> None:
    """The conversion alone is no reason to change somebody's model."""
    path = sparse_model(tmp_path)
    report = optimize(path, tmp_path / "out.onnx")
    assert next(record for record in report.passes if record.name == "convert_opset").rewritten == 1
    before, after = (
        onnx.load(path, load_external_data=False),
        onnx.load(tmp_path / "out.onnx", load_external_data=False),
    )
    assert after.opset_import == before.opset_import and after.graph.node == before.graph.node
    assert "nothing to do" in report.notes[0]


def test_it_runs_first() -> None:
    assert PIPELINE[0].name == "convert_opset"

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model, save_external
from onnx import TensorProto, helper

import sparse_onnx
from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, UsageError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.name_blocks import NameBlocks
from sparse_onnx.verify import lowering

SHAPE = Shape(experts=6, hidden=32, inner=48, biases=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_external(layered_model(SHAPE), tmp_path / "in.onnx")


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "WHOLE_BYTES", 0)
    monkeypatch.setattr(lowering, "GROUP_BYTES", 40_000)  # two experts at a time


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_lowers_every_block_and_says_so(source: Path, tmp_path: Path) -> None:
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert [block.form for block in report.blocks] == ["grouped", "grouped"]
    assert report.verify is not None and report.verify.method == "whole" and report.verify.passed
    assert report.verify.runs >= 10 and report.verify.max_rel_error < 1e-5
    lowered = next(record for record in report.passes if record.name == "fuse_gating")
    assert (lowered.matched, lowered.rewritten, lowered.refused) == (2, 2, 0)
    assert not io.load(tmp_path / "out.onnx").functions
    assert report.output is not None and report.output.path == str(tmp_path / "out.onnx")


def test_by_blocks(source: Path, tmp_path: Path, by_blocks: None) -> None:
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.method == "blocks" and report.verify.passed
    assert "every expert" in report.verify.inputs and report.verify.max_rel_error < 1e-5


@pytest.mark.parametrize("method", ["whole", "blocks"])
@pytest.mark.parametrize("mutation", ["experts", "weights", "combine", "glue"])
def test_a_wrong_rewrite_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, mutation: str
) -> None:
    if method == "blocks":
        monkeypatch.setattr(lowering, "WHOLE_BYTES", 0)
        monkeypatch.setattr(lowering, "GROUP_BYTES", 40_000)
    right = FuseGating.call

    def wrong(self: FuseGating, model: ir.Model):
        outcome = right(self, model)
        if mutation == "experts":
            a, b = (model.graph.initializers[f"layers.1.fc1.{e}"] for e in (1, 4))
            a.const_value, b.const_value = b.const_value, a.const_value
        elif mutation == "weights":
            value = model.graph.initializers["layers.0.fc2.3"]
            changed = value.const_value.numpy().copy()
            changed[0] *= 1.5
            value.const_value = ir.Tensor(changed, name=value.name)
        elif mutation == "combine":  # slots come back in the sorted order
            [inverse] = [
                n for n in model.graph if n.name == "layers.0.experts/TopK_" + n.name.rsplit("_", 1)[-1]
            ][1:]
            order = inverse.inputs[0]
            ir.convenience.replace_all_uses_with(inverse.outputs[1], order)
        else:
            [node] = [n for n in model.graph if n.name == "layers.1.out"]
            node.op_type = "Sub"
        return outcome

    monkeypatch.setattr(FuseGating, "call", wrong)
    before = contents(tmp_path)
    with pytest.raises(VerificationError) as caught:
        sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_in_may_be_out_and_twice_changes_nothing(source: Path, tmp_path: Path) -> None:
    feeds = {"x": np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)}
    from sparse_onnx.targets import session

    expected = session.run(session.create_session(source), feeds)[0]
    sparse_onnx.optimize(source, source)
    first = contents(tmp_path)
    np.testing.assert_allclose(
        session.run(session.create_session(source), feeds)[0], expected, rtol=0, atol=1e-5
    )
    report = sparse_onnx.optimize(source, source)
    assert contents(tmp_path) == first
    assert report.notes and "nothing to do" in report.notes[0]
    sparse_onnx.optimize(source, tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == first["in.onnx"]


def test_an_invalid_result_never_replaces_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FuseGating.call

    def wrong(self: FuseGating, model: ir.Model):
        outcome = right(self, model)
        nodes = list(model.graph)
        nodes[5].outputs[0].name = nodes[3].outputs[0].name
        return outcome

    monkeypatch.setattr(FuseGating, "call", wrong)
    before = contents(tmp_path)
    with pytest.raises(VerificationError, match="not valid"):
        sparse_onnx.optimize(source, source, verify="none")
    assert contents(tmp_path) == before


def test_the_result_is_compared_with_the_original(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of a pass before the lowering is a fault of the result."""
    right = NameBlocks.call

    def wrong(self: NameBlocks, model: ir.Model):
        router = model.graph.initializers["layers.0.router"]
        router.const_value = ir.Tensor(-router.const_value.numpy(), name=router.name)
        outcome = right(self, model)
        outcome.modified = True
        return outcome

    monkeypatch.setattr(NameBlocks, "call", wrong)
    with pytest.raises(VerificationError):
        sparse_onnx.optimize(source, tmp_path / "out.onnx")


def test_a_backup_keeps_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save(layered_model(SHAPE), path)
    backup = tmp_path / "m.onnx.bak"
    backup.write_bytes(path.read_bytes())
    sparse_onnx.optimize(path, path, weights="copy")
    io.load(backup)
    assert (tmp_path / "m.data").exists()


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    proto = ir.to_proto(layered_model(SHAPE))
    for tensor in list(proto.graph.initializer):
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        proto.graph.initializer.remove(tensor)
    del proto.graph.value_info[:]
    source = tmp_path / "in.onnx"
    onnx.save(proto, source)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert [block.form for block in report.blocks] == ["grouped", "grouped"]


def test_nothing_to_do_copies_the_model(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), source)
    report = sparse_onnx.optimize(source, out)
    assert "nothing to do" in report.notes[0]
    assert onnx.load(out).graph == onnx.load(source).graph


def test_refusals_leave_the_model_alone(tmp_path: Path) -> None:
    model = routed_model(Shape())
    model.graph.inputs.append(model.graph.initializers["fc1"])
    source = tmp_path / "in.onnx"
    ir.save(model, source)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert [refusal.by for refusal in report.refusals] == ["fuse_gating"]
    assert "1 refused" in report.notes[0]
    assert ir.load(tmp_path / "out.onnx").graph.num_nodes() == 1


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", dry_run=True)
    assert contents(tmp_path) == before and report.output is None
    assert any("fuse_gating" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "toaster"}, "unknown target"),
        ({"form": "x"}, "unknown form"),
        ({"passes": {"fuse_gates": {}}}, "unknown pass"),
        ({"passes": {"fuse_gating": {"speed": "11"}}}, "no option 'speed'"),
        ({"skip": ["everything"]}, "unknown pass"),
    ],
)
def test_wrong_requests(source: Path, tmp_path: Path, options: dict, message: str) -> None:
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        sparse_onnx.optimize(source, tmp_path / "out.onnx", **options)
    assert caught.value.hint and contents(tmp_path) == before


def test_a_missing_folder_is_seen_before_the_work(source: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(UsageError, match="folder that does not exist"):
        sparse_onnx.optimize(source, tmp_path / "nowhere" / "out.onnx", progress=steps.append)
    assert not steps


def test_skipped_lowering(source: Path, tmp_path: Path) -> None:
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", skip=["fuse_gating"])
    assert "nothing to do" in report.notes[0]


def test_each_pass_verified(source: Path, tmp_path: Path) -> None:
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", verify="each")
    assert report.verify is not None and report.verify.passed


def test_unverified_says_so(source: Path, tmp_path: Path) -> None:
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", verify="none")
    assert report.verify is not None and report.verify.method == "none" and report.verify.passed is None


def test_bfloat16_is_not_possible_on_the_cpu(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    ir.save(routed_model(Shape(dtype="bfloat16", weight_dtype="bfloat16")), source)
    with pytest.raises(ImpossibleError, match="no bfloat16 arithmetic"):
        sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_missing_and_broken_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        sparse_onnx.optimize(tmp_path / "none.onnx", tmp_path / "out.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff\xff not a model")
    with pytest.raises(ModelError):
        sparse_onnx.optimize(broken, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["broken.onnx"]


def test_a_model_that_ort_cannot_load(tmp_path: Path) -> None:
    model = layered_model(SHAPE)
    next(iter(model.graph)).op_type = "NoSuchOperator"
    source = tmp_path / "in.onnx"
    ir.save(model, source)
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert sorted(os.listdir(tmp_path)) == ["in.onnx"]


def test_no_space_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tmp_path)
    real = os.replace

    def full(*args, **kwargs):
        if str(args[1]).endswith("out.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutsideError, match="No space left") as caught:
        sparse_onnx.optimize(source, tmp_path / "out.onnx")
    assert caught.value.exit_code == 1 and contents(tmp_path) == before

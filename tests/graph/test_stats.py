from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph.toy import branch, call, external, function, model, packed_model, watched, write
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.external import slice_first_axis
from sparse_onnx.graph.io import load, save
from sparse_onnx.graph.stats import fingerprint, node_count, record, weight_bytes


def _branched() -> onnx.ModelProto:
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    inner = numpy_helper.from_array(np.ones(3, np.float32), "inner")
    body = helper.make_graph([helper.make_node("Identity", ["inner"], ["out"])], "body", [], out, [inner])
    return model([numpy_helper.from_array(np.ones(5, np.float32), "w")], [branch(body)])


def test_node_count_has_subgraphs_but_no_function_bodies() -> None:
    proto = _branched()
    # main: Identity, If; each of its 2 branches: Constant, If; each of these 4: Identity
    assert node_count(ir.from_proto(proto)) == 2 + 2 * 2 + 4
    proto.functions.append(function("F", [call("Identity")]))
    assert node_count(ir.from_proto(proto)) == 10


def test_weight_bytes_of_all_graphs() -> None:
    assert weight_bytes(ir.from_proto(_branched())) == 20 + 4 * 12


def test_weight_bytes_counts_shared_bytes_once(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    whole = 4 * 32 * 16 * 4 + 4 * 32 * 4 + 8
    assert weight_bytes(loaded) == whole
    array = np.ones((4, 10), np.float32)
    for packed in (loaded.graph.initializers["w"].const_value, ir.tensor(array, name="m")):
        assert packed is not None
        for index in (2, 1):
            piece = slice_first_axis(packed, index, f"{packed.name}.{index}")
            loaded.graph.register_initializer(ir.Value(name=piece.name, const_value=piece))
    assert weight_bytes(loaded) == whole + 2 * 40
    loaded.graph.register_initializer(ir.Value(name="m", const_value=ir.tensor(array, name="m")))
    assert weight_bytes(loaded) == whole + 4 * 40
    loaded.graph.register_initializer(ir.Value(name="t", const_value=ir.tensor(["ab", "c"], name="t")))
    assert weight_bytes(loaded) == whole + 4 * 40 + 3


def _twins(tmp_path: Path) -> list[ir.Model]:
    """The same model with weights in a file, in another file elsewhere, in the graph, in memory."""
    (tmp_path / "sub").mkdir()
    path = packed_model(tmp_path, rows=300)
    models = [load(path), load(save(load(path), tmp_path / "sub" / "out.onnx").path)]
    models.append(load(save(load(path), tmp_path / "inline.onnx", size_threshold=10**9).path))
    models.append(load(path))
    for value in models[-1].graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return models


def test_fingerprint_ignores_where_weights_are(tmp_path: Path) -> None:
    twins = _twins(tmp_path)
    assert len({fingerprint(model) for model in twins}) == 1
    assert len(fingerprint(twins[0])) == 16


def test_fingerprint_ignores_metadata(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    before = fingerprint(loaded)
    loaded.producer_name, loaded.doc_string, loaded.graph.name = "someone", "text", "other"
    loaded.metadata_props["a"] = "b"
    for node in loaded.graph:
        node.name, node.doc_string = f"{node.name}.renamed", "text"
        node.metadata_props["a"] = "b"
    loaded.graph[0].outputs[0].shape = ir.Shape([32, 16])  # as shape inference would
    assert fingerprint(loaded) == before


def _set(loaded: ir.Model, name: str, tensor: ir.TensorProtocol) -> None:
    loaded.graph.initializers[name].const_value = tensor


def _changed(array: np.ndarray, index: int) -> ir.Tensor:
    array = array.copy()
    array.reshape(-1)[index] += 1
    return ir.Tensor(array)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, w: _set(m, "w", _changed(w, 0)),
        lambda m, w: _set(m, "w", _changed(w, -1)),
        lambda m, w: _set(m, "w", ir.tensor(w.reshape(w.shape[0], -1, 1))),
        lambda m, w: _set(m, "w", ir.tensor(w.view(np.int32))),
        lambda m, w: _set(m, "w", ir.tensor(w[:1])),
        lambda m, w: _set(m, "zero", ir.tensor(np.asarray(1))),
        lambda m, w: m.graph[-1].attributes.pop("transB"),
        lambda m, w: m.graph[-1].attributes.add(ir.AttrFloat32("alpha", 2.0)),
        lambda m, w: m.graph[-1].replace_input_with(0, m.graph[0].outputs[0]),
        lambda m, w: setattr(m.graph[-1], "op_type", "Other"),
        lambda m, w: m.graph.opset_imports.update({"": 21}),
        lambda m, w: m.graph.inputs.append(ir.Value(name="more")),
        lambda m, w: setattr(m.graph.inputs[0], "shape", ir.Shape([1, 16])),
    ],
)
def test_fingerprint_sees(change: object, tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path, rows=300))
    before = fingerprint(loaded)
    weight = loaded.graph.initializers["w"].const_value
    assert weight is not None
    change(loaded, weight.numpy())  # type: ignore[operator]
    assert fingerprint(loaded) != before


def test_fingerprint_enters_subgraphs_functions_and_attributes() -> None:
    def build(inner: float, constant: float, op: str) -> ir.Model:
        proto = _branched()
        body = proto.graph.node[1].attribute[0].g.node[1].attribute[0].g
        body.initializer[0].CopyFrom(numpy_helper.from_array(np.full(3, inner, np.float32), "inner"))
        value = numpy_helper.from_array(np.full(3, constant, np.float32))
        proto.functions.append(
            function("F", [helper.make_node("Constant", [], ["c"], value=value), call(op)])
        )
        return ir.from_proto(proto)

    prints = [
        fingerprint(build(*arguments))
        for arguments in ((1, 1, "Abs"), (1, 1, "Abs"), (2, 1, "Abs"), (1, 2, "Abs"), (1, 1, "Neg"))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_fingerprint_ignores_the_order_of_attributes(tmp_path: Path) -> None:
    prints = []
    for order in (["transB", "alpha"], ["alpha", "transB"]):
        loaded = load(packed_model(tmp_path))
        gemm = loaded.graph[-1]
        gemm.attributes.clear()
        for name in order:
            gemm.attributes.add(ir.AttrFloat32(name, 2.0) if name == "alpha" else ir.AttrInt64(name, 1))
        prints.append(fingerprint(loaded))
    assert prints[0] == prints[1]


def test_fingerprint_reads_little(tmp_path: Path) -> None:
    """A terabyte in a sparse file, and 3000 tensors: the sample is bounded, and holds the last byte."""
    size = 1 << 40
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(size)
    tensors = [external("w", [size // 4], "w.bin")]
    tensors += [external(f"t{index}", [1000], "w.bin", index * 4000) for index in range(3000)]
    loaded = load(write(model(tensors), tmp_path / "m.onnx"))
    before = fingerprint(loaded)
    with open(tmp_path / "w.bin", "r+b") as file:
        file.seek(size - 1)
        file.write(b"\1")
    assert fingerprint(loaded) != before


def test_record_and_the_other_figures(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    loaded = load(path)
    with watched() as events:
        found = record(loaded, path)
    assert {path for event, path in events} == {str(tmp_path / "in.bin")}
    assert (found.path, found.nodes, found.weight_bytes) == (str(path), 3, weight_bytes(loaded))
    assert found.fingerprint == fingerprint(loaded)


def test_fingerprint_of_weights_that_are_gone(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    (tmp_path / "in.bin").unlink()
    with pytest.raises(ModelError, match=r"in\.bin"):
        fingerprint(loaded)

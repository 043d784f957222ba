"""Whole calibrations against numpy, on models whose inner values are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from builders import Shape, layered_model, routed_model, save_external
from onnx import helper, numpy_helper
from text_graphs import graph

from sparse_onnx import calibrate, optimize
from sparse_onnx.blocks.reference import inner_rows
from sparse_onnx.calibrate import plan as planning
from sparse_onnx.core.calibration import CENTRES, SPARSITIES, Calibration, SiteRecord
from sparse_onnx.core.calibration_file import read_calibration
from sparse_onnx.core.errors import ImpossibleError, ModelError, UsageError
from sparse_onnx.graph import io, stats

RNG = np.random.default_rng(0)
W1 = RNG.standard_normal((8, 24)).astype(np.float32)
W2 = RNG.standard_normal((24, 8)).astype(np.float32)
FFN = "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)"


def write(folder: Path, model: onnx.ModelProto | ir.Model, **arrays: np.ndarray) -> tuple[Path, Path]:
    path = folder / "m.onnx"
    onnx.save(model if isinstance(model, onnx.ModelProto) else ir.to_proto(model), path)
    np.savez(folder / "data.npz", **arrays)
    return path, folder / "data.npz"


def ffn(body: str = FFN, inputs: str = "float[T, 8] x", **more: np.ndarray) -> onnx.ModelProto:
    return graph(body, "y", {"w1": W1, "w2": W2} | more, inputs)


def site(found: Calibration, name: str) -> SiteRecord:
    return next(layer for layer in found.layers if layer.name == name)


def thresholded_error(rows: np.ndarray, matrix: np.ndarray, record: SiteRecord, name: str, at: int) -> float:
    if at == 0:
        return 0.0
    distance = rows - np.asarray(record.centre(name), np.float32)
    tau = record.quantiles[name][round(SPARSITIES[at] * 100)]
    residual = np.where(np.abs(distance) <= tau, distance, 0)
    size = np.linalg.norm(rows @ matrix, axis=1, keepdims=True)
    size = np.maximum(size, np.median(size))
    return float(np.linalg.norm(residual @ matrix / size) / np.linalg.norm(rows @ matrix / size))


def test_numbers_are_those_of_numpy(tmp_path: Path) -> None:
    x = RNG.standard_normal((500, 8)).astype(np.float32)
    found = calibrate(*write(tmp_path, ffn(), x=x), tmp_path / "c.json")
    assert [layer.name for layer in found.layers] == ["w1", "w2"]
    inner = np.maximum(x @ W1, 0)
    for record, rows, matrix in ((found.layers[0], x, W1), (found.layers[1], inner, W2)):
        seen, held_out = rows[:400], rows[400:]  # one run: its last fifth is held out
        assert record.tokens == 500 and record.rows == matrix.shape[0] and record.columns == matrix.shape[1:]
        assert record.zeros == pytest.approx(np.mean(rows == 0), abs=1e-6)
        assert record.mean == pytest.approx(rows.mean(dtype=np.float64), abs=1e-5)
        assert record.median == pytest.approx(np.median(seen), abs=1e-5)
        np.testing.assert_allclose(record.channel_median, np.median(seen, axis=0), atol=1e-5)
        for name in CENTRES:
            distance = np.abs(seen - np.asarray(record.centre(name)))
            np.testing.assert_allclose(
                record.quantiles[name], np.quantile(distance, np.linspace(0, 1, 101)), atol=1e-4
            )
            expected = [thresholded_error(held_out, matrix, record, name, at) for at in range(20)]
            np.testing.assert_allclose(record.errors[name], expected, atol=2e-3)
    assert site(found, "w2").mode == 0 and site(found, "w2").zeros > 0.4
    assert (found.data.runs, found.data.tokens, found.data.held_out_tokens) == (1, 500, 100)
    assert read_calibration(tmp_path / "c.json") == found
    assert found.fingerprint == stats.fingerprint(io.load(tmp_path / "m.onnx"))


def test_of_many_runs_every_fifth_is_held_out(tmp_path: Path) -> None:
    model, _ = write(tmp_path, ffn())
    runs = [RNG.standard_normal((10, 8)).astype(np.float32) + at for at in range(10)]
    (tmp_path / "runs").mkdir()
    for at, x in enumerate(runs):
        np.savez(tmp_path / "runs" / f"{at}.npz", x=x)
    found = calibrate(model, tmp_path / "runs")
    seen = np.concatenate([x for at, x in enumerate(runs) if at % 5 != 4])
    np.testing.assert_allclose(found.layers[0].channel_median, np.median(seen, axis=0), atol=1e-5)
    assert found.data.held_out_tokens == 20
    assert found.layers[0].mean == pytest.approx(np.mean(runs), abs=1e-5)


SPELLINGS: dict[str, tuple[onnx.ModelProto, int]] = {
    "gemm": (ffn("h = Gemm <transB = 1> (x, t, b) r = Relu (h) y = Gemm (r, w2)",
                 t=np.ascontiguousarray(W1.T), b=np.ones(24)), 2),
    "three axes": (ffn(inputs="float[B, S, 8] x"), 2),
    "shared input": (ffn("h = MatMul (x, w1) g = MatMul (x, v) s = Sigmoid (g) r = Mul (h, s) y = MatMul (r, w2)",
                         v=W1 * 2), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_layers_are_found_in_other_spellings(name: str, tmp_path: Path) -> None:
    proto, sites = SPELLINGS[name]
    x = RNG.standard_normal((4, 30, 8) if name == "three axes" else (120, 8)).astype(np.float32)
    found = calibrate(*write(tmp_path, proto, x=x))
    assert len(found.layers) == sites and all(layer.tokens == 120 for layer in found.layers)
    assert found.layers[0].mean == pytest.approx(float(x.mean()), abs=1e-5)


def test_quantized_weights_are_measured_as_numbers(tmp_path: Path) -> None:
    """MatMulNBits and MatMulInteger of ORT's own quantizers: about the errors of the layers that they stand for."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    big, back = (
        RNG.standard_normal((64, 128)).astype(np.float32),
        RNG.standard_normal((128, 64)).astype(np.float32),
    )
    proto = graph(
        "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)", "y", {"w1": big, "w2": back}, "float[T, 64] x"
    )
    proto.graph.node[0].name, proto.graph.node[2].name = "first", "second"
    x = RNG.standard_normal((300, 64)).astype(np.float32)
    model, data = write(tmp_path, proto, x=x)
    dense = calibrate(model, data)
    quantizer = MatMulNBitsQuantizer(onnx.load(model), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "int4.onnx"))
    quantize_dynamic(model, tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    for name, rate in (("int4.onnx", 0.02), ("int8.onnx", 0.02)):
        found = calibrate(tmp_path / name, data)
        assert len(found.layers) == 2
        for ours, theirs in zip(found.layers, dense.layers, strict=True):
            assert ours.rows == theirs.rows and ours.bytes < theirs.bytes / 3
            for centre in CENTRES:
                np.testing.assert_allclose(ours.errors[centre], theirs.errors[centre], atol=rate)


def test_padding_does_not_count(tmp_path: Path) -> None:
    table = RNG.standard_normal((9, 8)).astype(np.float32)
    body = "x = Gather (table, ids) h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)"
    proto = ffn(body, "int64[B, S] ids, int64[B, S] attention_mask", table=table)
    ids = RNG.integers(1, 9, (6, 5))
    mask = np.ones((6, 5), np.int64)
    mask[:, 3:] = 0
    ids[:, 3:] = 0
    found = calibrate(*write(tmp_path, proto, ids=ids, attention_mask=mask))
    assert found.layers[0].tokens == found.data.tokens == 18
    assert found.layers[0].mean == pytest.approx(float(table[ids[:, :3]].mean()), abs=1e-5)


def test_zeros_of_relus_that_no_linear_layer_reads_are_counted(tmp_path: Path) -> None:
    kernel = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    body = (
        "c = Conv <pads = [1, 1, 1, 1]> (x, k) r = Relu (c) f = Clip (r, low, high) y = GlobalAveragePool (f)"
    )
    proto = graph(
        body, "y", {"k": kernel, "low": np.asarray(0.0), "high": np.asarray(6.0)}, "float[batch, 3, 8, 8] x"
    )
    x = RNG.standard_normal((50, 3, 8, 8)).astype(np.float32)
    found = calibrate(*write(tmp_path, proto, x=x))
    proto.graph.output.append(helper.make_tensor_value_info("r", 1, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    relu = session.run(["r"], {"x": x})[0]
    assert [record.operator for record in found.activations] == ["Relu", "Clip"] and not found.layers
    for record in found.activations:
        assert record.values == relu.size and record.zeros == pytest.approx(np.mean(relu == 0), abs=1e-5)


def numpy_router(x: np.ndarray, router: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    logits = x @ router
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    index = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    weight = np.take_along_axis(scores, index, 1)
    return index, weight / weight.sum(1, keepdims=True)


SHAPES = {
    "fc1 holds both": Shape(experts=5, hidden=12, inner=10, biases=True),
    "apart, inputs first": Shape(experts=5, hidden=12, inner=10, separate=True, weight_layout=1),
    "relu, no gate": Shape(experts=5, hidden=12, inner=10, activation=3, gate_layout=0, biases=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_experts_are_measured_on_the_tokens_that_they_get(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    model = layered_model(shape, layers=1)
    x = RNG.standard_normal((200, 12)).astype(np.float32)
    found = calibrate(*write(tmp_path, model, x=x))
    weights = {value.name or "": value.const_value.numpy() for value in model.graph.initializers.values()}
    index, weight = numpy_router(x, weights["layers.0.router"], 2)
    [block] = found.blocks
    assert block.loads == tuple(np.bincount(index.ravel(), minlength=5)) and block.tokens == 200
    for one, other in ((0, 1), (2, 4)):
        assert block.coactivation is not None
        assert block.coactivation[one][other] == ((index == one).any(1) & (index == other).any(1)).sum()
    np.testing.assert_allclose(block.weight_quantiles, np.quantile(weight, np.linspace(0, 1, 101)), atol=1e-5)
    assert block.layers == ("layers.0.experts.up", "layers.0.experts.down")
    up, down = (site(found, label) for label in block.layers)
    assert up.tokens == down.tokens == 400 and up.mean == pytest.approx(float(x.mean()), abs=1e-5)
    # The same with numpy: 200 tokens, 160 of them for statistics, and their two experts each.
    from sparse_onnx.blocks import blocks

    [view] = blocks(model)
    inner, outer, chosen = [], [], []
    for token, experts in zip(x, index, strict=True):
        for expert in experts:
            chosen.append(expert)
            own = {role: weights[f"layers.0.{role}"][expert] for role in view.weights}
            inner.append(inner_rows(view.spec, token[None].astype(np.float64), own)[0])
            outer.append(own[view.spec.roles[-1]])
    rows = np.asarray(inner)
    assert down.median == pytest.approx(np.median(rows[:320]), abs=1e-5)
    np.testing.assert_allclose(down.channel_median, np.median(rows[:320], axis=0), atol=1e-5)
    lost = whole = 0.0
    for expert in set(chosen[320:]):
        at = [place for place in range(320, 400) if chosen[place] == expert]
        matrix = outer[at[0]] if shape.weight_layout else outer[at[0]].T
        results = rows[at] @ matrix
        dropped = np.where(np.abs(rows[at]) <= down.quantiles["zero"][50], rows[at], 0) @ matrix
        size = np.linalg.norm(results, axis=1, keepdims=True)
        size = np.maximum(size, np.median(size))
        whole += float(np.square(results / size).sum())
        lost += float(np.square(dropped / size).sum())
    assert down.errors["zero"][10] == pytest.approx((lost / whole) ** 0.5, abs=2e-3)
    if name.startswith("relu"):
        assert down.zeros == pytest.approx(np.mean(rows == 0), abs=0.05) and down.mode == 0


def test_an_expert_that_no_token_reaches_is_named(tmp_path: Path) -> None:
    """Indices are the data's own: expert 2 is never chosen, one slot is dropped, one token names an expert twice."""
    index = np.asarray([[0, 1], [1, 0], [3, 3], [0, 4]] * 5, np.int64)
    tokens = RNG.standard_normal((20, 16)).astype(np.float32)
    weight = np.full((20, 2), 0.5, np.float32)
    found = calibrate(*write(tmp_path, routed_model(Shape()), tokens=tokens, index=index, weight=weight))
    [block] = found.blocks
    assert block.unused == (2,) and block.loads == (15, 10, 0, 10) and block.dropped == 5
    assert block.coactivation is not None and block.coactivation[3] == (0, 0, 0, 5)
    assert site(found, "block.up").tokens == 35


def test_blocks_of_other_exporters_and_lowered_ones_have_the_same_routing(tmp_path: Path) -> None:
    model, data = write(
        tmp_path, layered_model(Shape(), layers=2), x=RNG.standard_normal((60, 16)).astype(np.float32)
    )
    first = calibrate(model, data)
    for form in ("dense", "branched", "grouped"):
        optimize(model, tmp_path / f"{form}.onnx", form=form, verify="none")
        found = calibrate(tmp_path / f"{form}.onnx", data)
        assert [block.loads for block in found.blocks] == [block.loads for block in first.blocks]
        assert [block.coactivation for block in found.blocks] == [
            block.coactivation for block in first.blocks
        ]


def test_values_that_do_not_fit_together_are_fetched_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write(
        tmp_path, layered_model(Shape(), layers=3), x=RNG.standard_normal((90, 16)).astype(np.float32)
    )
    whole = calibrate(*arguments, rows=16)
    monkeypatch.setattr(planning, "_FETCHED", 1)
    assert calibrate(*arguments, rows=16).dumps() == whole.dumps()


def test_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    arguments = write(
        tmp_path, layered_model(Shape(), layers=2), x=RNG.standard_normal((300, 16)).astype(np.float32)
    )
    texts = [calibrate(*arguments, rows=32, seed=seed).dumps() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_external_weights_are_not_copied(tmp_path: Path) -> None:
    save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=RNG.standard_normal((40, 16)).astype(np.float32))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = calibrate(tmp_path / "m.onnx", tmp_path / "d.npz")
    assert len(found.layers) == 2 and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_layers_in_branches_are_left_alone_and_said_to_be(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("Abs", ["h"], ["q"]),
         helper.make_node("MatMul", ["q", "w2"], ["z"])],
        "branch", [], [helper.make_tensor_value_info("z", 1, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z2"])],
        "other",
        [],
        [helper.make_tensor_value_info("z2", 1, None)],
    )
    proto = ffn(f"{FFN.replace('y =', 'm =')} s = ReduceMax <keepdims = 0> (m) o = Cast <to = 9> (s)")
    proto.graph.node.append(helper.make_node("If", ["o"], ["y"], then_branch=inner, else_branch=other))
    found = calibrate(*write(tmp_path, proto, x=np.ones((30, 8), np.float32)))
    assert any("body of an If" in refusal.reason for refusal in found.refusals)
    assert len(found.layers) == 2


REFUSED: dict[str, tuple[Any, dict[str, np.ndarray], type[Exception], str]] = {
    "nothing to measure": (
        graph("y = Sin (x)", "y", {}, "float[T, 8] x"), {"x": np.ones((3, 8))}, ImpossibleError, "can be measured",
    ),
    "a model that computes NaN": (
        ffn("l = Log (x) h = MatMul (l, w1) r = Relu (h) y = MatMul (r, w2)"),
        {"x": -np.ones((3, 8))}, ModelError, "computes NaN or infinity",
    ),
    "data of another model": (ffn(), {"x": np.ones((3, 7))}, UsageError, "not [3, 7]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_and_nothing_written(name: str, tmp_path: Path) -> None:
    proto, arrays, kind, reason = REFUSED[name]
    out = tmp_path / "c.json"
    out.write_text("before")
    with pytest.raises(kind) as error:
        calibrate(*write(tmp_path, proto, **arrays), out)
    assert reason in str(error.value) and "\n" not in str(error.value) and out.read_text() == "before"


def test_one_row_is_enough_and_is_its_own_held_out_row(tmp_path: Path) -> None:
    found = calibrate(*write(tmp_path, ffn(), x=RNG.standard_normal((1, 8))))
    assert [layer.tokens for layer in found.layers] == [1, 1]
    assert all(np.isfinite(layer.errors[name]).all() for layer in found.layers for name in CENTRES)


def test_weights_of_a_proto_may_be_constants(tmp_path: Path) -> None:
    proto = graph("h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)", "y", {"w2": W2}, "float[T, 8] x")
    constant = helper.make_node("Constant", [], ["w1"], value=numpy_helper.from_array(W1))
    proto.graph.node.insert(0, constant)
    found = calibrate(*write(tmp_path, proto, x=RNG.standard_normal((9, 8))))
    assert len(found.layers) == 2

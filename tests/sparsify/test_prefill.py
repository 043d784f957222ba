"""Layers that round their inputs keep weights of their own for many rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dense_layers import calibrated
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.graph import io
from sparse_onnx.sparsify.prefill import COPY_KEY, MOST_ROWS, copy_dense
from sparse_onnx.sparsify.record import acting
from sparse_onnx.targets import session as sessions

WIDTH, INNER, BLOCK = 64, 128, 32
LEVEL = "sparsity_level"


def model(accuracy: int = 4, bits: int = 8) -> onnx.ModelProto:
    """Two layers x + Gelu(x A + a) B with the products as MatMulNBits, behind a norm each, and one of floats."""
    rng = np.random.default_rng(bits)
    nodes, stored, x = [], [], "x"
    for at in range(2):
        value = f"norm{at}"
        nodes.append(helper.make_node("LayerNormalization", [x, "ones"], [value], name=value, axis=-1))
        for role, (k, n) in (("up", (WIDTH, INNER)), ("down", (INNER, WIDTH))):
            p = f"layers.{at}.{role}"
            codes = rng.integers(0, 256, (n, k // BLOCK, BLOCK * bits // 8)).astype(np.uint8)
            scales = (rng.uniform(1, 2, (n, k // BLOCK)) / 2.0**bits / np.sqrt(k) * 4).astype(np.float32)
            stored += [numpy_helper.from_array(codes, f"{p}.q"), numpy_helper.from_array(scales, f"{p}.s")]
            attributes: dict[str, Any] = {
                "K": k,
                "N": n,
                "bits": bits,
                "block_size": BLOCK,
                "accuracy_level": accuracy,
            }
            node = helper.make_node(
                "MatMulNBits",
                [value, f"{p}.q", f"{p}.s"],
                [f"{p}.y"],
                name=p,
                domain="com.microsoft",
                **attributes,
            )
            nodes.append(node)
            value = f"{p}.y"
            if role == "up":
                bias = (rng.standard_normal(n) * 0.2).astype(np.float32)
                stored.append(numpy_helper.from_array(bias, f"{p}.bias"))
                nodes += [
                    helper.make_node("Add", [value, f"{p}.bias"], [f"{p}.b"], name=f"{p}.add"),
                    helper.make_node("Gelu", [f"{p}.b"], [f"{p}.g"], name=f"{p}.gelu"),
                ]
                value = f"{p}.g"
        nodes.append(helper.make_node("Add", [x, value], [f"x{at}"], name=f"sum{at}"))
        x = f"x{at}"
    weight = (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32)
    stored += [
        numpy_helper.from_array(weight, "float.weight"),
        numpy_helper.from_array(np.ones(WIDTH, np.float32), "ones"),
    ]
    nodes += [
        helper.make_node("MatMul", [x, "float.weight"], ["f"], name="float"),
        helper.make_node("Add", [x, "f"], ["y"], name="last"),
    ]
    shape: list[str | int | None] = ["T", WIDTH]
    graph = helper.make_graph(
        nodes,
        "rounded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)}


def made(folder: Path, **options: int) -> Path:
    path = folder / "in.onnx"
    onnx.save(model(**options), path, save_as_external_data=True, location="in.data", size_threshold=64)
    (folder / "calib.json").write_text(calibrated(path, [rows(300, seed) for seed in range(2)]).dumps())
    return path


def optimized(source: Path, out: str, **options: Any) -> Any:
    return sparse_onnx.optimize(
        source,
        source.parent / out,
        thresholds=source.parent / "calib.json",
        sparsity=0.4,
        threads=1,
        **options,
    )


def run(path: Path, feeds: dict[str, np.ndarray], kernels: bool = False, **turned: int) -> np.ndarray:
    session = sessions.create_session(path, threads=1, kernels=kernels)
    return sessions.run(session, feeds | {name: np.array(level) for name, level in turned.items()})[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("native", [False, True])
def test_few_rows_skip_and_many_are_the_layers_that_were(
    bits: int, native: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if native:
        request.getfixturevalue("kernels")
    source = made(tmp_path, bits=bits)
    report = optimized(source, "copy.onnx", prefill="copy")
    plain, copied = tmp_path / "plain.onnx", tmp_path / "copy.onnx"
    optimized(source, "plain.onnx")
    assert report.thresholds.prefill == "copy"
    assert any("4 layers as they were" in note and "1 others have no copy" in note for note in report.notes)
    assert report.verify.passed
    for count in (0, 1, MOST_ROWS):
        few = rows(count, 7)
        ours, theirs = (run(path, few, native) for path in (copied, plain))
        assert ours.shape == (count, WIDTH) and np.array_equal(ours, theirs), count
        if count:
            assert np.abs(ours - run(source, few)).max() > 1e-3, "inputs were skipped"
    for count in (MOST_ROWS + 1, 70):
        many = rows(count, 8)
        dense = run(source, many)
        assert np.abs(run(copied, many, native, **{LEVEL: 0}) - dense).max() < 1e-5, "rounded as they were"
        skipping = np.abs(run(plain, many, native) - dense).max()
        assert np.abs(run(copied, many, native) - dense).max() < skipping


def test_what_it_costs_is_one_copy(tmp_path: Path) -> None:
    source = made(tmp_path, bits=8)
    optimized(source, "plain.onnx")
    optimized(source, "copy.onnx", prefill="copy", weights="copy")
    held = [
        sum(
            0 if value.const_value is None else value.const_value.nbytes
            for value in io.load(tmp_path / name).graph.initializers.values()
        )
        for name in ("plain.onnx", "copy.onnx")
    ]
    weights = 4 * WIDTH * INNER
    assert weights <= held[1] - held[0] < 1.3 * weights
    copied = io.load(tmp_path / "copy.onnx")
    choices = [node for node in copied.graph if COPY_KEY in node.metadata_props]
    assert len(choices) == 4 and sum(node.op_type == "Greater" for node in copied.graph) == 4
    assert [item.inner for item in acting(copied)] == [False] * 5


def test_layers_that_do_not_round_get_none(tmp_path: Path) -> None:
    source = made(tmp_path, accuracy=1)
    with pytest.raises(ImpossibleError, match="no thresholded layer was a MatMulNBits that rounds"):
        optimized(source, "never.onnx", prefill="copy")
    assert not (tmp_path / "never.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "twice"}, "unknown prefill 'twice'"),
        ({"prefill": "copy", "threshold_mode": "simulate"}, "mode 'native'"),
        ({"prefill": "copy", "method": "topk"}, "'topk' bounds each token"),
    ],
)
def test_what_does_not_go_together(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        optimized(made(tmp_path), "never.onnx", **options)


def test_a_wrong_copy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is no formality: copies of other weights are refused."""
    source = made(tmp_path)

    def wrong(model, before):  # type: ignore[no-untyped-def]
        found = copy_dense(model, before)
        for value in model.graph.initializers.values():
            if value.name == "layers.0.up.s":
                value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.1), name=value.name)
        return found

    monkeypatch.setattr("sparse_onnx.optimize.copies.copy_dense", wrong)
    with pytest.raises(Exception, match="weights of their own") as caught:
        optimized(source, "never.onnx", prefill="copy")
    assert getattr(caught.value, "exit_code", None) == 4 and not (tmp_path / "never.onnx").exists()

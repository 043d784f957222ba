"""Expert weights in integers: bytes against numpy, every layout, what is refused, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from any_body import dense_model, outlined
from builders import Shape, layered_model, routed_model, save_external
from harness import assert_close, check_rewrite, run_model
from onnx import TensorProto, helper
from verify.variants import clone, edited, in_a_branch

from sparse_onnx.blocks import WeightLayout, blocks, integer_weights
from sparse_onnx.blocks.lowering import ACTIVATIONS_KEY
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import ModelError, UsageError
from sparse_onnx.graph import io
from sparse_onnx.graph.stacked import stack
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.quantize_experts import QuantizeExperts

EXACT = {"activations": "float"}
WIDTHS = [
    {},
    {"symmetric": False},
    {"block": 128},
    {"bits": 8},
    {"bits": 8, "symmetric": False},
    {"bits": 8, "block": 32},
]
SHAPE = Shape(experts=5, hidden=64, inner=96, biases=True)


def feeds(shape: Shape, tokens: int = 13) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.standard_normal((tokens, shape.hidden)).astype(shape.dtype),
        "index": rng.integers(0, shape.experts + 1, (tokens, shape.top_k)),
        "weight": rng.uniform(0.2, 1, (tokens, shape.top_k)).astype(shape.weight_dtype),
    }


def oracle(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Numbers before they are rounded to codes, scales and points of `matrix [N, K]`; `block` 0 is a row."""
    outputs, inputs = matrix.shape
    size = block or inputs
    blocks = -(-inputs // size)
    apart = np.zeros((outputs, blocks * size))
    apart[:, :inputs] = matrix
    apart = apart.reshape(outputs, blocks, size)
    levels, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        largest = np.take_along_axis(apart, np.abs(apart).argmax(-1)[..., None], -1)[..., 0]
        scale = np.abs(largest) / (middle - 1) if not block else largest / -middle
        points = np.full(scale.shape, middle)
    else:
        low, high = np.minimum(apart.min(-1), 0), np.maximum(apart.max(-1), 0)
        scale = (high - low) / levels
        points = np.rint(-low / scale)
    codes = (apart / scale[..., None] + points[..., None]).clip(0, levels)
    return codes.reshape(outputs, -1)[:, :inputs], scale, points


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("inputs", [64, 96, 136])
def test_numbers(width: dict, inputs: int) -> None:
    """Within the rounding of a half, since ORT multiplies by the inverse of the scale."""
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((70, inputs)) * rng.uniform(0.1, 2, (70, 1))).astype(np.float32)
    settings = {"bits": 4, "block": 0, "symmetric": True} | width
    block = settings["block"] or (32 if settings["bits"] == 4 else 0)
    stored = integer_weights.quantize(
        matrix, integer_weights.Width(settings["bits"], block, settings["symmetric"])
    )
    codes, scale, points = oracle(matrix.astype(np.float64), settings["bits"], block, settings["symmetric"])
    np.testing.assert_allclose(stored.scales, scale, rtol=1e-6)
    np.testing.assert_array_equal(stored.points, points)
    found = stored.codes
    if settings["bits"] == 4:
        found = np.stack([found & 15, found >> 4], -1)
    found = found.reshape(codes.shape)
    assert np.abs(found - codes).max() < 0.5 + 1e-3
    assert len(np.unique(found)) > (14 if settings["bits"] == 4 else 200)


def test_rows_of_zeros_and_one_sign() -> None:
    matrix = np.random.default_rng(0).uniform(0.5, 1, (6, 64)).astype(np.float32)
    matrix[0], matrix[1] = 0, -matrix[1]
    for bits, block in ((4, 32), (8, 32), (8, 0)):
        for symmetric in (True, False):
            weights = integer_weights.IntegerWeights(
                ir.Tensor(matrix[None]),
                integer_weights.Width(bits, block, symmetric),
                False,
                integer_weights.Kept(),
            )
            after = weights.quantized().part(0, "").dequantized()
            np.testing.assert_array_equal(after[0], 0)
            assert np.abs(after - matrix).max() < (1 / 7 if bits == 4 else 1 / 100)


LAYOUTS = [
    SHAPE,
    Shape(experts=3, hidden=64, inner=32, gate_layout=0, activation=3),
    Shape(experts=9, hidden=32, inner=64, gate_layout=2, weight_layout=1, biases=True),
    Shape(experts=4, hidden=32, inner=48, separate=True, weight_layout=1),
    Shape(experts=4, hidden=48, inner=32, separate=True),
    Shape(experts=3, hidden=40, inner=136),  # no block of 16 divides these rows
    Shape(experts=3, hidden=6, inner=8),  # rows shorter than any block
    Shape(experts=3, hidden=7, inner=5, gate_layout=0),  # zero points of an expert end within a byte
]


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_layout(shape: Shape, width: dict) -> None:
    """The neutral form computes with what is stored, and each expert multiplies by it without another rounding."""
    if shape.hidden % 2 and width.get("bits", 4) == 4:
        pytest.skip("refused")
    model, inputs = routed_model(shape, opset=21), [feeds(shape), feeds(shape, 0)]
    after, outcome = check_rewrite(model, QuantizeExperts(**width, **EXACT), rewritten=1)
    [block] = blocks(after)
    assert block.spec.weight_layout == WeightLayout.OUT_IN and len(outcome.notes) == 1
    assert ACTIVATIONS_KEY not in block.node.metadata_props
    _is_close_to(model, after, inputs[0], width.get("bits", 4))
    lowered, _ = check_rewrite(after, FuseGating(), rewritten=1, feeds=inputs)
    kinds = [node.op_type for node in lowered.graph]
    assert kinds.count("MatMulNBits") == shape.experts * len(block.spec.roles)


def _is_close_to(model: ir.Model, quantized: ir.Model, inputs: dict[str, np.ndarray], bits: int) -> None:
    expected, actual = run_model(model, inputs)[0], run_model(quantized, inputs)[0]
    error = np.linalg.norm(expected - actual) / np.linalg.norm(expected)
    assert 1e-4 < error < (0.35 if bits == 4 else 0.02)


def test_numbers_are_those_of_each_expert() -> None:
    shape = Shape(experts=5, hidden=64, inner=96, weight_layout=1)
    model = routed_model(shape, opset=21)
    after, outcome = check_rewrite(model, QuantizeExperts(bits=8), rewritten=1)
    [before], [block] = blocks(model), blocks(after)
    changed = whole = 0.0
    for role in block.spec.roles:
        weight = Quantized.of(block.weights[role])
        matrices = before.weights[role].const_value
        assert weight is not None and matrices is not None
        for expert, matrix in enumerate(matrices.numpy()):
            stored = weight.part(expert, "x").dequantized()
            assert np.abs(stored - matrix.T).max() <= np.abs(matrix).max() / 127 * 0.51
            changed += float(np.square(stored - matrix.T).sum())
            whole += float(np.square(matrix).sum())
    assert f"{np.sqrt(changed / whole):.2%} in 'block'" in outcome.notes[0]


def test_bytes_are_those_that_the_kernel_reads() -> None:
    model = routed_model(SHAPE, opset=21)
    QuantizeExperts()(model)
    [block] = blocks(model)
    weight = Quantized.of(block.weights["fc2"])
    assert weight is not None
    stored = weight.data.tobytes()
    FuseGating()(model)
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    data = [node.inputs[1].const_value for node in products if node.attributes["K"].as_int() == SHAPE.inner]
    assert b"".join(tensor.tobytes() for tensor in data) == stored
    assert all(node.inputs[3] is None for node in products), "the operator's own zero points"


@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_keeps_its_type(bits: int) -> None:
    shape = Shape(experts=4, hidden=64, inner=96, dtype="float16", weight_dtype="float16")
    model = routed_model(shape, opset=21)
    after, _ = check_rewrite(model, QuantizeExperts(bits=bits, **EXACT), rewritten=1)
    lowered, _ = check_rewrite(after, FuseGating(), rewritten=1, feeds=[feeds(shape)], tolerance=4e-3)
    scales = [node.inputs[2].dtype for node in lowered.graph if node.op_type == "MatMulNBits"]
    assert set(scales) == {ir.DataType.FLOAT16}


def test_older_models_become_opset_21() -> None:
    model = layered_model(Shape(experts=4, hidden=32, inner=32), opset=18)
    x = {"x": np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)}
    after, _ = check_rewrite(model, QuantizeExperts(bits=8), rewritten=2)
    assert after.opset_imports[""] == 21 and after.ir_version >= 10
    assert_close(run_model(model, x)[0], run_model(after, x)[0], 0.05)


def test_models_that_cannot_are_refused() -> None:
    def edit(proto) -> None:
        graph = proto.graph
        nodes = [
            helper.make_node("Unsqueeze", ["y", "axes"], ["image"], name="image"),
            helper.make_node("GroupNormalization", ["image", "one", "one"], ["z"], name="norm", num_groups=1),
        ]
        graph.node.extend(nodes)
        graph.initializer.append(helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]))
        graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1], [1]))
        graph.output[0].name = "z"
        graph.output[0].type.tensor_type.shape.Clear()
        for size in (None, 1, 1, SHAPE.hidden):
            graph.output[0].type.tensor_type.shape.dim.add(dim_value=size) if size else None

    model = edited(routed_model(SHAPE, opset=20), edit)
    outcome = QuantizeExperts()(model)
    assert not outcome.modified and "GroupNormalization" in outcome.refusals[0].reason
    assert model.opset_imports[""] == 20


def test_blocks_that_divide_are_preferred() -> None:
    model = routed_model(Shape(hidden=96, inner=48), opset=21)
    QuantizeExperts(block=256)(model)
    [block] = blocks(model)
    assert {Quantized.of(block.weights[role]).block for role in block.spec.roles} == {16}


def test_activations_are_marked() -> None:
    model = routed_model(SHAPE, opset=21)
    outcome = QuantizeExperts()(model)
    [block] = blocks(model)
    assert block.node.metadata_props[ACTIVATIONS_KEY] == "int8" and "round activations" in outcome.notes[0]


def test_inside_a_branch() -> None:
    """The weights lie in the graph around it, and so do the integers."""
    model = in_a_branch()
    after, _ = check_rewrite(model, QuantizeExperts(**EXACT), rewritten=1)
    assert [node.op_type for node in after.graph][:2] == ["DequantizeLinear"] * 2
    inputs = {**feeds(Shape()), "use": np.asarray(True)}
    _is_close_to(model, after, inputs, 4)
    lowered, _ = check_rewrite(after, FuseGating(), rewritten=1, feeds=[inputs])
    assert {name.rpartition(".")[2] for name in lowered.graph.initializers if "fc1" in name} >= {"scale"}


def test_two_blocks_share_integers() -> None:
    def edit(proto) -> None:
        again = proto.graph.node.add()
        again.CopyFrom(proto.graph.node[0])
        again.name, again.input[0], again.output[0] = "again", "y", "z"
        again.metadata_props[0].value = "again"
        proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", SHAPE.hidden]))

    model = edited(routed_model(SHAPE, opset=21), edit)
    after, _ = check_rewrite(model, QuantizeExperts(**EXACT), rewritten=2)
    assert [node.op_type for node in after.graph].count("DequantizeLinear") == 2
    check_rewrite(after, FuseGating(), rewritten=2, feeds=[feeds(SHAPE)])


def test_weights_that_others_read_stay() -> None:
    model = routed_model(SHAPE, opset=21)
    model.graph.outputs.append(model.graph.initializers["fc2"])
    after, _ = check_rewrite(model, QuantizeExperts(), rewritten=1)
    assert "fc2" in after.graph.initializers and "fc1" not in after.graph.initializers


def test_refused() -> None:
    model = routed_model(SHAPE, opset=21)
    QuantizeExperts()(model)
    check_rewrite(model, QuantizeExperts(bits=8), rewritten=0, refused=["fc1 is quantized already"])
    model = routed_model(Shape(dtype="bfloat16", weight_dtype="bfloat16"), opset=21)
    check_rewrite(model, QuantizeExperts(), rewritten=0, refused=["fc1 is bfloat16"])
    model = routed_model(Shape(hidden=7, inner=8, gate_layout=0), opset=21)
    check_rewrite(
        model, QuantizeExperts(), rewritten=0, refused=["rows of 7 inputs do not end on whole bytes"]
    )
    model = routed_model(SHAPE, opset=21)
    model.graph.inputs.append(model.graph.initializers["fc1"])
    check_rewrite(model, QuantizeExperts(), rewritten=0, refused=["fc1 is computed or passed in"])


def test_experts_of_other_bodies_are_refused() -> None:
    model, _ = outlined(dense_model(lambda graph, x, expert: graph.op("MatMul", x, graph.weight(16, 16))))
    outcome = QuantizeExperts()(model)
    assert not outcome.modified and outcome.matched == 1
    assert "no networks of two layers" in outcome.refusals[0].reason


def test_one_of_two_blocks_is_refused() -> None:
    model = layered_model(SHAPE, opset=21)
    model.graph.outputs.append(model.graph.initializers["layers.1.fc2"])
    model.graph.inputs.append(model.graph.initializers["layers.0.fc1"])
    check_rewrite(
        model, QuantizeExperts(), rewritten=1, refused=["block 'layers.0.experts': fc1 is computed"]
    )


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"block": 8}, {"block": 48}, {"block": 512}, {"activations": "int4"}]
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(UsageError, match="quantize_experts"):
        QuantizeExperts(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_end_it(value: float) -> None:
    model = routed_model(SHAPE, opset=21)
    array = model.graph.initializers["fc2"].const_value.numpy().copy()
    array[2, 5, 7] = value
    model.graph.initializers["fc2"].const_value = ir.Tensor(array, name="fc2")
    with pytest.raises(ModelError, match="expert 2 cannot be quantized: its weights are not all finite"):
        QuantizeExperts()(model)


def _saved(tmp_path: Path, source: ir.Model, name: str, lower: bool) -> bytes:
    model = clone(source)
    QuantizeExperts(symmetric=False)(model)
    if lower:
        FuseGating()(model)
    saved = io.save(model, tmp_path / name)
    assert saved.data_path is not None
    return saved.data_path.read_bytes() + saved.path.read_bytes().replace(saved.data_path.name.encode(), b"")


@pytest.mark.parametrize("lower", [False, True])
def test_each_expert_is_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lower: bool) -> None:
    """In memory, in a file, and where no file can be written: the same bytes, and work only the last one repeats."""
    source, calls = routed_model(Shape(experts=5, hidden=64, inner=96), opset=21), []
    real = integer_weights.quantize
    monkeypatch.setattr(integer_weights, "quantize", lambda *given: calls.append(0) or real(*given))
    expected = _saved(tmp_path, source, "a.onnx", lower)
    assert len(calls) == 10
    monkeypatch.setattr(integer_weights, "_IN_MEMORY", 20_000)
    assert _saved(tmp_path, source, "b.onnx", lower) == expected and len(calls) == 20

    def no_space(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(integer_weights.tempfile, "TemporaryFile", no_space)
    assert _saved(tmp_path, source, "c.onnx", lower) == expected and len(calls) > 30


def test_stored_apart_and_external(tmp_path: Path) -> None:
    """Experts that lie in separate tensors of a file are read one by one, and give the same bytes."""
    model = io.load(save_external(routed_model(SHAPE, opset=21), tmp_path / "m.onnx"))
    expected = clone(routed_model(SHAPE, opset=21))
    whole = model.graph.initializers["fc1"].const_value
    assert isinstance(whole, ir.ExternalTensor)
    parts = [ir.Tensor(part.copy(), name="part") for part in whole.numpy()]
    model.graph.initializers["fc1"].const_value = stack(parts, "fc1")
    for each in (model, expected):
        QuantizeExperts()(each)
    for name in ("fc1.codes", "fc2.codes", "fc1.scale", "fc2.point"):
        ours, theirs = (each.graph.initializers[name].const_value for each in (model, expected))
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    ("sizes", "limit_mb"),
    [
        pytest.param((32, 8, 1024, 768, 2), 400, id="600MB"),
        pytest.param((64, 8, 2048, 768, 4), 700, id="5GB", marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(tmp_path: Path, sizes: tuple[int, ...], limit_mb: int) -> None:
    """Quantized, lowered, verified and written: ORT packs and maps one block, and does not hold the others."""
    script = Path(__file__).with_name("quantize_large.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *map(str, sizes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["weight_bytes"] > 1.4e6 * limit_mb
    assert result["output_bytes"] < 0.17 * result["weight_bytes"]
    assert result["peak_mb"] - result["baseline_mb"] < limit_mb
    assert result["method"] == "blocks" and result["passed"]

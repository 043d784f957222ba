"""QMoE with the attributes, grid and layout that onnxruntime-genai's builder gives it, on small layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench import contestants, layers, peers  # noqa: E402
from sparse_onnx.bench.peers import genai  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K = 256, 512, 8, 4


def build() -> layers.SparseLayers:
    return layers.qwen3_layers(hidden=HIDDEN, inner=INNER, experts=EXPERTS, top_k=TOP_K, layers=1)


@pytest.fixture(scope="module")
def built() -> layers.SparseLayers:
    return build()


@pytest.mark.parametrize("bits", [4, 8])
def test_qmoe_is_what_the_builder_writes(built: layers.SparseLayers, bits: int, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    genai.build_qmoe(built, path, bits)
    model = onnx.load(path)
    nodes = {node.op_type: node for node in model.graph.node}
    assert list(nodes) == ["MatMul", "QMoE", "Add"]
    written = {item.name: onnx.helper.get_attribute_value(item) for item in nodes["QMoE"].attribute}
    assert written == {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": b"swiglu",
        "block_size": 32,
        "expert_weight_bits": bits,
        "k": TOP_K,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "use_sparse_mixer": 0,
    }
    kept = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    inputs = [kept.get(name) for name in nodes["QMoE"].input]
    assert len(inputs) == 8
    _, _, fc1, fc1_scales, fc1_bias, fc2, fc2_scales, fc2_bias = inputs
    for bias, size in ((fc1_bias, 2 * INNER), (fc2_bias, HIDDEN)):
        np.testing.assert_array_equal(bias, np.zeros((EXPERTS, size), np.float32))
    experts = built.parts[0].experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    for expected, data, scales in (
        (torch.stack((gate, up), dim=2).flatten(1, 2).numpy(), fc1, fc1_scales),
        (experts.down_proj.detach().numpy(), fc2, fc2_scales),
    ):
        assert data.dtype == np.uint8 and scales.dtype == np.float32
        np.testing.assert_array_equal(scales, scales.astype(np.float16))
        # Half a step everywhere: a grid of another sign or without the sign of its scales is off by a whole one.
        step = np.abs(scales).repeat(32, axis=-1)
        assert (
            np.abs(numbers(data, scales, bits) - expected) < 0.51 * step + 0.01 * np.abs(expected)
        ).mean() > 0.98


@pytest.mark.parametrize(("bits", "bound"), [(4, 1e-2), (8, 0.03)])
def test_qmoe_computes_with_the_rounded_weights(
    built: layers.SparseLayers, bits: int, bound: float, tmp_path: Path
) -> None:
    rounded = build()
    experts = rounded.parts[0].experts
    for weights in (experts.gate_up_proj, experts.down_proj):
        (_, data), (_, scales) = genai.quantized(weights, bits)
        weights.copy_(torch.from_numpy(numbers(data, scales, bits)))
    path = tmp_path / "q.onnx"
    genai.build_qmoe(built, path, bits)
    session = contestants.create(path, 1)
    for tokens in (1, 9):
        x = np.random.default_rng(tokens).standard_normal((tokens, HIDDEN), dtype=np.float32)
        actual = session.run(None, {"hidden_states": x})[0]
        assert peers.largest_error(x, rounded(torch.from_numpy(x)).numpy(), actual) < bound


def test_rows_of_part_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="48 inputs are not whole blocks of 32"):
        genai.quantized(torch.ones(2, 4, 48), 4)


def numbers(data: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """``[E, N, K]`` of bytes and scales: two numbers a byte, the first in the low half; half of the range is zero."""
    if bits == 4:
        data = np.stack((data & 15, data >> 4), axis=-1).reshape(*data.shape[:-1], -1)
    return (data.astype(np.float32) - (1 << (bits - 1))) * scales.repeat(32, axis=-1)

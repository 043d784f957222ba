"""models/byte_moe.safetensors: the weights that ship."""

import pytest
import torch

from sparse_onnx.models import byte_moe, train_byte_moe
from sparse_onnx.models.corpus import corpus_sha256, held_out_text


@pytest.fixture(scope="module")
def shipped():
    return byte_moe.read(byte_moe.WEIGHTS)


@pytest.fixture(scope="module")
def comparable(shipped):
    if shipped[1]["corpus_sha256"] != corpus_sha256():
        pytest.skip(f"this Python's documentation differs from that of {shipped[1]['python']}")


def test_they_are_small_enough_to_ship():
    assert byte_moe.WEIGHTS.stat().st_size <= 8_000_000


def test_held_out_quality_is_what_the_file_says(shipped, comparable):
    model, metadata = shipped
    found = train_byte_moe.evaluate(model, held_out_text())
    assert found == pytest.approx(metadata["held_out_bits_per_byte"], abs=1e-3)


def test_they_learned_something(shipped):
    assert train_byte_moe.evaluate(shipped[0], held_out_text()[:8192]) < 2.0  # on any Python's text


def test_they_are_the_scripts_defaults(shipped):
    metadata = shipped[1]
    defaults = {option.name: option.default for option in train_byte_moe.main.params}
    assert {name: metadata[name] for name in ("steps", "seed", "threads")} == {
        name: defaults[name] for name in ("steps", "seed", "threads")
    }


def test_every_layer_uses_all_experts_and_has_margins(shipped):
    for layer in train_byte_moe.routing_on(shipped[0], held_out_text()):
        assert min(layer.load) > 0.25 / len(layer.load), layer.load
        assert layer.margin_p1 > 1e-3 and layer.margin_p10 > 1e-2


@torch.no_grad()
def test_swapping_two_experts_changes_the_logits(shipped):
    """Comparisons with this model notice a wrong expert."""
    model, _ = shipped
    ids = train_byte_moe.to_ids(held_out_text()[:256])[None]
    expected = model(ids)
    for layer in model.layers:
        for tensor in (layer.moe.experts.gate_up_proj, layer.moe.experts.down_proj):
            original = tensor.clone()
            tensor[[0, 1]] = tensor[[1, 0]]
            difference = (model(ids) - expected).abs().max()
            tensor.copy_(original)
            assert difference > 0.1
    torch.testing.assert_close(model(ids), expected)

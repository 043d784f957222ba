"""Rotary embeddings whose frequencies depend on the length of the sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from sparse_onnx.export import patches, rotary


def embedding(kind: str) -> MixtralRotaryEmbedding:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 3.0}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 16}
    return MixtralRotaryEmbedding(MixtralConfig(**sizes, rope_parameters=rope))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 300])
def test_dynamic_is_what_a_new_model_does(length: int) -> None:
    x, positions = torch.zeros(1, length, 64), torch.arange(length)[None]
    module, expected = embedding("dynamic"), embedding("dynamic")(x, positions)
    with patches.replaced(module) as names:
        assert names == ["MixtralRotaryEmbedding"]
        actual = module(x, positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if length > 16 else 0)
    torch.testing.assert_close(module.inv_freq, embedding("dynamic").inv_freq, rtol=0, atol=0)


def test_one_trace_holds_for_short_and_long() -> None:
    """The frequencies of a long sequence do not stay, either."""
    module = embedding("dynamic")
    free = {1: torch.export.Dim.DYNAMIC}
    sample = (torch.zeros(1, 5, 64), torch.arange(5)[None])
    with patches.replaced(module):
        exported = torch.export.export(module, sample, dynamic_shapes={"args": (free, free)}, strict=False)
    for length in (40, 20, 7, 33):
        given = (torch.zeros(1, length, 64), torch.arange(length)[None])
        torch.testing.assert_close(exported.module()(*given), embedding("dynamic")(*given), rtol=0, atol=1e-4)


def test_which_are_dynamic() -> None:
    assert rotary.is_dynamic(embedding("dynamic"))
    assert not rotary.is_dynamic(embedding("linear")) and not rotary.is_dynamic(torch.nn.Linear(1, 1))
    by_layer = SimpleNamespace(original_max_seq_len=1, rope_type={"full": "default", "sliding": "dynamic"})
    assert rotary.is_dynamic(by_layer)  # type: ignore[arg-type]

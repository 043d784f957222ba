"""GRU, LSTM and RNN layers keep their sequence axis dynamic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import sparse_onnx
from sparse_onnx.export import recurrent_layers

LAYERS: dict[str, nn.Module] = {
    "GRU": nn.GRU(8, 5, batch_first=True),
    "GRU of both directions, two layers, no bias": nn.GRU(
        8, 5, 2, bias=False, batch_first=True, bidirectional=True
    ),
    "LSTM": nn.LSTM(8, 5, 2, batch_first=True, dropout=0.5, bidirectional=True).eval(),
    "RNN": nn.RNN(8, 5, batch_first=True),
    "RNN with relu": nn.RNN(8, 5, nonlinearity="relu", batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_same_in_torch(name: str) -> None:
    layer, x = LAYERS[name], torch.randn(3, 7, 8)
    with torch.no_grad():
        expected = layer(x)
        later = layer(x, expected[1])
        with recurrent_layers.replaced():
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x, expected[1]), later)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(8, 5, proj_size=3, batch_first=True), nn.GRU(8, 5, 2, dropout=0.5)],
    ids=["projected", "dropout"],
)
def test_others_are_torchs(layer: nn.Module) -> None:
    x = torch.randn(3, 7, 8)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    with recurrent_layers.replaced():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_are_torchs(name: str) -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 8), torch.tensor([5, 3]), batch_first=True)
    expected = LAYERS[name](packed)
    with recurrent_layers.replaced():
        torch.testing.assert_close(LAYERS[name](packed)[0].data, expected[0].data)


class Experts(nn.Module):
    """A gate for the whole sequence, recurrent experts, and one layer that gives its states."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, len(LAYERS)), nn.ModuleList(LAYERS.values())
        self.heads = nn.ModuleList([nn.Linear(5 * (1 + layer.bidirectional), 8) for layer in self.experts])

    def forward(self, x: Tensor) -> Any:
        weights, index = self.gate(x.mean(1)).topk(2, -1)
        weights = torch.zeros(x.shape[0], len(LAYERS)).scatter(1, index, weights.softmax(-1))
        results = [head(expert(x)[0]) for head, expert in zip(self.heads, self.experts, strict=True)]
        mixed = sum(weights[:, e, None, None] * each for e, each in enumerate(results))
        return mixed, *self.experts[2](mixed)[1]


def test_exported(tmp_path: Path) -> None:
    source = (Experts().eval(), {"x": torch.randn(2, 7, 8)}, {"x": {0: "batch", 1: "sequence"}})
    report = sparse_onnx.export(source, tmp_path / "m.onnx")
    assert report.verify is not None and report.verify.passed
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert (kinds.count("GRU"), kinds.count("LSTM"), kinds.count("RNN")) == (5, 8, 2)

"""Conditions on numbers that wrap, or that are no integers: neither says that all of a tensor is zero."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

HIDDEN = 8


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def counts(self, x: Tensor) -> Tensor:
        return F.one_hot((x[:, 0] > 0).long(), 2).sum(0)


class Narrow(Counted):
    """156 counted in eight bits is -100."""

    def forward(self, x: Tensor) -> Tensor:
        counts, out = self.counts(x).to(torch.int8), torch.zeros_like(x)
        for i in range(2):
            if counts.sum() == 0:
                continue
            rows = torch.nonzero(counts[i].expand(x.shape[0]).float())[:, 0]
            out.index_add_(0, rows, self.linear(x[rows]))
        return out


class Unsigned(Counted):
    """200 without a sign is -56 with one."""

    def forward(self, x: Tensor) -> Tensor:
        counts, out = self.counts(x).to(torch.uint8).to(torch.int8), self.linear(x)
        if counts[1] > 0:
            out.add_(counts[1])
        return out


class NarrowSumOfCounts(Counted):
    """156 + 100 is 0 in eight bits."""

    def forward(self, x: Tensor) -> Tensor:
        counts, out = self.counts(x), self.linear(x)
        if counts.sum(dtype=torch.int8) != 0:
            out.add_(counts.sum())
        return out


class AboveAFraction(Counted):
    def forward(self, x: Tensor) -> Tensor:
        shares, out = x[:, :1].relu() * 0.1, self.linear(x)
        if shares.sum().item() > 0.7:
            out.add_(shares)
        return out


class AboveZero(Counted):
    def forward(self, x: Tensor) -> Tensor:
        shares, out = x[:, :1].relu(), self.linear(x)
        if shares.sum().item() > 0:
            out.add_(shares)
        return out


def inputs() -> list[Tensor]:
    """156 and 200 positive first numbers of 256, few of them, small ones and none."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(256, HIDDEN, generator=generator) for _ in range(4)]
    for x, positive in zip(drawn, (156, 200, 5, 0), strict=True):
        x[:, 0] = -1
        x[:positive, 0] = 1
    return [*drawn, drawn[2][:8] * 0.3, drawn[3][:3]]


@pytest.mark.parametrize("kind", [Narrow, Unsigned, NarrowSumOfCounts, AboveAFraction, AboveZero])
def test_right_or_refused(kind: type, tmp_path: Path) -> None:
    """How far torch gets with these may change; wrong they never are."""
    torch.manual_seed(3)
    module = kind().eval()
    try:
        sparse_onnx.export((module, {"x": inputs()[-2]}, {"x": {0: "tokens"}}), tmp_path / "out.onnx")
    except ImpossibleError:
        assert not (tmp_path / "out.onnx").exists()
        return
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    for x in inputs():
        with torch.no_grad():
            expected = module(x)
        actual = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

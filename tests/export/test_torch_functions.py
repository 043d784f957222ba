"""Functions that torch's exporters cannot follow give what torch gives, and are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_onnx
from sparse_onnx.export import torch_functions

Function = Callable[[Tensor], Any]
CASES: dict[str, Function] = {
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "take_along_dim broadcast": lambda x: x.take_along_dim(x[:1, :1].argsort(-1), dim=-1),
    "take_along_dim flat": lambda x: torch.take_along_dim(x, (x > 0).long().flatten()),
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "masked_select broadcast": lambda x: x.masked_select(x[:, :1] > 0),
    "var_mean": lambda x: torch.var_mean(x),
    "var_mean dim": lambda x: torch.var_mean(x, -1, keepdim=True),
    "var_mean correction": lambda x: torch.var_mean(x, dim=(1, 2), correction=0),
    "var_mean biased": lambda x: torch.var_mean(x, False),
    "kthvalue": lambda x: x.kthvalue(3, -1),
    "kthvalue kept": lambda x: torch.kthvalue(x, 1, dim=1, keepdim=True).values,
    "median": lambda x: x.median(),
    "median dim": lambda x: torch.median(x, dim=-1).values,
    "cumprod": lambda x: torch.cumprod(x, dim=-1),
    "cumprod integers": lambda x: (x[..., :4] * 3).int().cumprod(-1),
    "isin": lambda x: torch.isin((x * 3).long(), torch.tensor([1, 2, 5])),
    "isin inverted": lambda x: torch.isin((x * 3).long(), torch.tensor([[1], [0]]), invert=True),
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5]), x.contiguous()),
    "searchsorted right": lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0]), x.round(), right=True),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x + 1),
    "scaled_dot_product_attention causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "scaled_dot_product_attention masked": lambda x: F.scaled_dot_product_attention(
        x, x, x, (x[:, :, :1] > 0) == (x[:, :, 0] > 0)[:, None]
    ),
    "scaled_dot_product_attention added": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=x[0, :, :1] * x[0, :, 0]
    ),
    "cdist": lambda x: torch.cdist(x, x[:, :1] + 5),
}


@pytest.mark.parametrize("name", CASES)
def test_same(name: str) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    function = name.split()[0]
    owner = torch if hasattr(torch, function) else F
    expected, before = CASES[name](x), getattr(owner, function)
    with torch_functions.replaced():
        actual = CASES[name](x)
        assert getattr(owner, function) is not before
    assert getattr(owner, function) is before
    assert type(actual) is type(expected) or isinstance(actual, tuple)
    torch.testing.assert_close(actual, expected)


class Module(nn.Module):
    def __init__(self, *functions: Function) -> None:
        super().__init__()
        self.functions = functions
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(function(x * self.scale) for function in self.functions)


def test_exported(tmp_path: Path) -> None:
    """All of them in one model: outputs are scalars, vectors of unknown length and pairs."""
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    biased = [f for name, f in CASES.items() if name != "var_mean dim"]
    module = Module(*biased).eval()
    report = sparse_onnx.export((module, {"x": x}, {"x": {0: "batch", 1: "sequence"}}), tmp_path / "m.onnx")
    assert report.verify is not None and report.verify.passed


def test_scalar_output(tmp_path: Path) -> None:
    """A loss that a module returns beside its result, say."""
    module = Module(lambda x: x, lambda x: x.square().mean()).eval()
    x = torch.randn(2, 7, 8)
    report = sparse_onnx.export((module, {"x": x}, {"x": {0: "batch", 1: "sequence"}}), tmp_path / "m.onnx")
    assert report.verify is not None and report.verify.passed


def test_a_share_of_a_size_times_a_tensor(tmp_path: Path) -> None:
    """Python computes 1 / size in double precision, and the product is of the tensor's type: Sinkhorn's steps."""
    module = Module(
        lambda x: (1 / x.size(1)) * 1 / (x.square().sum(1) + 9), lambda x: x > 1 / x.size(0)
    ).eval()
    x = torch.randn(2, 7, 8)
    report = sparse_onnx.export((module, {"x": x}, {"x": {0: "batch", 1: "sequence"}}), tmp_path / "m.onnx")
    assert report.verify is not None and report.verify.passed

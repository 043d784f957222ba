"""Tensors in parts of open length, and lists of tensors, which ONNX does not define for bfloat16."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export.operator_types import cast_where_undefined  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class Chunks(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        first, second, third = torch.chunk(torch.cat([y, 2 * y, y + 1]), 3)
        left, right = torch.chunk(torch.cat([y[:-1], y]), 2)  # of lengths that differ
        return first * second - third + left.sum(0) * right.mean(0)


class Parts(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        first, last = torch.cat([y, y[1:]]).split(y.shape[0])
        return first * last.sum(0)


class Stacks(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        rows = torch.vstack([y, y[0], 3 * y])
        return rows.sum(0) + torch.hstack([y[:, :3], y[:, 3:]]) * torch.hstack([y[0, 5:], y[0, :5]])


def exported(module: nn.Module, place: Path, dtype: str | None) -> set[str]:
    """The operators of the file, which agrees with torch at other numbers of rows."""
    torch.manual_seed(0)
    out = place / "model.onnx"
    example = {"x": torch.randn(6, 8)}
    report = sparse_onnx.export((module.eval(), example, {"x": {0: "rows"}}), out, dtype=dtype)
    assert report.verify is not None and report.verify.passed
    return {node.op_type for node in io.load(out).graph.all_nodes()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("module", [Chunks, Parts, Stacks])
def test_they_need_no_lists(module: type[nn.Module], dtype: str | None, tmp_path: Path) -> None:
    kinds = exported(module(), tmp_path, dtype)
    assert not any("Sequence" in kind for kind in kinds)
    assert ("Split" in kinds) is (module is not Stacks)


TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g ({kind}[T,6] x, int64 i) => ({kind}[a,b] y) {{
    parts = SplitToSequence <axis = 0> (x)
    y = SequenceAt (parts, i)
}}"""


def test_a_list_of_bfloat16_is_refused() -> None:
    with pytest.raises(ImpossibleError, match=r"list of bfloat16 tensors \(SplitToSequence\)"):
        cast_where_undefined(ir.from_onnx_text(TEXT.format(kind="bfloat16")))
    assert cast_where_undefined(ir.from_onnx_text(TEXT.format(kind="float16"))) == 0

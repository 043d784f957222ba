"""Operators with a type of their own are computed in it, as torch does, not cast afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.export import sixteen  # noqa: E402
from sparse_onnx.export.samples import Run  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402
from sparse_onnx.graph.annotate import annotate  # noqa: E402

OPERATORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "softmax": ("Softmax", lambda x: torch.softmax(x, -1, dtype=torch.float32)),
    "functional": ("Softmax", lambda x: nn.functional.softmax(x, dim=-1, dtype=torch.float32)),
    "special": ("Softmax", lambda x: torch.special.softmax(x, 1, dtype=torch.float32)),
    "log": ("LogSoftmax", lambda x: torch.log_softmax(x, -1, dtype=torch.float32)),
    "special log": ("LogSoftmax", lambda x: torch.special.log_softmax(x, -1, dtype=torch.float32)),
    "mean": ("ReduceMean", lambda x: x.mean(-1, dtype=torch.float32)),
    "sum of an axis": ("ReduceSum", lambda x: x.sum(-1, keepdim=True, dtype=torch.float32)),
    "sum": ("ReduceSum", lambda x: x.sum(dtype=torch.float32)),
}


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale)


@pytest.mark.parametrize("name", OPERATORS)
def test_they_are_computed_in_their_type(name: str, tmp_path: Path) -> None:
    operator, function = OPERATORS[name]
    module, out = Model(function).eval(), tmp_path / "m.onnx"
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half()
    sparse_onnx.export((module, {"x": x}, {"x": {0: "batch"}}), out, dtype="float16")
    model = io.load(out)
    annotate(model)
    (node,) = [each for each in model.graph if each.op_type == operator]
    assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT
    assert node.outputs[0].dtype == ir.DataType.FLOAT
    run = Run(
        "5x8", {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).half()}, {"batch": 5}
    )
    (actual,) = sixteen.answers(sixteen.rounding_session(out), run)
    torch.testing.assert_close(
        torch.from_numpy(actual).squeeze(), function(run.inputs["x"]).squeeze(), rtol=1e-6, atol=1e-6
    )


def test_without_a_type_they_stay_in_the_models(tmp_path: Path) -> None:
    module, out = Model(lambda x: torch.softmax(x, -1)).eval(), tmp_path / "m.onnx"
    sparse_onnx.export((module, {"x": torch.randn(3, 8)}, {"x": {0: "batch"}}), out, dtype="float16")
    model = io.load(out)
    annotate(model)
    (node,) = [each for each in model.graph if each.op_type == "Softmax"]
    assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16

"""Operators that ONNX does not define for a type are exported in another, and answer the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.export import rounded  # noqa: E402
from sparse_onnx.export.operator_types import cast_where_undefined  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402
from sparse_onnx.graph.annotate import annotate  # noqa: E402
from sparse_onnx.targets import session as sessions  # noqa: E402

TEXT = """<ir_version: 10, opset_import: ["" : {opset}]>
g ({kind}[T,6] x, bool c) => ({kind}[T,2] v, int64[T,2] i, {kind}[T,6] z) {{
    two = Constant <value = int64[1] {{2}}> ()
    v, i = TopK (x, two)
    waves = Cos (x)
    z = If (c) < then_branch = t () => (a) {{ a = Softplus (waves) }},
                 else_branch = e () => (b) {{ b = Add (waves, x) }} >
}}"""


def graph(kind: str, opset: int) -> ir.Model:
    return ir.from_onnx_text(TEXT.format(kind=kind, opset=opset))


def refusal(model: ir.Model) -> str:
    """What onnxruntime says to the file: that it is invalid, or only that it has no kernel."""
    try:
        onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        return str(error)
    return ""


def test_a_file_of_bfloat16_is_valid_afterwards_and_the_same() -> None:
    model = graph("bfloat16", 20)
    assert "is invalid" in refusal(model)
    assert cast_where_undefined(model) == 3
    assert "is invalid" not in refusal(model) and "NOT_IMPLEMENTED" in refusal(model)
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("v", ir.DataType.BFLOAT16),
        ("i", ir.DataType.INT64),
        ("z", ir.DataType.BFLOAT16),
    ]
    assert cast_where_undefined(model) == 0
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    session = sessions.create_session(rounded.rounding_graph(model))
    for condition in (True, False):
        values, index, answer = sessions.run(session, {"x": x.float().numpy(), "c": np.array(condition)})
        expected = x.topk(2)
        np.testing.assert_array_equal(values, expected.values.float().numpy())
        np.testing.assert_array_equal(index, expected.indices.numpy())
        waves = torch.cos(x)
        right = nn.functional.softplus(waves) if condition else waves + x
        np.testing.assert_allclose(answer, right.float().numpy(), rtol=2**-7)


@pytest.mark.parametrize(("kind", "opset"), [("float16", 20), ("float", 20), ("bfloat16", 24)])
def test_types_that_an_operator_takes_stay(kind: str, opset: int) -> None:
    model = graph(kind, opset)
    before = [node.op_type for node in model.graph.all_nodes()]
    assert cast_where_undefined(model) == 0
    assert [node.op_type for node in model.graph.all_nodes()] == before


class Router(nn.Module):
    """Chooses in the model's own type."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.rows = nn.Linear(8, 12), nn.Parameter(torch.randn(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = torch.softmax(self.gate(x), dim=-1).topk(3, dim=-1)
        return (weight.unsqueeze(-1) * self.rows[index]).sum(1) + torch.cos(x)


def test_an_export_in_bfloat16_is_valid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = tmp_path / "m.onnx"
    sparse_onnx.export(
        (Router().eval(), {"x": torch.randn(3, 8)}, {"x": {0: "batch"}}), out, dtype="bfloat16"
    )
    model = io.load(out)
    annotate(model)
    kinds = {node.op_type: node.inputs[0].dtype for node in model.graph if node.inputs and node.inputs[0]}
    assert kinds["TopK"] == kinds["Cos"] == ir.DataType.FLOAT
    assert kinds["Gemm"] == kinds["Softmax"] == ir.DataType.BFLOAT16
    assert "is invalid" not in refusal(model)


class Rounded(nn.Module):
    """A model in float32 that chooses among scores of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = self.gate(x).to(torch.bfloat16).topk(2, dim=-1)
        return values.float(), index


def test_a_model_in_float32_that_rounds_is_valid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = tmp_path / "m.onnx"
    report = sparse_onnx.export((Rounded().eval(), {"x": torch.randn(3, 8)}, {"x": {0: "batch"}}), out)
    assert report.verify is not None and report.verify.passed
    model = io.load(out)
    annotate(model)
    (node,) = [each for each in model.graph if each.op_type == "TopK"]
    assert node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT

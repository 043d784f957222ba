"""How files in 16 bits are judged: by torch's own error in that type, and by the types that routers choose in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from sparse_onnx.bench.coverage import cases, exporters, half_page, measure, scoring  # noqa: E402
from sparse_onnx.bench.coverage.cases import Case, Made  # noqa: E402
from sparse_onnx.export import rounded  # noqa: E402
from sparse_onnx.targets import session as sessions  # noqa: E402

AXES = {"x": {0: "batch"}}


class Layers(nn.Module):
    def __init__(self, **spoilt: bool) -> None:
        super().__init__()
        self.spoilt = spoilt
        self.first, self.second, self.router = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 6)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.tanh(self.first(x)))
        if "off" in self.spoilt:
            y = y * 1.1
        if "off when many" in self.spoilt:
            y = y + 0.1 * x[13:].sum()
        if "coarse" in self.spoilt:  # of which a graph in float32 knows nothing
            y = (y + 100.0) - 100.0
        if "overflowing" in self.spoilt:
            y = y * 60000.0 * 60000.0 / 60000.0 / 60000.0
        kind = x.dtype if "narrow router" in self.spoilt else torch.float32
        logits = nn.functional.linear(x.to(kind), self.router.weight.to(kind))
        return y + 0.01 * logits.topk(2).values.sum(-1, keepdim=True).to(y.dtype)


def made(module: nn.Module, kind: str) -> Made:
    return Made((module.eval(), {"x": torch.randn(3, 32)}, AXES), {"dtype": kind})


def judged(kind: str, monkeypatch: pytest.MonkeyPatch, **spoilt: bool) -> measure.Cell:
    """Of a file of this module, and torch's unspoilt one."""

    def export(_: Made, path: Path) -> exporters.Exported:
        return exporters.torch_onnx(made(Layers(**spoilt), kind), path)

    monkeypatch.setitem(exporters.EXPORTERS, "ours", export)
    return measure.measure(Case("layers", "Layers", lambda folder: made(Layers(), kind)), "ours")


@pytest.mark.parametrize(
    ("kind", "outcome"), [("float16", measure.FALLBACK), ("bfloat16", measure.NO_KERNEL)]
)
def test_a_right_file(kind: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = judged(kind, monkeypatch)
    assert cell.outcome == outcome, cell
    assert cell.error is not None and cell.rounding is not None and 0 < cell.error < 2 * cell.rounding < 0.05
    assert ("kernel for" in cell.reason) is (kind == "bfloat16")


@pytest.mark.parametrize(
    ("kind", "spoilt", "reason"),
    [
        ("float16", "off", "its graph in float32 is off"),
        ("bfloat16", "off", "its graph in float32 is off"),
        ("float16", "off when many", "at 33: its graph in float32 is off"),
        ("bfloat16", "off when many", "at 33: its graph in float32 is off"),
        ("float16", "coarse", "in the median token"),
        ("float16", "overflowing", "off by inf in the median token"),
        ("float16", "narrow router", "1 float32 topk of float32 products, and the file by 1 float16 topk"),
        ("bfloat16", "narrow router", "1 float32 topk of float32 products, and the file by 1 bfloat16 topk"),
    ],
)
def test_wrong_files(kind: str, spoilt: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = judged(kind, monkeypatch, **{spoilt: True})
    assert cell.outcome == measure.WRONG and reason in cell.reason, cell


def test_what_a_mask_is_computed_from_is_no_score() -> None:
    """The mask comes first among Where's inputs, and is computed from a product in float16."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 20]>
        g (float16[T, 8] h, float[T, 8] x, float16[8, 8] a, float[8, 8] b) => (float[T, 2] values, int64[T, 2] chosen)
        <int64[1] two = {2}, float16 nothing = {0}, float least = {-9}>
        {
            narrow = MatMul (h, a)
            kept = Greater (narrow, nothing)
            wide = MatMul (x, b)
            scores = Where (kept, wide, least)
            values, chosen = TopK (scores, two)
        }
    """)
    assert scoring.in_file(model) == scoring.Choices({("topk", "float32", "float32"): 1})


def test_a_router_whose_product_alone_is_narrow_is_another() -> None:
    wide, narrow = ("topk", "float32", "float32"), ("topk", "float32", "float16")
    assert scoring.differing(scoring.Choices({wide: 2}), scoring.Choices({wide: 2})) == ""
    assert scoring.differing(scoring.Choices({wide: 2}), scoring.Choices({wide: 1, narrow: 1}))
    assert scoring.differing(scoring.Choices({wide: 2, narrow: 2}), scoring.Choices({wide: 3, narrow: 1}))
    assert scoring.differing(scoring.Choices({wide: 2}), scoring.Choices()) != ""
    # A loop of torch that the file holds once, and choices by integers.
    integers = ("topk", "int64", "")
    assert scoring.differing(scoring.Choices({wide: 8}), scoring.Choices({wide: 1, integers: 1})) == ""


def test_the_nearest_product_before_a_choice() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float16[T,4] x, float16[4,6] w, bool c) => (float[T,2] v, int64[T,2] i) {
            scores = MatMul (x, w)
            wide = Cast <to = 1> (scores)
            two = Constant <value = int64[1] {2}> ()
            v, i = If (c) <
                then_branch = t () => (a, b) { s = Softmax (wide)  a, b = TopK (s, two) },
                else_branch = e () => (d, f) { d, f = TopK (wide, two) } >
        }"""
    )
    # The cast of the second alone changes nothing.
    assert scoring.in_file(model) == {("topk", "float32", "float16"): 1, ("topk", "float16", "float16"): 1}


def test_each_operator_is_rounded_to_bfloat16() -> None:
    """In branches too; to the bit what torch computes, one operator at a time."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (bfloat16[T,8] x, bfloat16[T,8] y, bool c) => (bfloat16[T,8] z, bfloat16[T,8] p) {
            p = Mul (x, y)
            sum = Add (p, x)
            z = If (c) < then_branch = t () => (a) { q = Mul (sum, y)  a = Sub (q, x) },
                         else_branch = e () => (b) { b = Identity (sum) } >
        }"""
    )
    with pytest.raises(Exception, match="no kernel"):
        sessions.create_session(model)
    session = sessions.create_session(rounded.rounding_graph(model))
    x, y = (torch.randn(5, 8, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    product = x * y
    total = product + x
    for condition, expected in ((True, total * y - x), (False, total)):
        feeds = {"x": x.float().numpy(), "y": y.float().numpy(), "c": np.array(condition)}
        z, p = sessions.run(session, feeds)
        assert [value.name for value in session.get_outputs()] == ["z", "p"]
        np.testing.assert_array_equal(z, expected.float().numpy())
        np.testing.assert_array_equal(p, product.float().numpy())


def test_a_model_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMoE's router takes a softmax in float32 of logits of 16 bits."""
    pytest.importorskip("transformers")
    (case,) = [each for each in cases.load(cases.HALF["float16"]) if each.name == "olmoe"]
    kept: list[scoring.Choices] = []
    in_file = scoring.in_file
    monkeypatch.setattr(scoring, "in_file", lambda model: kept.append(in_file(model)) or kept[-1])
    cell = measure.measure(case, "ours")
    assert (cell.outcome, cell.blocks, cell.layers) == (measure.BLOCK, 2, 2), cell
    assert kept == [scoring.Choices({("topk", "float32", "float16"): 2})]


def test_the_page_says_what_differs_from_float32() -> None:
    def document(**cells: measure.Cell) -> dict[str, object]:
        return {
            "results": {
                name: {"title": "", "cells": {"ours": cell.to_json()}} for name, cell in cells.items()
            }
        }

    block = measure.Cell(measure.BLOCK, error=5e-4, rounding=1e-3, blocks=2, layers=2)
    missing = measure.Cell(measure.NO_KERNEL, "no bfloat16 kernel for Add", 2e-3, 3e-3, blocks=2, layers=2)
    refused = measure.Cell(measure.REFUSED, "its size is fixed")
    text = half_page.markdown(
        {"float16": document(a=block, b=refused), "bfloat16": document(a=missing, b=missing)},
        document(a=block, b=block),
    )
    assert "| float16 | 1 | 0 | 1 | 0 | 0 | 2 | 0 | 0.0005 | 0.001 | 0.5 |" in text
    assert "| bfloat16 | 2 | 0 | 0 | 0 | 0 | 2 | 2 | 0.002 | 0.003 | 0.7 |" in text
    assert "- `b`: refused (float32: neutral block): its size is fixed" in text and "- `a`: " not in text
    assert "### Other than in float32: bfloat16\n\nNone." in text
    assert "- `a`, `b`: no bfloat16 kernel for Add" in text
    assert all(f"--cases {place}" in text for place in cases.HALF.values())

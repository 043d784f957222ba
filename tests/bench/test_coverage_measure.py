"""What a cell of the coverage table says, for exporters that are right, wrong, loud and refusing."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from sparse_onnx.bench.coverage import exporters, measure  # noqa: E402
from sparse_onnx.bench.coverage.cases import Case, Made  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

AXES = {"x": {0: "batch"}}


class Scaled(nn.Module):
    def __init__(self, factor: float, wrong_when_many: bool = False) -> None:
        super().__init__()
        self.factor, self.wrong_when_many = factor, wrong_when_many
        self.linear = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor + (x[13:].sum() if self.wrong_when_many else 0.0)


def made(module: nn.Module) -> Made:
    return Made((module.eval(), {"x": torch.randn(3, 4)}, AXES))


CASE = Case("scaled", "Scaled", lambda folder: made(Scaled(2.0)))


def judged(monkeypatch: pytest.MonkeyPatch, exporter: object) -> measure.Cell:
    monkeypatch.setitem(exporters.EXPORTERS, "ours", exporter)
    return measure.measure(CASE, "ours")


def exporting(module: nn.Module, blocks: int = 0) -> object:
    """An exporter that writes this module, whatever it is asked for."""

    def export(_: Made, path: Path) -> exporters.Exported:
        return exporters.Exported(exporters.torch_onnx(made(module), path).path, blocks)

    return export


@pytest.mark.parametrize(("blocks", "outcome"), [(0, measure.FALLBACK), (1, measure.BLOCK)])
def test_a_right_file(blocks: int, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = judged(monkeypatch, exporting(Scaled(2.0), blocks))
    assert (cell.outcome, cell.blocks) == (outcome, blocks)
    assert cell.error is not None and cell.error <= measure.EXACT


@pytest.mark.parametrize("module", [Scaled(2.001), Scaled(2.0, wrong_when_many=True)])
def test_a_file_that_answers_otherwise_is_silently_wrong(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = judged(monkeypatch, exporting(module, blocks=1))
    assert cell.outcome == measure.WRONG and cell.reason.startswith("at ") and cell.error > measure.EXACT


def test_refusals_and_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: Made, path: Path) -> exporters.Exported:
        raise ImpossibleError("the axis is fixed")

    def fails(_: Made, path: Path) -> exporters.Exported:
        raise KeyError("aten.sort")

    def writes_rubbish(_: Made, path: Path) -> exporters.Exported:
        path.write_bytes(b"no model")
        return exporters.Exported(path)

    assert judged(monkeypatch, refuses) == measure.Cell(
        measure.REFUSED, "the axis is fixed", seconds=pytest.approx(0, abs=60)
    )
    assert judged(monkeypatch, fails).reason == "KeyError: 'aten.sort'"
    broken = judged(monkeypatch, writes_rubbish)
    assert broken.outcome == measure.FAILED and "does not load" in broken.reason


def test_a_module_with_fewer_blocks_than_sparse_layers_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoExperts(nn.Identity):
        pass

    class Model(Scaled):
        def __init__(self) -> None:
            super().__init__(2.0)
            self.first, self.second, self.of_images = TwoExperts(), TwoExperts(), TwoExperts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(super().forward(x)))

    monkeypatch.setitem(exporters.EXPORTERS, "ours", exporting(Scaled(2.0), blocks=1))
    cell = measure.measure(Case("two", "Model", lambda folder: made(Model())), "ours")
    assert (cell.outcome, cell.blocks, cell.layers) == (measure.FALLBACK, 1, 2)


def test_the_inputs_are_seven_of_sizes_that_no_export_compares() -> None:
    from sparse_onnx.export import samples
    from sparse_onnx.export.sources import Source

    text = samples.interface_of(
        {"ids": torch.tensor([[0, 9], [9, 0]]), "attention_mask": torch.ones(2, 2, dtype=torch.int64)},
        {"ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}},
        frozenset({"attention_mask"}),
    )
    runs = measure.untraced(Source("text", nn.Identity(), text))
    assert len(runs) == 7 and len({tuple(run.sizes.items()) for run in runs}) == 7
    assert {tuple(run.sizes.values()) for run in runs} & {(2, 7), (3, 11), (1, 5)} == set()
    assert any((run.inputs["attention_mask"] == 0).any() for run in runs)
    assert any(run.inputs["ids"].numel() == 1 for run in runs)

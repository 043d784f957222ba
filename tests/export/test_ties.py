"""Equal scores, and inputs at which rounding decides: neither fails an export, and neither hides a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.core.report import VerifyRecord  # noqa: E402
from sparse_onnx.export import check, rounding, samples, sources, ties  # noqa: E402

AXES = {"x": {0: "batch", 1: "sequence"}}


class Chosen(nn.Module):
    """The table's rows of the best keys; many score the same."""

    def __init__(self, best: int = 20) -> None:
        super().__init__()
        self.best = best
        generator = torch.Generator().manual_seed(0)
        self.keys = nn.Parameter(torch.randint(0, 3, (8, 64), generator=generator).float())
        self.table = nn.Parameter(torch.randn(64, 5, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        index = (x.round() @ self.keys).topk(self.best, dim=-1).indices
        return self.table[index].sum(-2)


def _source(module: nn.Module) -> sources.Source:
    return sources.of_objects((module, {"x": torch.randn(2, 7, 8)}, AXES))


def test_the_first_of_equal_elements() -> None:
    scores = torch.tensor([[2.0, 3.0, 2.0, 3.0, 1.0, 2.0] * 40])
    with ties.first_of_equal() as equal:
        values, indices = scores.topk(60)
        largest = scores.sort(descending=True)
    order = np.argsort(-scores.numpy(), axis=-1, kind="stable")
    assert indices.tolist() == order[:, :60].tolist() and largest.indices.tolist() == order.tolist()
    assert equal.met and torch.equal(values, scores.topk(60).values)
    with ties.first_of_equal() as equal:
        assert torch.randperm(100).float().topk(3).values.tolist() == [99, 98, 97]
    assert not equal.met


def test_equal_scores_are_no_difference(tmp_path: Path) -> None:
    report = sparse_onnx.export((Chosen(), {"x": torch.randn(2, 7, 8)}, AXES), tmp_path / "m.onnx")
    assert report.verify is not None and report.verify.passed
    named = [name for name in report.verify.inputs if name.endswith(ties.NOTE)]
    assert named and report.verify.tokens_left_out == 0


def test_a_wrong_file_is_no_tie(tmp_path: Path) -> None:
    """It takes the best 19 where the module takes 20; and scores tie there, too."""
    sparse_onnx.export((Chosen(19), {"x": torch.randn(2, 7, 8)}, AXES), tmp_path / "m.onnx")
    source = _source(Chosen())
    record = check.compare(
        tmp_path / "m.onnx", source, [], samples.untraced(source.interface), tolerance=1e-4
    )
    assert record.passed is False


class Undecided(nn.Module):
    """One of two rows: by the sign of a sum, and at one length by which of two equal sums is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.3, 0.7, 0.9, -0.2, 0.6, -1.1, 0.4]))
        self.other = nn.Parameter(self.weight.detach().flip(0))
        self.table = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        sums = x @ self.weight
        other = (x * 3).flip(-1) @ self.other / 3 if x.shape[1] == LENGTH else torch.zeros_like(sums)
        return self.table[(sums > other).long()]


LENGTH = 30
CALM = [{"batch": batch, "sequence": 9} for batch in (3, 4, 5)]
UNDECIDED = {"batch": 1, "sequence": LENGTH}


def _record(
    sizes: list[dict[str, int]], wrong: bool = False, far: float = 0.0, assumption: str = ""
) -> VerifyRecord:
    """Of a file that decides by sums in float64; `far` is added to what it gives where the module is undecided."""
    source = _source(Undecided())
    double = Undecided().double()

    def answer(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            output = double(torch.from_numpy(feeds["x"]).double()).float().numpy()
        return [output * (1.001 if wrong else 1.0) + (far if feeds["x"].shape[1] == LENGTH else 0.0)]

    runs = [samples.drawn(source.interface, each, "random", seed) for seed, each in enumerate(sizes)]
    runs = [dataclasses.replace(run, assumption=assumption) for run in runs]
    graph = ir.Graph([], [], nodes=[], name="file")
    model = ir.Model(graph, ir_version=10)
    return check.compare(model, source, [], runs, tolerance=1e-4, engine=lambda _: answer)


def test_how_far_rounding_moves_torch() -> None:
    source = _source(Undecided())
    for sizes, least, most in ((UNDECIDED, 2.0, 2.0), (CALM[0], 0.0, 1e-6)):
        run = samples.drawn(source.interface, sizes, "random", 3)
        own = source.forward(run.inputs)
        moved = [float((other - own).abs().max()) for (other,) in rounding.answers(source, run)]
        assert len(moved) == 5 and least <= max(moved) <= most


def test_a_run_that_decides_nothing_is_left_out_and_named() -> None:
    record = _record([*CALM, UNDECIDED])
    assert record.passed and record.tokens_left_out == LENGTH
    assert record.inputs[:3] == ["3x9", "4x9", "5x9"]
    assert record.inputs[3] == "1x30, left out: rounding moves torch's own answer by 2"


def test_runs_that_decide_nothing_are_not_most() -> None:
    record = _record([*CALM[:1], UNDECIDED])
    assert record.passed is False and "too few to compare" in record.failure


def test_a_wrong_answer_is_not_rounding() -> None:
    record = _record([*CALM, UNDECIDED], wrong=True)
    assert record.passed is False and record.failure.startswith("input 3x9")


def test_rounding_explains_no_more_than_it_does() -> None:
    """torch's own answer moves by 2 where it is undecided; the file is off by a thousand there."""
    record = _record([*CALM, UNDECIDED], far=1e3)
    assert record.passed is False and record.failure.startswith("input 1x30")


def test_nothing_is_left_out_where_the_trace_assumes_something() -> None:
    with pytest.raises(ImpossibleError, match="only where sequence is 9"):
        _record([*CALM, UNDECIDED], assumption="sequence is 9")


class Counting(nn.Module):
    """Answers otherwise each time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(8)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight * (1 + 0.01 * self.calls)


def test_a_state_is_not_rounding() -> None:
    source = _source(Counting())
    runs = [samples.drawn(source.interface, each, "random", 0) for each in CALM]
    model = ir.Model(ir.Graph([], [], nodes=[], name="file"), ir_version=10)
    record = check.compare(
        model, source, [], runs, tolerance=1e-4, engine=lambda _: lambda feeds: [feeds["x"] * 2.0]
    )
    assert record.passed is False and record.failure.startswith("input 3x9")

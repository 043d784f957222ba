"""Lists of row numbers, tables of experts and counts of rows in control flow: right, or refused with the line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

HIDDEN, EXPERTS, NUMBERS = 8, 3, 12


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.gate = nn.Parameter(4 * torch.randn(HIDDEN, EXPERTS, generator=generator))
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.register_buffer("table", torch.arange(NUMBERS) % EXPERTS)

    def index(self, x: Tensor) -> Tensor:
        return (x @ self.gate).argmax(-1)

    def number(self, x: Tensor) -> Tensor:
        return (x[:, 0].abs() * 7).long() % NUMBERS


class ListOfWhatChanges(Routed):
    """A list keeps the numbers that its tensor had."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(self.index(x) == e)[0]
            if rows.shape[0] == 0:
                continue
            kept = rows.tolist()
            rows.mul_(0)
            out.index_add_(0, torch.where(self.index(x) == e)[0], expert(x[kept]))
        return out


class ListOfTruths(Routed):
    """Not numbers of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x[(self.index(x) == 0).tolist()].sum(0)


class ByTable(Routed):
    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.table[self.number(x)], torch.zeros_like(x)  # type: ignore[index]
        for e in chosen.unique():
            out[chosen == e] = self.experts[e](x[chosen == e])  # type: ignore[index]
        return out


class ByChangedTable(Routed):
    def forward(self, x: Tensor) -> Tensor:
        self.table.mul_(0).add_(2)  # type: ignore[operator]
        chosen, out = self.table[self.number(x)], torch.zeros_like(x)  # type: ignore[index]
        for e in chosen.unique():
            out[chosen == e] = self.experts[e](x[chosen == e])  # type: ignore[index]
        return out


class SomeOrElse(Routed):
    """Where none is chosen there is something else than nothing."""

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for e, expert in enumerate(self.experts):
            rows = torch.where((x @ self.gate)[:, e] > 9)[0]
            if rows.numel() > 0:
                parts.append(expert(x[rows]))
        return (torch.cat(parts) if len(parts) else x).sum(0)


class SomeOrNone(SomeOrElse):
    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for e, expert in enumerate(self.experts):
            rows = torch.where((x @ self.gate)[:, e] > 9)[0]
            if rows.numel() > 0:
                parts.append(expert(x[rows]))
        found = torch.cat(parts) if len(parts) else x.new_empty(0)
        return found.sum() + x


class FilteredOut(Routed):
    """Rows that no expert gets: where all are so, the model's result has one axis."""

    def found(self, x: Tensor) -> Tensor:
        parts = []
        for e, expert in enumerate(self.experts):
            rows = torch.where((self.index(x) == e) & (x[:, 0] > 0))[0]
            if rows.numel() == 0:
                continue
            parts.append(expert(x[rows]))
        return torch.cat(parts) if parts else x.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.found(x)


class FilteredOutLast(FilteredOut):
    def forward(self, x: Tensor) -> Tensor:
        return self.found(x).sum(-1)


class FilteredOutMean(FilteredOut):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.found(x).mean(-1).sum()


class FilteredOutWidth(FilteredOut):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.found(x).shape[-1]


class FilteredOutAxes(FilteredOut):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.relu(self.found(x) * 2).dim()


class FilteredOutChosen(FilteredOut):
    """Goes through another condition."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.found(x)
        z = y * 2 if x.mean() > 0 else y * 3
        return x + z.sum(0)


class FilteredOutAll(FilteredOut):
    def forward(self, x: Tensor) -> Tensor:
        y = self.found(x)
        return x + torch.relu(y * 2 + 1).sum() + len(y) + y.flatten().sum(0)


class FilteredOutShaped(FilteredOut):
    """Written by rows into a tensor like it, and given a shape then."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.found(x)
        z = torch.empty_like(y)
        z[torch.arange(len(y)).flip(0)] = y
        return x + z.view(-1, HIDDEN).to(x.dtype).sum(0)


class FromTheEnd(Routed):
    """A count that may be negative is one from the end."""

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.bincount(self.index(x), minlength=EXPERTS).tolist()
        return x[: counts[0] - counts[1]].sum(0)


class UpToTheSum(Routed):
    def forward(self, x: Tensor) -> Tensor:
        counts = torch.bincount(self.index(x), minlength=EXPERTS).tolist()
        rows = x[: counts[0] + counts[1] + 1]  # one more than there may be
        return rows.sum(0) * rows.shape[0]


class SaysWhere(Routed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, expert in enumerate(self.experts):
            x = x + expert(x)
            if x.mean() > 0.05 and i < 2:
                break
        return x, torch.tensor(i)


class Checkpointed(Routed):
    def inner(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = self.index(x) == e
            if mask.any():
                out[mask] = expert(x[mask])
        return out

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def exported(kind: type, path: Path) -> None:
    """Raises where what is written answers otherwise at any size from 1 to 9."""
    torch.manual_seed(3)
    module = kind().eval()
    sparse_onnx.export((module, {"x": torch.randn(6, HIDDEN)}, {"x": {0: "tokens"}}), path)
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for tokens, sign in itertools.product(range(1, 10), (None, 1, -1)):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        x[:, 0] = x[:, 0] if sign is None else sign * x[:, 0].abs()
        with torch.no_grad():
            expected = module(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for value, actual in zip(expected, session.run(None, {"x": x.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), value, rtol=1e-4, atol=1e-5)


RIGHT = [ByTable, SomeOrNone, UpToTheSum, SaysWhere, Checkpointed, FilteredOutAll, FilteredOutShaped]
SHOWN = [FilteredOut, FilteredOutLast, FilteredOutMean, FilteredOutWidth, FilteredOutAxes]


@pytest.mark.parametrize("kind", RIGHT)
def test_lifted_rightly(kind: type, tmp_path: Path) -> None:
    exported(kind, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (ListOfTruths, ".tolist()"),
        (ByChangedTable, "chosen.unique()"),
        (SomeOrElse, "len(parts)"),
        (FilteredOutChosen, "y * 2 if"),
    ],
)
def test_refused_with_its_line(kind: type, line: str, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError) as caught:
        exported(kind, tmp_path / "out.onnx")
    assert line in str(caught.value) and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("kind", SHOWN)
def test_axes_that_only_the_graph_has_are_not_shown(kind: type, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError, match=r"x\.new_empty\(0\)` depends on tensor values") as caught:
        exported(kind, tmp_path / "out.onnx")
    assert caught.value.hint and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("kind", [FromTheEnd, ListOfWhatChanges])
def test_right_or_refused(kind: type, tmp_path: Path) -> None:
    """How far torch gets with these may change; wrong they never are."""
    try:
        exported(kind, tmp_path / "out.onnx")
    except ImpossibleError:
        assert not (tmp_path / "out.onnx").exists()

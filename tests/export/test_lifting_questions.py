"""What Python asks of lists that depend on tensors without the graph seeing it: `==`, `isinstance` and their kin."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from test_lifting_rows import Routed, exported  # noqa: E402
from torch import Tensor  # noqa: E402

from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export.lifting.hits import Numbers  # noqa: E402

PLACE = ("file.py", 1, "line")


class IsRows(Routed):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.where(x[:, 0] > 0)[0].tolist()
        if rows == [1, 3]:
            return x * 2
        return self.experts[0](x)


class IsNotEmpty(Routed):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.where(x[:, 0] > 0)[0].tolist()
        if rows != []:
            return x + self.experts[0](x[rows]).sum(0)
        return x * 3


class IsOneExpert(Routed):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.index(x).unique().tolist()
        if chosen == [0]:
            return x * 3
        return self.experts[0](x)


@pytest.mark.parametrize("kind", [IsRows, IsNotEmpty, IsOneExpert])
def test_a_list_of_rows_is_not_compared_in_the_trace(kind: type, tmp_path: Path) -> None:
    with pytest.raises(
        ImpossibleError, match="makes a Python list of a length that depends on tensor values"
    ):
        exported(kind, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


ASKED: dict[str, Callable[[Any], Any]] = {
    "==": lambda rows: rows == [1],
    "!=": lambda rows: rows != [1],
    "== reversed": lambda rows: operator.eq([1], rows),
    "!= reversed": lambda rows: operator.ne([1], rows),
    "<": lambda rows: rows < [1],
    "<=": lambda rows: rows <= [1],
    ">": lambda rows: rows > [1],
    ">=": lambda rows: rows >= [1],
    "in": lambda rows: 1 in rows,
    "+": lambda rows: operator.add(rows, [1]),
    "*": lambda rows: rows * 2,
    "* reversed": lambda rows: 2 * rows,
    "&": lambda rows: rows & {1},
    "-": lambda rows: {1} - rows,
    "reversed": reversed,
    "bool": bool,
    "index": lambda rows: rows.index(1),
    "equal of its kind": lambda rows: rows == Numbers(rows.tensor, PLACE),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_each_question_is_refused(asked: Callable[[Any], Any]) -> None:
    with pytest.raises(ImpossibleError, match="makes a Python list"):
        asked(Numbers(torch.arange(3), PLACE))


class Found(Routed):
    """Rows are found by all samples that an export compares."""

    def outs(self, x: Tensor) -> list[Tensor]:
        index, there, outs = self.index(x), x[:, 0] > -50, []
        for at, expert in enumerate(self.experts):
            rows = torch.where((index == at) & there)[0]
            if rows.numel() == 0:
                continue
            outs.append(expert(x[rows]))
        return outs


class EmptyFirst(Found):
    """Python asks the list on the left, which knows its length."""

    def forward(self, x: Tensor) -> Tensor:
        outs = self.outs(x)
        if [] == outs:  # noqa: SIM300 - the list on the left is what is asked
            return x.sum(0) * 3
        return torch.cat(outs).sum(0)


class Joined(Found):
    def forward(self, x: Tensor) -> Tensor:
        outs = [] + self.outs(x)  # noqa: RUF005 - joined by the list on the left
        if len(outs) == 0:
            return x.sum(0) * 3
        return torch.cat(outs).sum(0)


class EmptyIsTrue(Found):
    def forward(self, x: Tensor) -> Tensor:
        outs = self.outs(x)
        if (len(outs) == 0) == True:  # noqa: E712
            return x.sum(0) * 3
        return torch.cat(outs).sum(0)


@pytest.mark.parametrize("kind", [EmptyFirst, Joined, EmptyIsTrue])
def test_a_list_of_unknown_length_is_not_compared_either(kind: type, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError):
        exported(kind, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()

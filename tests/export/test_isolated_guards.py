"""A guard that fails at a few small sizes of one axis is compared there; any other is a reason to refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import guards, samples  # noqa: E402

TEXT = samples.interface_of(
    {"ids": torch.zeros(2, 2, dtype=torch.int64)}, {"ids": {0: "batch", 1: "sequence"}}
)


def isolated(code: str) -> list[dict[str, int]]:
    code = code.replace("B", "L['ids'].size()[0]").replace("S", "L['ids'].size()[1]")
    return guards.isolated(guards._compile(code, TEXT), TEXT)


def test_the_sizes_to_compare_on() -> None:
    assert isolated("-1 + S != 1") == [{"batch": 1, "sequence": 2}, {"batch": 3, "sequence": 2}]
    assert {sizes["sequence"] for sizes in isolated("(3 + S) // 4 != 1")} == {1, 2, 3, 4}
    assert {sizes["batch"] for sizes in isolated("B != 1")} == {1}


def test_few_tokens() -> None:
    """As a capacity of one token for each expert, for up to seven of them."""
    sizes = isolated("max(1, math.trunc(B*S / 4)) != 1")
    assert {each["batch"] * each["sequence"] for each in sizes} == {1, 2, 3, 4, 5, 6, 7}
    assert {"batch": 1, "sequence": 7} in sizes and {"batch": 3, "sequence": 2} in sizes
    assert isolated("B*S // 4 != 1") == []  # four to seven: not where there is next to nothing


class Cached(samples.Interface):
    """As a decoder's: the length of the mask is a sum."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return "sequence", "past"

    def complete(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        return {**sizes, "total": sizes["sequence"] + sizes["past"]}


def test_sums_of_two_axes() -> None:
    """As pools of four keys, of which there is one up to a total of four."""
    interface = Cached(samples.interface_of({"mask": torch.ones(2, 9)}, {"mask": {1: "total"}}).inputs)

    def found(code: str) -> list[dict[str, int]]:
        code = code.replace("T", "L['mask'].size()[1]")
        return guards.isolated(guards._compile(code, interface), interface)

    sizes = found("(3 + T) // 4 != 1")
    assert {each["sequence"] + each["past"] for each in sizes} == {2, 3, 4}
    assert {(1, 1), (1, 3), (3, 1)} <= {(each["sequence"], each["past"]) for each in sizes}
    assert found("T <= 9") == [] and found("T != 40") == []


@pytest.mark.parametrize(
    "code", ["S <= 9", "S != 40", "B*S != 14", "S % 2 == 0", "B == S", "(127 + S) // 128 != 1"]
)
def test_any_other_guard(code: str) -> None:
    assert isolated(code) == []


def test_a_guard_that_always_holds() -> None:
    assert isolated("S >= 1") == []


class Branches(torch.nn.Module):
    """Answers otherwise for one length, or only seems to."""

    def __init__(self, otherwise: float) -> None:
        super().__init__()
        self.otherwise = otherwise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.otherwise if x.shape[0] == 3 else x * 2.0


def test_a_length_with_an_answer_of_its_own_is_refused(tmp_path: Path) -> None:
    x = (torch.randn(5, 4),)
    with pytest.raises(ImpossibleError, match="right only where batch != 3"):
        sparse_onnx.export((Branches(7.0), x, {"x": {0: "batch"}}), tmp_path / "out.onnx")
    report = sparse_onnx.export((Branches(2.0), x, {"x": {0: "batch"}}), tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed and "3" in report.verify.inputs

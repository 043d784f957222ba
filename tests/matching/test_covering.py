"""Sizes that one operand alone gives a broadcast: numpy is the judge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.matching.covering import UnknownSize, has_sizes, lacking

Axes = Sequence[int | str | None]


def value(axes: Axes | None) -> ir.Value:
    return ir.Value(name="v", shape=None if axes is None else ir.Shape(axes))


@pytest.mark.parametrize(
    ("missing", "present", "sizes"),
    [
        (["T", 8], ["T", 8], [1, 1]),
        (["T", 8], ["T", 1], [1, 8]),
        (["T", 8], [], ["T", 8]),
        (["T", 8], [8], ["T", 1]),
        ([8], ["T", 8], [1]),
        (["T"], [5], [1]),  # 5 or 1
        ([None], [5], [1]),
        ([1, 1, 1], ["T"], [1, 1, 1]),
        ([5], ["T"], [5]),
        ([0], [1], [0]),
        (["T"], ["S"], ["T"]),
        ([], [4, 4], []),
    ],
)
def test_one_operand(missing: Axes, present: Axes, sizes: list[int | str]) -> None:
    assert lacking([value(missing)], [value(present)]) == sizes


def test_several_operands() -> None:
    assert lacking([value([1, 8]), value(["T", 1, 1])], [value([5, 1])]) == ["T", 1, 8]
    assert lacking([value(["T"]), value([7])], [value([1])]) == [7], "T must be 7 or 1"
    assert lacking([value(["T", 8])], [value(["T", 1]), value([8])]) == [1, 1]
    assert lacking([value(["T"]), value(["T"])], [value(None)]) == ["T"]


@pytest.mark.parametrize(
    ("missing", "present", "reason"),
    [
        ([None], [[1]], "number of axes of 'v'"),
        ([[None, 8]], [["T", 8]], "axis -2 of 'v'"),
        ([[None]], [[None]], "axis -1 of 'v'"),
        ([["T"], ["S"]], [[1]], "axis -1 of 'v'"),  # the larger of the two
    ],
)
def test_sizes_that_are_not_known(missing: list[Axes], present: list[Axes], reason: str) -> None:
    with pytest.raises(UnknownSize, match=reason):
        lacking([value(axes) for axes in missing], [value(axes) for axes in present])


def test_a_stand_in_gives_the_same_shape() -> None:
    """Every combination of small shapes, with names for sizes and sizes for names."""
    axes = [[], *([a] for a in (1, 3, "T", None)), *([a, b] for a in (1, 3, "T") for b in (1, 3, "S", None))]
    checked = 0
    for missing, present, t, s in itertools.product(axes, axes, (0, 1, 3), (1, 3)):
        try:
            sizes = lacking([value(missing)], [value(present)])
        except UnknownSize:
            continue
        names = {"T": t, "S": s}
        for hidden in (1, 3):  # what is not known
            real = [
                [names.get(size, size) if size else hidden for size in each] for each in (missing, present)
            ]
            try:
                expected = np.broadcast_shapes(*real)
            except ValueError:
                continue
            stand_in = [names.get(size, size) for size in sizes]
            assert np.broadcast_shapes(stand_in, real[1]) == expected, (missing, present, names)
            checked += 1
    assert checked > 500


def test_what_a_value_has_already() -> None:
    assert has_sizes(value(["T", 8]), [1, 8]) and has_sizes(value(["T", 8]), ["T", 1])
    assert not has_sizes(value([8]), [1, 1]) and not has_sizes(value(None), [1])
    assert not has_sizes(value(["T", 8]), ["S", 1]) and has_sizes(value(None), []) is False

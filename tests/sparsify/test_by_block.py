"""Blocks are found by what comes again, and skip alike."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_onnx.sparsify.allocate import LEVELS, Curve, greedy
from sparse_onnx.sparsify.by_block import blocks_of, by_block, with_experts

STEPS = np.linspace(0, 0.95, 20)


def curve(size: float, steep: float) -> Curve:
    return Curve(size, STEPS, steep * STEPS**2)


@pytest.mark.parametrize(
    ("kinds", "starts"),
    [
        ("qoudqoudqoud", [0, 4, 8]),
        ("xqoudqoudz", [0, 5]),
        (
            "hhudhhudhhud",
            [0, 6, 10],
        ),  # two of a kind in each block: blocks begin at u, and the first has all before it
        ("qoudmmqoudmmqoud", [0, 6, 12]),
        ("abc", [0]),
        ("aaa", [0, 1, 2]),
        ("", []),
    ],
)
def test_a_block_begins_where_its_first_layer_comes_again(kinds: str, starts: list[int]) -> None:
    found = blocks_of(kinds)
    assert [block[0] for block in found] == starts
    assert [at for block in found for at in block] == list(range(len(kinds)))


def test_each_block_skips_as_much_and_within_it_the_least_error_decides() -> None:
    curves = [curve(100, 1), curve(300, 5), curve(100, 0.1), curve(300, 0.5)]
    path = by_block(curves, [[0, 1], [2, 3]])
    sizes = np.array([each.bytes for each in curves])
    for level in (10, 40, 80):
        for block in ([0, 1], [2, 3]):
            skipped = (path[level] * sizes)[block].sum() / sizes[block].sum()
            assert skipped == pytest.approx(level / 100)
    assert path[40, 0] > path[40, 1] and path[40, 2] > path[40, 3]
    np.testing.assert_array_equal(path[:, :2], greedy(curves[:2]))
    together = greedy(curves)
    assert (together[40] * sizes)[2:].sum() > (together[40] * sizes)[:2].sum(), (
        "the second block is the dearer one"
    )
    assert path.shape == (LEVELS, 4) and not path[0].any() and (np.diff(path, axis=0) >= 0).all()


def test_experts_join_the_block_that_they_are_part_of() -> None:
    names = ["q0", "o0", "q1", "o1", "up0", "down0", "up1", "down1"]
    kinds = [name[:-1] for name in names]
    experts = [["up0", "down0"], ["up1", "down1"]]
    assert with_experts(names, kinds, experts) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert with_experts(names[:6], kinds[:6], experts[:1]) == [[0, 1], [2, 3], [4, 5]], (
        "one of two blocks has experts"
    )
    assert with_experts(names[:4], kinds[:4], []) == [[0, 1], [2, 3]]
    assert with_experts(names[4:], kinds[4:], experts) == [[0, 1], [2, 3]]

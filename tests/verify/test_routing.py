from __future__ import annotations

import numpy as np
import pytest
from builders import Shape, layered_model

from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.verify.routing import Decision, decisions, flipped, observed, routers


def decision(index: list[list[int]], margin: list[float] | None) -> Decision:
    return Decision(np.asarray(index), None if margin is None else np.asarray(margin), 1e-5)


def test_routers_are_found_before_and_after_lowering() -> None:
    model = layered_model(Shape(), layers=2)
    before = routers(model)
    FuseGating()(model)
    assert routers(model) == before and [r.scores for r in before] == ["layers.0.scores", "layers.1.scores"]
    assert [v.name for v in observed(model, before).graph.outputs] == [
        "y", "layers.0.index", "layers.0.scores", "layers.1.index", "layers.1.scores",
    ]  # fmt: skip
    assert len(model.graph.outputs) == 1, "the model itself is untouched"


def test_margins_are_relative_to_the_largest_score() -> None:
    watch = routers(layered_model(Shape(), layers=1))
    scores = np.asarray([[8, 4, 2, -np.inf], [1, 1, 1, 1]], np.float32)
    [found] = decisions(
        watch, {"layers.0.index": np.asarray([[0, 1], [0, 1]]), "layers.0.scores": scores}
    ).values()
    np.testing.assert_allclose(found.margin, [0.25, 0.0])


@pytest.mark.parametrize(
    ("after", "margin", "batch", "mask", "fault"),
    [
        ([[0, 1], [2, 3]], [1.0, 1.0], 2, None, False),  # the same
        ([[1, 0], [3, 2]], [1.0, 1.0], 2, None, False),  # the same in another order
        ([[0, 2], [2, 3]], [1e-7, 1.0], 2, [True, False], False),  # a near-tie
        ([[0, 2], [2, 3]], [1e-2, 1.0], 2, None, True),  # a fault
        ([[0, 2], [2, 3]], None, 2, None, True),  # nothing known of the margin
        ([[0, 2], [2, 1]], [1e-7, 1.0], 2, None, True),  # a near-tie excuses its own sequence only
    ],
)
def test_flips(after: list, margin: list | None, batch: int, mask: list | None, fault: bool) -> None:
    before = {"a": decision([[0, 1], [2, 3]], margin)}
    found, reason = flipped(before, {"a": decision(after, None)}, batch)
    assert (found is None) == (mask is None) and (mask is None or found.tolist() == mask)
    assert bool(reason) == fault


def test_consequences_of_a_near_tie_are_excused() -> None:
    """A flip in one layer moves the next layer's scores, for every token of its sequence."""
    before = {"a": decision([[0, 1], [2, 3]], [1e-7, 1.0]), "b": decision([[0, 1], [0, 1]], [1.0, 1.0])}
    after = {"a": decision([[0, 2], [2, 3]], None), "b": decision([[0, 1], [2, 3]], None)}
    mask, reason = flipped(before, after, 1)
    assert mask is not None and mask.tolist() == [True] and not reason


@pytest.mark.parametrize(
    ("after", "excused"),
    [
        ([[0, 2]], True),  # 1 and 2 lie at the boundary
        ([[0, 3]], False),  # 3 does not
        ([[1, 2]], False),  # 0 was chosen clearly
        ([[0, 0]], False),  # no TopK answers so
        ([[0, 4]], False),  # dropped
    ],
)
def test_only_swaps_at_the_boundary_are_excused(after: list, excused: bool) -> None:
    scores = np.asarray([[0.5, 0.2, 0.2, 0.1]])
    before = Decision(np.asarray([[0, 1]]), np.asarray([0.0]), 1e-5, scores)
    mask, reason = flipped({"a": before}, {"a": decision(after, None)}, 1)
    assert (mask is not None) == excused and bool(reason) != excused


@pytest.mark.parametrize("mask", [-np.inf, -1e9, -65504.0, np.finfo(np.float32).min])
def test_masked_scores_do_not_make_ties(mask: float) -> None:
    """Group-limited routers fill what is not allowed; a margin is not relative to the filling."""
    watch = routers(layered_model(Shape(), layers=1))
    scores = np.asarray([[0.9, 0.6, 0.3, mask]], np.float32)
    [found] = decisions(watch, {"layers.0.index": np.asarray([[0, 1]]), "layers.0.scores": scores}).values()
    np.testing.assert_allclose(found.margin, [0.3 / 0.9], rtol=1e-6)

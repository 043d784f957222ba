"""What routers decided in a run, and which decisions were near-ties that rounding may flip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.routing import router_scores
from sparse_onnx.verify.metadata import sound_blocks

#: A router's margin - how far the last chosen score lies above the first that was not, relative to the largest score
#: of the token - below which a different choice is rounding and not a fault.
NEAR_TIE = {"float32": 1e-5, "float16": 1e-2}
#: Scores this many times the largest chosen one are masks, not scores.
_MASKED = 1e3


@dataclasses.dataclass(frozen=True)
class Router:
    """Names of the values in the main graph that hold a block's routing. `scores` is None for routers without TopK."""

    block: str
    index: str
    scores: str | None
    experts: int | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """One router in one run: chosen experts `[T, K]` and, where known, the margin of each token `[T]` and the scores
    `[T, E]` that it chose by."""

    index: np.ndarray
    margin: np.ndarray | None
    near_tie: float
    scores: np.ndarray | None = None


def routers(model: ir.Model) -> list[Router]:
    """Routers of the blocks in the main graph, neutral and lowered."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    found = []
    for block in neutral_blocks(model):
        if block.node.graph is model.graph:
            scores = router_scores(block.expert_index)
            name = None if scores is None else scores.name
            found.append(Router(block.name, block.expert_index.name or "", name, block.experts))
    for lowered in sound_blocks(model):
        if lowered.expert_index in values and lowered.output in values:
            found.append(Router(lowered.name, lowered.expert_index, lowered.scores, lowered.experts))
    return found


def observed(model: ir.Model, watch: Sequence[Router]) -> ir.Model:
    """A copy whose outputs are followed by each router's index and, where known, scores."""
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    present = {value.name for value in copy.graph.outputs}
    for router in watch:
        for name in (router.index, router.scores):
            if name is not None and name in values and name not in present:
                copy.graph.outputs.append(values[name])
                present.add(name)
    return copy


def decisions(watch: Sequence[Router], outputs: dict[str, np.ndarray]) -> dict[str, Decision]:
    """The routers' decisions, out of a run of the observed model."""
    found = {}
    for router in watch:
        index = outputs.get(router.index)
        if index is None:
            continue
        index = index.reshape(-1, index.shape[-1])
        scores = outputs.get(router.scores) if router.scores is not None else None
        margin, near_tie = None, NEAR_TIE["float32"]
        if scores is not None and scores.size // max(scores.shape[-1], 1) == len(index):
            near_tie = NEAR_TIE.get(scores.dtype.name, near_tie)
            scores = scores.reshape(len(index), scores.shape[-1]).astype(np.float64)
            margin = _margins(scores, index.shape[1])
        else:
            scores = None
        found[router.block] = Decision(index, margin, near_tie, scores)
    return found


def _margins(scores: np.ndarray, chosen: int) -> np.ndarray:
    if chosen >= scores.shape[1]:
        return np.full(len(scores), np.inf)
    ordered = -np.sort(-scores, axis=1)
    with np.errstate(invalid="ignore"):
        gap = ordered[:, chosen - 1] - ordered[:, chosen]
    return gap / _score_scale(scores, chosen)


def _score_scale(scores: np.ndarray, chosen: int) -> np.ndarray:
    """Largest score of each token, without those far beyond the chosen ones: a mask's -inf, -1e9 or lowest float."""
    sizes = np.abs(np.where(np.isfinite(scores), scores, np.inf))
    top = np.sort(scores, axis=1)[:, -chosen:]
    beyond = _MASKED * np.abs(np.where(np.isfinite(top), top, 0)).max(axis=1, keepdims=True)
    scale = np.where(sizes <= beyond, sizes, 0).max(axis=1)
    return np.maximum(scale, np.finfo(np.float64).tiny)


def _excused(before: Decision, after: Decision, token: int) -> bool:
    """Whether the token's other choice is rounding: only experts at the boundary were swapped."""
    if before.margin is None or before.margin[token] > before.near_tie:
        return False
    if before.scores is None:
        return True
    scores = before.scores[token]
    old, new = set(before.index[token].tolist()), set(after.index[token].tolist())
    if len(new) != len(after.index[token]) or not all(0 <= expert < len(scores) for expert in old | new):
        return False
    last = np.sort(scores)[-len(before.index[token])]
    scale = _score_scale(scores[None], len(before.index[token]))[0]
    return all(abs(scores[expert] - last) <= before.near_tie * scale for expert in old ^ new)


def flipped(
    expected: dict[str, Decision], actual: dict[str, Decision], batch: int
) -> tuple[np.ndarray | None, str]:
    """Sequences in which a router chose other experts for some token.

    Args:
        expected: decisions of the reference, in the order of the graph.
        actual: decisions of what is judged.
        batch: sequences in the run; its tokens are divided evenly among them.

    Returns:
        A mask `[batch]` and an empty text where each flip is a near-tie, or the consequence of an earlier one in the
        same sequence; None and what was flipped where one is not. None and an empty text where nothing was flipped.
    """
    mask = np.zeros(batch, np.bool_)
    for name, before in expected.items():
        after = actual.get(name)
        if after is None or after.index.shape != before.index.shape or len(before.index) % batch:
            continue
        moved = (np.sort(before.index, axis=1) != np.sort(after.index, axis=1)).any(axis=1)
        fresh = moved & ~np.repeat(mask, len(moved) // batch)
        if not all(_excused(before, after, int(token)) for token in np.flatnonzero(fresh)):
            return (
                None,
                f"router of '{name}' chose other experts for {int(fresh.sum())} of {len(moved)} tokens",
            )
        mask |= moved.reshape(batch, -1).any(axis=1)
    return (mask if mask.any() else None), ""

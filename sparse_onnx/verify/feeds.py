"""Inputs of one block alone: every expert is hit, a few of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decides the inputs of a block: E, K, D, the types of tokens and expert_weight, and whether slots may be
    dropped (index = E)."""

    experts: int
    top_k: int
    hidden: int
    dtype: ir.DataType
    weight_dtype: ir.DataType
    drops: bool


@dataclasses.dataclass(frozen=True)
class Feeds:
    """Inputs of one block: tokens `[T, D]`, expert_index `[T, K]`, expert_weight `[T, K]`."""

    name: str
    tokens: np.ndarray
    index: np.ndarray
    weight: np.ndarray
    repeats: int = 1


def routings(
    block: Facts, chosen: np.ndarray, seed: int = 0, first: bool = True, large: bool = False
) -> Iterator[Feeds]:
    """Routings over the experts `chosen`. Each of them is hit; the rest is tried on the first group of a block.

    Args:
        block: the block.
        chosen: which experts may be hit.
        seed: of the draw.
        first: no token, one token, all to one expert, random, dropped slots, too.
        large: 256 tokens several times, too, since races do not show on few.
    """
    rng = np.random.default_rng(seed)
    hidden, top_k = block.hidden, block.top_k
    dtype, weight_dtype = block.dtype.numpy(), block.weight_dtype.numpy()

    def feeds(name: str, index: np.ndarray, repeats: int = 1) -> Feeds:
        tokens = rng.standard_normal((len(index), hidden)).astype(dtype)
        weight = rng.uniform(0.1, 1.0, index.shape).astype(weight_dtype)
        return Feeds(name, tokens, index.astype(np.int64), weight, repeats)

    rounds = -(-len(chosen) // top_k)
    every = np.resize(rng.permutation(chosen), rounds * top_k).reshape(rounds, top_k)
    yield feeds("every expert", every)
    if not first:
        return
    yield feeds("one token", rng.choice(chosen, (1, top_k)))
    yield feeds("no token", np.zeros((0, top_k), np.int64))
    yield feeds("all to one expert", np.full((5, top_k), rng.choice(chosen)))
    yield feeds("random", rng.choice(chosen, (33, top_k)))
    if large:
        yield feeds("256 tokens", rng.choice(chosen, (256, top_k)), repeats=3)
    if block.drops:
        index = rng.choice(chosen, (17, top_k))
        index[rng.random(index.shape) < 0.4] = block.experts
        index[3] = block.experts
        dropped = feeds("dropped slots", index)
        dropped.tokens[3] = np.inf
        yield dropped

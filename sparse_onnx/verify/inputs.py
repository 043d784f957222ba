"""Inputs of any size for a model, drawn so that its routers are put to the test.

Sizes come from the graph's symbolic axes, values from what the graph does with an input: token ids stay inside the
embedding table that they index, expert indices cover all experts, masks are ones, positions count up, flags go both
ways, floating-point inputs are normal.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ModelError
from sparse_onnx.verify.caches import Sizes, cache_sizes
from sparse_onnx.verify.meaning import lowered_indices, meaning

#: `random`; `one`: every token alike, so that a router sends all of them to the same experts; `zeros`: all scores of
#: a router without bias tie.
Kind = Literal["random", "one", "zeros"]


@dataclasses.dataclass(frozen=True)
class Size:
    """`batch` sequences of `sequence` new tokens behind `past` cached ones. A model of rows has `batch * sequence`."""

    batch: int
    sequence: int
    past: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: what to feed, and how to call it in the report. `repeats` looks for races. An `optional` case counts
    only if the reference itself can run it."""

    name: str
    size: Size
    feeds: dict[str, np.ndarray]
    repeats: int = 1
    optional: bool = False


_SIZES = (Size(2, 7), Size(3, 11), Size(1, 1), Size(1, 5), Size(4, 1), Size(1, 40), Size(5, 3))
_LARGE = Size(1, 256)
_CACHED = (Size(2, 3, past=4), Size(1, 1, past=6))
_EMPTY = Size(1, 0)
#: Values of an integer input that indexes no known table: any table that is worth one has as many rows.
_UNKNOWN = 2
#: Part of the slots that are dropped where the graph allows it.
_DROPPED = 0.1


def cases(model: ir.Model, seed: int = 0, large: bool = True) -> list[Case]:
    """The standard set: several batches and lengths, one token, all tokens to one expert, ties, a realistic size; with
    cached tokens where the model has a cache, and no token at all where its axes allow it."""
    inputs = _inputs(model)
    fixed = _cache_sizes(model)
    flags = sum(1 for value in inputs if _is_flag(value))
    kinds: list[tuple[Size, Kind, int, bool]] = [(size, "random", 1, False) for size in _SIZES]
    kinds += [(Size(4, 1), "one", 1, False), (Size(2, 9), "one", 1, False)]
    if any(_is_float(value) for value in inputs):
        kinds.append((Size(2, 3), "zeros", 1, False))
    if large:
        kinds.append((_LARGE, "random", 3, True))  # some models have no position that far
    if any(_is_past(value) for value in inputs):
        kinds += [(size, "random", 1, True) for size in _CACHED]
    kinds.append((_EMPTY, "random", 1, True))
    drawn: list[Case] = []
    seen = set()
    for index, (size, kind, repeats, optional) in enumerate(kinds):
        for setting in _settings(flags, index):
            feeds = _drawn(model, size, kind, seed + index, setting, fixed)
            if size is _EMPTY and all(array.size for array in feeds.values()):
                continue
            shape = tuple((name, array.shape) for name, array in feeds.items())
            key = (shape, kind, setting)
            if key in seen and repeats == 1:
                continue  # a static axis: another draw of the same size says little more
            seen.add(key)
            label = _label(inputs, feeds, size) + {"random": "", "one": " one expert", "zeros": " ties"}[kind]
            if setting:
                label += " with flags off"
            drawn.append(Case(label, size, feeds, repeats, optional or setting != 0))
    return drawn


def _settings(flags: int, index: int) -> list[int]:
    """Bits of the flags that are off. The first cases have each flag off alone, and all of them."""
    if flags and index < 2:
        return sorted({0, (1 << flags) - 1, *(1 << flag for flag in range(min(flags, 4)))})
    return [0]


def sized_inputs(
    model: ir.Model, batch: int, sequence: int, *, past: int = 0, kind: Kind = "random", seed: int = 0
) -> dict[str, np.ndarray]:
    """Feeds for every input of the model.

    Args:
        model: its graph inputs say names, types and axes.
        batch: size of the batch axis.
        sequence: size of the sequence axis (new tokens). Inputs with one dynamic axis get both multiplied.
        past: cached tokens, for models with a key/value cache.
        kind: how values are drawn.
        seed: of the draw.

    Raises:
        ModelError: an input without a type or rank, or of a type that cannot be drawn.
    """
    return _drawn(model, Size(batch, sequence, past), kind, seed, 0, _cache_sizes(model))


def _cache_sizes(model: ir.Model) -> Sizes:
    return cache_sizes(model, lambda fixed: _drawn(model, Size(1, 2), "random", 0, 0, fixed))


def _drawn(
    model: ir.Model, size: Size, kind: Kind, seed: int, off: int, fixed: Sizes
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = _inputs(model)
    rows = not any(_is_sequence_axis(value, axis) for value in inputs for axis in range(1, _rank(value)))
    indices = lowered_indices(model)
    feeds, flag = {}, 0
    for value in inputs:
        shape = _shape(value, size, rows, fixed)
        if _is_flag(value):
            feeds[value.name or ""] = np.full(shape, not off >> flag & 1, np.bool_)
            flag += 1
        else:
            feeds[value.name or ""] = _draw(value, shape, size, kind, rng, indices)
    return feeds


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _is_past(value: ir.Value) -> bool:
    return "past" in (value.name or "").lower() and _is_float(value)


def _is_flag(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.BOOL and not _is_mask(value)


def _is_mask(value: ir.Value) -> bool:
    return "mask" in (value.name or "").lower() or (_rank(value) > 0 and meaning(value, {}).mask)


def _label(inputs: list[ir.Value], feeds: dict[str, np.ndarray], size: Size) -> str:
    """The shape of the main input, without its features."""
    if not inputs:
        return "no input"
    side = ("mask", "position", "past")
    main = [
        value for value in inputs if _rank(value) and not any(word in (value.name or "") for word in side)
    ]
    value = (main or inputs)[0]
    shape = feeds[value.name or ""].shape
    if _is_float(value) and len(shape) > 1:
        shape = shape[:-1]
    text = "x".join(map(str, shape)) if shape else "scalar"
    if len(shape) == 1:
        text += " token" if shape[0] == 1 else " tokens"
    return f"{text} after {size.past}" if size.past else text


def _rank(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None:
        raise ModelError(
            "has neither shape nor type", "run shape inference first", where=f"input '{value.name}'"
        )
    return len(value.shape)


def _is_sequence_axis(value: ir.Value, axis: int) -> bool:
    assert value.shape is not None
    return not isinstance(value.shape[axis], int)


def _shape(value: ir.Value, size: Size, rows: bool, fixed: Sizes) -> tuple[int, ...]:
    assert value.shape is not None
    shape = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        known = fixed.get((value.name or "", axis))
        if known is not None:
            shape.append(known)
            continue
        name = (dim.value or "").lower()
        if rows and axis == 0:
            shape.append(size.batch * size.sequence)
        elif "batch" in name or (axis == 0 and not re.search("seq|len|token|time", name)):
            shape.append(size.batch)
        elif "total" in name or ("past" in name and "+" in name) or _is_total_mask(value, axis, size):
            shape.append(size.past + size.sequence)
        elif axis >= 2 and _is_image(value, fixed):
            shape.append(16 + size.sequence)  # large enough for what convolutions and pools take away
        elif "past" in name or (len(value.shape) == 4 and axis == 2):
            shape.append(size.past)
        else:
            shape.append(size.sequence)
    return tuple(shape)


def _is_image(value: ir.Value, fixed: Sizes) -> bool:
    """``[batch, channels, height, width]`` with open height and width; a cache's last axis is the size of a head."""
    assert value.shape is not None
    if len(value.shape) != 4 or not _is_float(value) or _is_past(value):
        return False
    open_axes = [
        not isinstance(value.shape[axis], int) and (value.name or "", axis) not in fixed for axis in range(4)
    ]
    return open_axes[2] and open_axes[3]


def _is_total_mask(value: ir.Value, axis: int, size: Size) -> bool:
    return size.past > 0 and "mask" in (value.name or "") and axis > 0


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _draw(
    value: ir.Value,
    shape: tuple[int, ...],
    size: Size,
    kind: Kind,
    rng: np.random.Generator,
    indices: Mapping[str, int],
) -> np.ndarray:
    if value.dtype is None or not (
        value.dtype.is_floating_point() or value.dtype.is_integer() or _is_mask(value)
    ):
        raise ModelError(f"type {value.dtype} cannot be drawn", where=f"input '{value.name}'")
    dtype = value.dtype.numpy()
    if value.dtype.is_floating_point():
        if kind == "zeros":
            return np.zeros(shape, dtype)
        if kind == "one" and shape and shape[-1:] != (0,):
            return np.broadcast_to(rng.standard_normal(shape[-1]), shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)
    name = (value.name or "").lower()
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name:
        counted = np.arange(size.past, size.past + (shape[-1] if shape else 1))
        rows = meaning(value, indices).bound
        counted = counted if rows is None else np.minimum(counted, rows - 1)
        return np.broadcast_to(counted if shape else counted[0], shape).astype(dtype)
    means = meaning(value, indices)
    if means.mask or (means.bound is None and not shape):  # a count or a length: one of them
        return np.ones(shape, dtype)
    bound = max(1, _UNKNOWN if means.bound is None else means.bound)
    if kind == "one":
        return np.full(shape, rng.integers(bound), dtype)
    if means.experts is None:
        return rng.integers(0, bound, shape).astype(dtype)
    slots = math.prod(shape)
    drawn = np.resize(rng.permutation(bound), slots)  # every expert as often as the next
    rng.shuffle(drawn)
    if means.droppable and slots > 1:
        drawn[rng.random(slots) < _DROPPED] = means.experts
    return drawn.reshape(shape).astype(dtype)

"""Operators that only move or pick elements: where a slice of their result was before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparse_onnx.export.lifting.program import Program, name_of, value_of

_SAME = (
    "aten::alias",
    "aten::detach",
    "aten::contiguous",
    "aten::clone",
    "aten::lift_fresh_copy",
    "aten::view_as",
)
_CONVERSIONS = ("aten::_to_copy", "aten::to")
_RESHAPES = (
    "aten::view",
    "aten::reshape",
    "aten::flatten",
    "aten::_unsafe_view",
    "aten::ravel",
    "aten::unflatten",
)
_SQUEEZES = ("aten::squeeze",)


def is_copy(node: fx.Node) -> bool:
    """Whether zeros, and only they, become zeros - and numbers stay themselves."""
    if name_of(node) in _SAME:
        return True
    if name_of(node) not in _CONVERSIONS:
        return False
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or after.dtype == torch.bool:
        return isinstance(before, Tensor) and before.dtype == torch.bool
    if before.dtype == torch.bool or before.dtype == after.dtype:
        return True
    # A narrower type would wrap; a float would be cut.
    return not before.dtype.is_floating_point and (
        after.dtype.is_floating_point
        or (
            holds_all(before.dtype, after.dtype)
            and torch.iinfo(after.dtype).min <= torch.iinfo(before.dtype).min
        )
    )


def holds_all(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a type of integers goes as far up as another."""
    return torch.iinfo(after).max >= torch.iinfo(before).max


def keeps_sign(node: fx.Node) -> bool:
    """Whether a conversion makes no number from 0 on negative: a narrower integer would wrap."""
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or after.dtype.is_complex:
        return False
    if after.dtype.is_floating_point or after.dtype == torch.bool or before.dtype == torch.bool:
        return True
    if before.dtype.is_floating_point:
        source = name_of(node.args[0])  # counts of elements, and shares of 1, fit
        return source in ("aten::softmax", "aten::_softmax", "aten::sigmoid") or (
            source == "aten::histc" and after.dtype.itemsize >= 4
        )
    return holds_all(before.dtype, after.dtype)


def is_wide(dtype: torch.dtype) -> bool:
    """Whether sums do not wrap, as those of more integers than memory holds, or of floats."""
    return dtype.is_floating_point or dtype == torch.int64 or dtype == torch.int32


def base(program: Program, node: fx.Node, at: Mapping[int, int]) -> tuple[fx.Node, dict[int, int]]:
    """The earliest tensor that holds the same elements, and the slice of it."""
    where = dict(at)
    while True:
        step = _before(program, node, where)
        if step is None:
            return node, where
        node, where = step


def _before(program: Program, node: fx.Node, at: dict[int, int]) -> tuple[fx.Node, dict[int, int]] | None:
    name, args = name_of(node), node.args
    source = args[0] if args else None
    if getattr(node.target, "__name__", "") == "getitem":
        return _of_sequence(node, at)
    if not isinstance(source, fx.Node) or not isinstance(value_of(node), Tensor):
        return None
    before = value_of(source)
    if not isinstance(before, Tensor):
        return None
    shared = program.current(node) and program.unchanged_since(source, node)
    if is_copy(node):
        return (source, at) if shared or name in ("aten::alias", "aten::detach") else None
    if name == "aten::select" and isinstance(args[1], int) and isinstance(args[2], int):
        return source, _selected(at, args[1] % before.dim(), args[2], before)
    if name == "aten::index" and shared:
        return _constant_index(program, node, at)
    if name == "aten::slice":
        return _single(node, at)
    if name == "aten::unsqueeze":
        dim = args[1] % value_of(node).dim()
        return source, {d - (d > dim): i for d, i in at.items() if d != dim}
    if name in _SQUEEZES:
        return source, _unsqueezed(node, at)
    if name in (
        "aten::permute",
        "aten::transpose",
        "aten::t",
        "aten::numpy_T",
        "aten::movedim",
        "aten::swapaxes",
    ):
        order = _order(node)
        return None if order is None else (source, {order[d]: i for d, i in at.items()})
    if name in _RESHAPES:
        where = _reshaped(before, value_of(node), at)
        return None if where is None else (source, where)
    return None


def _of_sequence(node: fx.Node, at: dict[int, int]) -> tuple[fx.Node, dict[int, int]] | None:
    """An element of `unbind`."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return None
    sequence, index = node.args
    if not isinstance(sequence, fx.Node) or name_of(sequence) != "aten::unbind" or not isinstance(index, int):
        return None
    source = sequence.args[0]
    if not isinstance(source, fx.Node):
        return None
    before = value_of(source)
    dim = sequence.args[1] if len(sequence.args) > 1 else 0
    return source, _selected(at, int(dim) % before.dim(), index, before)  # type: ignore[arg-type]


def _single(node: fx.Node, at: Mapping[int, int]) -> tuple[fx.Node, dict[int, int]] | None:
    """`x[3:4]` is `x[3]`."""
    source, (dim, start, end) = node.args[0], (*node.args[1:4], 0, None, None)[:3]
    plain = all(isinstance(each, int) for each in (dim, start, end)) and len(node.args) <= 4
    if not plain or not isinstance(source, fx.Node) or not 0 <= start == end - 1:  # type: ignore[operator]
        return None
    dim = int(dim) % value_of(source).dim()  # type: ignore[call-overload, arg-type]
    return source, {**{d: i for d, i in at.items() if d != dim}, dim: int(start)}  # type: ignore[call-overload, arg-type]


def _selected(at: Mapping[int, int], dim: int, index: int, before: Tensor) -> dict[int, int]:
    size = before.shape[dim]
    if index < 0 and isinstance(size, int):
        index += size
    return {**{d + (d >= dim): i for d, i in at.items()}, dim: index}


def _constant_index(
    program: Program, node: fx.Node, at: dict[int, int]
) -> tuple[fx.Node, dict[int, int]] | None:
    """`x[tensor(3)]`, where the tensor is a constant of the trace."""
    source, indices = node.args
    given = [(dim, each) for dim, each in enumerate(indices) if each is not None]  # type: ignore[arg-type]
    if len(given) != 1 or not isinstance(source, fx.Node):
        return None
    dim, index = given[0]
    constant = program.constant(index)
    if constant is None or constant.numel() != 1 or constant.dtype == torch.bool or constant.dim() > 1:
        return None
    if constant.dim() == 1:  # the dimension stays, with one element
        at = {d - (d > dim): i for d, i in at.items() if d != dim}
    return source, _selected(at, dim, int(constant), value_of(source))


def _unsqueezed(node: fx.Node, at: Mapping[int, int]) -> dict[int, int]:
    before, dims = value_of(node.args[0]), node.args[1] if len(node.args) > 1 else None
    listed = range(before.dim()) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {int(d) % before.dim() for d in listed}  # type: ignore[call-overload, arg-type]
    gone = {d for d in gone if isinstance(before.shape[d], int) and before.shape[d] == 1}
    kept = [d for d in range(before.dim()) if d not in gone]
    return {kept[d]: i for d, i in at.items()}


def _order(node: fx.Node) -> list[int] | None:
    rank, name = value_of(node).dim(), name_of(node)
    if name == "aten::permute":
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    if name in ("aten::t", "aten::numpy_T"):
        return list(reversed(range(rank)))
    if name in ("aten::transpose", "aten::swapaxes"):
        first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload, arg-type]
        order = list(range(rank))
        order[first], order[second] = second, first
        return order
    source, target = node.args[1], node.args[2]
    listed = [[each] if isinstance(each, int) else list(each) for each in (source, target)]  # type: ignore[arg-type]
    moved = {t % rank: s % rank for s, t in zip(*listed, strict=True)}
    others = iter(d for d in range(rank) if d not in moved.values())
    return [moved[d] if d in moved else next(others) for d in range(rank)]


def _reshaped(before: Tensor, after: Tensor, at: Mapping[int, int]) -> dict[int, int] | None:
    """The slice where its dimensions are left alone: as many equal ones before it, or after it."""
    where = {}
    for dim, index in at.items():
        front = _equal(before.shape[: dim + 1], after.shape[: dim + 1])
        behind = after.dim() - dim
        back = behind <= before.dim() and _equal(before.shape[-behind:], after.shape[-behind:])
        if not front and not back:
            return None
        where[dim if front else before.dim() - behind] = index
    return where


def _equal(left: Any, right: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(left) == len(right) and all(
        statically_known_true(a == b) for a, b in zip(left, right, strict=True)
    )


def before_reduction(node: fx.Node, at: Mapping[int, int]) -> dict[int, int] | None:
    """The slice of a reduction's input that its output's slice sums up. None: it has other outputs too."""
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return {}
    listed = given if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(d, int) and not isinstance(d, bool) for d in listed):
        return None
    dims = {int(d) % before.dim() for d in listed}  # type: ignore[arg-type]
    if after.dim() == before.dim():
        return {d: i for d, i in at.items() if d not in dims}
    kept = [d for d in range(before.dim()) if d not in dims]
    return {kept[d]: i for d, i in at.items()}


def counting(program: Program, node: fx.Node) -> int | None:
    """The dimension along which a tensor counts 0, 1, 2, ..., all others being 1; None if it does not."""
    source, _ = node, None
    while name_of(source) in ("aten::view", "aten::reshape", "aten::unsqueeze", *_SAME, *_CONVERSIONS):
        source = source.args[0]  # type: ignore[assignment]
    if name_of(source) == "aten::arange":
        numbers = [each for each in source.args if isinstance(each, int)]
        plain = len(numbers) == len(source.args) and (
            len(numbers) == 1 or (numbers[0] == 0 and len(numbers) == 2)
        )
    else:
        constant = program.constant(source)
        plain = (
            constant is not None
            and constant.dim() == 1
            and constant.tolist() == list(range(constant.numel()))
        )
    wide = [dim for dim, size in enumerate(value_of(node).shape) if not (isinstance(size, int) and size == 1)]
    return wide[0] if plain and len(wide) == 1 else None


def same_values(node: fx.Node) -> fx.Node | None:
    """What an operator takes all its elements from, leaving none out: sorting, `unique`."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        several, index = node.args
        if (
            isinstance(several, fx.Node)
            and index == 0
            and name_of(several)
            in (
                "aten::sort",
                "aten::_unique2",
                "aten::unique_dim",
                "aten::unique_consecutive",
            )
        ):
            source = several.args[0]
            return source if isinstance(source, fx.Node) else None
    if name_of(node) in ("aten::flip", "aten::roll"):
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    return None


def selecting_mask(made: fx.Node, symbol: Any) -> fx.Node | None:
    """The mask whose true elements a new size counts: that of `nonzero`, of indexing by booleans."""
    name = name_of(made)
    if name in ("aten::nonzero", "aten::nonzero_numpy", "aten::argwhere", "aten::where"):
        return made.args[0] if len(made.args) == 1 and isinstance(made.args[0], fx.Node) else None
    if name == "aten::masked_select":
        return made.args[1] if isinstance(made.args[1], fx.Node) else None
    if name == "aten::index":
        masks = [
            each
            for each in made.args[1]  # type: ignore[union-attr]
            if isinstance(each, fx.Node) and value_of(each).dtype in (torch.bool, torch.uint8)
        ]
        return masks[0] if len(masks) == 1 else None
    return None

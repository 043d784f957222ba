"""Questions about a program's tensors and sizes under facts that are known: what is zero, absent, empty."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from sparse_onnx.export.lifting import views
from sparse_onnx.export.lifting.program import Program, expression, is_integer, name_of, value_of

#: A slice: dimension -> index.
At = Mapping[int, int]
ALL: At = {}

REDUCTIONS = ("aten::any", "aten::sum", "aten::count_nonzero", "aten::amax", "aten::max")
_BLANK = ("aten::zeros", "aten::zeros_like", "aten::new_zeros")
_NON_NEGATIVE = (
    "aten::one_hot",
    "aten::bincount",
    "aten::histc",
    "aten::softmax",
    "aten::_softmax",
    "aten::sigmoid",
    "aten::relu",
    "aten::abs",
    "aten::count_nonzero",
    "aten::any",
    *_BLANK,
)
#: All zero where their first argument is.
_KEEP_ZERO = (
    "aten::slice",
    "aten::index",
    "aten::gather",
    "aten::index_select",
    "aten::expand",
    "aten::repeat",
    "aten::cumsum",
    "aten::abs",
    "aten::neg",
    "aten::relu",
    "aten::masked_select",
)
_SUMS, _CASTS = ("aten::sum", "aten::cumsum"), ("aten::to", "aten::_to_copy")
_PICKS = ("aten::slice", "aten::index", "aten::gather", "aten::index_select", "aten::expand", "aten::repeat")
#: Functions of sizes that are not negative where their arguments are not.
_KEEP_SIGN = frozenset(
    [
        "Add",
        "Mul",
        "Min",
        "TruncToInt",
        "TruncToFloat",
        "CeilToInt",
        "FloorToInt",
        "RoundToInt",
        "ToFloat",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloorDiv",
        "CleanDiv",
        "Mod",
        "PythonMod",
    ]
)
DEPTH = 60


class Known:
    """Facts of one program, under one condition: kept, and put to use."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._zero: list[tuple[fx.Node, dict[int, int]]] = []
        self._lacks: list[tuple[fx.Node, dict[int, int], int]] = []
        self._sizes: set[sympy.Symbol] = set()
        #: Formulas that are at most 0.
        self._not_positive: list[Any] = []

    def _matches(self, node: fx.Node, at: At) -> list[tuple[fx.Node, At, int]]:
        """`(index, slice, number)` such that this node's slice is all zero exactly where the index's holds the
        number nowhere."""
        name, args = name_of(node), node.args
        source = args[0] if args else None
        if not isinstance(source, fx.Node):
            return []
        if not self.program.unchanged_since(source, node) and not self._marks(node):
            return []
        if name == "aten::eq":
            return self._equal(node, at)
        rank = value_of(node).dim() if isinstance(value_of(node), Tensor) else 0
        if name == "aten::one_hot" and rank - 1 in at and is_integer(source):
            return [(source, {dim: i for dim, i in at.items() if dim != rank - 1}, at[rank - 1])]
        if name == "aten::bincount" and 0 in at and (len(args) < 2 or args[1] is None):
            return [(source, ALL, at[0])]
        if self._marks(node):
            dim, index = args[1], args[2]
            dim = dim % rank if isinstance(dim, int) else -1
            if set(at) == {dim} and isinstance(index, fx.Node) and self.program.unchanged_since(index, node):
                return [(index, ALL, at[dim])]
        return []

    def _marks(self, node: fx.Node) -> bool:
        """`zeros.scatter(dim, index, 1)`: something above zero at each index, zeros elsewhere."""
        args = node.args
        if name_of(node) not in ("aten::scatter", "aten::scatter_") or len(args) != 4:
            return False
        blank = isinstance(args[0], fx.Node) and name_of(args[0]) in _BLANK
        number = number_of(args[3])
        alone = name_of(node) == "aten::scatter" or self.program.only_write(node)
        return blank and alone and number is not None and number > 0

    def _equal(self, node: fx.Node, at: At) -> list[tuple[fx.Node, At, int]]:
        left, right = node.args[0], node.args[1]
        number = number_of(right)
        if number is None and isinstance(right, fx.Node):
            constant = self.program.constant(right)
            if constant is not None and constant.numel() == 1 and not constant.is_floating_point():
                number = int(constant)
        if number is not None and float(number).is_integer() and isinstance(left, fx.Node):
            same = value_of(left).dim() == value_of(node).dim()
            return [(left, at if same else ALL, int(number))] if same or not at else []
        for index, classes in ((left, right), (right, left)):
            if isinstance(classes, fx.Node) and isinstance(index, fx.Node):
                found = self._one_of(node, index, classes, at)
                if found is not None:
                    return [found]
        return []

    def _one_of(
        self, node: fx.Node, index: fx.Node, classes: fx.Node, at: At
    ) -> tuple[fx.Node, At, int] | None:
        """`index[..., None] == arange(E)` at one of the classes."""
        numbers, rank = views.counting(self.program, classes), value_of(node).dim()
        if numbers is None or value_of(index).dim() != rank:
            return None
        dim = rank - value_of(classes).dim() + numbers
        if set(at) != {dim} or value_of(index).shape[dim] != 1:
            return None
        return index, ALL, at[dim]

    def _counts(self, symbol: sympy.Symbol, made: fx.Node) -> bool:
        """Whether the symbol is never negative: a size, or the value of a tensor that is not."""
        if isinstance(value_of(made), (Tensor, list, tuple)):
            return True
        source = made.args[0] if made.args else None
        return isinstance(source, fx.Node) and self.non_negative(source)

    def non_negative(self, node: Any, depth: int = 0) -> bool:
        """Whether no element is ever below zero."""
        if not isinstance(node, fx.Node):
            number = number_of(node)
            return number is not None and number >= 0
        value = value_of(node)
        if not isinstance(value, Tensor) or depth > DEPTH or not self.program.current(node):
            return False
        name, wide = name_of(node), views.is_wide(value.dtype)
        if value.dtype in (torch.bool, torch.uint8) or self._marks(node) or (name in _NON_NEGATIVE and wide):
            return (
                name != "aten::bincount" or len(node.args) < 2 or node.args[1] is None
            )  # weights may be negative
        if (
            (name in _SUMS and wide)
            or name in _PICKS
            or (views.keeps_sign(node) if name in _CASTS else views.is_copy(node))
        ):
            return self.non_negative(node.args[0], depth + 1)
        if name in ("aten::mul", "aten::add", "aten::div") and len(node.args) == 2 and wide:
            return all(self.non_negative(each, depth + 1) for each in node.args)
        below, _ = views.base(self.program, node, ALL)
        return below is not node and self.non_negative(below, depth + 1)

    def zero(self, node: Any, at: At = ALL, depth: int = 0) -> bool:
        """Whether all of the tensor's slice is exactly zero, or false, under the facts."""
        if not isinstance(node, fx.Node) or depth > DEPTH:
            return number_of(node) == 0
        node, at = views.base(self.program, node, at)
        if any(known is node and _covers(where, at) for known, where in self._zero):
            return True
        if not self.program.current(node):
            return False
        follow = depth + 1
        name, args = name_of(node), node.args

        def known(value: Any, where: At = at) -> bool:
            fresh = not isinstance(value, fx.Node) or self.program.unchanged_since(value, node)
            return fresh and self.zero(value, where, follow)

        if name in _BLANK:
            return True
        if any(self.lacks(index, inner, number, follow) for index, inner, number in self._matches(node, at)):
            return True
        if name in _KEEP_ZERO or views.is_copy(node):
            return known(args[0], ALL)
        if name in REDUCTIONS:
            inner = views.before_reduction(node, at)
            return inner is not None and known(args[0], inner)
        if name in ("aten::gt", "aten::ne", "aten::ge"):
            return number_of(args[1]) == (1 if name == "aten::ge" else 0) and known(args[0])
        if name in ("aten::logical_and", "aten::bitwise_and", "aten::mul"):
            # Zero times infinity is not zero.
            finite = name != "aten::mul" or not value_of(node).dtype.is_floating_point
            return finite and any(known(each, self._aligned(node, each, at)) for each in args[:2])
        if name in ("aten::logical_or", "aten::bitwise_or", "aten::add", "aten::sub"):
            return all(known(each, self._aligned(node, each, at)) for each in args[:2])
        return False

    def _aligned(self, node: fx.Node, operand: Any, at: At) -> At:
        """The slice of an operand of the same rank; all of one that is broadcast."""
        value = value_of(operand)
        same = isinstance(value, Tensor) and value.shape == value_of(node).shape
        return at if same else ALL

    def lacks(self, node: Any, at: At, number: int, depth: int = 0) -> bool:
        """Whether the tensor's slice holds this integer nowhere."""
        if not isinstance(node, fx.Node) or depth > DEPTH:
            return False
        node, at = views.base(self.program, node, at)
        if any(
            known is node and value == number and _covers(where, at) for known, where, value in self._lacks
        ):
            return True
        source = views.same_values(node)
        if source is None and name_of(node) in _PICKS:
            source = node.args[0]
        if not isinstance(source, fx.Node) or not self.program.current(node):
            return False
        return self.program.unchanged_since(source, node) and self.lacks(source, ALL, number, depth + 1)

    def reduced(self, formula: Any, depth: int = 0) -> Any:
        """A size with every symbol that is known to be 0 put in."""
        if formula is None:
            return None
        for symbol in list(getattr(formula, "free_symbols", ())):
            if self._size_is_zero(symbol, depth):
                formula = formula.subs(symbol, 0)
        return self._decided(formula) if self._not_positive else formula

    def _decided(self, formula: Any) -> Any:
        """A formula with the smaller or larger of two sizes put in where it is known which one that is."""
        for each in sorted(_extremes(formula), key=sympy.count_ops):
            left, right = each.args
            if self.at_most(right, left):
                left, right = right, left
            elif not self.at_most(left, right):
                continue
            return self._decided(formula.subs(each, left if type(each).__name__ == "Min" else right))
        return formula

    def _size_is_zero(self, symbol: sympy.Symbol, depth: int) -> bool:
        if symbol in self._sizes:
            return True
        made = self.program.made.get(symbol)
        if made is None or depth > DEPTH:
            return False
        mask, zero = views.selecting_mask(made, symbol), False
        if mask is not None:
            zero = self.program.unchanged_since(mask, made) and self.zero(mask)
        elif name_of(made) in ("aten::item", "aten::_local_scalar_dense"):
            source = made.args[0]
            zero = (
                isinstance(source, fx.Node)
                and self.program.unchanged_since(source, made)
                and self.zero(source)
            )
        elif name_of(made) == "aten::slice":
            zero = self._slices_nothing(made, depth + 1)
        if zero:
            self._sizes.add(symbol)
        return zero

    def _slices_nothing(self, node: fx.Node, depth: int) -> bool:
        """Whether a slice starts where it ends, or beyond the end of its tensor."""
        bounds = self._bounds(node)
        if bounds is None:
            return False
        size, start, end = (self.reduced(each, depth) for each in bounds)
        return start == end or self.at_most(size, start)

    def slices_all(self, node: fx.Node) -> bool:
        """Whether a slice is its whole tensor."""
        bounds = self._bounds(node)
        return bounds is not None and bounds[1] == 0 and self.at_most(bounds[0], bounds[2])

    def _bounds(self, node: fx.Node) -> tuple[Any, Any, Any] | None:
        """Size, start and end of a slice by steps of 1, none of them counted from behind."""
        given = (*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :])
        dim, start, end, step = given
        if name_of(node) != "aten::slice" or step != 1 or not isinstance(dim, int):
            return None
        size = expression(value_of(node.args[0]).shape[dim])
        first = expression(0 if start is None else start)
        last = size if end is None or end == sys.maxsize else expression(end)
        return None if not self.from_zero(first) or not self.from_zero(last) else (size, first, last)

    def from_zero(self, formula: Any) -> bool:
        """Whether a number or formula is never negative."""
        if formula is None:
            return False
        if formula.is_number:
            return bool(formula >= 0)
        if formula.is_Symbol:
            made = self.program.made.get(formula)
            return formula.is_nonnegative is True if made is None else self._counts(formula, made)
        name = type(formula).__name__
        if name == "Max":
            return any(self.from_zero(each) for each in formula.args)
        return name in _KEEP_SIGN and all(self.from_zero(each) for each in formula.args)

    def at_most(self, left: Any, right: Any) -> bool:
        """Whether one size is known to be no larger than another, which is not negative."""
        difference = sympy.expand(left - right)
        return any(difference == known for known in self._not_positive)

    def empty(self, node: Any) -> bool:
        """Whether the tensor has no element."""
        value = value_of(node)
        if not isinstance(value, Tensor):
            return False
        return any(self.reduced(expression(size)) == 0 for size in value.shape)

    def shape(self, node: Any) -> list[Any]:
        return [self.reduced(expression(size)) for size in value_of(node).shape]


def _extremes(formula: Any) -> list[Any]:
    every = sympy.preorder_traversal(formula) if isinstance(formula, sympy.Basic) else ()
    return [each for each in every if type(each).__name__ in ("Min", "Max") and len(each.args) == 2]


def _covers(known: At, asked: At) -> bool:
    return all(asked.get(dim) == index for dim, index in known.items())


def negated(formula: Any) -> Any:
    is_truth = isinstance(formula, (sympy.logic.boolalg.Boolean, bool))
    return sympy.Not(formula) if is_truth else sympy.Eq(formula, 0)


def number_of(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None

"""Loops over the experts that were hit: `for expert in hit:`, where how many there are depends on the routing.

The loop goes over all experts instead, each turn under the condition that its expert was hit. That is the same
loop if the hits are distinct integers below a known number, in ascending order: those of `nonzero` of a mask
over experts, and of `unique` of an index that comes from `topk`, `argmax` and the like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.lifting import graph_edits, views
from sparse_onnx.export.lifting.program import Program, data_dependent, name_of, tracing, value_of
from sparse_onnx.export.lifting.values import Place, refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
_HINT = "loop over all experts, range(number of experts), or write an adapter (--adapter)"


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """`tensor.tolist()` of a length that depends on tensors: good for looping over it, and as an index. A set has no
    order to rely on. All else that Python asks of it is refused, for it would be answered without the graph."""

    tensor: Tensor
    place: Place
    ordered: bool = True

    def refusal(self) -> ImpossibleError:
        return refuse(self.place, "makes a Python list of a length that depends on tensor values", _HINT)

    def as_index(self) -> Tensor:
        """What picks the same as this list does, which is a copy of the tensor as it was. A list of truths is no mask
        to rely on, and one of lists is an index of several axes to some."""
        if not self.ordered or self.tensor.dim() != 1 or self.tensor.dtype not in INTEGERS:
            raise self.refusal()
        return self.tensor

    def _refused(self, *args: Any) -> Any:
        raise self.refusal()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what libraries look for to tell kinds of objects apart
            raise AttributeError(name)
        raise self.refusal()

    __len__ = __iter__ = __getitem__ = __setitem__ = __delitem__ = __bool__ = __reversed__ = _refused
    __add__ = __radd__ = __mul__ = __rmul__ = __contains__ = _refused
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refused
    __sub__ = __rsub__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refused
    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True)
class _Hits:
    """The numbers below `count` at which `source` is true, or that it holds."""

    source: fx.Node
    count: int
    is_mask: bool


def of(items: Any, runtime: Runtime, place: Place | None) -> Iterator[tuple[Any, Any]] | None:
    """`(condition, item)` for each turn that the loop may have; None for loops of a length known in the trace."""
    place = place or ("", 0, "")
    tensor = items.tensor if isinstance(items, Numbers) else items
    if isinstance(tensor, Numbers) or not isinstance(tensor, Tensor) or tracing() is None or not tensor.dim():
        return None
    if isinstance(items, Numbers) and not items.ordered:
        raise refuse(place, "loops over a set of tensor values, in no certain order", "use sorted(...)")
    length = tensor.shape[0]
    if isinstance(length, torch.SymInt) and not data_dependent(length):
        raise refuse(place, "loops in Python over a dynamic axis", "use tensor operations, or make it static")
    if not data_dependent(length):
        return None
    program = _program(runtime)
    node = graph_edits.node_of(tensor)
    hits = _found(program, node) if node is not None else None
    if hits is None or any(not isinstance(size, int) or size != 1 for size in tensor.shape[1:]):
        raise refuse(place, "loops over tensor values that are not known to be distinct experts", _HINT)
    return _turns(hits, program, tensor, isinstance(items, Numbers))


def _turns(hits: _Hits, program: Program, tensor: Tensor, numbers: bool) -> Iterator[tuple[Any, Any]]:
    source = graph_edits.readable(hits.source)
    for expert in range(hits.count):
        present = source.select(0, expert).bool() if hits.is_mask else (source == expert).any()
        if numbers and tensor.dim() == 1:
            yield present, expert
        elif numbers:
            yield present, [expert]
        else:
            yield present, _constant(expert, tensor)


def _constant(expert: int, tensor: Tensor) -> Tensor:
    """A tensor whose value the trace knows, so that it indexes a ModuleList."""
    value: Any = expert
    for _ in tensor.shape[1:]:
        value = [value]
    return torch.tensor(value, dtype=tensor.dtype)


def _found(program: Program, node: fx.Node) -> _Hits | None:
    """The mask or index that hits come from."""
    while True:
        if not program.current(node):
            return None
        earlier = _earlier(node)
        if earlier is None:
            break
        node = earlier
    name, source = name_of(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name in ("aten::nonzero", "aten::argwhere", "aten::nonzero_numpy", "aten::where"):
        mask = value_of(source)
        if mask.dim() == 1 and isinstance(mask.shape[0], int) and program.unchanged_since(source, node):
            return _Hits(source, mask.shape[0], True)
    ascending = len(node.args) < 2 or node.args[1] is not False
    if name == "aten::_unique2" and ascending:
        count = bound(program, source)
        if count is not None and program.unchanged_since(source, node):
            return _Hits(source, count, False)
    return None


def _earlier(node: fx.Node) -> fx.Node | None:
    """What holds the same hits in the same order."""
    name, args = name_of(node), node.args
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        several, index = args
        if isinstance(several, fx.Node) and index == 0:
            if name_of(several) == "aten::unbind":
                column = _is_column(several.args[0]) and several.args[1:] in ((1,), (-1,))
                return several.args[0] if column else None  # type: ignore[return-value]
            if name_of(several) in ("aten::_unique2", "aten::nonzero_numpy", "aten::where"):
                return several
        return None
    source = args[0] if args else None
    if not isinstance(source, fx.Node):
        return None
    moved = (
        "aten::squeeze",
        "aten::view",
        "aten::reshape",
        "aten::flatten",
        "aten::unsqueeze",
        "aten::select",
    )
    if views.is_copy(node) or (name in moved and _is_column(source)):
        return source
    return None


def _is_column(node: Any) -> bool:
    """Whether a tensor has one element a row, so that reshaping keeps which and in what order."""
    value = value_of(node)
    sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
    return len(sizes) >= 1 and all(isinstance(size, int) and size == 1 for size in sizes[1:])


def _program(runtime: Runtime) -> Program:
    program = Program(tracing().tracer.graph, tracing().tracer.root)
    program.count_writes()
    program.bounds = runtime.bounds()
    return program


def bound_of(tensor: Tensor, runtime: Runtime) -> int | None:
    """A number that all elements of a tensor of the trace, integers from 0 on, stay below."""
    node = graph_edits.node_of(tensor)
    return None if node is None else bound(_program(runtime), node)


def bound(program: Program, node: Any, depth: int = 0) -> int | None:
    """A number that all elements, which are integers from 0 on, stay below."""
    if not isinstance(node, fx.Node) or depth > 40 or not program.current(node):
        return None
    below, _ = views.base(program, node, {})
    if below is not node:
        return bound(program, below, depth + 1)
    if node in program.bounds:
        return program.bounds[node]
    name, args = name_of(node), node.args
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        several, index = args
        if (
            isinstance(several, fx.Node)
            and index == 1
            and name_of(several) in ("aten::topk", "aten::max", "aten::min", "aten::sort")
        ):
            position = 2 if name_of(several) == "aten::topk" else 1
            return _size(several, position)
        if (
            isinstance(several, fx.Node)
            and index == 0
            and name_of(several) in ("aten::sort", "aten::_unique2")
        ):
            return bound(program, several.args[0], depth + 1)
        return None
    if name in ("aten::argmax", "aten::argmin"):
        return _size(node, 1)
    if name == "aten::argsort":
        return _size(node, 1)
    if name == "aten::multinomial":
        return _static(value_of(args[0]).shape[-1])
    if name == "aten::remainder" and isinstance(args[1], int) and args[1] > 0:
        return args[1]
    if name in (
        "aten::slice",
        "aten::index",
        "aten::gather",
        "aten::index_select",
        "aten::expand",
        "aten::masked_select",
    ):
        return bound(program, args[0], depth + 1)
    if name in ("aten::cat", "aten::stack"):
        each = [bound(program, part, depth + 1) for part in args[0]]  # type: ignore[union-attr]
        return None if None in each or not each else max(each)  # type: ignore[type-var]
    return None


def bounds(module: nn.Module) -> dict[str, int]:
    """Of each buffer of integers from 0 on, such as hash routing's table of experts, a number that they stay below;
    the graph holds them as they are. Not to be asked in a trace."""
    tables = {
        name: table for name, table in module.named_buffers() if table.dtype in INTEGERS and table.numel()
    }
    return {name: int(table.max()) + 1 for name, table in tables.items() if int(table.min()) >= 0}


def _size(node: fx.Node, position: int) -> int | None:
    source = value_of(node.args[0])
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1)
    return _static(source.shape[dim]) if isinstance(dim, int) and not isinstance(dim, bool) else None


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None

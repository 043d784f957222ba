"""The turns of a loop, each with whether the loop has it for every input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_onnx.export.lifting import graph_edits, hits
from sparse_onnx.export.lifting.program import Program, tracing
from sparse_onnx.export.lifting.values import Place, SomeItems

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime


def of(items: Any, runtime: Runtime, place: Place) -> Iterator[tuple[Any, Any]]:
    """`(present, item)` of each."""
    if isinstance(items, SomeItems) and items.place is not None:
        return _of_some(items, runtime)
    found = hits.of(items, runtime, place)
    return found if found is not None else ((True, item) for item in items)


def _of_some(items: SomeItems, runtime: Runtime) -> Iterator[tuple[Any, Any]]:
    _unwritten(items)
    turns = items.turns()
    for missing, item in turns:
        yield _there(runtime, missing), item
        if list.__len__(items) != len(turns):  # a loop that adds to its own list goes on with what it added
            raise items._error()


def _unwritten(items: SomeItems) -> None:
    """Refuses a list where a condition of its items, a tensor, was written to since."""
    program = Program(tracing().tracer.graph, tracing().tracer.root)
    program.count_writes()
    for each in items.conditions.values():
        for condition, _ in each:
            node = graph_edits.node_of(condition) if isinstance(condition, Tensor) else None
            if isinstance(condition, SomeItems) or (node is not None and not program.current(node)):
                raise items._error()


def _there(runtime: Runtime, missing: list[tuple[Any, bool]]) -> Any:
    """Whether an item of a list is there that is missing where these conditions are so."""
    there: Any = True
    for condition, truth in missing:
        one = runtime.negated(condition) if truth else condition
        there = one if there is True else torch.logical_and(as_tensor(there), as_tensor(one))
    return there


def as_tensor(value: Any) -> Tensor:
    """A truth of the trace as a tensor."""
    return value if isinstance(value, Tensor) else torch.scalar_tensor(torch.sym_ite(value, 1, 0)).bool()

"""What rewritten code calls: it decides what is a Python value, and lifts what depends on tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparse_onnx.export.lifting import (
    choice,
    functions,
    graph_edits,
    hits,
    kinds,
    substitutes,
    texts,
    trials,
    truths,
    turns,
)
from sparse_onnx.export.lifting.branch import Concrete, Lifted
from sparse_onnx.export.lifting.program import Sym, data_dependent, storage, tracing, writes
from sparse_onnx.export.lifting.values import Count, Negated, Place, SomeItems, Undefined, refuse, written

_ADAPTER = "write an adapter (--adapter)"
_USE_TENSORS = f"use tensor operations there, or {_ADAPTER}"


#: A loop that is left from inside, in another such loop, doubles what is traced with each turn.
_MOST_BRANCHES = 2000


class Runtime:
    """One trace of one module. Its methods are what rewritten code asks for, and are not for others."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.open: list[Lifted] = []
        #: The `try` statements around what runs now that handle errors.
        self.tried: list[Place] = []
        self.notes: list[str] = []
        self._present: Any = True
        self._branches = 0
        self._watched: list[tuple[Place, int, int]] = []
        self._functions = functions.Functions(self)
        self._bounds = hits.bounds(module)

    def bounds(self) -> dict[fx.Node, int]:
        """What the module's buffers of integers stay below, by their placeholders in the trace."""
        now = dict(self.module.named_buffers())
        nodes = {name: graph_edits.node_of(now[name]) for name in self._bounds if name in now}
        # Once a buffer is written to, another node stands for it.
        return {
            node: self._bounds[name]
            for name, node in nodes.items()
            if node is not None and node.op == "placeholder"
        }

    def note(self, place: Place, text: str) -> None:
        note = f"{written(place)} {text}"
        if note not in self.notes:
            self.notes.append(note)

    def watch(self, place: Place, *values: Any) -> None:
        """Two tensors that are equal, of which one stands for both from now on: neither may be written to."""
        mode = tracing()
        position = len(mode.tracer.graph.nodes)
        for value in values:
            if isinstance(value, Tensor):
                key = storage(value)
                if key is not None:
                    self._watched.append((place, key, position))

    def finish(self) -> None:
        """Checks what can be known at the end only.

        Raises:
            ImpossibleError: a tensor that stands for two was written to.
        """
        mode = tracing()
        if mode is None or not self._watched:
            return
        for position, node in enumerate(mode.tracer.graph.nodes):
            changed = {storage(target) for target in writes(node)}
            for place, key, since in self._watched:
                if key in changed and position >= since:
                    raise refuse(
                        place,
                        "depends on tensor values and rebinds a tensor that is written to later",
                        _USE_TENSORS,
                    )

    def concrete(self, value: Any, place: Place) -> Any:
        """A condition where both sides cannot be run."""
        if self._depends(value):
            raise refuse(
                place,
                "depends on tensor values and leaves its loop or function from within another statement",
                _USE_TENSORS,
            )
        return value

    def _depends(self, value: Any) -> bool:
        """Whether the truth of a value is not known in the trace."""
        if isinstance(value, (Count, Negated)):
            value = value.items
        if isinstance(value, SomeItems):
            return value.place is not None and not value.surely_some()
        if isinstance(value, Tensor):
            return tracing() is not None and getattr(value, "constant", None) is None and truths.fake(value)
        if isinstance(value, Sym) and data_dependent(value):
            return truths.known(value) is None
        return isinstance(value, hits.Numbers)

    def branch(
        self,
        value: Any,
        place: Place,
        values: Mapping[str, Any],
        names: tuple[str, ...],
        read_later: frozenset[str],
    ) -> Concrete | Lifted:
        if not self._depends(value):
            return Concrete(truths.truth(value), place)
        if isinstance(value, Count):
            value = value.items
        truth = not isinstance(value, Negated)
        condition = self._condition(value if truth else value.items, place)
        self._branches += 1
        if self._branches > _MOST_BRANCHES:
            raise refuse(place, f"is one of more than {_MOST_BRANCHES} branches of one trace", _USE_TENSORS)
        return Lifted(self, condition, place, values, names, read_later, truth)

    def _condition(self, value: Any, place: Place) -> Any:
        if isinstance(value, hits.Numbers):
            raise refuse(place, "tests how many experts are hit", _USE_TENSORS)
        if isinstance(value, torch.SymInt):
            return value != 0
        if isinstance(value, Tensor) and value.numel() != 1:
            raise refuse(place, f"is a tensor of shape {tuple(value.shape)}, not one truth", _USE_TENSORS)
        return value

    def select(self, value: Any, then: Callable[[], Any], other: Callable[[], Any], place: Place) -> Any:
        """`then if value else other`."""
        branch = self.branch(value, place, {}, ("result",), frozenset({"result"}))
        result = None
        while branch.more():
            branch.leave({"result": then() if branch.side else other()})
            result = branch.value("result")
        return result

    def both(self, place: Place, asks_truth: bool, *values: Callable[[], Any]) -> Any:
        """`a and b`: the first that is false, else the last; of which only the truth is asked for, or all."""
        return self._joined(place, asks_truth, values, torch.logical_and, True)

    def either(self, place: Place, asks_truth: bool, *values: Callable[[], Any]) -> Any:
        """`a or b`: the first that is true, else the last."""
        return self._joined(place, asks_truth, values, torch.logical_or, False)

    def _joined(
        self, place: Place, asks_truth: bool, values: Iterable[Callable[[], Any]], join: Any, goes_on: bool
    ) -> Any:
        result: Any = goes_on
        depends = False
        for thunk in values:
            value = thunk()
            if not asks_truth and (depends or self._depends(value)) and not truths.is_truth(value):
                raise refuse(
                    place, "gives one of several values by `and` or `or` of tensor values", _USE_TENSORS
                )
            if not depends and not self._depends(value):
                if truths.truth(value) != goes_on:
                    return value
                result = value
                continue
            truth = self._as_truth(value, place)
            if not depends:
                result, depends = truth, True
            elif isinstance(result, torch.SymBool) and isinstance(truth, torch.SymBool):
                result = result & truth if join is torch.logical_and else result | truth
            else:
                result = join(turns.as_tensor(result), turns.as_tensor(truth))
        return result

    def _as_truth(self, value: Any, place: Place) -> Any:
        if not self._depends(value):
            return torch.full(
                (), truths.truth(value), dtype=torch.bool
            )  # a constant could not go into a branch's graph
        if isinstance(value, (SomeItems, Count, Negated)):
            raise refuse(place, "joins conditions of which one is a list of an unknown length", _USE_TENSORS)
        condition = self._condition(value, place)
        return condition.reshape(()).bool() if isinstance(condition, Tensor) else condition

    def negated(self, value: Any) -> Any:
        """`not value`."""
        if not self._depends(value):
            return not value
        if isinstance(value, (SomeItems, Count)):
            return Negated(value.items if isinstance(value, Count) else value)
        if isinstance(value, Negated):
            return value.items
        if isinstance(value, Tensor):
            return torch.logical_not(value)
        return value == 0 if isinstance(value, torch.SymInt) else torch.sym_not(value)

    def quotient(self, left: Any, right: Any, place: Place) -> Any:
        """`left // right`."""
        self.no_float_sizes(left, right, place)
        return left // right

    def remainder(self, left: Any, right: Any, place: Place) -> Any:
        """`left % right`."""
        if isinstance(left, str):
            return texts.formatted(left, right, place)
        self.no_float_sizes(left, right, place)
        return left % right

    def divisor(self, left: Any, right: Any, place: Place) -> Any:
        """The right side of `left //= right`."""
        self.no_float_sizes(left, right, place)
        return right

    def no_float_sizes(self, left: Any, right: Any, place: Place) -> None:
        """torch rounds a quotient of a symbolic size and a float otherwise than Python."""
        sizes = any(isinstance(each, Sym) for each in (left, right))
        if sizes and any(isinstance(each, (float, torch.SymFloat)) for each in (left, right)):
            raise refuse(
                place, "divides a size by a float without remainder", "use math.floor(a / b), or integers"
            )

    def contains(self, container: Any, item: Any, place: Place) -> Any:
        """`item in container`."""
        if isinstance(container, Tensor) and self._depends(container):
            return (container == item).any()
        if isinstance(container, hits.Numbers):
            return (container.tensor == item).any()
        one = isinstance(item, Tensor) and not item.dim() and self._depends(item)
        if type(container) in (tuple, list, set, frozenset, dict) and (one or data_dependent(item)):
            return self.either(
                place, True, *[functools.partial(operator.eq, item, each) for each in container]
            )
        return item in container

    def picked(self, container: Any, index: Any, place: Place) -> Any:
        """`container[index]`."""
        return choice.of(self, container, index, place)

    def call(self, function: Any, place: Place) -> Any:
        """What is called instead of a function: its rewritten form, or one that takes symbolic sizes."""
        return substitutes.find(function, self, place) or self._functions.find(function)

    def trying(self, place: Place, of_values: bool) -> trials.Trial:
        """Of the statements that an `except` is for; `of_values`: for errors that tensors' values may lead to."""
        return trials.Trial(self, place, of_values)

    def caught(self, place: Place) -> None:
        """At the start of an `except`."""
        trials.not_of_the_trace(place)

    def matched(self, value: Any, place: Place) -> Any:
        """What `match` compares with patterns of sequences, mappings and classes."""
        if kinds.stands_for_others(value):
            raise refuse(
                place, "matches patterns with what depends on tensor values", "use `if`, or " + _ADAPTER
            )
        return value

    def itself(self, value: Any, place: Place) -> Any:
        """What is compared with True or False by `is`, which no tensor is."""
        if self._depends(value):
            raise refuse(
                place, "asks by `is` for the truth of what depends on tensor values", "leave out `is`"
            )
        return value

    def shown(self, value: Any) -> Any:
        """A value in an f-string."""
        return texts.shown(self.read(value))

    def text(self, value: str, place: Place) -> str:
        """An f-string."""
        return texts.text(value, place)

    def asserted(self, value: Any, place: Place) -> Any:
        """The truth of an assertion; one that depends on tensors is left out of the graph."""
        if not self._depends(value):
            return value
        self.not_tried(place)
        self.note(place, "is not checked by the graph")
        return True

    def not_tried(self, place: Place) -> None:
        """Of an error that depends on tensors, which an `except` may be waiting for."""
        if self.tried:
            raise refuse(
                place,
                f"raises an error or not, as tensor values say, within {written(self.tried[-1])}",
                _USE_TENSORS,
            )

    def refuses(self, place: Place) -> bool:
        """Whether an error is raised on one side of a lifted branch only, which is then left out."""
        if self.open:
            self.not_tried(place)
            self.open[-1].raising = True
        return bool(self.open)

    def started(self, items: Any, place: Place) -> Iterator[Any]:
        """The items of a loop that is left half-way."""
        for present, item in turns.of(items, self, place):
            if present is not True:
                raise refuse(
                    place, "loops over what tensor values select, and leaves the loop half-way", _USE_TENSORS
                )
            yield item

    def iterate(self, items: Any, place: Place) -> Iterator[Any]:
        """The items of a loop. `present` says of each whether the loop has it."""
        for present, item in turns.of(items, self, place):
            self._present = present
            yield item

    def present(self) -> Any:
        return self._present

    def plainly(self, items: Any, place: Place) -> Any:
        """The items of a loop that cannot leave out some of them."""
        if hits.of(items, self, place) is not None:
            raise refuse(place, "loops over tensor values", _USE_TENSORS)
        return items

    def list(self, items: list[Any]) -> SomeItems:
        return SomeItems(items)

    def read(self, value: Any) -> Any:
        if type(value) is Undefined:
            raise value._error()
        return value

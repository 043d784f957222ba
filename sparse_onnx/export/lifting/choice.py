"""`self.experts[number](x)`, where the number is a tensor's: one branch for each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sparse_onnx.export.lifting import hits
from sparse_onnx.export.lifting.program import data_dependent, name_of, tracing
from sparse_onnx.export.lifting.values import Place, refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime


class Choice:
    """One of several modules, to be called."""

    def __init__(self, runtime: Runtime, modules: list[nn.Module], number: Any, place: Place) -> None:
        self.__dict__.update(_runtime=runtime, _modules=modules, _number=number, _place=place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime, modules, number, place = self._runtime, self._modules, self._number, self._place

        def called(position: int) -> Any:
            def this() -> Any:
                return modules[position](*args, **kwargs)

            if position == len(modules) - 1:
                return this()
            return runtime.select(number == position, this, lambda: called(position + 1), place)

        return called(0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what libraries look for to tell kinds of objects apart
            raise AttributeError(name)
        raise refuse(
            self._place,
            "asks for more than the answer of a module that tensor values choose",
            "call it only, or write an adapter (--adapter)",
        )


def of(runtime: Runtime, container: Any, index: Any, place: Place) -> Any:
    """`container[index]`."""
    if not isinstance(container, nn.ModuleList) or not isinstance(index, (Tensor, torch.SymInt)):
        return container[index]
    number = index
    if isinstance(index, Tensor) and all(isinstance(size, int) and size == 1 for size in index.shape):
        number = index.reshape(())
    if not (runtime._depends(number) if isinstance(number, Tensor) else data_dependent(number)):
        return container[index]
    bound = _bound(runtime, number)
    if bound is None or bound > len(container):
        raise refuse(
            place,
            "takes a module by a number that depends on tensor values and is not known to be one of them",
            "take it from argmax or topk over that many scores, or write an adapter (--adapter)",
        )
    if isinstance(number, Tensor):
        number = number.clone()  # it may be written to before the module is called
    return Choice(runtime, list(container)[:bound], number, place)


def _bound(runtime: Runtime, number: Any) -> int | None:
    """What a number from 0 on stays below."""
    if isinstance(number, Tensor):
        return hits.bound_of(number, runtime)
    program = hits._program(runtime)
    made: fx.Node | None = program.made.get(number.node.expr)
    if tracing() is None or made is None or name_of(made) not in ("aten::item", "aten::_local_scalar_dense"):
        return None
    source = made.args[0]
    current = isinstance(source, fx.Node) and program.unchanged_since(source, made)
    return hits.bound(program, source) if current else None

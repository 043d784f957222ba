"""Data-dependent Python control flow of a user's module, lifted into the graph where that is proved right.

The module's methods, and the user's functions that they call, run in a rewritten form while the module is
traced. Nothing else sees it: comparisons run the module as it is.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sparse_onnx.export.lifting import functions, intercept, strides, unshaped
from sparse_onnx.export.lifting.runtime import Runtime
from sparse_onnx.export.lifting.values import SomeItems, Undefined

__all__ = ["lifted"]

#: What Python's functions call the numbers of a trace, where they take none, such as the key of a dictionary.
_STAND_INS = re.compile(r"\bSym(Int|Float|Bool)\b")


@contextlib.contextmanager
def lifted(module: nn.Module) -> Iterator[Runtime]:
    """Within the block the module traces with its control flow lifted.

    Raises:
        ImpossibleError: in the trace, naming the line of a statement that cannot be lifted.
    """
    runtime = Runtime(module)
    changed: list[nn.Module] = []
    try:
        for each in module.modules():
            function = functions.forward_of(each)
            if function is not None:
                each.forward = types.MethodType(runtime._functions.of(function), each)
                changed.append(each)
        own = vars(module).get("forward")
        whole = module.forward

        @functools.wraps(whole)
        def forward(*args: Any, **kwargs: Any) -> Any:
            for each in module.modules():
                if isinstance(
                    each, nn.RNNBase
                ):  # which would do so on the first call, maybe on one side of a branch
                    each._update_flat_weights()
            try:
                with intercept.Calls():
                    result = _plain(whole(*args, **kwargs))
            except (GuardOnDataDependentSymNode, TypeError) as error:
                if isinstance(error, TypeError) and not _STAND_INS.search(str(error)):
                    raise
                raise runtime._functions.explained(error) from error
            if (place := unshaped.place_of_any(result)) is not None:
                raise unshaped.refusal(place)
            runtime.finish()
            return result

        module.forward = forward
        try:
            with strides.without_assumptions():
                yield runtime
        finally:
            del module.forward
            if own is not None:
                module.forward = own
    finally:
        for each in changed:
            del each.forward


def _plain(value: Any) -> Any:
    """Outputs with lists of Python's own kind."""
    if type(value) is Undefined:
        raise value._error()
    if isinstance(value, SomeItems):
        return [_plain(each) for each in value]
    if type(value) in (tuple, list):
        return type(value)(_plain(each) for each in value)
    return {key: _plain(each) for key, each in value.items()} if type(value) is dict else value

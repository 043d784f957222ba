"""`try` of the user's code: errors that come from the trace are not for it to handle, and those that torch raises for
some values only are not there in the trace."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.export.lifting import graph_edits
from sparse_onnx.export.lifting.program import data_dependent, name_of, tracing, value_of
from sparse_onnx.export.lifting.values import Place, refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

_HINT = "test for it instead (`if rows.numel() > 0`), or write an adapter (--adapter)"
#: Whose errors a plain run never meets.
_TRACERS = ("torch.fx", "torch._subclasses", "torch._dynamo", "torch._export", "torch.export")
#: Raise where a tensor has no elements, or fewer than they are to give.
_OF_SOME = frozenset(
    f"aten::{name}"
    for name in [
        *("max", "min", "amax", "amin", "aminmax", "argmax", "argmin"),
        *("median", "nanmedian", "mode", "kthvalue", "topk"),
    ]
)


class Trial:
    """The statements between `try` and its handlers."""

    def __init__(self, runtime: Runtime, place: Place, of_values: bool) -> None:
        self.runtime, self.place, self.of_values = runtime, place, of_values and tracing() is not None

    def __enter__(self) -> None:
        if self.of_values:
            self.graph: fx.Graph = tracing().tracer.graph
            self.mark = graph_edits.last(self.graph)
            self.runtime.tried.append(self.place)

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if not self.of_values:
            return
        self.runtime.tried.pop()
        if error is None and any(_may_raise(node) for node in graph_edits.since(self.graph, self.mark)):
            raise refuse(self.place, "handles an error that torch raises or not, as tensor values say", _HINT)


def _may_raise(node: fx.Node) -> bool:
    if name_of(node) not in _OF_SOME or not isinstance(before := value_of(node.args[0]), Tensor):
        return False
    return any(data_dependent(size) for size in before.shape)


def not_of_the_trace(place: Place) -> None:
    """Raises what is being handled again if the user's own run would not have met it."""
    error = sys.exc_info()[1]
    if isinstance(error, SparseOnnxError):
        raise error
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(_TRACERS):
            raise refuse(
                place,
                "would handle that Python cannot follow tensor values here, which is no error of torch's",
                _HINT,
            ) from error
        seen = seen.__cause__ or seen.__context__

"""Weights that a module holds without holding their values: a tensor class that reads them when it must."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import experts
from sparse_onnx.export.checkpoint import expression as expressions
from sparse_onnx.export.checkpoint.expression import Applied, Expression, aten, take, value

#: A larger matrix is multiplied by in blocks of rows of this many bytes.
BLOCK_BYTES = 64 << 20

#: Operators that only say where elements are to lie: never worth reading anything for.
_LAYOUT = {
    aten.cat.default,
    aten.stack.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten._to_copy.default,
}
_recording = 0


class Stored(torch.Tensor):
    """What an expression gives, computed anew by each operator that needs its elements, and then forgotten.

    Operators that only rearrange give such tensors again. Elements cannot be written.
    """

    expression: Expression

    # torch would give every result this class otherwise.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, expression: Expression) -> Stored:
        meta = expression.meta
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=torch.device("cpu")
        )
        made.expression = expression
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Stored({self.dtype}{list(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = (
                parameter(self.expression) if isinstance(self, nn.Parameter) else Stored(self.expression)
            )
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0].expression if args and isinstance(args[0], Stored) else None
        if first is not None and function in (aten.detach.default, aten.alias.default):
            return Stored(first)
        if first is not None and not kwargs and (parts := _parts(first, function, args)) is not None:
            return parts
        if function is torch.ops.sparse_onnx.moe.default:
            return experts.moe._init_fn(*args, **kwargs)  # the operator's own code takes expert by expert
        if function is aten._assert_tensor_metadata.default:
            return function(*tree_map_only(Stored, lambda tensor: tensor.expression.meta, args))
        if function is aten.embedding.default and first is not None:
            plain = expressions.uncast(first)
            return function(value(plain), *args[1:], **kwargs).to(first.dtype)
        if (
            function in (aten.mm.default, aten.addmm.default)
            and (wide := _in_blocks(function, args, kwargs)) is not None
        ):
            return wide
        if (function in _LAYOUT and _all_stored(args)) or (_recording and not function._schema.is_mutable):
            return _wrapped(
                expressions.apply(
                    function,
                    *tree_map_only(Stored, _expression, args),
                    **tree_map_only(Stored, _expression, kwargs),
                )
            )
        if function._schema.is_mutable and first is not None:
            raise ImpossibleError(
                f"a weight is changed in place by {function.name()}", "load it whole: --no-stream"
            )
        return function(*tree_map_only(Stored, _computed, args), **tree_map_only(Stored, _computed, kwargs))


def parameter(expression: Expression) -> nn.Parameter:
    """A module's parameter of that value."""
    return nn.Parameter(Stored(expression), requires_grad=False)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within the block no operator computes anything: all are noted, for what a checkpoint is converted by."""
    global _recording
    _recording += 1
    try:
        yield
    finally:
        _recording -= 1


def _all_stored(args: Any) -> bool:
    """Activations that are joined with a weight, say, are computed with: they may be written to."""
    return all(isinstance(each, Stored) for each in tree_leaves(args) if isinstance(each, torch.Tensor))


def _expression(tensor: Stored) -> Expression:
    return tensor.expression


def _computed(tensor: Stored) -> torch.Tensor:
    return value(tensor.expression)


def _wrapped(found: Any) -> Any:
    return [Stored(each) for each in found] if isinstance(found, list) else Stored(found)


def _parts(first: Expression, function: Any, args: Any) -> Any:
    """Slices along the first axis, which are found in what is stored."""
    axis = args[1] % len(first.shape) if len(args) > 1 and isinstance(args[1], int) and first.shape else 0
    if axis or not first.shape:
        return None
    size = first.shape[0]
    if function is aten.select.int:
        return Stored(take(first, args[2] % size))
    if function is aten.unbind.int:
        return [Stored(take(first, at)) for at in range(size)]
    if function is aten.slice.Tensor and (len(args) < 5 or args[4] == 1):
        start, stop, _ = slice(*(*args[2:4], None, None)[:2]).indices(size)
        return Stored(take(first, slice(start, max(start, stop))))
    if function is aten.index.Tensor and len(args[1]) == 1 and args[1][0] is not None:
        index = args[1][0]
        if index.dim() < 2 and index.dtype in (torch.int64, torch.int32):
            rows = [value(take(first, int(at) % size)) for at in index.reshape(-1)]
            return torch.stack(rows) if index.dim() else rows[0]
    return None


def _in_blocks(function: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """``rows @ weight.T`` for a weight too large to be converted at once, in blocks of its rows."""
    *_, rows, weight = args
    if (
        kwargs
        or not isinstance(weight, Stored)
        or isinstance(rows, Stored)
        or weight.expression.nbytes <= BLOCK_BYTES
    ):
        return None
    turned = weight.expression
    if not isinstance(turned, Applied) or turned.function not in (aten.t.default, aten.transpose.int):
        return None
    matrix = turned.args[0]
    step = max(1, BLOCK_BYTES * matrix.shape[0] // matrix.nbytes)
    blocks = [
        rows @ value(take(matrix, slice(start, min(start + step, matrix.shape[0])))).T
        for start in range(0, matrix.shape[0], step)
    ]
    product = torch.cat(blocks, dim=1)
    if function is aten.mm.default:
        return product
    bias = args[0]
    return product + (_computed(bias) if isinstance(bias, Stored) else bias)


def widened(module: nn.Module) -> nn.Module:
    """A copy of a module of stored weights that computes in float32."""
    wide = copy.deepcopy(module)
    known: dict[int, nn.Parameter] = {}
    for part in wide.modules():
        for name, old in part._parameters.items():
            if isinstance(old, Stored) and old.is_floating_point():
                part._parameters[name] = known.setdefault(id(old), parameter(_float32(old.expression)))
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = (
                    Stored(_float32(buffer.expression)) if isinstance(buffer, Stored) else buffer.float()
                )
    return wide


def _float32(expression: Expression) -> Expression:
    return expressions.apply(aten._to_copy.default, expression, dtype=torch.float32)


def is_stored(module: nn.Module) -> bool:
    """Whether a module's weights are left in its checkpoint."""
    return any(isinstance(each, Stored) for each in module.parameters())

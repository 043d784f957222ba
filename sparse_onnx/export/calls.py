"""Calls of a user's module that leave it as it was: an ONNX graph starts from the same weights and buffers each time.

A module may count its calls, keep the last routing, or update a balance of experts in a buffer. The answers that an
export is compared with are those of a first call; a model whose later ones differ is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.checkpoint.stored import is_stored
from sparse_onnx.export.lifting import state
from sparse_onnx.export.users import users_code

if TYPE_CHECKING:
    from sparse_onnx.export.sources import Source

#: Two calls that differ by no more than this, relative to the largest magnitude, are the same.
_SAME = 1e-6


@contextlib.contextmanager
def leaving_as_is(module: nn.Module) -> Iterator[None]:
    """Within the block the module may change its buffers, attributes and lists; behind it they are what they were."""
    if any(nn.parameter.is_lazy(each) for each in module.parameters()):
        yield  # the first call makes its weights
        return
    before = state.take(module, ())
    with keeping_buffers(module):
        try:
            yield
        finally:
            before.restore()


@contextlib.contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Within the block buffers may be written to; behind it they hold what they did."""
    values = _buffers(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not _equal(buffer, value):
                    buffer.copy_(value)


def refuse_memory(source: Source) -> None:
    """Calls a user's module twice with the same input.

    Raises:
        ImpossibleError: the second answer differs because of what the first call left behind.
        OutsideError: the module raises.
    """
    if source.is_transformers or is_stored(source.module):
        return
    module, inputs = source.module, source.interface.draw(source.interface.traced_sizes())
    with leaving_as_is(module), torch.random.fork_rng(devices=[]), users_code(source.name), torch.no_grad():
        before, values = state.take(module, ()), _buffers(module)
        torch.manual_seed(0)
        first = module(**inputs)
        changed = _changed(module, before, values)
        if not changed:
            return
        torch.manual_seed(0)
        if _same(first, module(**inputs)):
            return
    raise ImpossibleError(
        f"the model answers the same input otherwise when it is called again: each call changes {changed[0]}, and "
        "an ONNX graph remembers nothing",
        "leave such changes to training (`if self.training:`), or take that state as an input",
        where=source.name,
    )


def _buffers(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(buffer, buffer.detach().clone()) for buffer in module.buffers()]


def _changed(module: nn.Module, before: state.Snapshot, values: list[tuple[Tensor, Tensor]]) -> list[str]:
    """What a call changed, buffers first."""
    names = {id(buffer): name for name, buffer in module.named_buffers()}
    written = [id(buffer) for buffer, value in values if not _equal(buffer, value)]
    found = [f"the buffer '{names.get(each, '?')}'" for each in written]
    for holder, there, here in before.changed(state.take(module, ())):
        keys: Mapping[Any, Any] = there if isinstance(there, Mapping) and isinstance(here, Mapping) else {}
        other = [key for key in {**keys, **(here if keys else {})} if keys.get(key) is not here.get(key)]
        found.append(f"{other[0]!r} of {type(holder).__name__}" if other else f"a {type(holder).__name__}")
    return found


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _same(first: Any, second: Any) -> bool:
    left, right = (
        [each for each in torch.utils._pytree.tree_leaves(all_) if isinstance(each, Tensor)]
        for all_ in (first, second)
    )
    return len(left) == len(right) and all(_close(a, b) for a, b in zip(left, right, strict=True))


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.dtype.is_floating_point:
        return bool(torch.equal(left, right))
    scale = float(left.abs().nan_to_num(0, 0, 0).max()) if left.numel() else 0.0
    return bool(torch.allclose(left, right, rtol=0, atol=_SAME * scale, equal_nan=True))

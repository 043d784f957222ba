"""Tracing a module whose weights are left in its checkpoint: torch.export looks at shapes and types alone, so each
weight gives way to memory that is reserved and never touched, and the graph is given the weights afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.checkpoint.expression import Expression
from sparse_onnx.export.checkpoint.stored import Stored, parameter
from sparse_onnx.export.checkpoint.tensors import tensor_of
from sparse_onnx.graph.slots import tensor_slots

#: Address of a placeholder's memory -> what it stands for.
Table = dict[int, Expression]
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@contextlib.contextmanager
def placed(module: nn.Module) -> Iterator[Table]:
    """Within the block the module's stored weights are placeholders. They outlive the block: a traced program keeps
    them."""
    table: Table = {}
    made: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as undo:
        for part in module.modules():
            holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for tensors in holders:
                for name, old in list(tensors.items()):
                    if not isinstance(old, Stored):
                        continue
                    if id(old) not in made:
                        tensor = _untouched(old)
                        table[tensor.data_ptr()] = old.expression
                        is_parameter = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
                    undo.callback(tensors.__setitem__, name, old)
                    tensors[name] = made[id(old)]
        yield table


def _untouched(like: torch.Tensor) -> torch.Tensor:
    size = math.prod(like.shape) * like.dtype.itemsize
    if not size:
        return torch.empty(like.shape, dtype=like.dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(memory, dtype=like.dtype).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Attached:
    """A tensor that a graph was given, and what it is of the checkpoint."""

    tensor: ir.TensorProtocol
    expression: Expression


def attach(model: ir.Model, table: Table) -> dict[int, Attached]:
    """Gives a traced graph the weights that its placeholders stand for, in place.

    Returns:
        What the graph was given, by the tensor's `id`.

    Raises:
        ImpossibleError: the trace changed a weight's shape or type, so that its content is not the weight's.
    """
    found = {}
    for slot in tensor_slots(model):
        raw = slot.tensor.raw if hasattr(slot.tensor, "raw") else None
        if not isinstance(raw, torch.Tensor) or raw.untyped_storage().data_ptr() not in table:
            continue
        expression = table[raw.untyped_storage().data_ptr()]
        same = raw.shape == expression.meta.shape and raw.dtype == expression.dtype and raw.is_contiguous()
        if not slot.is_initializer or not same:
            raise ImpossibleError(
                f"the trace changed the weight '{slot.name}', and the checkpoint is too large to follow it",
                "--no-stream loads the weights whole",
            )
        tensor = tensor_of(expression, slot.name)
        slot.replace(tensor)
        found[id(tensor)] = Attached(tensor, expression)
    return found


def with_weights(program: nn.Module, table: Table) -> None:
    """Gives a traced program, as a module, the weights that its placeholders stand for, in place."""
    for part in program.modules():
        for name, old in list(part._parameters.items()):
            if old is not None and old.numel() and old.data_ptr() in table:
                part._parameters[name] = parameter(table[old.data_ptr()])
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.numel() and buffer.data_ptr() in table:
                part._buffers[name] = Stored(table[buffer.data_ptr()])

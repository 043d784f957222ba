"""Weights of a checkpoint as tensors of a graph: byte ranges of its files wherever their order allows it, else computed
piece by piece while they are written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from sparse_onnx.export.checkpoint.expression import (
    Applied,
    Expression,
    Leaf,
    aten,
    simplified,
    take,
    value,
)
from sparse_onnx.graph.stacked import join, stack

#: What is computed is computed in pieces of this many bytes, where it has so many rows.
PIECE_BYTES = 32 << 20


def tensor_of(expression: Expression, name: str) -> ir.TensorProtocol:
    """A lazy or external tensor with the expression's value; nothing is read now.

    A stack of single experts, and gate and up projections one behind the other, are ranges of the checkpoint's own
    files, which the kernel copies. Writing any other one out costs the memory of one expert or some rows.
    """
    expression = simplified(expression)
    if isinstance(expression, Leaf):
        entry = expression.entry
        folder, file = os.path.split(entry.path)
        dtype, sizes = from_torch_dtype(entry.dtype), ir.Shape(entry.shape)
        return ir.ExternalTensor(
            file, entry.offset, entry.nbytes, dtype, shape=sizes, name=name, base_dir=folder
        )
    assert isinstance(expression, Applied)
    shape = expression.shape
    if len(shape) >= 3 and shape[0] > 1:
        parts = [tensor_of(take(expression, at), f"{name}.{at}") for at in range(shape[0])]
        return stack(parts, name)
    if expression.function is aten.cat.default and (len(expression.args) < 2 or expression.args[1] == 0):
        return join([tensor_of(each, f"{name}.{at}") for at, each in enumerate(expression.args[0])], name)
    rows = list(row_blocks(expression, PIECE_BYTES)) if len(shape) > 1 else []
    if len(rows) > 1:
        return join([_computed(take(expression, block), name) for block in rows], name)
    return _computed(expression, name)


def row_blocks(expression: Expression, size: int) -> Iterator[slice]:
    """All rows, in slices of about that many bytes."""
    rows = expression.shape[0]
    step = max(1, size * rows // max(1, expression.nbytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _computed(expression: Expression, name: str) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(array_of(value(expression)), from_torch_dtype(expression.dtype), name=name),
        from_torch_dtype(expression.dtype),
        ir.Shape(expression.shape),
        name=name,
    )


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """Contiguous, of ml_dtypes' types where numpy has none of its own."""
    return np.ascontiguousarray(TorchTensor(tensor.contiguous()).numpy())


def same_bytes(expression: Expression, tensor: ir.TensorProtocol) -> bool:
    """Whether the file holds exactly the expression's value. The very same range of the same file needs no reading;
    everything else is read on both sides, and computed here by torch, piece by piece."""
    plain = simplified(expression)
    if not isinstance(tensor, ir.ExternalTensor):
        return array_of(value(plain)).tobytes() == tensor.tobytes()
    place = os.path.realpath(tensor.path), tensor.offset or 0, tensor.nbytes
    if isinstance(plain, Leaf) and place == (plain.entry.path, plain.entry.offset, plain.entry.nbytes):
        return True
    if math.prod(expression.shape) != tensor.size or from_torch_dtype(expression.dtype) != tensor.dtype:
        return False
    descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = tensor.offset or 0
        for piece in _pieces(plain):
            expected = value(piece).contiguous().view(-1).view(torch.uint8).numpy()
            found = np.frombuffer(os.pread(descriptor, len(expected), position), np.uint8)
            if not np.array_equal(found, expected):
                return False
            position += len(expected)
    finally:
        os.close(descriptor)
    return position == (tensor.offset or 0) + tensor.nbytes


def _pieces(expression: Expression) -> Iterator[Expression]:
    """Expressions of bounded size whose bytes, one behind the other, are those of the expression."""
    if not expression.shape or expression.nbytes <= PIECE_BYTES:
        yield expression
    elif len(expression.shape) > 2:
        for at in range(expression.shape[0]):
            yield from _pieces(take(expression, at))
    else:
        for block in row_blocks(expression, PIECE_BYTES):
            yield take(expression, block)

"""The same bytes as a tensor of another type and shape: what lies in a file stays where it lies."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.stacked import Stacked


def retyped(
    tensor: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.TensorProtocol:
    """The tensor's bytes read as another type, lowest bits first where an element is smaller than a byte.

    An external tensor gives the same range of the same file; nothing is read.

    Raises:
        ValueError: strings, or another number of bits.
    """
    strings = ir.DataType.STRING in (tensor.dtype, dtype)
    bits = 0 if strings else math.prod(shape) * dtype.bitwidth
    if strings or bits != tensor.size * tensor.dtype.bitwidth or bits % 8:
        raise ValueError(f"{tensor.name!r} cannot be read as {list(shape)} {dtype.name}")
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset or 0,
            tensor.nbytes,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=os.fspath(tensor.base_dir),
        )
    if (
        isinstance(tensor, Stacked) and shape and shape[0] == len(tensor.parts)
    ):  # which is written part by part
        return Stacked([retyped(part, dtype, shape[1:], name) for part in tensor.parts], name)
    if isinstance(tensor, ir.LazyTensor):
        return ir.LazyTensor(
            functools.partial(_read_as, tensor, dtype, shape, name), dtype, ir.Shape(shape), name=name
        )
    return _read_as(tensor, dtype, shape, name)


def _read_as(
    tensor: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.Tensor | ir.PackedTensor:
    if isinstance(tensor, ir.PackedTensor):
        raw = tensor.numpy_packed().reshape(-1).view(np.uint8)
    elif tensor.dtype.bitwidth >= 8 and isinstance(tensor, ir.Tensor):
        raw = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    else:
        raw = np.frombuffer(tensor.tobytes(), np.uint8)
    if dtype.bitwidth < 8:
        return ir.PackedTensor(raw, dtype, shape=ir.Shape(shape), name=name)
    return ir.Tensor(raw.view(dtype.numpy()).reshape(tuple(shape)), dtype, name=name)

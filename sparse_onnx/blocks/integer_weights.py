"""Expert weights in 4 or 8 bits, each expert quantized when it is first read.

A number is ``(code - point) * scale``. Codes are unsigned, lowest bits first, rows of inputs `[E, N, K]`: the bytes
that MatMulNBits and QMoE read. Elements along K share a scale in blocks, or a whole row of them has one. Where the
numbers are symmetric every point is the middle of the range, which those operators take without zero points.

Blocks are ORT's own: `quantize_matmul_4bits` and `quantize_matmul_8bits`, which give a symmetric block's number of the
largest magnitude the lowest code. A row in 8 bits is what ORT's tools make of a weight for integer products: codes 1 to
255 around 128, so that ``code - 128`` is an int8 of -127 to 127.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Hashable, Iterable
from typing import IO

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.scratch import scratch_folder
from sparse_onnx.graph.stacked import Stacked

#: Elements that are quantized at once: their turned copy stays in cache.
_CHUNK = 1 << 20
#: Bytes of quantized weights that are kept in memory.
_IN_MEMORY = 64 << 20


@dataclasses.dataclass(frozen=True)
class Width:
    """How numbers are stored: 4 or 8 bits, elements along the inputs that share a scale (0: a row; 8 bits only), and
    whether all zero points are the middle of the range."""

    bits: int
    block: int
    symmetric: bool

    @property
    def dtype(self) -> ir.DataType:
        return ir.DataType.UINT4 if self.bits == 4 else ir.DataType.UINT8


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers:
    """One matrix ``[N, K]``: packed codes, scales ``[N, blocks]`` and points ``[N, blocks]``."""

    codes: np.ndarray
    scales: np.ndarray
    points: np.ndarray


class Kept:
    """Matrices that were quantized: the first in memory, all others in a temporary file without a name, which ends with
    the process. They are read several times, to be verified and written, and codes and scales apart. Where the file
    cannot be written they are quantized again."""

    def __init__(self) -> None:
        self._held = 0
        self._file: IO[bytes] | None = None
        self._full = False
        self._parts: dict[Hashable, np.ndarray | tuple[int, int, np.dtype, tuple[int, ...]]] = {}

    def get(self, key: Hashable) -> np.ndarray | None:
        part = self._parts.get(key)
        if not isinstance(part, tuple):
            return part
        assert self._file is not None
        start, length, dtype, shape = part
        content = os.pread(self._file.fileno(), length, start)
        return np.frombuffer(content, dtype).reshape(shape)

    def put(self, key: Hashable, array: np.ndarray) -> None:
        if key in self._parts or self._full:
            return
        if self._held + array.nbytes <= _IN_MEMORY:
            self._held += array.nbytes
            self._parts[key] = array
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=scratch_folder())  # noqa: SIM115
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError:
            self._full = True
            return
        self._parts[key] = (start, array.nbytes, array.dtype, array.shape)


class IntegerWeights:
    """A packed weight ``[E, N, K]`` in integers: `data`, `scale` and `zero_point` are lazy stacks of experts.

    Args:
        source: ``[E, N, K]``, or ``[E, K, N]`` where `transposed`; float32 or float16, which is the scales' type too.
        width: how it is to be stored; 4 bits need an even K.
        transposed: whether the source's rows are outputs.
        kept: shared by the weights of a model.
    """

    def __init__(self, source: ir.TensorProtocol, width: Width, transposed: bool, kept: Kept) -> None:
        self.source, self.width, self.transposed, self._kept = source, width, transposed, kept
        self._key = object()
        experts, first, second = source.shape.numpy()
        self.experts = experts
        self.outputs, self.inputs = (second, first) if transposed else (first, second)
        self.blocks = -(-self.inputs // width.block) if width.block else 1
        self.data = self._stack(self._data, width.dtype, (self.outputs, self.inputs), "")
        self.scale = self._stack(self._scale, source.dtype, self._grid, ".scale")
        self.zero_point = self._zero_points()

    @property
    def _grid(self) -> tuple[int, int]:
        return self.outputs, self.blocks

    def _stack(
        self, of: Callable[[int], ir.TensorProtocol], dtype: ir.DataType, shape: tuple[int, int], what: str
    ) -> ir.TensorProtocol:
        name = f"{self.source.name}.int{self.width.bits}"
        parts = [
            ir.LazyTensor(
                functools.partial(of, expert), dtype, ir.Shape(shape), name=f"{name}.{expert}{what}"
            )
            for expert in range(self.experts)
        ]
        return Stacked(parts, self.source.name or "weight")

    def _zero_points(self) -> ir.TensorProtocol:
        if self.width.symmetric:
            middle = np.full(self._grid, 1 << (self.width.bits - 1), np.uint8)
            each: ir.TensorProtocol = self._integers(middle)
            if middle.size * self.width.bits % 8 == 0:
                return Stacked([each] * self.experts, self.source.name or "weight")
            return self._integers(np.repeat(middle[None], self.experts, 0))
        if self.outputs * self.blocks * self.width.bits % 8 == 0:
            return self._stack(self._point, self.width.dtype, self._grid, ".zero_point")
        shape = ir.Shape([self.experts, *self._grid])  # parts that do not end on whole bytes: all at once
        return ir.LazyTensor(self._all_points, self.width.dtype, shape, cache=True)

    def quantized(self) -> Quantized:
        """What the DequantizeLinear of these tensors means."""
        block = self.width.block or self.inputs
        return Quantized(self.data, self.scale, self.zero_point, 2, block, self.source.dtype)

    def lost(self, experts: Iterable[int]) -> tuple[float, float]:
        """Sums of squares over some experts: of what rounding changes, and of the weights themselves.

        Raises:
            ModelError: weights that are not finite, or a weight file that is gone.
        """
        changed = whole = 0.0
        stored = self.quantized()
        for expert in experts:
            before, after = self._matrix(expert), stored.part(expert, "").dequantized()
            step = max(1, _CHUNK // self.inputs)
            for start in range(0, self.outputs, step):
                rows = before[start : start + step].astype(np.float64)
                whole += float(np.square(rows).sum())
                changed += float(np.square(rows - after[start : start + step]).sum())
        return changed, whole

    def _matrix(self, expert: int) -> np.ndarray:
        """``[N, K]``."""
        array = read_array(slice_first_axis(self.source, expert, ""))
        return array.T if self.transposed else array

    def _quantized(self, expert: int) -> Numbers:
        matrix = self._matrix(expert)
        try:
            return quantize(matrix, self.width)
        except ValueError as error:
            raise ModelError(
                f"expert {expert} cannot be quantized: {error}",
                "leave the experts in float",
                where=f"weight '{self.source.name}'",
            ) from None

    def _read(self, expert: int, what: str) -> np.ndarray:
        known = self._kept.get((self._key, expert, what))
        if known is not None:
            return known
        numbers = self._quantized(expert)
        for name in ("codes", "scales") if self.width.symmetric else ("codes", "scales", "points"):
            self._kept.put((self._key, expert, name), getattr(numbers, name))
        return getattr(numbers, what)

    def _data(self, expert: int) -> ir.TensorProtocol:
        codes, shape = self._read(expert, "codes"), (self.outputs, self.inputs)
        if self.width.bits == 4:
            return ir.PackedTensor(codes, ir.DataType.UINT4, shape=shape)
        return ir.Tensor(codes.reshape(shape))

    def _scale(self, expert: int) -> ir.TensorProtocol:
        return ir.Tensor(self._read(expert, "scales"))

    def _point(self, expert: int) -> ir.TensorProtocol:
        return self._integers(self._read(expert, "points"))

    def _all_points(self) -> ir.TensorProtocol:
        return self._integers(np.stack([self._read(expert, "points") for expert in range(self.experts)]))

    def _integers(self, numbers: np.ndarray) -> ir.TensorProtocol:
        return ir.Tensor(numbers.astype(self.width.dtype.numpy()), self.width.dtype)


def quantize(matrix: np.ndarray, width: Width) -> Numbers:
    """One matrix ``[N, K]`` of float32 or float16, whose type the scales take.

    Raises:
        ValueError: a weight is not finite.
    """
    outputs, inputs = matrix.shape
    blocks = -(-inputs // width.block) if width.block else 1
    codes = np.empty((outputs, inputs * width.bits // 8), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    points = np.full((outputs, blocks), 1 << (width.bits - 1), np.uint8)
    step = max(1, _CHUNK // max(1, inputs))
    for start in range(0, outputs, step):
        at = slice(start, start + step)
        rows = matrix[at]
        if not np.isfinite(rows).all():
            raise ValueError("its weights are not all finite")
        found = _in_blocks(rows, width) if width.block else _row_by_row(rows, width, matrix.dtype)
        codes[at], scales[at] = found[:2]
        if not width.symmetric:
            points[at] = found[2]
    return Numbers(codes.reshape(-1), scales.astype(matrix.dtype), points)


def _in_blocks(rows: np.ndarray, width: Width) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from onnxruntime.capi import _pybind_state as ort

    quantizer = ort.quantize_matmul_4bits if width.bits == 4 else ort.quantize_matmul_8bits
    count, inputs = rows.shape
    blocks, each = -(-inputs // width.block), 8 // width.bits
    codes = np.zeros((count, blocks, width.block // each), np.uint8)
    scales = np.zeros((count, blocks), np.float32)
    packed = np.zeros((count, -(-blocks // each)), np.uint8)
    columns = np.ascontiguousarray(rows.T, np.float32)
    quantizer(codes, columns, scales, packed, width.block, count, inputs, width.symmetric)
    shifts = np.arange(each, dtype=np.uint8) * width.bits
    points = (packed[..., None] >> shifts & ((1 << width.bits) - 1)).reshape(count, -1)[:, :blocks]
    return codes.reshape(count, -1)[:, : inputs // each], scales, points


def _row_by_row(rows: np.ndarray, width: Width, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = rows.astype(np.float32)
    if width.symmetric:
        low, span, lowest = -np.abs(rows).max(1), 127.0, 1
        scale = -low / span
    else:
        low, lowest = np.minimum(rows.min(1), 0), 0
        scale = (np.maximum(rows.max(1), 0) - low) / 255
    scale = scale.astype(dtype).astype(np.float32)  # codes belong to the scale that is stored
    scale[scale == 0] = 1
    points = np.full(len(rows), 128) if width.symmetric else np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(rows / scale[:, None]) + points[:, None], lowest, 255)
    return codes.astype(np.uint8), scale[:, None], points[:, None].astype(np.uint8)

"""Writes weights into one data file: each byte range once, copied by the kernel, holes of sparse files kept.

offsets, parts = layout(tensors)  # nothing is read
write(parts, file)
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import onnx_ir as ir

from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.external import opened
from sparse_onnx.graph.stacked import pieces, place
from sparse_onnx.graph.text import quoted

# A large tensor starts on a page: a runtime then maps it without sharing pages with its neighbour, file
# systems that share blocks can, and the holes of a sparse file stay whole. A small one starts on a cache
# line, which is also the widest vector: kernels that want aligned weights can use the mapping as it is.
_PAGE = 4096
_LINE = 64
_LARGE = 64 * 1024

_CHUNK = 8 * 1024 * 1024
_IN_KERNEL = 1 << 30  # bytes a call, so that an interrupt is not held up for minutes
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Part:
    """`length` bytes for `offset` of the new file: a tensor, or of its weight file what is at `start`."""

    tensor: ir.TensorProtocol
    start: int
    length: int
    offset: int


def layout(tensors: Sequence[ir.TensorProtocol]) -> tuple[list[int], list[Part]]:
    """Where each tensor goes in a new data file, and what must be written there, in ascending order.

    External ranges which overlap (a packed tensor and slices of it, or one range under two names) keep their
    place relative to each other, and are written once; so is a tensor object that is used twice. A stack of tensors
    that lie apart is written part by part, whatever else is written of them.
    """
    unions = _unions(tensors)
    placed: dict[Hashable, int] = {}
    offsets: list[int] = []
    parts: list[Part] = []
    end = 0
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            start = tensor.offset or 0
            file = _file(tensor)
            starts, ends = unions[file]
            at = bisect.bisect_right(starts, start) - 1
            key: Hashable = (file, at)
            first, length = starts[at], ends[at] - starts[at]
        else:
            start = first = 0
            key, length = place(tensor, _identity), tensor.nbytes
        if key not in placed:
            unit = _PAGE if length >= _LARGE else _LINE
            placed[key] = -(-end // unit) * unit
            end = placed[key] + length
            parts.extend(_parts(tensor, first, length, placed[key]))
        offsets.append(placed[key] + start - first)
    return offsets, parts


def _parts(tensor: ir.TensorProtocol, start: int, length: int, offset: int) -> Iterator[Part]:
    for piece in pieces(tensor):
        if piece is tensor:
            yield Part(tensor, start, length, offset)
            continue
        start = (piece.offset or 0) if isinstance(piece, ir.ExternalTensor) else 0
        yield Part(piece, start, piece.nbytes, offset)
        offset += piece.nbytes


def _identity(tensor: ir.TensorProtocol) -> Hashable:
    if isinstance(tensor, ir.ExternalTensor):
        return _file(tensor), tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _file(tensor: ir.ExternalTensor) -> tuple[str, str]:
    return os.fspath(tensor.base_dir), os.fspath(tensor.location)


def _unions(tensors: Sequence[ir.TensorProtocol]) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """For each weight file the unions of overlapping ranges: ascending starts, and their ends."""
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            start = tensor.offset or 0
            ranges.setdefault(_file(tensor), []).append((start, start + tensor.nbytes))
    unions = {}
    for file, spans in ranges.items():
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(spans):
            if ends and start < ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        unions[file] = starts, ends
    return unions


def write(parts: Sequence[Part], file: BinaryIO) -> int:
    """Writes the parts, one tensor in memory at a time, and waits until they are on the disk.

    Returns:
        How many bytes of weights were written, holes included, padding not.

    Raises:
        OSError: the file could not be written.
        ModelError: a weight file changed, or a tensor does not have the bytes that its shape needs.
    """
    for part in parts:
        if isinstance(part.tensor, ir.ExternalTensor):
            with opened(part.tensor) as source:
                _copy(source, file.fileno(), part)
        else:
            file.seek(part.offset)
            _write_tensor(part.tensor, file)
            file.flush()
            # numpy loses the error of its last flush, so the file itself must say how much arrived.
            written = os.fstat(file.fileno()).st_size - part.offset
            if written < part.length:
                raise OSError(errno.EIO, f"only {written} of {part.length} bytes could be written")
            if written > part.length:
                raise ModelError(
                    f"tensor {quoted(part.tensor.name or '')} has more bytes than its shape and type need"
                )
    os.fsync(file.fileno())
    return sum(part.length for part in parts)


def _write_tensor(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    if hasattr(tensor, "tofile"):  # in onnx-ir's classes, not in its protocol
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())


def _copy(source: int, target: int, part: Part) -> None:
    position, end = part.start, part.start + part.length
    while position < end:
        data, hole = _next_data(source, position, end)
        _copy_bytes(source, target, data, part.offset + data - part.start, hole - data)
        position = hole
    if os.fstat(source).st_size < end:  # or what is missing would pass for a hole
        raise _shorter()
    os.ftruncate(target, part.offset + part.length)


def _next_data(source: int, position: int, end: int) -> tuple[int, int]:
    """The first stretch of the file at or after `position` which is not a hole, up to `end`."""
    try:
        data = min(os.lseek(source, position, os.SEEK_DATA), end)
        return data, min(os.lseek(source, data, os.SEEK_HOLE), end) if data < end else end
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
            return end, end
        return position, end  # a file system without holes


def _copy_bytes(source: int, target: int, start: int, offset: int, length: int) -> None:
    in_kernel = hasattr(os, "copy_file_range")
    while length > 0:
        copied = 0
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, min(length, _IN_KERNEL), start, offset)
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
            in_kernel = copied > 0
        if not in_kernel:
            chunk = os.pread(source, min(length, _CHUNK), start)
            if not chunk:
                raise _shorter()
            copied = os.pwrite(target, chunk, offset)
        start, offset, length = start + copied, offset + copied, length - copied


def _shorter() -> OSError:
    return OSError(errno.EIO, "a weight file became shorter since the model was loaded")

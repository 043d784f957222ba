"""External weights as byte ranges of files: where one may lie, reading it, and slicing it without a copy.

A weight file must lie in or under the model's folder and be reached without a symbolic link, because whoever
writes a model chooses the names in it. One layout is excepted: Hugging Face's cache, where
``snapshots/<revision>/name`` is a link to ``blobs/<hash>`` of the same repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
import os
import re
import stat
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.text import has_control_characters, quoted

_HINT = "external data must be a plain file in the model's own folder"
_DECODED = "sparse_onnx.decoded"
_BLOB = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A weight file that passed the checks. `location` is relative to the absolute folder `base_dir`."""

    base_dir: str
    location: str
    size: int


def locate(folder: str, location: str) -> DataFile:
    """The weight file that a model in `folder` calls `location`. Touches no file but by lstat and readlink.

    Raises:
        ModelError: the location leads out of the folder, or does not name a regular file with one name.
    """
    parts = _parts(location)
    base = os.path.realpath(folder)
    path = os.path.join(base, *parts)
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = _hub_blob(path, location)
            base, parts = os.path.split(path)[0], [os.path.basename(path)]
            status = os.lstat(path)
        if os.path.realpath(path) != path:
            raise ModelError(f"external data {quoted(location)} lies behind a symbolic link", _HINT)
    except OSError as error:
        raise ModelError(
            f"external data file {quoted(location)} cannot be found: {error.strerror}",
            "put it beside the model, under the name that the model gives it",
        ) from None
    _check_plain_file(status, location)
    return DataFile(base, os.path.join(*parts), status.st_size)


def _parts(location: str) -> list[str]:
    problem = ""
    if not location:
        problem = "is empty"
    elif "\\" in location or has_control_characters(location):
        problem = "holds a backslash or a control character"
    elif os.path.isabs(location) or re.match(r"[A-Za-z]:", location):
        problem = "is absolute"
    elif location.startswith("*/_ORT_"):  # ORT's mark for an address in its own memory
        problem = "is a memory address"
    parts = [part for part in location.split("/") if part not in ("", ".")]
    if not problem and (not parts or ".." in parts):
        problem = "leads out of the model's folder"
    if problem:
        raise ModelError(f"external data location {quoted(location)} {problem}", _HINT)
    return parts


def _hub_blob(link: str, location: str) -> str:
    """Where a link of Hugging Face's cache leads: ``repo/snapshots/rev/.../name`` to ``repo/blobs/hash``."""
    refusal = ModelError(f"external data {quoted(location)} is a symbolic link", _HINT)
    target = os.readlink(link)
    if os.path.isabs(target):
        raise refusal
    holder = os.path.realpath(os.path.dirname(link))
    target = os.path.normpath(os.path.join(holder, target))
    above = holder
    while os.path.basename(os.path.dirname(above)) != "snapshots":
        if above == (above := os.path.dirname(above)):
            raise refusal
    repository = os.path.dirname(os.path.dirname(above))
    blobs, name = os.path.split(target)
    if blobs != os.path.join(repository, "blobs") or not _BLOB.fullmatch(name):
        raise refusal
    return target


def _check_plain_file(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"external data {quoted(name)} is not a regular file", _HINT)
    if status.st_nlink > 1:
        raise ModelError(
            f"external data {quoted(name)} is a hard link: the same file has another name elsewhere",
            "copy it, so that the model has a file of its own",
        )


def check_range(name: str, start: int, length: int, file: str, size: int) -> None:
    """Refuses a byte range that the file does not hold.

    Raises:
        ModelError: names the tensor and the file.
    """
    if start + length > size:
        raise ModelError(
            f"truncated external data: tensor {quoted(name)} needs bytes {start} to {start + length} of "
            f"{quoted(file)}, which has {size}",
            "download or export the model again",
        )


@contextlib.contextmanager
def opened(tensor: ir.ExternalTensor) -> Iterator[int]:
    """A read-only descriptor of the tensor's file, checked again: it may have changed since the load.

    Raises:
        ModelError: the file is gone, not a plain file, or shorter than the tensor needs.
    """
    name = os.fspath(tensor.location)
    try:
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(
            f"external data {quoted(name)} of {quoted(tensor.name)} cannot be opened: {error.strerror}",
            "has it been moved since the model was loaded?",
        ) from None
    try:
        status = os.fstat(descriptor)
        _check_plain_file(status, name)
        check_range(tensor.name, tensor.offset or 0, tensor.nbytes, name, status.st_size)
        yield descriptor
    finally:
        os.close(descriptor)


def read_array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The tensor as an array; of an external one, a read-only mapping of its range that dies with the array.

    `ir.ExternalTensor.numpy` keeps its file mapped and its pages counted as ours for as long as the tensor
    lives; comparing a model larger than memory needs them gone after each tensor.

    Raises:
        ModelError: the file is gone, not a plain file, or shorter than the tensor needs.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tensor.shape.numpy()
    if tensor.size == 0:
        return np.empty(shape, tensor.dtype.numpy())
    with opened(tensor) as descriptor:
        start = tensor.offset or 0
        skipped = start % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(
            descriptor, skipped + tensor.nbytes, access=mmap.ACCESS_READ, offset=start - skipped
        )
    if tensor.dtype.bitwidth < 8:
        packed = np.frombuffer(mapping, np.uint8, tensor.nbytes, skipped)
        return ir.PackedTensor(packed, tensor.dtype, shape=shape).numpy()
    dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
    return np.frombuffer(mapping, dtype, tensor.size, skipped).reshape(shape)


def moved(tensor: ir.TensorProtocol, location: str, offset: int, base_dir: str = "") -> ir.ExternalTensor:
    """The same tensor with its bytes at another place."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=base_dir,
    )


def renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """An external tensor under another name; any other tensor itself, so that its memory is known to be the same."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    copy = moved(tensor, os.fspath(tensor.location), tensor.offset or 0, os.fspath(tensor.base_dir))
    copy.name = name
    return copy


class FirstAxis(ir.LazyTensor):
    """A lazy tensor that knows its slices along the first axis, and need not be evaluated for one of them."""

    def part(self, index: int, name: str) -> ir.TensorProtocol:
        raise NotImplementedError


def drop_mapping(tensor: ir.TensorProtocol) -> None:
    """Unmaps what `ir.ExternalTensor.numpy` keeps. Arrays of it that are still in use stay valid."""
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:  # an array still points into the mapping, which now dies with that array
            tensor.raw = None


def slice_first_axis(tensor: ir.TensorProtocol, index: int, name: str) -> ir.TensorProtocol:
    """``tensor[index]`` of a packed ``[E, ...]`` tensor, under another name; no weight is read or copied.

    An external tensor gives a byte range of the same file, one in memory a view, a stack its part as it is
    stored, any other lazy one a lazy slice (which evaluates the whole, unless that caches).

    Args:
        tensor: rank 1 or more.
        index: 0 <= index < E.

    Raises:
        ValueError: no such index, strings, or elements below a byte whose slices do not start on whole bytes.
    """
    shape = tensor.shape.numpy()
    if not shape or not 0 <= index < shape[0]:
        raise ValueError(f"tensor {tensor.name!r} of shape {list(shape)} has no slice {index}")
    if tensor.dtype == ir.DataType.STRING:
        raise ValueError(f"tensor {tensor.name!r} holds strings")
    bits = math.prod(shape[1:]) * tensor.dtype.bitwidth
    if bits % 8:
        raise ValueError(f"slices of tensor {tensor.name!r} ({tensor.dtype.name}) do not fall on whole bytes")
    nbytes, rest = bits // 8, ir.Shape(shape[1:])
    if isinstance(tensor, ir.ExternalTensor):
        start = (tensor.offset or 0) + index * nbytes
        return ir.ExternalTensor(
            tensor.location, start, nbytes, tensor.dtype, shape=rest, name=name, base_dir=tensor.base_dir
        )
    if isinstance(tensor, FirstAxis):
        return tensor.part(index, name)
    if isinstance(tensor, ir.LazyTensor):
        take = functools.partial(_view, tensor, index, name)
        return ir.LazyTensor(take, tensor.dtype, rest, name=name)
    if isinstance(tensor, ir.PackedTensor):
        packed = tensor.numpy_packed().reshape(-1)[index * nbytes : (index + 1) * nbytes]
        return ir.PackedTensor(packed, tensor.dtype, shape=rest, name=name)
    return _view(tensor, index, name)


def _view(tensor: ir.TensorProtocol, index: int, name: str) -> ir.Tensor:
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        # Such a tensor decodes itself again at each call: E slices would hold E copies of the whole.
        if _DECODED not in tensor.meta:
            tensor.meta[_DECODED] = tensor.numpy()
        array = tensor.meta[_DECODED]
    else:
        array = tensor.numpy()
    return ir.Tensor(array[index, ...], dtype=tensor.dtype, name=name)

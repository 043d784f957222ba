"""Lazy tensors over stored ones: separately stored tensors as one packed tensor, one with its last axes swapped, rows
of two in turn, and whatever else is computed from them.

Nothing is read before the result is, and a stack is then read one part at a time: being written out costs the memory
of its largest part. `external.slice_first_axis` gives the parts of a stack back as they are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import FirstAxis, drop_mapping, read_array, renamed, slice_first_axis


class Stacked(FirstAxis):
    """``[E, ...]`` whose slice ``e`` is ``parts[e]``. Made by `stack`."""

    def __init__(self, parts: Sequence[ir.TensorProtocol], name: str) -> None:
        first = parts[0]
        shape = ir.Shape([len(parts), *first.shape.numpy()])
        super().__init__(self._whole, first.dtype, shape, name=name)
        self.parts = tuple(parts)

    def part(self, index: int, name: str) -> ir.TensorProtocol:
        return renamed(self.parts[index], name)

    def _whole(self) -> ir.Tensor:
        array = np.empty(self.shape.numpy(), self.dtype.numpy())
        for target, part in zip(array, self.parts, strict=True):
            target[...] = read_array(part)
        return ir.Tensor(array, self.dtype, name=self.name)

    def tobytes(self) -> bytes:
        pieces = []
        for part in self.parts:
            pieces.append(part.tobytes())
            drop_mapping(part)
        return b"".join(pieces)

    def tofile(self, file: Any) -> None:
        for part in self.parts:
            if hasattr(part, "tofile"):  # in onnx-ir's classes, not in its protocol
                part.tofile(file)
            else:
                file.write(part.tobytes())


class Joined(ir.LazyTensor):
    """Tensors one behind the other along their first axis, read one at a time. Made by `join`."""

    def __init__(self, parts: Sequence[ir.TensorProtocol], name: str) -> None:
        first = parts[0]
        rows = sum(part.shape.numpy()[0] for part in parts)
        super().__init__(self._whole, first.dtype, ir.Shape([rows, *first.shape.numpy()[1:]]), name=name)
        self.parts = tuple(parts)

    def _whole(self) -> ir.Tensor:
        return ir.Tensor(
            np.concatenate([read_array(part) for part in self.parts]), self.dtype, name=self.name
        )

    tobytes, tofile = Stacked.tobytes, Stacked.tofile


class Transposed(FirstAxis):
    """``source`` with its last two axes swapped. Made by `transpose`."""

    def __init__(self, source: ir.TensorProtocol, name: str) -> None:
        *rest, rows, columns = source.shape.numpy()
        super().__init__(self._swapped, source.dtype, ir.Shape([*rest, columns, rows]), name=name)
        self.source = source

    def part(self, index: int, name: str) -> ir.TensorProtocol:
        if len(self.shape) < 3:
            raise ValueError(
                f"rows of {self.name!r} are columns of a stored tensor, which do not lie together"
            )
        return Transposed(slice_first_axis(self.source, index, name), name)

    def _swapped(self) -> ir.Tensor:
        array = np.ascontiguousarray(read_array(self.source).swapaxes(-1, -2))
        return ir.Tensor(array, self.dtype, name=self.name)


class Recipe(Protocol):
    """Makes an array of others. Recipes that compare equal give the same, and have the same hash."""

    def __call__(self, *arrays: np.ndarray) -> np.ndarray: ...

    def __hash__(self) -> int: ...


class Computed(ir.LazyTensor):
    """What a recipe makes of stored tensors, each time that it is read. Made by `computed`."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[ir.TensorProtocol],
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str,
    ) -> None:
        super().__init__(self._made, dtype, ir.Shape(shape), name=name)
        self.recipe, self.sources = recipe, tuple(sources)

    def _made(self) -> ir.Tensor:
        array = self.recipe(*map(read_array, self.sources))
        if array.shape != tuple(self.shape.numpy()) or array.dtype != self.dtype.numpy():
            raise ValueError(
                f"{self.name!r} became {array.dtype}{list(array.shape)}, not {self.dtype}{self.shape}"
            )
        return ir.Tensor(np.ascontiguousarray(array), self.dtype, name=self.name)


@dataclasses.dataclass(frozen=True)
class _Turns:
    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        first, second = arrays
        return np.stack([first, second], axis=1).reshape(2 * len(first), *first.shape[1:])


def computed(
    recipe: Recipe, sources: Sequence[ir.TensorProtocol], dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.TensorProtocol:
    """``recipe(*sources)``, read as arrays and computed whenever the result is read. Nothing is read now.

    Being written out it costs the memory of itself and its sources: a packed tensor is a `stack` of computed parts.

    Args:
        recipe: gives an array of `dtype` and `shape`.
        sources: of any kind.
        dtype: of the result.
        shape: of the result.
        name: of the result.
    """
    return Computed(recipe, sources, dtype, shape, name)


def interleave(first: ir.TensorProtocol, second: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """``[2 N, ...]``: row 2 i is row i of `first [N, ...]`, row 2 i + 1 that of `second`. Nothing is read now.

    Raises:
        ValueError: shapes or types differ, strings, or no axis.
    """
    shape = tuple(first.shape.numpy())
    if (first.dtype, shape) != (second.dtype, tuple(second.shape.numpy())):
        raise ValueError(f"{second.name!r} differs from {first.name!r} in shape or type")
    if not shape or first.dtype == ir.DataType.STRING:
        raise ValueError(f"{first.name!r} has no rows of numbers")
    return Computed(_Turns(), (first, second), first.dtype, (2 * shape[0], *shape[1:]), name)


def stack(parts: Sequence[ir.TensorProtocol], name: str, transposed: bool = False) -> ir.TensorProtocol:
    """The tensors as one, ``[E, ...]``, in this order. Nothing is read.

    Parts that lie one behind the other in one file give the byte range of all of them, which can be linked.

    Args:
        parts: at least one; of equal shape and type. External, lazy or in memory.
        name: of the stack.
        transposed: whether the last two axes of each part are to be swapped.

    Raises:
        ValueError: shapes or types differ, strings, or parts below a byte that do not end on whole bytes.
    """
    if not parts:
        raise ValueError(f"no parts to stack as {name!r}")
    first = parts[0]
    kind = first.dtype, tuple(first.shape.numpy())
    for part in parts:
        if (part.dtype, tuple(part.shape.numpy())) != kind:
            raise ValueError(f"{part.name!r} differs from {first.name!r} in shape or type")
    if first.dtype == ir.DataType.STRING or first.size * first.dtype.bitwidth % 8:
        raise ValueError(f"{first.name!r} ({first.dtype.name}) does not end on a whole byte")
    if transposed:
        parts = [transpose(part, part.name or name) for part in parts]
    return _range_of_all(parts, name) or Stacked(parts, name)


def join(parts: Sequence[ir.TensorProtocol], name: str) -> ir.TensorProtocol:
    """The tensors as one, ``[N1 + N2 + ..., ...]``, in this order. Nothing is read.

    Raises:
        ValueError: no parts, types or later axes differ, strings, or parts below a byte that do not end on whole bytes.
    """
    if not parts:
        raise ValueError(f"no parts to join as {name!r}")
    first = parts[0]
    kind = first.dtype, tuple(first.shape.numpy()[1:])
    for part in parts:
        if not len(part.shape) or (part.dtype, tuple(part.shape.numpy()[1:])) != kind:
            raise ValueError(f"{part.name!r} differs from {first.name!r} in shape or type")
        if part.dtype == ir.DataType.STRING or part.size * part.dtype.bitwidth % 8:
            raise ValueError(f"{part.name!r} ({part.dtype.name}) does not end on a whole byte")
    return Joined(parts, name) if parts[1:] else renamed(first, name)


def transpose(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The tensor with its last two axes swapped when it is read.

    Raises:
        ValueError: it has less than two axes, or holds strings.
    """
    if len(tensor.shape) < 2 or tensor.dtype == ir.DataType.STRING:
        raise ValueError(f"{tensor.name!r} is no matrix of numbers")
    return renamed(tensor.source, name) if isinstance(tensor, Transposed) else Transposed(tensor, name)


def _range_of_all(parts: Sequence[ir.TensorProtocol], name: str) -> ir.ExternalTensor | None:
    first = parts[0]
    if not isinstance(first, ir.ExternalTensor) or not first.nbytes:
        return None
    start = first.offset or 0
    for index, part in enumerate(parts):
        if not isinstance(part, ir.ExternalTensor):
            return None
        if (part.base_dir, part.location) != (first.base_dir, first.location):
            return None
        if (part.offset or 0) != start + index * first.nbytes:
            return None
    shape = ir.Shape([len(parts), *first.shape.numpy()])
    length = len(parts) * first.nbytes
    return ir.ExternalTensor(
        first.location, start, length, first.dtype, shape=shape, name=name, base_dir=first.base_dir
    )


def stored(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """The stored tensors that a stack or a transposed tensor reads; of any other tensor, itself.

    What is computed counts as stored: it becomes bytes of its own.
    """
    if isinstance(tensor, (Stacked, Joined)):
        for part in tensor.parts:
            yield from stored(part)
    elif isinstance(tensor, Transposed):
        yield from stored(tensor.source)
    else:
        yield tensor


def pieces(tensor: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """Tensors whose bytes, one behind the other, are those of the tensor."""
    if isinstance(tensor, (Stacked, Joined)):
        for part in tensor.parts:
            yield from pieces(part)
    else:
        yield tensor


def place(tensor: ir.TensorProtocol, where: Callable[[ir.TensorProtocol], Hashable]) -> Hashable:
    """What identifies the tensor's content: `where` its stored tensors are, and how they are read."""
    if isinstance(tensor, Stacked):
        return "stacked", tuple(place(part, where) for part in tensor.parts)
    if isinstance(tensor, Joined):
        return "joined", tuple(place(part, where) for part in tensor.parts)
    if isinstance(tensor, Transposed):
        return "transposed", place(tensor.source, where), tuple(tensor.shape.numpy())
    if isinstance(tensor, Computed):
        sources = tuple(place(source, where) for source in tensor.sources)
        return "computed", tensor.recipe, sources, tensor.dtype, tuple(tensor.shape.numpy())
    return where(tensor)


class Slices:
    """A packed tensor ``[E, ...]`` of which only single slices ``slices[e]`` are read, as arrays."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.tensor = tensor
        self.shape = tensor.shape.numpy()

    def __getitem__(self, index: int) -> np.ndarray:
        assert isinstance(self.tensor, Stacked)
        return read_array(self.tensor.parts[index])


def read_slices(tensor: ir.TensorProtocol) -> np.ndarray | Slices:
    """What ``array[e]`` and ``array.shape`` can be asked of, without reading more than a slice of a stack."""
    return Slices(tensor) if isinstance(tensor, Stacked) else read_array(tensor)

"""What a model asks for: the input that data fill, and those that follow from it (masks, positions, empty caches)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.text import printable, quoted
from sparse_onnx.verify.inputs import sized_inputs
from sparse_onnx.verify.meaning import Meaning, lowered_indices, meaning

_NAMED = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Feeds of one run of the model.

    Attributes:
        feeds: all inputs by name.
        tokens: positions that count.
        mask: which positions ``[B, S]`` count; None: all.
    """

    feeds: dict[str, np.ndarray]
    tokens: int
    mask: np.ndarray | None = None


class Interface:
    """The inputs of a model.

    Args:
        model: with inferred types and shapes.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.inputs = {
            value.name or "": value
            for value in model.graph.inputs
            if value.name not in model.graph.initializers
        }
        indices = lowered_indices(model)
        self.bounds = {
            name: _bound(meaning(value, indices)) for name, value in self.inputs.items() if _is_integer(value)
        }
        self._sides: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def token_input(self) -> str:
        """The input that takes token ids ``[batch, sequence]``.

        Raises:
            UsageError: none, or several.
        """
        found = [
            name
            for name, value in self.inputs.items()
            if _is_integer(value)
            and self.bounds[name] is not None
            and not _is_side(name)
            and _rank(value) in (1, 2)
        ]
        if len(found) == 1:
            return found[0]
        what = f"several inputs take token ids: {self._list(found)}" if found else "no input takes token ids"
        raise UsageError(f"text cannot be given to this model: {what}", self._hint())

    def bound(self, name: str) -> int | None:
        """Values of an integer input lie below; None where no table was found."""
        return self.bounds.get(name)

    def run(self, given: Mapping[str, np.ndarray], where: str) -> Run:
        """A run from the arrays of the data: checked, cast, the other inputs filled in.

        Raises:
            UsageError: names, types, shapes or values that the model does not take.
        """
        unknown = sorted(set(given) - set(self.inputs))
        if unknown:
            raise UsageError(f"the model has no input {quoted(unknown[0])}", self._hint(), where)
        feeds = {name: self._checked(name, array, where) for name, array in given.items()}
        self._same_sizes(feeds, where)
        batch, sequence = self._size(feeds)
        if batch * sequence == 0:
            raise UsageError("holds no token", "give data with at least one", where)
        for name in self.inputs:
            if name not in feeds:
                feeds[name] = self._side(name, batch, sequence, where)
        mask = self._mask(given, feeds, batch, sequence)
        tokens = batch * sequence if mask is None else int(mask.sum())
        if tokens == 0:
            raise UsageError("its attention mask hides every token", "give data with at least one", where)
        return Run(feeds, tokens, mask)

    def _checked(self, name: str, array: np.ndarray, where: str) -> np.ndarray:
        value = self.inputs[name]
        assert value.dtype is not None
        wanted = value.dtype.numpy()
        kinds = "f" if value.dtype.is_floating_point() else "iu" if value.dtype.is_integer() else "b"
        if array.dtype.kind not in kinds and array.dtype != wanted:
            raise UsageError(
                f"input {quoted(name)} takes {value.dtype.name.lower()}, not {array.dtype}",
                self._hint(),
                where,
            )
        shape = [] if value.shape is None else list(value.shape)
        fits = len(shape) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(shape, array.shape, strict=True)
        )
        if value.shape is not None and not fits:
            raise UsageError(
                f"input {quoted(name)} takes {printable(str(value.shape))}, not {list(array.shape)}",
                "",
                where,
            )
        if kinds == "f":
            cast = array.astype(wanted, copy=False)
            if not np.isfinite(cast).all():
                raise UsageError(f"input {quoted(name)} holds NaN or infinity", "clean the data", where)
            return cast
        if kinds == "iu" and array.size:
            self._in_range(name, array, where)
        return array.astype(wanted, copy=False)

    def _in_range(self, name: str, array: np.ndarray, where: str) -> None:
        low, high = int(array.min()), int(array.max())
        bound = self.bounds.get(name)
        if bound is not None and (low < 0 or high >= bound):
            wrong = low if low < 0 else high
            raise UsageError(
                f"token {wrong} of input {quoted(name)} is outside the model's {bound}",
                "is it data, or a tokenizer, of another model?",
                where,
            )
        value = self.inputs[name]
        assert value.dtype is not None
        info = np.iinfo(value.dtype.numpy())
        if low < info.min or high > info.max:
            raise UsageError(f"input {quoted(name)} holds {high if high > info.max else low}", "", where)

    def _same_sizes(self, feeds: Mapping[str, np.ndarray], where: str) -> None:
        """Axes of the same name are of the same size."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in feeds.items():
            for dim, size in zip(self.inputs[name].shape or (), array.shape, strict=False):
                label = None if isinstance(dim, int) else dim.value
                if label is None:
                    continue
                known, other = sizes.setdefault(label, (size, name))
                if known != size:
                    raise UsageError(
                        f"axis {quoted(label)} is {known} of input {quoted(other)} and {size} of {quoted(name)}",
                        "",
                        where,
                    )

    def _size(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, int]:
        """Batch and sequence, from the first input that is no side input."""
        main = next(
            (name for name in self.inputs if name in feeds and not _is_side(name)), next(iter(feeds), "")
        )
        array = feeds.get(main)
        if array is None or array.ndim == 0:
            return 1, 1
        if array.ndim == 1:
            return 1, array.shape[0]
        value = self.inputs[main]
        if array.ndim == 2 and _is_integer(value):
            return array.shape[0], array.shape[1]
        running = [
            size
            for dim, size in zip(value.shape or (), array.shape, strict=False)
            if not isinstance(dim, int)
        ]
        first = array.shape[0]
        inner = math.prod(running[1:]) if running and not isinstance((value.shape or [0])[0], int) else 1
        return first, inner

    def _mask(
        self, given: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], batch: int, sequence: int
    ) -> np.ndarray | None:
        """Padding that the data's own mask marks."""
        for name in given:
            if "mask" in name.lower() and feeds[name].shape == (batch, sequence):
                mask = feeds[name] != 0
                return None if mask.all() else mask
        return None

    def _side(self, name: str, batch: int, sequence: int, where: str) -> np.ndarray:
        value = self.inputs[name]
        if not _is_side(name) or (_is_float(value) and not _is_cache(name)):
            raise UsageError(f"the model's input {quoted(name)} is not in the data", self._hint(), where)
        size = (batch, sequence)
        if size not in self._sides:
            if len(self._sides) > 4:
                self._sides.clear()
            self._sides[size] = sized_inputs(self.model, batch, sequence)
        array = self._sides[size][name]
        if _is_cache(name) and value.dtype is not None and value.dtype.name == "BOOL":
            return np.zeros_like(array)  # whether the cache is used
        if _is_float(value) and array.size:
            raise UsageError(
                f"the model's cache {quoted(name)} has a fixed size {list(array.shape)}", self._hint(), where
            )
        return np.zeros_like(array) if _is_segment(name) else array

    def _hint(self) -> str:
        return f"its inputs are {self._list(self.inputs)}; an .npz file holds arrays by these names"

    def _list(self, names: object) -> str:
        listed = [printable(str(name)) for name in names]  # type: ignore[attr-defined]
        more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        return ", ".join(listed[:_NAMED]) + more


def _bound(means: Meaning) -> int | None:
    """Values lie below it; an index of experts may be their number, a dropped slot."""
    return means.bound if means.bound is None else means.bound + means.droppable


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _is_cache(name: str) -> bool:
    return "past" in name.lower() or "cache" in name.lower()


def _is_segment(name: str) -> bool:
    return "token_type" in name.lower() or "segment" in name.lower()


def _is_side(name: str) -> bool:
    """Whether the input follows from the others."""
    lowered = name.lower()
    return _is_cache(name) or _is_segment(name) or "mask" in lowered or "position" in lowered

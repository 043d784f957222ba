"""Graphs of fixed sizes, for targets that run no others: one for decoding, one for prompts, over the same weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.graph import io
from sparse_onnx.graph.infer import infer
from sparse_onnx.passes.fold_shapes import FoldShapes
from sparse_onnx.passes.infer_shapes import InferShapes

Sizes = Mapping[str, int]


def parse(text: str) -> dict[str, int]:
    """``batch=1,sequence=128``

    Raises:
        UsageError: another form, or a size below 1.
    """
    sizes = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if not equals or not number.strip().isdigit() or int(number) < 1 or not name.strip():
            raise UsageError(f"'{text}' is not AXIS=SIZE,AXIS=SIZE", "such as batch=1,sequence=1")
        sizes[name.strip()] = int(number)
    return sizes


def open_axes(model: ir.Model) -> list[str]:
    """Names of the sizes that the inputs leave open, in order; an axis without a name counts as ``INPUT.AXIS``."""
    return list(dict.fromkeys(name for value in _inputs(model) for _, name in _open(value)))


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def _open(value: ir.Value) -> Iterator[tuple[int, str]]:
    for axis, size in enumerate(value.shape or ()):
        if not isinstance(size, int):
            yield axis, size.value or f"{value.name}.{axis}"


def specialise(model: ir.Model, sizes: Sizes) -> ir.Model:
    """A copy with these sizes of the inputs' open axes, shapes that follow from them computed. Weights are shared.

    A size that is a sum of others, as ``past_sequence_length + sequence_length``, follows from them.

    Raises:
        UsageError: an axis that no input has, or one whose size is not given.
    """
    known = open_axes(model)
    for name in sizes:
        if name not in known:
            raise UsageError(
                f"no input has an open axis '{name}'", f"open axes: {', '.join(known) or 'none'}"
            )
    given = {name: _size(name, sizes) for name in known}
    missing = [name for name, size in given.items() if size is None]
    if missing:
        example = ",".join(f"{name}=1" for name in missing)
        raise UsageError(f"no size is given for the axis '{missing[0]}'", f"--static {example}")
    copy = model.clone()
    for graph in copy.graphs():
        for value in (*graph.inputs, *graph.outputs, *(out for node in graph for out in node.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([_fixed(size, given) for size in value.shape])
    for value in _inputs(copy):
        value.shape = ir.Shape(
            [
                size if isinstance(size, int) else given.get(f"{value.name}.{axis}")
                for axis, size in enumerate(value.shape or ())
            ]
        )
    InferShapes()(copy)
    FoldShapes()(copy)
    infer(copy)
    loose = [value.name for value in copy.graph.outputs if not _is_static(value)]
    if loose:
        raise ImpossibleError(
            f"the shape of output '{loose[0]}' does not follow from the sizes of the inputs",
            "it depends on what is computed: the model has no static graph",
        )
    return copy


def _size(name: str, sizes: Sizes) -> int | None:
    if name in sizes:
        return sizes[name]
    parts = [part.strip() for part in re.split(r"\+", name)]
    numbers = [int(part) if part.isdigit() else sizes.get(part) for part in parts]
    found = [number for number in numbers if number is not None]
    return sum(found) if len(parts) > 1 and len(found) == len(parts) else None


def _fixed(size: int | ir.SymbolicDim, given: Mapping[str, int | None]) -> int | str | None:
    if isinstance(size, int):
        return size
    return given.get(size.value or "") or size.value


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def beside(out: Path, sizes: Sizes, first: bool) -> Path:
    """Where a static graph goes: the first is OUT itself, others say their sizes."""
    return out if first else out.with_name(f"{out.stem}.{'x'.join(map(str, sizes.values()))}{out.suffix}")


def required(model: ir.Model, asked: Sequence[Sizes], target: str, needs: bool) -> list[dict[str, int]]:
    """The sizes of the graphs to make; none where the graph stays dynamic.

    Raises:
        UsageError: the target wants fixed sizes, and none are given.
    """
    if asked or not needs:
        return [dict(sizes) for sizes in asked]
    axes = open_axes(model)
    if axes:
        example = ",".join(f"{name}=1" for name in axes)
        raise UsageError(
            f"target '{target}' runs static shapes alone, and the model leaves open: {', '.join(axes)}",
            f"--static {example}",
        )
    return [{}]


def named(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "its own sizes"


def save(out: str | os.PathLike[str], graphs: Sequence[Sizes]) -> None:
    """Puts static graphs where the dynamic one was just written, over the same weights; the first in its place.

    Raises:
        SparseOnnxError: a graph cannot be written; the dynamic one stays.
    """
    model = io.load(out)
    for at, sizes in reversed(list(enumerate(graphs))):
        io.save(specialise(model, sizes), beside(Path(out), sizes, at == 0), weights="link")

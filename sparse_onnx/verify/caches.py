"""Axes of a key/value cache that a model leaves open but that its attention fixes: heads, and the size of a head.

Exporters name such an axis instead of giving its size (`kv_cache_dim`). It is read from the attention that the cache
goes into; where that does not tell, sizes are tried until the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.targets import session as sessions

#: By input's name and axis.
Sizes = dict[tuple[str, int], int]
#: Where an attention operator takes its cache, and the attributes that count its heads: of queries, of the cache.
_ATTENTION: dict[tuple[str, str], tuple[tuple[int, ...], str, str]] = {
    ("com.microsoft", "GroupQueryAttention"): ((3, 4), "num_heads", "kv_num_heads"),
    ("com.microsoft", "SparseAttention"): ((3, 4), "num_heads", "kv_num_heads"),
    ("com.microsoft", "MultiHeadAttention"): ((6, 7), "num_heads", "num_heads"),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): ((5, 6), "num_heads", "num_heads"),
    ("", "Attention"): ((4, 5), "q_num_heads", "kv_num_heads"),
}
_RUNNING = re.compile("batch|seq|len|token|time|past|total")
_TRIED = (16, 32, 64, 128, 8, 24, 40, 48, 72, 80, 96, 112, 160, 192, 256, 4, 12)


def cache_sizes(model: ir.Model, smallest: Callable[[Sizes], Mapping[str, np.ndarray]]) -> Sizes:
    """Sizes of the open axes of caches.

    Args:
        model: whose inputs are looked at.
        smallest: makes feeds for a short run, with these sizes.
    """
    found: Sizes = {}
    unknown: list[tuple[str, int]] = []
    for value in model.graph.inputs:
        for axis in _open_axes(value):
            size = next((size for size in _told(value, axis) if size), None)
            if size:
                found[value.name or "", axis] = size
            else:
                unknown.append((value.name or "", axis))
    if unknown:
        found |= _tried(model, unknown, found, smallest)
    return found


def _open_axes(value: ir.Value) -> list[int]:
    """Heads and their size in a cache ``[batch, heads, past, size]`` where they are names."""
    if (
        value.shape is None
        or len(value.shape) != 4
        or value.dtype is None
        or not value.dtype.is_floating_point()
    ):
        return []
    taken = any(_past_slot(node, position) for node, position in value.uses())
    if not taken and not re.search("past|cache", (value.name or "").lower()):
        return []
    dims = value.shape
    return [
        axis for axis in (1, 3) if not isinstance(dims[axis], int) and not _RUNNING.search(_name(dims[axis]))
    ]


def _name(dim: ir.SymbolicDim | int) -> str:
    return "" if isinstance(dim, int) else (dim.value or "").lower()


def _past_slot(node: ir.Node, position: int) -> bool:
    known = _ATTENTION.get((node.domain, node.op_type))
    return known is not None and position in known[0]


def _told(value: ir.Value, axis: int) -> Iterator[int | None]:
    """What each reader of a cache says of an axis."""
    for node, position in value.uses():
        if _past_slot(node, position):
            _, queries, heads = _ATTENTION[node.domain, node.op_type]
            attributes = {
                name: node.attributes[name].as_int() for name in (queries, heads) if name in node.attributes
            }
            if axis == 1:
                yield attributes.get(heads)
                continue
            yield _head_size(node, attributes.get(queries, 0), attributes.get(heads, 0))
        elif node.op_type == "Concat" and node.domain == "":
            for other in (*node.inputs, *node.outputs):
                if other is not None and other is not value:
                    yield _size(other, axis)


def _head_size(node: ir.Node, queries: int, heads: int) -> int | None:
    query = node.inputs[0] if node.inputs else None
    key = node.inputs[1] if len(node.inputs) > 1 else None
    for source, count in ((key, heads), (query, queries if key is not None else queries + 2 * heads)):
        width = None if source is None or source.shape is None or len(source.shape) != 3 else _size(source, 2)
        if width and count and width % count == 0:
            return width // count
    return None


def _size(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or len(value.shape) <= axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _tried(
    model: ir.Model,
    unknown: list[tuple[str, int]],
    known: Sizes,
    smallest: Callable[[Sizes], Mapping[str, np.ndarray]],
) -> Sizes:
    """The first size with which the model runs, the same for all open axes; none where there is no such."""
    try:
        session = sessions.create_session(model, name="the model")
    except SparseOnnxError:
        return {}
    for size in _TRIED:
        sizes = known | dict.fromkeys(unknown, size)
        try:
            sessions.run(session, dict(smallest(sizes)))
        except SparseOnnxError:
            continue
        return sizes
    return {}

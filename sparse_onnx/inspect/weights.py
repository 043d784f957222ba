"""What two models' weights have in common, by content.

Lowering cuts packed tensors into slices and copies files, so neither names nor shapes nor places say what is
the same. A tensor counts as shared where the other model holds the same bytes: as a tensor, as an aligned
slice of one, or as a row of equal parts. Content is compared by hashes of samples, so that it is quick for
any size: tensors that are equal at the samples and differ elsewhere are taken for the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os

import numpy as np
import onnx_ir as ir

#: Bytes read at each sampled place; a tensor of up to all the samples' bytes is read whole.
_SAMPLE = 4096
_SAMPLES = 8
#: A tensor is compared with slices of the other model's tensors of up to this many times its size.
_MOST_PARTS = 4096


@dataclasses.dataclass(frozen=True)
class Shared:
    """Bytes of B that A has too, bytes only in B, bytes only in A."""

    both: int
    added: int
    removed: int


def shared_weights(a: ir.Model, b: ir.Model) -> Shared:
    first, second = _tensors(a), _tensors(b)
    both = _found(second, first)
    return Shared(
        both=both,
        added=sum(view.nbytes for view in second) - both,
        removed=sum(view.nbytes for view in first) - _found(first, second),
    )


def _tensors(model: ir.Model) -> list[np.ndarray]:
    """Every initializer's bytes as a flat view of uint8; external ones are memory-mapped, not read."""
    views = []
    files: dict[str, np.ndarray] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes == 0:
                continue
            if isinstance(tensor, ir.ExternalTensor):
                path = os.fspath(tensor.path)
                if path not in files:  # one mapping a file: a process may hold 65,530 of them
                    files[path] = np.memmap(path, np.uint8, "r")
                start = tensor.offset or 0
                views.append(files[path][start : start + tensor.nbytes])
            else:
                views.append(np.frombuffer(tensor.tobytes(), np.uint8))
    return views


def _found(wanted: list[np.ndarray], held: list[np.ndarray]) -> int:
    """Bytes of `wanted` that occur in `held`."""
    by_size: dict[int, set[bytes]] = {}

    def contents(size: int) -> set[bytes]:
        if size not in by_size:
            by_size[size] = {
                _digest(view[start : start + size])
                for view in held
                if view.nbytes % size == 0 and view.nbytes // size <= _MOST_PARTS
                for start in range(0, view.nbytes, size)
            }
        return by_size[size]

    sizes = sorted({view.nbytes for view in held}, reverse=True)
    found = 0
    for view in wanted:
        if _digest(view) in contents(view.nbytes):
            found += view.nbytes
            continue
        found += max(
            (_parts_found(view, size, contents(size)) for size in sizes if _divides(size, view)), default=0
        )
    return found


def _divides(size: int, view: np.ndarray) -> bool:
    return size < view.nbytes and view.nbytes % size == 0 and view.nbytes // size <= _MOST_PARTS


def _parts_found(view: np.ndarray, size: int, contents: set[bytes]) -> int:
    parts = (view[start : start + size] for start in range(0, view.nbytes, size))
    return sum(part.nbytes for part in parts if _digest(part) in contents)


def _digest(view: np.ndarray) -> bytes:
    digest = hashlib.blake2b(view.nbytes.to_bytes(8, "little"), digest_size=16)
    if view.nbytes <= _SAMPLE * _SAMPLES:
        digest.update(view.tobytes())
    else:
        for start in np.linspace(0, view.nbytes - _SAMPLE, _SAMPLES, dtype=np.int64):
            digest.update(view[start : start + _SAMPLE].tobytes())
    return digest.digest()

"""Whether constants of two models are the same: by where they lie if that settles it, else by all their bytes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import opened
from sparse_onnx.graph.stacked import pieces, place

_CHUNK = 8 << 20
#: Constants up to this size are always read.
_SMALL = 4096


class Constants:
    """Digests of the constants that two models use. Equal digests mean equal type, shape and content.

    Where both models use the very same tensors of a type and shape - the same bytes of the same files, or the same
    objects - these are told apart by where they are, and nothing is read. All others are read whole, in pieces.
    """

    def __init__(self, first: Iterable[ir.TensorProtocol], second: Iterable[ir.TensorProtocol]) -> None:
        places: dict[str, tuple[set[Hashable], set[Hashable]]] = defaultdict(lambda: (set(), set()))
        for side, tensors in enumerate((first, second)):
            for tensor in tensors:
                places[_head(tensor)][side].add(place(tensor, _place))
        self._shared = {head for head, (ours, theirs) in places.items() if ours == theirs}
        self._known: dict[Hashable, str] = {}

    def digest(self, tensor: ir.TensorProtocol | None) -> str:
        """Of one of the tensors that the object was made for, or of a small one.

        Raises:
            ModelError: a weight file is gone.
        """
        if tensor is None:
            return "absent"
        head, where = _head(tensor), place(tensor, _place)
        if head in self._shared and (tensor.dtype == ir.DataType.STRING or tensor.nbytes > _SMALL):
            return f"{head} at {where}"
        if (head, where) not in self._known:
            self._known[head, where] = f"{head} {_content(tensor)}"
        return self._known[head, where]


def _head(tensor: ir.TensorProtocol) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape.numpy())}"


def _place(tensor: ir.TensorProtocol) -> Hashable:
    if isinstance(tensor, ir.ExternalTensor):
        return os.path.realpath(tensor.path), tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _content(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256()
    for piece in pieces(tensor):
        _add(digest, piece)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensor: ir.TensorProtocol) -> None:
    if tensor.dtype == ir.DataType.STRING:
        digest.update(repr([bytes(text) for text in tensor.numpy().reshape(-1)]).encode())
    elif isinstance(tensor, ir.ExternalTensor):
        with opened(tensor) as descriptor:
            at, end = tensor.offset or 0, (tensor.offset or 0) + tensor.nbytes
            while at < end:
                piece = os.pread(descriptor, min(_CHUNK, end - at), at)
                if not piece:
                    break
                digest.update(piece)
                at += len(piece)
    elif tensor.dtype.bitwidth < 8:
        digest.update(tensor.tobytes())
    else:
        array = np.ascontiguousarray(tensor.numpy())
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(array.reshape(-1).view(np.uint8).data)

"""Weights that are computed when they are read, written out once before a model is run many times."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.graph import io
from sparse_onnx.graph.scratch import scratch_folder

#: Bytes of such weights that a model in memory may hold: a serialized graph has less than 2 GB.
_MOST = 256 << 20


@contextlib.contextmanager
def materialised(model: ir.Model) -> Iterator[ir.Model]:
    """The model, or where many of its weights are computed, the same with these in temporary files.

    Raises:
        OutsideError: no space is left.
    """
    computed = sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor)
    )
    if computed <= _MOST:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-", dir=scratch_folder()) as folder:
        path = Path(folder) / "model.onnx"
        io.save(model, path, weights="copy")
        yield io.load(path)

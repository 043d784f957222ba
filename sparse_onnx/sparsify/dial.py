"""One number that sets all thresholds of a model: the optional graph input `sparsity_level`.

    level  = Clip(sparsity_level, 0, 100)
    tau    = Split(Gather(table, level))       table [101, sites]; row 0 is -1: nothing is skipped

An initializer that is also an input of the graph: sessions run without it, with the level that the model was made for,
and a caller that passes an int64 scalar turns it for that run. Three nodes for all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.sparsify.allocate import LEVELS

INPUT = "sparsity_level"
#: Metadata of the node that gives the level, in bounds.
DIAL_KEY = "sparse_onnx.dial"


def emit_dial(
    model: ir.Model,
    names: Namespace,
    tables: Sequence[np.ndarray],
    types: Sequence[ir.DataType],
    level: int,
) -> tuple[str, list[ir.Value]]:
    """The thresholds of each site, computed before all other nodes.

    Args:
        model: gets the input and the nodes.
        names: of the model.
        tables: ``[101]`` a site; of several columns where a site has a threshold for each input.
        types: of each site's threshold.
        level: that the model runs at where nobody says otherwise.

    Returns:
        The input's name, and ``[1]`` or ``[K]`` a site.
    """
    graph = model.graph
    emit = Emitter(graph, names, INPUT)
    dial = ir.Value(
        name=names.free(INPUT),
        shape=ir.Shape(()),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(np.asarray(level, np.int64)),
    )
    assert dial.const_value is not None and dial.name is not None
    dial.const_value.name = dial.name
    graph.inputs.append(dial)
    graph.register_initializer(dial)
    lowest, highest = (emit.constant(np.asarray(end, np.int64)) for end in (0, LEVELS - 1))
    current = emit.op("Clip", dial, lowest, highest)
    emit.nodes[-1].metadata_props[DIAL_KEY] = "level"
    found: dict[int, ir.Value] = {}
    for dtype in dict.fromkeys(types):
        sites = [at for at, kind in enumerate(types) if kind == dtype]
        for at, value in zip(sites, _rows(emit, [tables[at] for at in sites], dtype, current), strict=True):
            value.dtype, value.shape = dtype, ir.Shape([tables[at][0].size])
            found[at] = value
    if len(graph):
        graph.insert_before(graph[0], emit.nodes)
    else:
        graph.extend(emit.nodes)
    return dial.name, [found[at] for at in range(len(tables))]


def _rows(
    emit: Emitter, tables: Sequence[np.ndarray], dtype: ir.DataType, level: ir.Value
) -> Sequence[ir.Value]:
    parts = [table.reshape(LEVELS, -1) for table in tables]
    tensor = ir.Tensor(
        np.concatenate(parts, axis=1).astype(dtype.numpy()), dtype, name=f"{INPUT}.{dtype.name.lower()}"
    )
    table = emit.names.initializer(emit.graph, (INPUT, dtype), tensor)
    row = emit.op("Gather", table, level, axis=0)
    if len(parts) == 1:
        return [row]
    widths = [part.shape[1] for part in parts]
    return emit.ops("Split", (row, emit.constant(np.asarray(widths, np.int64))), len(parts), axis=0)


def set_level(model: ir.Model, name: str, level: int) -> None:
    """Sets the level that a model with that dial runs at where its caller says nothing."""
    model.graph.initializers[name].const_value = ir.Tensor(np.asarray(level, np.int64), name=name)

"""Small models as ONNX text, sessions of them, and what ORT makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

Constants = Mapping[str, np.ndarray]

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def since(*version: int) -> pytest.MarkDecorator:
    """Of a trap that older versions of ORT are known not to have, or to have in another form."""
    return pytest.mark.skipif(version > VERSION, reason=f"found in ORT {'.'.join(map(str, version))}")


def model(
    inputs: str,
    body: str,
    outputs: str,
    constants: Constants | None = None,
    functions: str = "",
    opset: int = 20,
) -> onnx.ModelProto:
    """`inputs => outputs { body }` with initializers, and functions of the domain `t` behind it."""
    made = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "t" : 1]>
        g ({inputs}) => ({outputs}) {{ {body} }} {functions}
    """)
    made.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in (constants or {}).items()
    )
    return made


def session(
    made: onnx.ModelProto | Path,
    *,
    level: int = 99,
    threads: int = 1,
    saved: Path | None = None,
    entries: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """A quiet session on CPU. `saved` is where ORT writes the graph that it made of the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    source = str(made) if isinstance(made, Path) else made.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(made: onnx.ModelProto, feeds: Constants, *, level: int = 99, threads: int = 1) -> list[np.ndarray]:
    return session(made, level=level, threads=threads).run(None, dict(feeds))


def optimized(made: onnx.ModelProto, folder: Path) -> onnx.GraphProto:
    """The graph as ORT runs it at its highest optimization level."""
    path = folder / "optimized.onnx"
    session(made, saved=path)
    return onnx.load(path).graph


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those in subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def operators(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in nodes(graph)]

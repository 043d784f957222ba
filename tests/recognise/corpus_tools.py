"""Feeds for the corpus' models, and what other tools make of those models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

FOLDER = Path(__file__).parents[3] / "shared" / "corpus"
MANIFEST: list[dict[str, Any]] = (
    json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").exists() else []
)
VOCABULARY = 64
KV_SIZE = 16


def entries(blocks: bool | None = None) -> list[Any]:
    """The manifest's entries as test parameters; one that skips where there is no corpus."""
    if not MANIFEST:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no corpus at {FOLDER}"))]
    chosen = [e for e in MANIFEST if blocks is None or bool(e["moe_blocks"]) == blocks]
    return [pytest.param(entry, id=entry["model"].removesuffix(".onnx")) for entry in chosen]


def feeds(model: onnx.ModelProto, names: list[str], batch: int, length: int, past: int, seed: int) -> dict:
    """Random tokens or rows for inputs whose roles are `names`, in the model's order."""
    rng = np.random.default_rng([batch, length, past, seed])
    made = {}
    given = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in given]
    has_past = any("past" in name for name in names)
    past = past if has_past else 0
    for value, name in zip(values, names, strict=True):
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        sizes = [d.dim_value for d in kind.shape.dim]
        if name == "input_ids":
            array = rng.integers(0, VOCABULARY, (batch, length))
        elif name == "attention_mask":
            array = np.ones((batch, past + length))
        elif name == "position_ids":
            array = np.tile(np.arange(past, past + length), (batch, 1))
        elif name == "x":
            array = rng.standard_normal((batch, length, sizes[-1]))
        elif "conv" in name:
            array = rng.standard_normal((batch, *sizes[1:]))
        else:
            array = rng.standard_normal((batch, sizes[1] or 2, past, sizes[3] or KV_SIZE))
        made[value.name] = array.astype(dtype)
    return made


SHAPES = ((1, 1, 0), (2, 7, 3), (1, 33, 0))
"""Batch, length, past: one token, the usual, many."""


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """No name, no metadata, no shape but of inputs and outputs: what is left is the computation."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for part in (model, model.graph, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name = model.producer_version = model.graph.name = ""
    names: dict[str, str] = {"": ""}
    _strip_graph(model.graph, names)
    model.graph.name = "g"
    return model


def _strip_graph(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    def new(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    del graph.value_info[:]
    for item in (*graph.input, *graph.initializer, *graph.output):
        item.name, item.doc_string = new(item.name), ""
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
    for number, node in enumerate(graph.node):
        node.name, node.doc_string = f"n{number}", ""
        del node.metadata_props[:]
        for field in (node.input, node.output):
            renamed = [new(name) for name in field]
            del field[:]
            field.extend(renamed)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip_graph(attribute.g, names)


def saved_by_ort(source: Path, out: Path, level: str) -> onnx.ModelProto:
    """ONNX Runtime's own optimized model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}"
    )
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return onnx.load(out)


def halved(model: onnx.ModelProto, spelling: str) -> onnx.ModelProto:
    """In float16, inputs and outputs as they were.

    The histogram of the grouped spelling stays in float32: no kernel of the CPU adds in float16.
    """
    converter = pytest.importorskip("onnxruntime.transformers.float16", reason="no float16 converter")
    kept = [*converter.DEFAULT_OP_BLOCK_LIST, *(["ScatterElements"] if spelling == "grouped" else [])]
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    return converter.convert_float_to_float16(
        copied, keep_io_types=True, disable_shape_infer=True, op_block_list=kept
    )


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    onnxslim = pytest.importorskip("onnxslim", reason="onnxslim is not installed")
    return onnxslim.slim(onnx.ModelProto.FromString(model.SerializeToString()))


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    onnxsim = pytest.importorskip("onnxsim", reason="onnxsim is not installed")
    return onnxsim.simplify(onnx.ModelProto.FromString(model.SerializeToString()))[0]


def weight_bytes(model: onnx.ModelProto) -> dict[str, bytes]:
    """All weights: initializers, and Constant nodes' values by their output."""
    found = {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].type == onnx.AttributeProto.TENSOR:
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t).tobytes()
    return found


def has_half(model: onnx.ModelProto) -> bool:
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)

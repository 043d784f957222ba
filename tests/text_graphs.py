"""Graphs written as text, for what is read off them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

F32 = np.float32


def graph(
    body: str,
    outputs: str,
    stored: Mapping[str, Any],
    inputs: str = "float[T,8] logits",
    types: str = "",
) -> onnx.ModelProto:
    """A model of the body's nodes; `stored` are initializers: floats as float32, integers as int64."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g ({inputs}) => ({outputs}) <{types}> {{ {body} }}
    """
    model = parser.parse_model(text)
    for name, value in stored.items():
        array = np.asarray(value)
        array = array.astype(F32 if array.dtype.kind == "f" else array.dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model)

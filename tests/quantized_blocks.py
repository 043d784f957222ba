"""Neutral blocks whose matrices are stored quantized, behind DequantizeLinear."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
from builders import Shape, routed_model
from onnx import helper, numpy_helper


@dataclasses.dataclass(frozen=True)
class Storage:
    """`block` 0: one scale an index of `axis`; axis None: one scale for all. `points`: none, one for all, or any."""

    kind: str = "uint4"
    axis: int | None = 2
    block: int = 16
    points: str = "any"
    opset: int = 21


def quantized_model(shape: Shape, storage: Storage, constant: bool = True, seed: int = 0) -> ir.Model:
    """tokens, index, weight -> y. Not `constant`: the scale of the last matrix is an input."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(getattr(ml_dtypes, storage.kind, None) or storage.kind)
    info = ml_dtypes.iinfo(dtype)
    model = ir.to_proto(routed_model(shape, opset=storage.opset))
    for tensor in list(model.graph.initializer):
        if tensor.name.endswith("_bias"):
            continue
        dims = tuple(tensor.dims)
        grid = _grid(dims, storage)
        numbers = rng.integers(int(info.min), int(info.max), dims, endpoint=True).astype(dtype)
        spread = float(info.max) - float(info.min)
        scale = rng.uniform(1, 3, grid) / spread / np.sqrt(dims[1])
        parts = {"data": numbers, "scale": scale.astype(numpy_helper.to_array(tensor).dtype)}
        if storage.points != "none":
            points = rng.integers(int(info.min), int(info.max), grid, endpoint=True)
            parts["points"] = np.asarray(points if storage.points == "any" else points * 0 + 3).astype(dtype)
        model.graph.initializer.remove(tensor)
        for part, array in parts.items():
            name = f"{tensor.name}.{part}"
            if part == "scale" and not constant and tensor.name == "fc2":
                model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, grid))
            else:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
        attributes = {} if storage.axis is None else {"axis": storage.axis}
        if storage.block:
            attributes["block_size"] = storage.block
        inputs = [f"{tensor.name}.{part}" for part in parts]
        node = helper.make_node(
            "DequantizeLinear", inputs, [tensor.name], f"{tensor.name}.node", **attributes
        )
        model.graph.node.insert(0, node)
        model.graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))
    if storage.kind in ("int2", "uint2"):
        model.ir_version = 13
    return ir.from_proto(model)


def _grid(dims: tuple[int, ...], storage: Storage) -> tuple[int, ...]:
    if storage.axis is None:
        return ()
    if not storage.block:
        return (dims[storage.axis],)
    return tuple(-(-n // storage.block) if at == storage.axis % 3 else n for at, n in enumerate(dims))

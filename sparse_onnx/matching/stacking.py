"""The matrices of a block's experts, stored apart or packed, as the packed inputs of its neutral node."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import WeightLayout
from sparse_onnx.graph.build import Namespace
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import stack, transpose
from sparse_onnx.matching.expert import Expert
from sparse_onnx.matching.linear import Linear, Matrix
from sparse_onnx.matching.values import tensor

Tensor = ir.TensorProtocol


class Obstacle(Exception):
    """Why a proven block cannot be written as a neutral node."""


def stacked(
    experts: Sequence[Expert], name: str, graph: ir.Graph | ir.Function, names: Namespace
) -> tuple[dict[str, ir.Value], WeightLayout]:
    """Matrices and biases by role as values ``[E, ...]``, and how the matrices lie. Reads no matrix.

    A packed tensor that the graph already has is used as it is; matrices stored apart become a lazy stack.

    Raises:
        Obstacle: shapes or types differ between experts, or weights that are no constants.
    """
    roles = list(experts[0].layers)
    turned = sum(1 if experts[0].layers[role].out_in else -1 for role in roles)
    if turned == 0:
        turned = 1 if experts[0].layers[roles[0]].out_in else -1
    out_in = turned > 0
    values: dict[str, ir.Value] = {}
    for role in roles:
        layers = [expert.layers[role] for expert in experts]
        values[role] = _matrices(layers, out_in, f"{name}/{role}", graph, names)
        count, width = _outputs(values[role], out_in)
        values[f"{role}_bias"] = _biases(layers, count, width, f"{name}/{role}_bias", graph, names)
    return values, WeightLayout.OUT_IN if out_in else WeightLayout.IN_OUT


def _outputs(value: ir.Value, out_in: bool) -> tuple[int, int]:
    assert value.shape is not None
    shape = value.shape.numpy()
    if len(shape) != 3:
        raise Obstacle(f"the experts' weights '{value.name}' are {list(shape)}, not three-dimensional")
    return shape[0], shape[1] if out_in else shape[2]


def _matrices(
    layers: Sequence[Linear], out_in: bool, name: str, graph: ir.Graph | ir.Function, names: Namespace
) -> ir.Value:
    stored = [layer.weight for layer in layers]
    for item in stored:
        _tensor(item)
    whole = _packed(stored)
    if whole is not None and all(layer.out_in == out_in for layer in layers):
        return whole
    parts = []
    for layer in layers:
        part = _expert_tensors(layer.weight) if len(layers) == 1 else [_part(layer.weight, 2)]
        if layer.weight.half is not None:
            outputs = 0 if layer.out_in else 1
            part = [_half(item, layer.weight.half, outputs) for item in part]
        if layer.out_in != out_in:
            part = [transpose(item, item.name or name) for item in part]
        parts.extend(part)
    return _added(_stack(parts, name), [layer.weight for layer in layers], graph, names)


def _biases(
    layers: Sequence[Linear],
    count: int,
    width: int,
    name: str,
    graph: ir.Graph | ir.Function,
    names: Namespace,
) -> ir.Value:
    dtype = layers[0].weight.source.dtype
    biases = [layer.bias for layer in layers]
    for bias in biases:
        if bias is not None:
            _tensor(bias)
    if all(bias is None for bias in biases):
        if dtype is None:
            raise Obstacle(f"the type of the experts' weights '{layers[0].weight.source.name}' is not known")
        zeros = ir.Tensor(
            np.zeros((count, width), dtype.numpy()), dtype, name=f"sparse_onnx/zeros[{count}x{width}]"
        )
        home = _home([layer.weight for layer in layers], graph)
        return names.initializer(home, ("zeros", dtype, count, width), zeros)
    whole = _packed([bias for bias in biases if bias is not None]) if None not in biases else None
    if whole is not None and whole.shape is not None and tuple(whole.shape.numpy()) == (count, width):
        return whole
    rows: list[Tensor] = []
    for bias in biases:
        if bias is None:
            assert dtype is not None
            rows.append(ir.Tensor(np.zeros(width, dtype.numpy()), dtype, name=name))
            continue
        parts = _expert_tensors(bias) if len(biases) == 1 else [_part(bias, 1)]
        for part in parts:
            array = read_array(part).reshape(-1)
            if bias.half is not None:
                array = np.split(array, 2)[bias.half] if array.size % 2 == 0 else array
            if array.size != width:
                raise Obstacle(f"bias '{bias.source.name}' has {array.size} elements, not {width}")
            rows.append(ir.Tensor(np.array(array), part.dtype, name=name))
    used = [bias for bias in biases if bias is not None]
    return _added(_stack(rows, name), used, graph, names)


def _packed(matrices: Sequence[Matrix]) -> ir.Value | None:
    """The initializer that holds just these, in order and whole."""
    first = matrices[0]
    if any(item.half is not None for item in matrices):
        return None
    if len(matrices) == 1:
        return first.source if first.index is None else None
    count = len(matrices)
    length = first.source.shape[0] if first.source.shape is not None else None
    in_order = all(item.source is first.source and item.index == at for at, item in enumerate(matrices))
    return first.source if in_order and length == count else None


def _tensor(stored: Matrix) -> Tensor:
    found = tensor(stored.source)
    if found is None:
        raise Obstacle(
            f"'{stored.source.name}' is not constant: weights must be initializers that no caller sets"
        )
    return found


def _part(stored: Matrix, dimensions: int) -> Tensor:
    """One expert's tensor. Its rank may exceed `dimensions` for a bias ``[1, n]`` alone."""
    found = _tensor(stored)
    if stored.index is not None:
        found = slice_first_axis(found, stored.index, f"{stored.source.name}.{stored.index}")
    if dimensions == 2 and len(found.shape) != 2:
        raise Obstacle(f"'{stored.source.name}' holds no matrix of one expert: {list(found.shape.numpy())}")
    return found


def _expert_tensors(stored: Matrix) -> list[Tensor]:
    """All slices of a packed tensor."""
    found = _tensor(stored)
    count = found.shape.numpy()[0]
    return [slice_first_axis(found, at, f"{stored.source.name}.{at}") for at in range(count)]


def _half(part: Tensor, half: int, axis: int) -> Tensor:
    shape = list(part.shape.numpy())
    if shape[axis] % 2:
        raise Obstacle(f"'{part.name}' has {shape[axis]} outputs, which are no two halves")
    shape[axis] //= 2
    if isinstance(part, ir.ExternalTensor) and axis == 0:
        length = part.nbytes // 2
        start = (part.offset or 0) + half * length
        return ir.ExternalTensor(
            part.location,
            start,
            length,
            part.dtype,
            shape=ir.Shape(shape),
            name=f"{part.name}.{half}",
            base_dir=part.base_dir,
        )
    cut = functools.partial(_cut, part, half, axis)
    return ir.LazyTensor(cut, part.dtype, ir.Shape(shape), name=f"{part.name}.{half}")


def _cut(part: Tensor, half: int, axis: int) -> ir.Tensor:
    array = np.split(read_array(part), 2, axis)[half]
    return ir.Tensor(np.ascontiguousarray(array), part.dtype, name=part.name)


def _stack(parts: Sequence[Tensor], name: str) -> Tensor:
    try:
        return stack(parts, name)
    except ValueError as error:
        raise Obstacle(f"the experts' weights do not fit together: {error}") from None


def _home(stored: Sequence[Matrix], graph: ir.Graph | ir.Function) -> ir.Graph:
    """The graph whose initializers the weights are, if it is one; else that of the block."""
    owners = {id(item.source.graph): item.source.graph for item in stored}
    owner = next(iter(owners.values())) if len(owners) == 1 else graph
    if not isinstance(owner, ir.Graph):
        raise Obstacle("a function cannot hold weights of its own")
    return owner


def _added(
    packed: Tensor, stored: Sequence[Matrix], graph: ir.Graph | ir.Function, names: Namespace
) -> ir.Value:
    home = _home(stored, graph)
    key = tuple((id(item.source), item.index, item.half) for item in stored)
    return names.initializer(home, ("stack", packed.name, key), packed)

"""Linear layers and the stored matrices behind them, however a graph spells them."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.values import attribute, axes, axis, ints, pairs, producer, rank, size, tensor

MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One expert's matrix or bias as it is stored.

    Attributes:
        source: an initializer (or DequantizeLinear of one).
        index: the slice of `source` on its first axis; None: all of it (one expert's, or all experts' packed).
        transposed: the graph uses the last two axes the other way round.
        half: only the first (0) or the last (1) half of the outputs; None: all of them.
    """

    source: ir.Value
    index: int | None = None
    transposed: bool = False
    half: int | None = None


@dataclasses.dataclass(frozen=True)
class Linear:
    """``y = x W + bias``, row by row.

    Attributes:
        x: ``[..., in]``.
        weight: what is stored; `out_in` tells how it lies.
        bias: stored ``[out]`` (``[E, out]`` where packed), or None.
        out_in: whether the stored matrix has the outputs before the inputs.
        node: that multiplies.
        activation: of an operator that applies one at once (ORT's FusedGemm): the operator's name and attributes.
    """

    x: ir.Value
    weight: Matrix
    bias: Matrix | None
    out_in: bool
    node: ir.Node
    activation: tuple[str, tuple[tuple[str, float], ...]] | None = None


def matrix(value: ir.Value | None) -> Matrix | None:
    """The stored tensor behind a constant matrix or vector: through Split, Slice, Gather, Squeeze, Transpose."""
    if value is None:
        return None
    if tensor(value) is not None:
        return Matrix(value)
    node = producer(value)
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Identity":
        return matrix(source)
    if node.op_type == "Transpose":
        return _turned(node, matrix(source))
    if node.op_type == "Gather":
        picked = ints(node.inputs[1])
        if picked is None or len(picked) != 1 or rank(node.inputs[1]) != 0 or axis(node, 0) != 0:
            return None
        return _slice(source, picked[0])
    if node.op_type in ("Squeeze", "Reshape"):
        return _squeezed(node, source)
    return None


def _turned(node: ir.Node, inner: Matrix | None) -> Matrix | None:
    order = attribute(node, "perm")
    if inner is None:
        return None
    if order is None:
        shape = stored_shape(inner)
        order = [1, 0] if shape is not None and len(shape) == 2 else None
    if order is None or list(order) not in ([1, 0], [0, 2, 1]):
        return None
    return dataclasses.replace(inner, transposed=not inner.transposed)


def _slice(packed: ir.Value, index: int) -> Matrix | None:
    stored = matrix(packed)
    count = size(packed, 0)
    if stored is None or stored.index is not None or count is None or not -count <= index < count:
        return None
    return dataclasses.replace(stored, index=index % count)


def _squeezed(node: ir.Node, piece: ir.Value) -> Matrix | None:
    """``[1, ...]`` without its first axis, where that piece is one slice of a packed tensor."""
    if node.op_type == "Squeeze":
        found = axes(node)
        if found != [0] and (found is None or found != [-(rank(piece) or 0)]):
            return None
    elif not _drops_first_axis(node, piece):
        return None
    cut = producer(piece)
    if cut is None or cut.inputs[0] is None:
        return None
    packed = cut.inputs[0]
    if cut.op_type == "Split" and axis(cut, 0) == 0 and size(packed, 0) == len(cut.outputs):
        lengths = ints(cut.inputs[1]) if len(cut.inputs) > 1 and cut.inputs[1] is not None else None
        if lengths is not None and set(lengths) != {1}:
            return None
        return _slice(packed, piece.index() or 0)
    if cut.op_type == "Gather" and axis(cut, 0) == 0:
        picked = ints(cut.inputs[1])
        return _slice(packed, picked[0]) if picked is not None and len(picked) == 1 else None
    if cut.op_type == "Slice":
        bounds = [ints(item) for item in cut.inputs[1:5]]
        while len(bounds) < 4:
            bounds.append(None)
        start, end, along, step = bounds
        if (
            start is None
            or end is None
            or len(start) != 1
            or along not in ([0], None)
            or step not in ([1], None)
        ):
            return None
        count = size(packed, 0)
        if count is None:
            return None
        first = start[0] + count if start[0] < 0 else start[0]
        last = min(end[0] + count if end[0] < 0 else end[0], count)
        return _slice(packed, first) if last == first + 1 else None
    return None


def _drops_first_axis(node: ir.Node, piece: ir.Value) -> bool:
    target = node.outputs[0].shape
    wanted = ints(node.inputs[1])
    if piece.shape is None or not piece.shape.is_static() or piece.shape.numpy()[:1] != (1,):
        return False
    rest = list(piece.shape.numpy()[1:])
    if target is not None and target.is_static():
        return list(target.numpy()) == rest
    return wanted is not None and len(wanted) == len(rest) and wanted in (rest, [-1, *rest[1:]])


def linear(value: ir.Value | None) -> Linear | None:
    """The value as a linear layer on a two-dimensional constant matrix: MatMul, Gemm, Einsum, ORT's fused ones."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.domain == "" and node.op_type == "Add":
        for product, constant in pairs(node):
            bias = stored_bias(constant)  # first: sums of layers' results may be thousands of additions deep
            inner = None if bias is None else linear(product)
            if inner is not None and inner.bias is None and inner.activation is None:
                return dataclasses.replace(inner, bias=bias)
        return None
    if node.op_type in ("MatMul", "FusedMatMul"):
        return _matmul(node)
    if node.op_type in ("Gemm", "FusedGemm"):
        return _gemm(node)
    return _einsum(node) if node.domain == "" and node.op_type == "Einsum" else None


def stored_bias(value: ir.Value) -> Matrix | None:
    """A stored vector; ``[1, ..., n]`` counts too where it is a whole initializer."""
    found = matrix(value)
    shape = None if found is None or found.transposed else stored_shape(found)
    if found is None or not shape or any(length != 1 for length in shape[:-1]):
        return None
    return found if len(shape) == 1 or found.index is None else None


def stored_shape(stored: Matrix) -> list[int] | None:
    """Of the one matrix or vector, as it is stored. Subgraphs often lack the shapes of what they cut out of weights."""
    shape = stored.source.shape
    if shape is None or not shape.is_static():
        return None
    return list(shape.numpy())[0 if stored.index is None else 1 :]


def _two_dimensional(value: ir.Value | None) -> Matrix | None:
    found = matrix(value)
    shape = None if found is None else stored_shape(found)
    return found if shape is not None and len(shape) == 2 else None


def turns_weight(node: ir.Node) -> bool | None:
    """Whether a MatMul, or ORT's FusedMatMul, multiplies with its second input transposed; None where it does more."""
    if node.op_type == "MatMul" and node.domain == "":
        return False
    if node.op_type != "FusedMatMul" or node.domain != MICROSOFT:
        return None
    if any(attribute(node, flag, 0) for flag in ("transA", "transBatchA", "transBatchB")):
        return None
    return bool(attribute(node, "transB", 0)) if attribute(node, "alpha", 1.0) == 1.0 else None


def _matmul(node: ir.Node) -> Linear | None:
    x, weight, turned = node.inputs[0], _two_dimensional(node.inputs[1]), turns_weight(node)
    if x is None or weight is None or turned is None:
        return None
    return Linear(x, weight, None, weight.transposed != turned, node)


def _gemm(node: ir.Node) -> Linear | None:
    if node.domain != ("" if node.op_type == "Gemm" else MICROSOFT):
        return None
    x, weight = node.inputs[0], _two_dimensional(node.inputs[1])
    if x is None or weight is None or attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
        return None
    added = node.inputs[2] if len(node.inputs) > 2 else None
    bias = None
    if added is not None:
        bias = stored_bias(added)
        if bias is None or attribute(node, "beta", 1.0) != 1.0:
            return None
    activation = None
    if node.op_type == "FusedGemm":
        named = attribute(node, "activation", "")
        extras = ("activation_alpha", "activation_beta", "activation_gamma")
        given = tuple(
            (name.split("_")[1], attribute(node, name)) for name in extras if name in node.attributes
        )
        activation = (named, given)
    turned = bool(attribute(node, "transB", 0))
    return Linear(x, weight, bias, weight.transposed != turned, node, activation)


def _einsum(node: ir.Node) -> Linear | None:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(node.inputs) != 2:
        return None
    for (x_term, w_term), (x, w) in (
        ((terms[0], terms[1]), (node.inputs[0], node.inputs[1])),
        ((terms[1], terms[0]), (node.inputs[1], node.inputs[0])),
    ):
        weight = _two_dimensional(w)
        if weight is None or x is None or len(w_term) != 2 or not x_term or not result:
            continue
        summed, kept = x_term[-1], result[-1]
        if (
            {summed, kept} != set(w_term)
            or summed == kept
            or kept in x_term
            or x_term[:-1] != result[:-1]
            or summed in x_term[:-1]
        ):
            continue
        return Linear(x, weight, None, (w_term == kept + summed) != weight.transposed, node)
    return None

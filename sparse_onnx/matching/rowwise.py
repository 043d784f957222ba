"""Proof that a body computes each row of its outputs from the same row of its input alone.

    f(x)[r] = f(x[r]) for every selection r of rows          rows: the first `lead` axes of x

A forward pass over the nodes knows three kinds of values: `Fixed` (the same whatever the rows hold), `Rows` (one part
a row, rows on the leading axes), and `Sizes` (vectors of sizes, in which the number of rows may stand, as Shape and
Concat make them for Reshape and Expand). What an operator may do with each is told in `row_rules` and `row_shapes`.
Every operator that is not listed there is refused by its name: random and control flow operators among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.blocks.function import MIN_OPSET
from sparse_onnx.matching.row_kinds import Dim, Dims, Fixed, Kind, NotRowWise, Rows, Size, Sizes, Step
from sparse_onnx.matching.row_rules import MICROSOFT, RULES
from sparse_onnx.matching.values import attribute

#: Operators of which ONNX infers nothing, and those that have the same result as far as its type goes.
_INFERRED_AS = {
    ("", "GroupNormalization"): "Identity",
    ("", "SimplifiedLayerNormalization"): "Identity",
    (MICROSOFT, "FusedConv"): "Conv",
    (MICROSOFT, "FusedGemm"): "Gemm",
    (MICROSOFT, "FusedMatMul"): "MatMul",
    **{(MICROSOFT, name): "Identity" for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")},
    **{(MICROSOFT, f"Skip{name}Normalization"): "Identity" for name in ("Layer", "SimplifiedLayer")},
}
_FLAGS = frozenset(
    ("And", "Or", "Xor", "Not", "IsNaN", "IsInf", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
)


@dataclasses.dataclass(frozen=True)
class Typed:
    """Type and sizes of an input of a body; None for a size that is not known."""

    dtype: ir.DataType
    dims: tuple[int | None, ...]

    @staticmethod
    def of(value: ir.Value) -> Typed | None:
        """None where type or rank are not known."""
        if value.dtype is None or value.shape is None:
            return None
        return Typed(value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape))


@dataclasses.dataclass(frozen=True)
class Proof:
    """The body is row by row. `graph` is a copy of it with inferred types, `outputs` and `kinds` are of that copy."""

    graph: ir.Graph
    outputs: tuple[Rows, ...]
    kinds: Mapping[ir.Value, Kind]


@dataclasses.dataclass(frozen=True)
class Counterexample:
    """The body is not known to be row by row: what stands in the way, and the operator."""

    reason: str
    op_type: str
    index: int


def prove(
    function: ir.Function,
    entry: Typed,
    others: Sequence[Typed | None],
    *,
    lead: int = 1,
) -> Proof | Counterexample:
    """Whether a body of one input of rows and any number of fixed ones is row by row.

    Args:
        function: its first input holds the rows.
        entry: type of that input; its first `lead` axes are the rows.
        others: types of the other inputs, as far as they are known.
        lead: axes that count rows, 1 or more.
    """
    graph = _scratch(function, entry, others)
    opset = function.opset_imports.get("", 0)
    rows: Dims = tuple(Dim() for _ in range(lead))
    merged = rows[0] if lead == 1 else Dim()
    if opset < MIN_OPSET:
        return Counterexample(f"its operators are of opset {opset}", "", -1)
    if len(entry.dims) < lead:
        return Counterexample(f"its input has {len(entry.dims)} axes", "", -1)
    kinds: dict[ir.Value, Kind] = {graph.inputs[0]: Rows((*rows, *map(_size, entry.dims[lead:])), lead)}
    for value, typed in zip(graph.inputs[1:], others, strict=True):
        kinds[value] = Fixed(None if typed is None else tuple(map(_size, typed.dims)))
    for index, node in enumerate(graph):
        step = Step(
            node, tuple(kinds[v] if v is not None else None for v in node.inputs), rows, merged, opset
        )
        try:
            for value, kind in zip(node.outputs, _apply(step), strict=False):
                kinds[value] = _refined(kind, value)
                _with_type(value, node)
        except NotRowWise as error:
            return Counterexample(str(error), node.op_type, index)
        except (LookupError, ValueError):
            return Counterexample("its inputs do not fit together", node.op_type, index)
        if any(value not in kinds for value in node.outputs if value.uses() or value.is_graph_output()):
            return Counterexample("a second output of it is used", node.op_type, index)
    outputs = []
    for value in graph.outputs:
        kind = kinds[value]
        if not isinstance(kind, Rows) or kind.lead != lead:
            return Counterexample("its result does not have one part for each row", "", -1)
        outputs.append(kind)
    return Proof(graph, tuple(outputs), kinds)


def _apply(step: Step) -> Sequence[Kind]:
    node = step.node
    rule = RULES.get((node.domain, node.op_type))
    if rule is None or node.overload:
        raise NotRowWise("it is not known to treat rows one by one")
    if any(item.is_ref() for item in node.attributes.values()):
        raise NotRowWise("it has an attribute that a caller sets")
    if (
        node.inputs
        and node.op_type != "Dropout"
        and all(isinstance(kind, Fixed | None) for kind in step.kinds)
    ):
        return [Fixed(None) for _ in node.outputs]
    return rule(step)


def _scratch(function: ir.Function, entry: Typed, others: Sequence[Typed | None]) -> ir.Graph:
    """The body as a graph with types as far as ONNX infers them."""
    graph = ir.GraphView(
        function.inputs,
        function.outputs,
        nodes=list(function),
        opset_imports=dict(function.opset_imports),
        name=function.name,
    ).clone()
    for index, (value, typed) in enumerate(zip(graph.inputs, (entry, *others), strict=True)):
        if typed is not None:
            value.type = ir.TensorType(typed.dtype)
            names = (f"d{index}_{at}" for at in range(len(typed.dims)))
            value.shape = ir.Shape(
                [name if size is None else size for name, size in zip(names, typed.dims, strict=True)]
            )
    if entry.dims:
        first = graph.inputs[0]
        assert first.shape is not None
        first.shape[0] = "rows"
    _infer(graph)
    return graph


def _infer(graph: ir.Graph) -> None:
    """Types as far as ONNX tells them; of operators that it does not know, as if they were the ones they come from."""
    renamed = []
    for node in graph:
        known = _INFERRED_AS.get((node.domain, node.op_type))
        if known is not None and not (
            node.op_type == "FusedMatMul" and len(node.attributes) > ("alpha" in node.attributes)
        ):
            renamed.append((node, node.domain, node.op_type))
            node.domain, node.op_type = "", known
    common.ShapeInferencePass(check_type=False, strict_mode=False)(ir.Model(graph, ir_version=10))
    for node, domain, op_type in renamed:
        node.domain, node.op_type = domain, op_type


def _with_type(value: ir.Value, node: ir.Node) -> None:
    """The type of a result that ONNX does not infer: that of the data, but for flags and indices."""
    if value.dtype is not None:
        return
    dtype = next((item.dtype for item in node.inputs if item is not None), None)
    if node.op_type == "Where":
        dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    if node.op_type in _FLAGS:
        dtype = ir.DataType.BOOL
    elif node.op_type in ("Shape", "ArgMax", "ArgMin") or (node.op_type == "TopK" and value.index() == 1):
        dtype = ir.DataType.INT64
    elif node.op_type == "Cast":
        dtype = ir.DataType(attribute(node, "to"))
    elif node.op_type in ("CastLike", "OneHot"):
        like = node.inputs[-1]
        dtype = None if like is None else like.dtype
    if dtype is not None:
        value.type = ir.TensorType(dtype)


def _size(size: int | None) -> Size:
    return Dim() if size is None else size


def _refined(kind: Kind, value: ir.Value) -> Kind:
    """With the sizes that ONNX's inference found."""
    if isinstance(kind, Sizes) or value.shape is None:
        return kind
    inferred = tuple(size if isinstance(size, int) else None for size in value.shape)
    if kind.dims is None:
        return dataclasses.replace(kind, dims=tuple(map(_size, inferred)))
    if len(inferred) != len(kind.dims):
        raise NotRowWise(f"its result has {len(kind.dims)} axes, or {len(inferred)}")
    first = kind.lead if isinstance(kind, Rows) else 0
    dims = tuple(
        told if at >= first and told is not None and isinstance(own, Dim) else own
        for at, (own, told) in enumerate(zip(kind.dims, inferred, strict=True))
    )
    return dataclasses.replace(kind, dims=dims)

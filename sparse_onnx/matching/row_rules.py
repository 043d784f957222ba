"""What each operator does with rows: the rules of `rowwise`, by operator."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_onnx.matching.row_kinds import (
    Dim,
    Fixed,
    Kind,
    NotRowWise,
    Rows,
    Rule,
    Step,
    broadcast,
    counted,
    only_fixed,
)
from sparse_onnx.matching.row_products import einsum, gemm, matmul
from sparse_onnx.matching.row_shapes import SHAPE_RULES

MICROSOFT = "com.microsoft"


def _elementwise(step: Step) -> Sequence[Kind]:
    kinds = [kind for at in range(len(step.kinds)) if (kind := step.settled(at)) is not None]
    return [broadcast(step, kinds)] * len(step.node.outputs)


def _unary(step: Step) -> Sequence[Kind]:
    """Elementwise in the first input; the others are parameters of the whole."""
    only_fixed(step, 1)
    kind = step.settled(0)
    assert kind is not None
    return [kind if isinstance(kind, Rows) else Fixed(kind.dims)] * len(step.node.outputs)


def _like(step: Step) -> Sequence[Kind]:
    kind = step.settled(0)
    assert kind is not None
    return [kind if isinstance(kind, Rows) else Fixed(kind.dims)]


def _dropout(step: Step) -> Sequence[Kind]:
    if step.kind(2) is not None and any(step.ints(2, "training mode")):
        raise NotRowWise("it is random in training mode")
    return [_like(step)[0]] * len(step.node.outputs)


def _channels(step: Step) -> Sequence[Kind]:
    """Convolutions, pools and norms: data `[N, C, ...]`, parameters the same for all rows."""
    data = _single(step)
    only_fixed(step, 1)
    return [Rows((data.dims[0], *(Dim() for _ in data.dims[1:])), 1)]


def _kept(step: Step) -> Sequence[Kind]:
    """The same with sizes as they were."""
    data = _single(step)
    if step.op == "BatchNormalization" and step.attribute("training_mode", 0):
        raise NotRowWise("it computes statistics over the rows in training mode")
    only_fixed(step, 1)
    return [data]


def _single(step: Step) -> Rows:
    data = step.rows_input(0)
    if data.lead != 1:
        raise NotRowWise("it takes only the first axis as rows")
    return data


def _fused_conv(step: Step) -> Sequence[Kind]:
    data = _single(step)
    for at in (1, 2):
        if step.kind(at) is not None:
            step.fixed(at, f"input {at}")
    result = Rows((data.dims[0], *(Dim() for _ in data.dims[1:])), 1)
    added = step.settled(3)
    return [result if added is None else broadcast(step, [result, added])]


def _layer_norm(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    axis = step.axis(len(data.dims), -1)
    step.behind(axis, data.lead)
    for at in range(1, len(step.kinds)):
        if step.kind(at) is not None:
            parameter = step.fixed(at, f"input {at}")
            broadcast(step, [data, parameter])
    return [data]


def _skip_norm(step: Step) -> Sequence[Kind]:
    data, skip = step.rows_input(0), step.rows_input(1)
    only_fixed(step, 2)
    result = broadcast(step, [data, skip])
    return (
        [result, Fixed(None), Fixed(None), result][: len(step.node.outputs)] if _sums_only(step) else [result]
    )


def _sums_only(step: Step) -> bool:
    return not any(value.uses() or value.is_graph_output() for value in step.node.outputs[1:3])


def _along(default: int) -> Rule:
    def rule(step: Step) -> Sequence[Kind]:
        """Works along one axis and keeps all sizes."""
        data = step.rows_input(0)
        step.behind(step.axis(len(data.dims), default), data.lead)
        return [data]

    return rule


def _cumsum(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    (axis,) = step.ints(1, "axis")
    step.behind(axis + len(data.dims) if axis < 0 else axis, data.lead)
    return [data]


def _mean_variance(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    for axis in step.attribute("axes", [0, 2, 3]):
        step.behind(axis + len(data.dims) if axis < 0 else axis, data.lead)
    return [data]


def _reduce(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    axes = step.axes(len(data.dims))
    if not axes:
        if axes is not None and step.attribute("noop_with_empty_axes", 0):
            return [data]
        raise NotRowWise("it sums up all axes, the rows too")
    return [_reduced(step, data, axes)]


def _arg(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    return [_reduced(step, data, [step.axis(len(data.dims), 0)])]


def _reduced(step: Step, data: Rows, axes: list[int]) -> Rows:
    for axis in axes:
        if axis < data.lead:
            raise NotRowWise("it reduces over the rows")
    keep = step.attribute("keepdims", 1)
    kept = [1 if at in axes else size for at, size in enumerate(data.dims) if keep or at not in axes]
    return Rows(tuple(kept), data.lead)


def _top_k(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    only_fixed(step, 1)
    axis = step.axis(len(data.dims), -1)
    step.behind(axis, data.lead)
    result = Rows(tuple(Dim() if at == axis else size for at, size in enumerate(data.dims)), data.lead)
    return [result, result]


def _resize(step: Step) -> Sequence[Kind]:
    data = _single(step)
    if step.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise NotRowWise("it crops a region")
    axes = step.attribute("axes")
    given = step.sizes(3) if step.kind(3) is not None else None
    if axes is not None and all(axis % len(data.dims) for axis in axes):
        pass
    elif axes is not None:
        raise NotRowWise("it works along the axis of the rows")
    elif given is not None:
        if (
            not step.counts_rows(given.entries[0])
            or step.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
        ):
            raise NotRowWise("it may change the number of rows")
    else:
        scales = step.fixed(2, "scales").array
        if scales is None or scales.ravel()[0] != 1:
            raise NotRowWise("it may change the number of rows")
    return [Rows((data.dims[0], *(Dim() for _ in data.dims[1:])), 1)]


def _grid_sample(step: Step) -> Sequence[Kind]:
    data, grid = _single(step), step.rows_input(1)
    if grid.lead != 1:
        raise NotRowWise("its grid is not one for each row")
    return [Rows((*data.dims[:2], *grid.dims[1:-1]), 1)]


def _triangle(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    only_fixed(step, 1)
    step.behind(len(data.dims) - 2, data.lead)
    return [data]


def _attention(step: Step) -> Sequence[Kind]:
    """Query, key and value alone: one attention a row. Masks and caches are not followed."""
    operands = [step.rows_input(at) for at in range(3)]
    if any(kind.lead != 1 for kind in operands) or any(kind is not None for kind in step.kinds[3:]):
        raise NotRowWise("it has a mask or a cache")
    return [Rows((operands[0].dims[0], *(Dim() for _ in operands[0].dims[1:])), 1)]


def _names(text: str) -> list[str]:
    return text.split()


ELEMENTWISE = _names(
    "Add Sub Mul Div Pow Mod Min Max Sum Mean And Or Xor Equal Less LessOrEqual Greater GreaterOrEqual Where PRelu "
    "BitShift BitwiseAnd BitwiseOr BitwiseXor"
)
UNARY = _names(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh "
    "Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_CHANNELS = _names(
    "Conv ConvTranspose MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool DepthToSpace "
    "SpaceToDepth"
)
_KEPT = _names("BatchNormalization InstanceNormalization GroupNormalization LRN")
_REDUCE = _names("Max Mean Min Prod Sum SumSquare L1 L2 LogSum LogSumExp")

RULES: dict[tuple[str, str], Rule] = {
    **{("", name): counted(_elementwise) for name in ELEMENTWISE},
    **{("", name): counted(_unary) for name in UNARY},
    **{("", name): _channels for name in _CHANNELS},
    **{("", name): _kept for name in _KEPT},
    **{("", f"Reduce{name}"): _reduce for name in _REDUCE},
    **{("", name): _along(-1) for name in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")},
    **{
        ("", name): _layer_norm
        for name in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
    },
    **{("", name): _arg for name in ("ArgMax", "ArgMin")},
    ("", "CastLike"): _like,
    ("", "Dropout"): _dropout,
    ("", "MatMul"): matmul,
    ("", "Gemm"): gemm,
    ("", "CumSum"): _cumsum,
    ("", "MeanVarianceNormalization"): _mean_variance,
    ("", "TopK"): _top_k,
    ("", "Resize"): _resize,
    ("", "GridSample"): _grid_sample,
    ("", "Trilu"): _triangle,
    ("", "Attention"): _attention,
    ("", "Einsum"): einsum,
    **{("", name): rule for name, rule in SHAPE_RULES.items()},
    **{(MICROSOFT, name): _unary for name in ("Gelu", "QuickGelu")},
    **{(MICROSOFT, name): _elementwise for name in ("BiasGelu", "FastGelu")},
    **{
        (MICROSOFT, name): _skip_norm
        for name in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
    },
    (MICROSOFT, "FusedMatMul"): matmul,
    (MICROSOFT, "FusedGemm"): gemm,
    (MICROSOFT, "FusedConv"): _fused_conv,
}
"""By domain and operator."""

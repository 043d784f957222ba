"""Shapes of what ORT's own operators compute, for onnx's inference: models that ORT has saved hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import onnx
from onnx.defs import OpSchema

Context = onnx.shape_inference.InferenceContext
_Dim = onnx.TensorShapeProto.Dimension

_DOMAIN = "com.microsoft"
#: Also without a domain, as ORT writes it.
_UNMARKED = "SimplifiedLayerNormalization"
_FLAGS = ("transA", "transB", "transBatchA", "transBatchB")


@contextlib.contextmanager
def contrib_schemas() -> Iterator[None]:
    """Inside, onnx knows ORT's operators. Not outside: onnx's reference evaluator fails to load where two domains have
    an operator of the same name, and so does what imports it (torch's exporter)."""
    known = [(name, _DOMAIN) for name in _OPERATORS] + [(_UNMARKED, "")]
    added = [(name, domain) for name, domain in known if not onnx.defs.has(name, domain)]
    for name, domain in added:
        onnx.defs.register_schema(_schema(name, domain))
    try:
        yield
    finally:
        for name, domain in added:
            onnx.defs.deregister_schema(name, 1, domain)


def _schema(name: str, domain: str) -> OpSchema:
    """Of any inputs, outputs and attributes: nothing of them is checked here."""

    def any_number(of: str) -> OpSchema.FormalParameter:
        variadic = OpSchema.FormalParameterOption.Variadic
        return OpSchema.FormalParameter(of, "T", param_option=variadic, is_homogeneous=False, min_arity=1)

    schema = OpSchema(
        name,
        domain,
        1,
        "See ONNX Runtime's documentation of its contrib operators.",
        inputs=[any_number("inputs")],
        outputs=[any_number("outputs")],
        type_constraints=[("T", ["tensor(float)"], "")],
    )
    schema.set_type_and_shape_inference_function(_OPERATORS[name])
    return schema


def _like_first(context: Context) -> None:
    _like(context, 0, 0)


def _like(context: Context, output: int, source: int) -> None:
    """The output has the type and the shape of an input."""
    kind = _input(context, source)
    if kind is not None and output < context.get_num_outputs():
        context.set_output_type(output, kind)


def _input(context: Context, at: int) -> onnx.TypeProto | None:
    return context.get_input_type(at) if at < context.get_num_inputs() else None


def _dims(kind: onnx.TypeProto | None) -> list[_Dim] | None:
    """None where not even the rank is known."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    return list(kind.tensor_type.shape.dim)


def _set(context: Context, output: int, like: onnx.TypeProto, dims: Iterable[_Dim] | None = None) -> None:
    """The output has the element type of `like`, and `dims`."""
    if output >= context.get_num_outputs():
        return
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = like.tensor_type.elem_type
    if dims is not None:
        kind.tensor_type.shape.dim.extend(dims)
    context.set_output_type(output, kind)


def _number(context: Context, attribute: str) -> int | None:
    found = context.get_attribute(attribute)
    return None if found is None else int(found.i)


def _product(context: Context) -> None:
    """``[.., M, K] x [.., K, N]``, either side turned."""
    a, b = _input(context, 0), _input(context, 1)
    if a is None or b is None:
        return
    turned = [bool(_number(context, flag)) for flag in _FLAGS]
    sides = [_dims(a) or [], _dims(b) or []]
    if any(len(dims) < 2 for dims in sides) or any(turned[2:]):
        _set(context, 0, a)
        return
    length = max(map(len, sides))
    lead_a, lead_b = ([_Dim(dim_value=1)] * (length - len(dims)) + dims[:-2] for dims in sides)
    lead = [_broadcast(*pair) for pair in zip(lead_a, lead_b, strict=True)]
    _set(context, 0, a, [*lead, sides[0][-1 if turned[0] else -2], sides[1][-2 if turned[1] else -1]])


def _broadcast(a: _Dim, b: _Dim) -> _Dim:
    one = _Dim(dim_value=1)
    sides = [side for side in (a, b) if side != one]
    known = [side for side in sides if side.HasField("dim_value")]
    if not sides:
        return one
    return (known or sides)[0] if known or len(sides) == 1 or sides[0] == sides[1] else _Dim()


def _product_of_bits(context: Context) -> None:
    """MatMulNBits: ``[.., K]`` to ``[.., N]``, N an attribute."""
    a = _input(context, 0)
    if a is None:
        return
    dims, columns = _dims(a), _number(context, "N")
    _set(context, 0, a, None if not dims else [*dims[:-1], _Dim(dim_value=columns) if columns else _Dim()])


def _normalized_sum(context: Context) -> None:
    """Skip(Simplified)LayerNormalization: result, mean, inverse of the deviation, sum of both inputs."""
    for output in (0, 3):
        _like(context, output, 0)


def _embedded(context: Context) -> None:
    """EmbedLayerNormalization: ids ``[B, S]`` of a table ``[V, D]`` to ``[B, S, D]``, twice."""
    ids, table = _input(context, 0), _input(context, 2)
    if ids is None or table is None:
        return
    rows, columns = _dims(ids), _dims(table)
    for output in (0, 2):
        _set(context, output, table, None if rows is None or not columns else [*rows, columns[-1]])
    _set(context, 1, ids, None if not rows else rows[:1])


def _gathered_blocks(context: Context) -> None:
    """GatherBlockQuantized: of data ``[V, D]`` by ids to ``[.., D]``, in the type of the scales; two values a byte
    where the data are bytes that hold 4 bits each."""
    data, ids, scales = (_input(context, at) for at in range(3))
    if data is None or ids is None or scales is None:
        return
    dims, rows = _dims(data), _dims(ids)
    if dims is None or rows is None:
        _set(context, 0, scales)
        return
    packed = data.tensor_type.elem_type == onnx.TensorProto.UINT8 and (_number(context, "bits") or 4) == 4
    if packed and dims[-1].HasField("dim_value"):
        dims[-1] = _Dim(dim_value=2 * dims[-1].dim_value)
    elif packed:
        dims[-1] = _Dim()
    axis = (_number(context, "gather_axis") or 0) % max(len(dims), 1)
    _set(context, 0, scales, [*dims[:axis], *rows, *dims[axis + 1 :]])


def _grouped_attention(context: Context) -> None:
    """GroupQueryAttention: ``[B, S, heads * size]``, and the longer cache; queries alone or keys and values behind."""
    query = _input(context, 0)
    if query is None:
        return
    dims, heads, shared = _dims(query), _number(context, "num_heads"), _number(context, "kv_num_heads")
    if dims and _input(context, 1) is None:
        width = dims[-1].dim_value
        dims[-1] = (
            _Dim(dim_value=width * heads // (heads + 2 * shared)) if width and heads and shared else _Dim()
        )
    _set(context, 0, query, dims)
    for output, past in ((1, 3), (2, 4)):
        _longer(context, output, past)


def _longer(context: Context, output: int, past: int) -> None:
    """A cache ``[B, heads, length, size]`` with more in it."""
    kind = _input(context, past)
    if kind is not None:
        dims = _dims(kind)
        _set(context, output, kind, None if not dims or len(dims) < 3 else [*dims[:2], _Dim(), *dims[3:]])


def _heads_attention(context: Context) -> None:
    """MultiHeadAttention: queries ``[B, S, D]`` or ``[B, S, heads, 3, size]``, values ``[B, L, D]`` or
    ``[B, heads, L, size]``, to ``[B, S, D]``."""
    query, value = _input(context, 0), _input(context, 2)
    if query is None:
        return
    dims, of_value = _dims(query), _dims(value)
    if dims is None or len(dims) not in (3, 5):
        _set(context, 0, query)
        return
    if len(dims) == 5:
        width = _times(dims[2], dims[4])
    elif value is None:  # keys and values in one
        width = dims[2]
    elif of_value is not None and len(of_value) == 3:
        width = of_value[2]
    else:
        width = _times(of_value[1], of_value[3]) if of_value is not None and len(of_value) == 4 else _Dim()
    _set(context, 0, query, [*dims[:2], width])
    for output, past in ((1, 6), (2, 7)):
        _longer(context, output, past)


def _times(a: _Dim, b: _Dim) -> _Dim:
    known = a.dim_value and b.dim_value
    return _Dim(dim_value=a.dim_value * b.dim_value) if known else _Dim()


def _attention(context: Context) -> None:
    """Attention: ``[B, S, D]`` by weights ``[D, 3 * W]`` to ``[B, S, W]``."""
    rows, weights = _dims(_input(context, 0)), _dims(_input(context, 1))
    kind = _input(context, 0)
    if kind is None:
        return
    sizes = context.get_attribute("qkv_hidden_sizes")
    width = _Dim()
    if sizes is not None and len(sizes.ints) == 3:
        width = _Dim(dim_value=sizes.ints[2])
    elif weights and weights[-1].dim_value:
        width = _Dim(dim_value=weights[-1].dim_value // 3)
    _set(context, 0, kind, None if not rows else [*rows[:-1], width])


def _convolved(context: Context) -> None:
    """FusedConv: ``[N, C, ..]`` by ``[M, ..]`` to ``[N, M, ..]`` of the same rank."""
    kind, weights = _input(context, 0), _dims(_input(context, 1))
    if kind is None:
        return
    dims = _dims(kind)
    if not dims or not weights or len(dims) < 3:
        _set(context, 0, kind)
    else:
        _set(context, 0, kind, [dims[0], weights[0], *(_Dim() for _ in dims[2:])])


def _convolved_with_state(context: Context) -> None:
    _like(context, 0, 0)
    _like(context, 1, 3)


#: Those of transformers that ORT's optimizer, its exporters and its model builder write.
_OPERATORS: dict[str, Callable[[Context], None]] = {
    "Attention": _attention,
    "BiasGelu": _like_first,
    "CausalConvWithState": _convolved_with_state,
    "EmbedLayerNormalization": _embedded,
    "FastGelu": _like_first,
    "FusedConv": _convolved,
    "FusedGemm": _product,
    "FusedMatMul": _product,
    "GatherBlockQuantized": _gathered_blocks,
    "Gelu": _like_first,
    "GroupQueryAttention": _grouped_attention,
    "MatMulNBits": _product_of_bits,
    "MoE": _like_first,
    "MultiHeadAttention": _heads_attention,
    "QMoE": _like_first,
    "QuickGelu": _like_first,
    "RotaryEmbedding": _like_first,
    _UNMARKED: _like_first,
    "SkipLayerNormalization": _normalized_sum,
    "SkipSimplifiedLayerNormalization": _normalized_sum,
}

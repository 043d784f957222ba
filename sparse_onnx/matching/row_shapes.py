"""Rules of the operators that shape, cut and move data. See `rowwise`."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.row_kinds import Dim, Dims, Fixed, Kind, NotRowWise, Rows, Rule, Size, Sizes, Step


def _constant(step: Step) -> Sequence[Kind]:
    tensor = ir.convenience.get_const_tensor(step.node.outputs[0])
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        raise NotRowWise("it is no constant of numbers")
    array = tensor.numpy()
    return [Fixed(array.shape, array if array.size <= 4096 else None)]


def _shape(step: Step) -> Sequence[Kind]:
    kind = step.kind(0)
    if isinstance(kind, Sizes) or kind is None:
        return [Sizes((1,) if kind is None else () if kind.scalar else (len(kind.entries),))]
    if kind.dims is None:
        raise NotRowWise("its input has an unknown rank")
    start, end = step.attribute("start", 0), step.attribute("end")
    return [Sizes(kind.dims[start:end])]


def _gather(step: Step) -> Sequence[Kind]:
    data = step.kind(0)
    if isinstance(data, Sizes):
        picked, chosen = step.ints(1, "index"), step.kind(1)
        scalar = isinstance(chosen, Fixed) and chosen.dims == ()
        return [Sizes(tuple(data.entries[at] for at in picked), scalar)]
    index = step.settled(1)
    if index is None or index.dims is None or data is None or data.dims is None:
        raise NotRowWise("its index has an unknown rank")
    axis = step.axis(len(data.dims), 0)
    if isinstance(data, Rows):
        step.behind(axis, data.lead)
        if isinstance(index, Rows):
            raise NotRowWise("its index depends on the rows")
        return [Rows((*data.dims[:axis], *index.dims, *data.dims[axis + 1 :]), data.lead)]
    assert isinstance(index, Rows)
    if axis != 0:
        raise NotRowWise("it puts axes before the rows")
    return [Rows((*index.dims, *data.dims[1:]), index.lead)]


def _aligned(step: Step) -> Sequence[Kind]:
    """GatherElements and ScatterElements: index (and updates) of the same rows as the data."""
    data, index = step.rows_input(0), step.rows_input(1)
    axis = step.axis(len(data.dims), 0)
    step.behind(axis, data.lead)
    others = [step.rows_input(at) for at in range(1, len(step.kinds))]
    if any(kind.lead != data.lead or len(kind.dims) != len(data.dims) for kind in others):
        raise NotRowWise("its index does not have the data's rows")
    return [Rows(index.dims, data.lead) if step.op == "GatherElements" else data]


def _slice(step: Step) -> Sequence[Kind]:
    data = step.kind(0)
    rank = 1 if isinstance(data, Sizes) else len(step.rows_input(0).dims)
    starts = step.ints(1, "start") if isinstance(data, Sizes) else None
    count = len(step.sizes(1).entries)
    axes = step.axes(rank, 3) if step.kind(3) is not None else list(range(count))
    assert axes is not None
    if isinstance(data, Sizes):
        assert starts is not None
        ends = step.ints(2, "end")
        steps = step.ints(4, "step") if step.kind(4) is not None else [1]
        return [Sizes(data.entries[slice(starts[0], ends[0], steps[0])])]
    rows = step.rows_input(0)
    for axis in axes:
        step.behind(axis, rows.lead)
    for at in range(1, len(step.kinds)):
        if step.kind(at) is not None:
            step.settled(at)
            if isinstance(step.kind(at), Rows):
                raise NotRowWise("its bounds depend on the rows")
    return [Rows(tuple(Dim() if at in axes else size for at, size in enumerate(rows.dims)), rows.lead)]


def _split(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    axis = step.axis(len(data.dims), 0)
    step.behind(axis, data.lead)
    if step.kind(1) is not None:
        step.fixed(1, "sizes")
    dims = [
        tuple(Dim() if at == axis else size for at, size in enumerate(data.dims)) for _ in step.node.outputs
    ]
    return [Rows(each, data.lead) for each in dims]


def _concat(step: Step) -> Sequence[Kind]:
    kinds = [kind for kind in step.kinds if kind is not None]
    if any(isinstance(kind, Sizes) for kind in kinds):
        parts = [step.sizes(at) for at in range(len(step.kinds))]
        return [Sizes(tuple(entry for part in parts for entry in part.entries))]
    rows = [step.rows_input(at) for at in range(len(kinds))]
    rank, lead = len(rows[0].dims), rows[0].lead
    if any(len(part.dims) != rank or part.lead != lead for part in rows):
        raise NotRowWise("its inputs do not have the same rows")
    axis = step.axis(rank, 0)
    step.behind(axis, lead)
    along = [part.dims[axis] for part in rows]
    static = [size for size in along if isinstance(size, int)]
    total: Size = sum(static) if len(static) == len(along) else Dim()
    return [Rows((*rows[0].dims[:axis], total, *rows[0].dims[axis + 1 :]), lead)]


def _pad(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    rank = len(data.dims)
    pads, axes = step.ints(1, "pads"), step.axes(rank, 3) or list(range(rank))
    if step.kind(2) is not None:
        step.fixed(2, "value")
    for at, axis in enumerate(axes):
        if axis < data.lead and (pads[at] or pads[at + len(axes)]):
            raise NotRowWise("it pads the axis of the rows")
    return [Rows((*data.dims[: data.lead], *(Dim() for _ in data.dims[data.lead :])), data.lead)]


def _transpose(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    order = step.attribute("perm", list(range(len(data.dims)))[::-1])
    if list(order[: data.lead]) != list(range(data.lead)):
        raise NotRowWise("it moves the axis of the rows")
    return [Rows(tuple(data.dims[at] for at in order), data.lead)]


def _tile(step: Step) -> Sequence[Kind]:
    data, counts = step.rows_input(0), step.sizes(1).entries
    if len(counts) != len(data.dims) or any(count != 1 for count in counts[: data.lead]):
        raise NotRowWise("it repeats the rows")
    if any(count is None or step.counts_rows(count) for count in counts):
        raise NotRowWise("it computes with the number of rows")
    sizes = (size if count == 1 else Dim() for size, count in zip(data.dims, counts, strict=True))
    return [Rows(tuple(sizes), data.lead)]


def _rows_in(step: Step, target: Sequence[Size | None]) -> int:
    """How many axes at the front of a target shape are the rows', all of them; 0 for none."""
    lead = len(step.rows)
    if len(target) >= lead and all(a is b for a, b in zip(target[:lead], step.rows, strict=True)):
        return lead
    return 1 if target and target[0] is step.merged else 0


def _behind_rows(step: Step, sizes: Sequence[Size | None]) -> Dims:
    known = tuple(size for size in sizes if size is not None and not step.counts_rows(size))
    if len(known) != len(sizes):
        raise NotRowWise("it puts the number of rows on another axis")
    return known


def _expand(step: Step) -> Sequence[Kind]:
    data, target = step.settled(0), step.sizes(1).entries
    if data is None or data.dims is None:
        raise NotRowWise("its input has an unknown rank")
    lead = data.lead if isinstance(data, Rows) else _rows_in(step, target)
    shift = len(target) - len(data.dims)
    if isinstance(data, Rows):
        padded = (1,) * -shift + tuple(target) if shift < 0 else tuple(target)
        if shift > 0 or any(
            wanted != 1 and wanted is not own
            for wanted, own in zip(padded[:lead], data.dims[:lead], strict=True)
        ):
            raise NotRowWise("it puts axes before the rows, or repeats them")
        rest = _behind_rows(step, padded[lead:])
        return [Rows((*data.dims[:lead], *map(_larger, data.dims[lead:], rest)), lead)]
    if not lead:
        _behind_rows(step, target)
        return [Fixed(None)]
    if shift < 0 or any(size != 1 for size in data.dims[: max(0, lead - shift)]):
        raise NotRowWise("it has an entry for each row that is the same for all inputs")
    own = (*(1,) * shift, *data.dims)[lead:]
    return [
        Rows(
            (
                *(size for size in target[:lead] if size is not None),
                *map(_larger, own, _behind_rows(step, target[lead:])),
            ),
            lead,
        )
    ]


def _larger(a: Size, b: Size) -> Size:
    return b if a == 1 else a


def _constant_of_shape(step: Step) -> Sequence[Kind]:
    target = step.sizes(0).entries
    lead = _rows_in(step, target)
    if not lead:
        _behind_rows(step, target)
        return [Fixed(None)]
    return [
        Rows(
            (*(size for size in target[:lead] if size is not None), *_behind_rows(step, target[lead:])), lead
        )
    ]


def _flatten(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    axis = step.axis(len(data.dims), 1)
    if axis != data.lead:
        raise NotRowWise("it puts rows and their contents on one axis")
    return [Rows((step.merged if data.lead > 1 else data.dims[0], _product(data.dims[axis:])), 1)]


def _reshape(step: Step) -> Sequence[Kind]:
    target = list(step.sizes(1).entries)
    data = step.kind(0)
    if isinstance(data, Sizes):
        return [Sizes(data.entries)] if len(target) == 1 else [Sizes(data.entries, scalar=not target)]
    data = step.rows_input(0)
    if not step.attribute("allowzero", 0):
        target = [
            data.dims[at] if size == 0 and at < len(data.dims) else size for at, size in enumerate(target)
        ]
    content = data.dims[data.lead :]
    lead = _rows_in(step, target)
    if not lead:
        split = len(step.rows)
        for at in {0, split - 1}:  # -1 stands for all rows, or for the last of their axes
            before = all(a is b for a, b in zip(target[:at], step.rows, strict=False))
            if before and at < len(target) and target[at] == -1 and _same(target[at + 1 :], content):
                lead, front = (1, (step.merged,)) if at == 0 else (split, step.rows)
                target[: at + 1] = front
                break
        else:
            raise NotRowWise("its target shape is not known to keep one part for each row")
    rest = target[lead:]
    sizes = _behind_rows(step, rest)
    if -1 in sizes:
        known = math.prod(size for size in sizes if isinstance(size, int) and size != -1)
        whole = _product(content)
        unknown = any(isinstance(size, Dim) for size in sizes)
        filled: Size = whole // known if isinstance(whole, int) and known and not unknown else Dim()
        sizes = tuple(filled if size == -1 else size for size in sizes)
    return [Rows((*(size for size in target[:lead] if size is not None), *sizes), lead)]


def _same(a: Sequence[Size | None], b: Dims) -> bool:
    """Whether both have the same product, whatever the unknown sizes are."""
    if None in a or -1 in a:
        return False
    numbers = [math.prod(size for size in each if isinstance(size, int)) for each in (a, b)]
    dims = [collections.Counter(id(size) for size in each if isinstance(size, Dim)) for each in (a, b)]
    return numbers[0] == numbers[1] != 0 and dims[0] == dims[1]


def _product(dims: Dims) -> Size:
    static = [size for size in dims if isinstance(size, int)]
    return math.prod(static) if len(static) == len(dims) else Dim()


def _squeeze(step: Step) -> Sequence[Kind]:
    data = step.kind(0)
    if isinstance(data, Sizes):
        return [Sizes(data.entries, scalar=len(data.entries) == 1)]
    data = step.rows_input(0)
    axes = step.axes(len(data.dims))
    if axes is None:
        raise NotRowWise("it drops every axis of size 1, that of a single row too")
    for axis in axes:
        step.behind(axis, data.lead)
    return [Rows(tuple(size for at, size in enumerate(data.dims) if at not in axes), data.lead)]


def _unsqueeze(step: Step) -> Sequence[Kind]:
    data = step.kind(0)
    if isinstance(data, Sizes):
        if not data.scalar:
            raise NotRowWise("it makes a matrix of sizes")
        return [Sizes(data.entries)]
    data = step.rows_input(0)
    added = step.ints(1, "axes") if step.kind(1) is not None else step.attribute("axes", [])
    rank = len(data.dims) + len(added)
    places = {axis + rank if axis < 0 else axis for axis in added}
    if min(places, default=rank) < data.lead:
        raise NotRowWise("it puts axes before the rows")
    left = iter(data.dims)
    return [Rows(tuple(1 if at in places else next(left) for at in range(rank)), data.lead)]


def _one_hot(step: Step) -> Sequence[Kind]:
    data = step.rows_input(0)
    step.fixed(1, "depth")
    step.fixed(2, "values")
    axis = step.axis(len(data.dims) + 1, -1)
    step.behind(axis, data.lead)
    return [Rows((*data.dims[:axis], Dim(), *data.dims[axis:]), data.lead)]


SHAPE_RULES: dict[str, Rule] = {
    "Constant": _constant,
    "Shape": _shape,
    "Gather": _gather,
    "GatherElements": _aligned,
    "ScatterElements": _aligned,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Pad": _pad,
    "Transpose": _transpose,
    "Tile": _tile,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "OneHot": _one_hot,
}

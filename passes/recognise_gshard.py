"""GShard's dispatch and combine tensors, lifted to the neutral form; also Switch's, with one expert a token.

For ids and weights ``[S, K]``, tokens ``x [S, D]``, E experts with C seats each:

    place[s, k]      = how many slots before (s, k) chose the same expert          a CumSum of the one-hot ids
    mask[s, k, e, c] = (ids[s, k] == e) * (place[s, k] == c)
    combine[s, e, c] = sum_k weight[s, k] * mask[s, k, e, c]
    dispatch         = combine > 0, or the sum of the mask
    rows[e, c]       = sum_s dispatch[s, e, c] * x[s]
    y[s]             = sum_{e, c} combine[s, e, c] * expert_e(rows[e, c])

The tensors may be made with Einsum, or Mul and ReduceSum, in any order; slots may be counted token by token or all
first choices first. A slot whose place is C or more, or that fails a condition of the graph, is dropped: its index
becomes E. The place itself stays as it was computed.

Proved: the one-hots are of 0 and 1; no two slots take one seat, since places are a running count over all slots (of a
group, where tokens come in groups); dispatch has the same seats as combine; it is 1 where a weight is 0 at most, which
adds nothing, so weights must not be negative where dispatch is ``combine > 0``.

Refused: a block of which any of this is not proved - soft mixtures among them -, weights that are not constant, expert
values used elsewhere. Enters If, Loop and Scan bodies. Functions were inlined before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.batched import batched_linear
from sparse_onnx.matching.block import Found, Workshop, commit
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.factors import Algebra, Axis, Factor, Opaque
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.lengths import product
from sparse_onnx.matching.linear import Linear
from sparse_onnx.matching.order import bounded
from sparse_onnx.matching.seats import Named, SeatReader, Seats, named
from sparse_onnx.matching.signs import non_negative, support
from sparse_onnx.matching.slots import rows_behind
from sparse_onnx.matching.values import is_last, producer, rank, scalar, size, tensor

_HINT = "only tokens dispatched by one-hot experts and places, each seat taken once, can be recognised"


@dataclasses.dataclass(frozen=True)
class RecogniseGShard(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_gshard"
    summary: ClassVar[str] = "GShard's dispatch and combine einsums, lifted to the neutral form"

    def call(self, model: ir.Model) -> Outcome:
        shop, dims = Workshop(model, self.name), Dims()
        for graph in list(model.graphs()):
            for node in [node for node in graph if node.domain == "" and node.op_type == "Einsum"]:
                known = node.graph is None or FORM_KEY in node.metadata_props
                anchor = None if known else _anchor(node)
                if anchor is None:
                    continue
                try:
                    expert = _expert(anchor)
                    block = _block(anchor, expert, dims)
                except Opaque as problem:
                    if _constant(batched_linear(anchor.rows)) is None:
                        shop.refuse(str(problem), node, _HINT)
                    continue
                variable = next(filter(None, map(_constant, expert.layers.values())), None)
                if variable is not None:
                    shop.refuse(
                        f"the weights '{variable.name}' are not constant: a graph input or computed",
                        node,
                        _HINT,
                    )
                else:
                    commit(block, shop)
        matched = shop.rewritten + len(shop.refusals)
        return Outcome(model, shop.rewritten > 0, matched, shop.rewritten, tuple(shop.refusals))


@dataclasses.dataclass(frozen=True)
class _Anchor:
    """``combine [tokens.., e, c] x outputs [e, .., c, m] -> [tokens.., m]``, letters for axes."""

    combine: str
    mixed: ir.Value
    seats: str
    rows: ir.Value
    result: str
    output: ir.Value

    @property
    def expert(self) -> str:
        return self.seats[0]

    @property
    def seat(self) -> str:
        [letter] = set(self.combine) & set(self.seats) - {self.expert} - set(self.result)
        return letter

    @property
    def groups(self) -> set[str]:
        return set(self.seats) & set(self.result[:-1])


def _anchor(node: ir.Node) -> _Anchor | None:
    """The last Einsum of a block: it sums over experts and seats what packed matrices have computed."""
    for mixed_term, mixed, rows_term, rows, result in two_operands(node.outputs[0]):
        summed = set(mixed_term) & set(rows_term) - set(result)
        if len(summed) != 2 or not result or rows_term[-1:] != result[-1:] or result[-1] in mixed_term:
            continue
        if rows_term[0] not in summed or set(mixed_term) != summed | set(result[:-1]):
            continue
        if set(rows_term) - summed <= set(result) and batched_linear(rows) is not None:
            return _Anchor(mixed_term, mixed, rows_term, rows, result, node.outputs[0])
    return None


def _constant(layer: Linear | None) -> ir.Value | None:
    """A matrix or bias of the layer that is not constant; None where all are."""
    stored = [] if layer is None else [layer.weight, *([layer.bias] if layer.bias is not None else [])]
    return next((item.source for item in stored if tensor(item.source) is None), None)


def _expert(anchor: _Anchor) -> Expert:
    """All experts at once.

    Raises:
        Opaque: they are not of a kind that the neutral form has.
    """
    expert = read_expert(anchor.rows, batched_linear, rows_behind)
    if isinstance(expert, str):
        raise Opaque(f"the experts are not two layers and an activation of each element: {expert}")
    return expert


def _block(anchor: _Anchor, expert: Expert, dims: Dims) -> Found:
    """The block.

    Raises:
        Opaque: what is not proved.
    """
    algebra = Algebra()
    lengths = {x: size(v, at) for term, v in _operands(anchor) for at, x in enumerate(term)}
    axes = {letter: algebra.axis(length) for letter, length in lengths.items()}
    axes[anchor.seat] = (algebra.atom(lengths[anchor.seat]),)
    if not axes[anchor.expert]:
        raise Opaque("there is one expert alone")
    token_axes = [axes[letter] for letter in anchor.result[:-1]]
    groups = frozenset(atom for letter in anchor.groups for atom in axes[letter])
    reader = SeatReader(
        algebra,
        [atom for axis in token_axes for atom in axis],
        axes[anchor.expert][0],
        axes[anchor.seat][0],
        groups,
    )
    marked = frozenset((axes[anchor.expert][0], axes[anchor.seat][0]))
    factors, summed = algebra.factors(anchor.mixed, tuple(axes[letter] for letter in anchor.combine), marked)
    seats, rest, names = reader.read(factors, summed)
    weight = _weight(rest, names)
    tokens = _dispatched(expert, anchor, algebra, axes, seats, weight)
    return _found(anchor, expert, tokens, seats, weight, dims)


def _operands(anchor: _Anchor) -> tuple[tuple[str, ir.Value], ...]:
    return ((anchor.combine, anchor.mixed), (anchor.seats, anchor.rows), (anchor.result, anchor.output))


def _weight(rest: Sequence[Factor], names: dict[int, str]) -> Named:
    if len(rest) != 1:
        found = ", ".join(f"'{item.value.name}'" for item in rest) or "none"
        raise Opaque(f"a slot has not just one routing weight: {found}")
    slots = {atom for atom, name in names.items() if name not in ("e", "c")}
    if rest[0].atoms != slots:
        raise Opaque(f"the routing weight '{rest[0].value.name}' is not one for each slot")
    return named(rest[0], names)


def _dispatched(
    expert: Expert, anchor: _Anchor, algebra: Algebra, axes: dict[str, Axis], seats: Seats, weight: Named
) -> Factor:
    """The tokens, where the experts' rows are proved to be those in the seats of `combine`."""
    entry = expert.entry if rank(expert.entry) == len(anchor.seats) else rows_behind(expert.entry)
    if rank(entry) != len(anchor.seats):
        raise Opaque(f"the axes of the experts' rows '{entry.name}' are not those of their outputs")
    inner = algebra.axis(size(entry, -1))
    marked = frozenset((axes[anchor.expert][0], axes[anchor.seat][0]))
    factors, summed = algebra.factors(entry, (*(axes[letter] for letter in anchor.seats[:-1]), inner), marked)
    rows = [item for item in factors if item.axes and item.axes[-1] == inner and inner]
    masks = [item for item in factors if item not in rows]
    if len(rows) != 1 or any(len(axis) > 1 for axis in rows[0].axes):
        raise Opaque(f"the experts' rows '{entry.name}' are not tokens times a dispatch mask")
    own = [atom for axis in rows[0].axes[:-1] for atom in axis]
    wanted = [axes[letter] for letter in anchor.result[:-1]]
    groups = {atom for letter in anchor.groups for atom in axes[letter]}
    if len(own) != sum(map(len, wanted)) or len(set(own)) != len(own):
        raise Opaque(f"'{rows[0].value.name}' is not one row for each token")
    for atom, other in zip(own, [atom for axis in wanted for atom in axis], strict=True):
        if (other in groups and atom != other) or (other not in groups and atom not in summed):
            raise Opaque(f"the tokens' axes of '{rows[0].value.name}' are not in the order of the result's")
    reader = SeatReader(algebra, own, axes[anchor.expert][0], axes[anchor.seat][0], frozenset(groups))
    through = support(masks[0].value) if len(masks) == 1 else None
    if through is None and len(masks) == 1 and masks[0].value.dtype == ir.DataType.BOOL:
        raise Opaque(f"the dispatch mask '{masks[0].value.name}' does not say where combine is more than 0")
    if through is None:
        again, rest, names = reader.read(masks, summed)
    else:
        factors, more = algebra.factors(through[0], algebra.spread(through[0], masks[0].axes).axes, marked)
        again, rest, names = reader.read(factors, summed | more)
    if again != seats:
        raise Opaque("tokens are dispatched to other seats than they are combined from")
    if rest and (through is None or _weight(rest, names) != weight):
        raise Opaque(f"tokens are multiplied by '{rest[0].value.name}' when they are dispatched")
    if rest and through is not None and through[1] and not non_negative(weight.value):
        raise Opaque(f"the weights '{weight.value.name}' may be negative, and such tokens are not dispatched")
    return rows[0]


def _found(anchor: _Anchor, expert: Expert, tokens: Factor, seats: Seats, weight: Named, dims: Dims) -> Found:
    """The block, once everything is proved that has to do with sizes.

    Raises:
        Opaque: what is not proved.
    """
    index, top_k = seats.index.value, seats.top_k
    for layer in expert.layers.values():
        if size(layer.weight.source, 0) != seats.experts:
            raise Opaque(
                f"{seats.experts} experts are chosen from, and '{layer.weight.source.name}' is of another number"
            )
    slots = _slots(anchor, top_k)
    if [name for name in seats.index.axes if name] != slots or [
        name for name in weight.axes if name
    ] != slots:
        raise Opaque("experts or weights are not in the order of tokens and their slots")
    if not bounded(index, seats.experts):
        raise Opaque(f"'{index.name}' is not proved to hold experts from 0 to {seats.experts - 1}")
    if not dims.as_many(tokens.value, None, index, top_k) or not dims.as_many(
        weight.value, top_k, index, top_k
    ):
        raise Opaque(
            f"'{index.name}' is not proved to hold {top_k} experts for each row of '{tokens.value.name}'"
        )
    conditions = {item for item in seats.conditions if not _is_capacity(item, seats)}
    for item in (seats.place, *conditions):
        if {name for name in item.axes if name} - {"e"} != set(slots):
            raise Opaque(f"'{item.value.name}' is not one value for each slot")
    drops = bool(conditions) or not _fits(anchor, seats, tokens, dims)
    emitted = functools.partial(_kept_index, seats, tuple(conditions), slots)
    return Found(
        spelling="gshard",
        output=anchor.output,
        tokens=tokens.value,
        expert_index=emitted if drops else index,
        expert_weight=weight.value,
        top_k=top_k,
        experts=[expert],
    )


def _slots(anchor: _Anchor, top_k: int) -> list[str]:
    tokens = [letter for at, letter in enumerate(anchor.result[:-1]) if size(anchor.output, at) != 1]
    return [f"t{at}" for at in range(len(tokens))] + (["k"] if top_k > 1 else [])


def _is_capacity(item: Named, seats: Seats) -> bool:
    """Whether a condition says what `place < capacity` says."""
    node = producer(item.value, "Less")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return False
    if node.inputs[0] not in (seats.unclipped, seats.place.value) or item.axes != seats.place.axes:
        return False
    bound = node.inputs[1]
    if isinstance(seats.capacity, int):
        return scalar(bound) == seats.capacity
    return _behind_casts(bound) is _behind_casts(seats.capacity)


def _behind_casts(value: ir.Value) -> ir.Value:
    value = flat(value)
    node = producer(value, "Cast")
    return value if node is None or node.inputs[0] is None else _behind_casts(node.inputs[0])


def _fits(anchor: _Anchor, seats: Seats, tokens: Factor, dims: Dims) -> bool:
    """Whether each expert has a seat for every token, and no token chooses an expert twice: then none is dropped."""
    chosen = producer(_behind_casts(seats.index.value), "TopK")
    if seats.top_k > 1 and (chosen is None or not is_last(chosen)):
        return False
    if anchor.groups or seats.first or isinstance(seats.capacity, int):
        return False
    capacity, lengths = dims.vector(_behind_casts(seats.capacity)), dims.of(tokens.value)
    return capacity is not None and lengths is not None and list(capacity) == [product(lengths[:-1])]


def _kept_index(seats: Seats, conditions: Sequence[Named], slots: Sequence[str], emit: Emitter) -> ir.Value:
    """The chosen experts, and E where the place is none of the expert's seats or a condition fails."""
    index = _ordered(emit, seats.index, slots)
    place = _own(emit, seats.place, index, slots)
    int64 = int(ir.DataType.INT64)
    if isinstance(seats.capacity, int):
        capacity = emit.ints(seats.capacity)
    else:
        capacity = emit.op("Reshape", emit.op("Cast", seats.capacity, to=int64), emit.ints(1))
    kept = emit.op("Less", emit.op("Cast", place, to=int64), capacity)
    for item in conditions:
        kept = emit.op("And", kept, _own(emit, item, index, slots))
    dtype = seats.index.value.dtype or ir.DataType.INT64
    return emit.op("Where", kept, index, emit.constant(np.asarray(seats.experts, dtype.numpy())))


def _ordered(emit: Emitter, item: Named, wanted: Sequence[str]) -> ir.Value:
    """The value without its axes of length 1, and the others in this order."""
    ones = [at for at, name in enumerate(item.axes) if not name]
    value = emit.op("Squeeze", item.value, emit.ints(*ones)) if ones else item.value
    have = [name for name in item.axes if name]
    return (
        value
        if have == list(wanted)
        else emit.op("Transpose", value, perm=[have.index(name) for name in wanted])
    )


def _own(emit: Emitter, item: Named, index: ir.Value, slots: Sequence[str]) -> ir.Value:
    """One value a slot: where there is one for each expert, that of the chosen expert."""
    if "e" not in item.axes:
        return _ordered(emit, item, slots)
    last = emit.ints(-1)
    every = _ordered(emit, item, [*slots, "e"])
    return emit.op(
        "Squeeze", emit.op("GatherElements", every, emit.op("Unsqueeze", index, last), axis=-1), last
    )

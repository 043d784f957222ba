"""A sum over the hits of all experts, proved to be a mixture of experts, and lifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.accumulate import Step, Total
from sparse_onnx.matching.choice import Index
from sparse_onnx.matching.expert import Expert
from sparse_onnx.matching.hit_weights import Unproven, Weight, split
from sparse_onnx.matching.hits import HitReader
from sparse_onnx.matching.layout import flat, rows_of
from sparse_onnx.matching.lengths import ONE
from sparse_onnx.matching.loop_bodies import read_bodies
from sparse_onnx.matching.slot_loops import same_experts, slots_apart, weight_of_all
from sparse_onnx.matching.slot_sum import slot_sum
from sparse_onnx.matching.values import pairs, sole_use


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """A proven routing, and what each expert computes for its tokens, whatever that is.

    Attributes:
        output: the value to replace.
        tokens: ``[..., D]``.
        index: expert indices.
        weight: of each slot; None: all are 1.
        entries: ``[n, D]``, tokens of each expert, in the order of the experts.
        exits: what each computes of them.
        bodies: each as an expert of two layers, or why it is none.
        addends: what else is in `output`.
        base: a value with the token axes of `output`.
    """

    output: ir.Value
    tokens: ir.Value
    index: Index
    weight: Weight | None
    entries: tuple[ir.Value, ...]
    exits: tuple[ir.Value, ...]
    bodies: tuple[Expert | str, ...]
    addends: tuple[ir.Value, ...]
    base: ir.Value


def looks_like(total: Total) -> bool:
    """Whether the hits of several experts, or of one among several, are put into one sum."""
    numbers = {step.hits.expert for step in total.steps}
    if total.problems:
        return len(total.steps) + len(total.problems) > 1
    return len(numbers) > 1 or any((step.hits.index.experts or 0) > 1 for step in total.steps)


def proved(total: Total, reader: HitReader) -> Experts:
    """The routing and the experts of a sum.

    Raises:
        Unproven: it is no mixture of experts, or may be none.
    """
    if total.problems:
        raise Unproven(
            total.problems[0][1],
            "each expert's tokens must be where its number was chosen, and their results added",
        )
    slots = slots_apart(total.steps, reader.choices)
    if slots is not None:
        return _over_slots_apart(total, *slots, reader)
    loop = _loop(total.steps, reader)
    index, weight, by_slot = loop.index, loop.weight, loop.by_slot
    _check_rows(total, loop.tokens, index, by_slot, reader)
    _check_uses(total)
    addends = total.addends
    if any(step.overwrites for step in total.steps):
        addends = _overwritten(total, index, len(total.steps), by_slot)
    output = total.value
    if by_slot:
        output, weight = _over_slots(output, weight, addends, index, reader)
    elif weight is None and not addends and index.top_k == 1:
        output, weight = _weighted_after(output, index, reader)
    return loop.experts(output, index, weight, addends, total.bases[0])


def _over_slots_apart(
    total: Total, index: Index, parts: Sequence[Sequence[Step]], reader: HitReader
) -> Experts:
    """Several loops, each over the experts of one slot of the tokens."""
    loops = [_loop(part, reader) for part in parts]
    first = loops[0]
    for number, loop in enumerate(loops):
        if loop.by_slot:
            raise Unproven("the sum has a row for each slot, and each slot a loop of its own")
        if loop.tokens is not first.tokens:
            raise Unproven(f"slot {number} reads '{loop.tokens.name}', slot 0 '{first.tokens.name}'")
        if not same_experts(loop.bodies, first.bodies):
            raise Unproven(f"the experts of slot {number} are not proved to be those of slot 0")
    weight = weight_of_all([loop.weight for loop in loops], index, reader.dims)
    _check_rows(total, first.tokens, index, False, reader)
    _check_uses(total)
    return first.experts(total.value, index, weight, total.addends, total.bases[0])


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What the masks of one routing say; see `Experts`. `by_slot`: the sum has a row for each slot."""

    index: Index
    weight: Weight | None
    tokens: ir.Value
    entries: tuple[ir.Value, ...]
    exits: tuple[ir.Value, ...]
    bodies: tuple[Expert | str, ...]
    by_slot: bool

    def experts(
        self,
        output: ir.Value,
        index: Index,
        weight: Weight | None,
        addends: tuple[ir.Value, ...],
        base: ir.Value,
    ) -> Experts:
        return Experts(
            output, self.tokens, index, weight, self.entries, self.exits, self.bodies, addends, base
        )


def _loop(every: Sequence[Step], reader: HitReader) -> _Loop:
    steps = _by_expert(every)
    index = steps[0].hits.index
    if index.top_k is None:
        raise Unproven(f"the number of experts of a token is not known from '{index.value.name}'")
    by_slot = all(step.kinds == ("s",) for step in steps)
    if not by_slot:
        _check_routing(steps, index)
    parts = [_contribution(step, reader) for step in steps]
    weight = parts[0][1]
    for number, (_, other) in enumerate(parts):
        if other != weight:
            raise Unproven(f"the weight of expert {number} comes from elsewhere than that of expert 0")
    exits = tuple(output for output, _ in parts)
    bodies, entries, tokens = read_bodies(steps, exits, reader)
    return _Loop(index, weight, tokens, tuple(entries), exits, tuple(bodies), by_slot)


def _by_expert(steps: Sequence[Step]) -> list[Step]:
    """One step for each expert, in order.

    Raises:
        Unproven: experts that occur twice or not at all, or masks over several routings.
    """
    index = steps[0].hits.index
    known: dict[int, Step] = {}
    for step in steps:
        number = step.hits.expert
        if step.hits.index != index:
            raise Unproven(
                f"the mask of expert {number} is over '{step.hits.index.value.name}', that of expert "
                f"{steps[0].hits.expert} over '{index.value.name}'"
            )
        if number in known:
            raise Unproven(
                f"expert {number} is added twice", "each expert must have a mask of its own number"
            )
        known[number] = step
    last = max((index.experts or 0) - 1, *known)
    missing = [number for number in range(last + 1) if number not in known]
    if min(known) < 0 or missing:
        lost = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        plural = len(missing) > 1
        raise Unproven(
            f"expert{'s' * plural} {lost} of {last + 1} {'are' if plural else 'is'} missing",
            "tracing leaves out experts that the example did not reach; export again with a loop over all experts, "
            "with no test whether one has tokens",
        )
    return [known[number] for number in range(last + 1)]


def _check_routing(steps: Sequence[Step], index: Index) -> None:
    tokens = tuple(label for label in index.labels if label not in ("k", "1"))
    for number, step in enumerate(steps):
        places = tuple(kind for kind in step.kinds if kind != "0")
        if places not in (("T",), tokens):
            by = "slot" if "k" in places else "slot of all tokens" if "s" in places else "other coordinates"
            raise Unproven(
                f"the results of expert {number} are put where its {by} says, not where its token is"
            )
        if index.distinct:
            continue
        why = "nothing proves that a token's experts are different ones, and "
        if step.hits.order == "T":
            raise Unproven(f"{why}the mask of expert {number} counts a token once")
        if step.once:
            raise Unproven(f"{why}of equal rows the scatter of expert {number} keeps just one")


def _contribution(step: Step, reader: HitReader) -> tuple[ir.Value, Weight | None]:
    number = step.hits.expert
    if not step.exact:
        raise Unproven(f"the rows of expert {number} may have been repeated before they are added")
    try:
        output, weight = split(step.rows, step.hits, reader)
        if weight is not None and split(output, step.hits, reader)[1] is not None:
            raise Unproven("the weight is applied twice")
    except Unproven as reason:
        raise Unproven(f"expert {number}: {reason}") from None
    return output, weight


def _check_rows(total: Total, tokens: ir.Value, index: Index, by_slot: bool, reader: HitReader) -> None:
    """That tokens, indices and accumulators have the same rows."""
    dims, top_k = reader.dims, index.top_k
    assert top_k is not None
    if not dims.as_many(index.value, top_k, tokens, None):
        raise Unproven(f"nothing shows that '{tokens.name}' has a row for each token of '{index.value.name}'")
    shape = dims.of(index.value) or ()
    for base in total.bases:
        axes = dims.of(base) or ()
        if not dims.as_many(base, None, index.value, 1 if by_slot else top_k):
            what = "slot" if by_slot else "token"
            raise Unproven(
                f"nothing shows that the sum that begins with '{base.name}' has a row for each {what}"
            )
        if len(axes) > 2 and axes[1:-1] != shape[1 : len(axes) - 1]:
            raise Unproven(f"'{base.name}' has other axes of tokens than '{index.value.name}'")


def _check_uses(total: Total) -> None:
    inner = {"ScatterND", "ScatterElements", "Add", "Sum", "Gather", "GatherND", "Shape", "Slice"}
    for value in total.partial:
        others = [use.node for use in value.uses() if use.node.op_type not in inner or use.node.domain]
        if value.is_graph_output() or others:
            where = f"node '{others[0].name}'" if others else "an output of the graph"
            raise Unproven(f"the partial sum '{value.name}' is read by {where} too")


def _overwritten(total: Total, index: Index, experts: int, by_slot: bool) -> tuple[ir.Value, ...]:
    """What is left to add where results take the place of what was there.

    Raises:
        Unproven: results that take the place of other results.
    """
    if not all(step.overwrites or step.starts for step in total.steps) or not total.straight:
        raise Unproven("some results are added and others take the place of what was there")
    if index.top_k != 1 and not by_slot:
        raise Unproven(
            f"results take the place of what was there, and a token has {index.top_k} experts: the last one wins"
        )
    if index.experts == experts or not total.addends:
        return ()
    raise Unproven("tokens of no expert keep what the sum began with")


def _over_slots(
    output: ir.Value, weight: Weight | None, addends: tuple[ir.Value, ...], index: Index, reader: HitReader
) -> tuple[ir.Value, Weight | None]:
    """The sum over a token's slots of what the loop computed for each."""
    assert index.top_k is not None
    found = slot_sum(output, index.top_k, reader.dims)
    if found is None or addends or (weight is not None and found[1] is not None):
        raise Unproven(
            "the results of slots are not added up token by token, weighted once, and nothing else"
        )
    return found[0], found[1] if weight is None else weight


def _weighted_after(output: ir.Value, index: Index, reader: HitReader) -> tuple[ir.Value, Weight | None]:
    """A product with a number for each token, right behind the loop."""
    use = sole_use(output)
    while (
        use is not None
        and use.op_type in ("Reshape", "Identity")
        and rows_of(use.outputs[0]) is rows_of(output)
    ):
        use = sole_use(use.outputs[0])
    if use is None or use.op_type != "Mul" or use.domain:
        return output, None
    for value, factor in pairs(use):
        wanted, have = reader.dims.of(value), reader.dims.of(factor)
        if flat(value) is not flat(output) or wanted is None or have is None:
            continue
        if have[-1] == ONE and have[:-1] == wanted[:-1]:
            return use.outputs[0], Weight(flat(factor))
    return output, None

"""A sum over the hits of all experts, proved to be a mixture of experts, and lifted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.accumulate import Step, Total
from sparse_onnx.matching.choice import Index
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.hit_weights import Unproven, Weight, split
from sparse_onnx.matching.hits import HitReader
from sparse_onnx.matching.layout import flat, rows_of
from sparse_onnx.matching.lengths import ONE
from sparse_onnx.matching.slot_sum import slot_sum
from sparse_onnx.matching.values import pairs, size, sole_use

#: Values of the largest body of an expert that is searched for where it begins.
_LARGEST = 2000


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
    steps = _by_expert(total.steps)
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
    bodies, entries, tokens = _read(steps, [output for output, _ in parts], reader)
    _check_rows(total, tokens, index, by_slot, reader)
    _check_uses(total)
    addends = total.addends
    if any(step.overwrites for step in steps):
        addends = _overwritten(total, index, len(steps), by_slot)
    output = total.value
    if by_slot:
        output, weight = _over_slots(output, weight, addends, index, reader)
    elif weight is None and not addends and index.top_k == 1:
        output, weight = _weighted_after(output, index, reader)
    exits = tuple(output for output, _ in parts)
    return Experts(
        output, tokens, index, weight, tuple(entries), exits, tuple(bodies), addends, total.bases[0]
    )


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


def _read(
    steps: Sequence[Step], outputs: Sequence[ir.Value], reader: HitReader
) -> tuple[list[Expert | str], list[ir.Value], ir.Value]:
    """The experts (or why one is none of two layers), where each begins, and the tokens that all of them read."""
    bodies: list[Expert | str] = []
    entries: list[ir.Value] = []
    tokens: ir.Value | None = None
    for number, (step, output) in enumerate(zip(steps, outputs, strict=True)):
        body = read_expert(output)
        entry = _entry(output, step, reader) if isinstance(body, str) else body.entry
        if entry is None:
            raise Unproven(
                f"expert {number} is no expert of two layers: {body}; nor does it read rows of its tokens alone"
            )
        source = _tokens(number, step, entry, reader)
        if tokens is not None and source is not tokens:
            raise Unproven(f"expert {number} reads '{source.name}', expert 0 '{tokens.name}'")
        tokens = source
        width, have = size(step.base, -1), size(output, -1) if isinstance(body, str) else _width(body)
        if have is None and isinstance(body, str):
            raise Unproven(f"expert {number} is no expert of two layers, and of unknown width: {body}")
        if have is None or width != have:
            raise Unproven(f"the rows of expert {number} are not as wide as the sum that they are added to")
        bodies.append(body)
        entries.append(entry)
    assert tokens is not None
    return bodies, entries, tokens


def _width(body: Expert) -> int | None:
    last = list(body.layers.values())[-1]
    shape = last.weight.source.shape
    if shape is None or len(shape) < 2:
        return None
    found = shape[-2] if last.out_in else shape[-1]
    return found if isinstance(found, int) else None


def _tokens(number: int, step: Step, entry: ir.Value, reader: HitReader) -> ir.Value:
    """What an expert's rows are gathered from."""
    rows = reader.rows(entry)
    if rows is None or rows.labels[-1] != "d":
        raise Unproven(
            f"expert {number} reads '{entry.name}', which are not rows of the tokens that chose it"
        )
    if rows.hits != step.hits:
        raise Unproven(f"expert {number} reads tokens gathered by the mask of expert {rows.hits.expert}")
    found = reader.along(rows)
    if found is None or found[1] != "T":
        by = "slot" if found is not None and found[1] == "k" else "other coordinates"
        raise Unproven(f"expert {number} reads rows of '{rows.data.name}' picked by {by}, not by token")
    return rows_of(found[0])


def _entry(output: ir.Value, step: Step, reader: HitReader) -> ir.Value | None:
    """The one value of gathered rows from which an expert of any body computes its output."""
    found: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    work = [output]
    while work and len(seen) < _LARGEST:
        value = work.pop()
        if value in seen:
            continue
        seen.add(value)
        rows = reader.rows(value)
        if rows is not None and rows.hits == step.hits and rows.labels == ("n", "d"):
            found.add(value)
            continue
        if value.is_graph_input():
            raise Unproven(
                f"expert {step.hits.expert} reads '{value.name}', an input of the graph, past the rows that chose it: "
                "as weights that are not constant, or as rows of other tokens"
            )
        node = value.producer()
        if node is not None and any(item.type == ir.AttributeType.GRAPH for item in node.attributes.values()):
            what = f"operator {node.op_type} at '{node.name}'"
            raise Unproven(
                f"expert {step.hits.expert} is computed behind {what}, on a condition or in a body of its own"
            )
        if node is not None:
            work += [item for item in node.inputs if item is not None]
    return found.pop() if len(found) == 1 and not work else None


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

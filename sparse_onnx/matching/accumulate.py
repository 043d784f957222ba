"""Sums that are put together row by row: scatters of what was computed at some hits, chained on one accumulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from sparse_onnx.blocks import is_zero
from sparse_onnx.matching.hits import Coordinates, HitReader, Hits
from sparse_onnx.matching.layout import flat, keeps_last_axis
from sparse_onnx.matching.lengths import ONE, Length
from sparse_onnx.matching.sums import made_of
from sparse_onnx.matching.values import attribute, axis, ints, is_float, measured, producer, tensor

_SCATTERS = ("ScatterND", "ScatterElements")
_TURNS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One scatter into an accumulator.

    Attributes:
        node: the scatter.
        base: the accumulator before it.
        hits: where from.
        kinds: coordinates of the rows that are written.
        rows: ``[n, D]``, one for each hit: what is added, or put in place of what was there.
        overwrites: the latter, and more than zeros may be there.
        starts: nothing but zeros is there.
        once: of equal rows just one takes effect.
        exact: no row can have been repeated on its way.
    """

    node: ir.Node
    base: ir.Value
    hits: Hits
    kinds: tuple[str, ...]
    rows: ir.Value
    overwrites: bool
    starts: bool
    once: bool
    exact: bool


@dataclasses.dataclass(eq=False)
class Link:
    """A partial sum: `value` is the sum of all of `parts` and `addends`, and `step` on top of it.

    `used` tells that a further link continues it.
    """

    value: ir.Value
    parts: list[Link]
    addends: list[ir.Value]
    step: Step | None
    index: ir.Value | None
    single: bool
    problem: tuple[ir.Node, str] | None = None
    used: bool = False


@dataclasses.dataclass(frozen=True)
class Total:
    """A finished sum.

    Attributes:
        value: of steps and addends.
        steps: in the graph's order.
        addends: what else is in it, zeros left out.
        bases: accumulators that nothing had been added to.
        partial: the partial sums.
        straight: each step continues the one before it, nothing is added in between.
        problems: scatters in the sum that are no steps, and why.
    """

    value: ir.Value
    steps: tuple[Step, ...]
    addends: tuple[ir.Value, ...]
    bases: tuple[ir.Value, ...]
    partial: tuple[ir.Value, ...]
    straight: bool
    problems: tuple[tuple[ir.Node, str], ...] = ()


def totals(graph: ir.Graph | ir.Function, reader: HitReader) -> list[Total]:
    """All sums over hits in a graph, in its order."""
    links: dict[ir.Value, Link] = {}
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type in _SCATTERS:
            _scatter(node, links, reader)
        elif node.op_type in ("Add", "Sum"):
            _add(node, links, reader)
    return [_total(_trimmed(link)) for link in links.values() if not link.used]


def _scatter(node: ir.Node, links: dict[ir.Value, Link], reader: HitReader) -> None:
    base = node.inputs[0]
    before = links.get(base) if base is not None else None
    read = _step(node, reader)
    step = read if isinstance(read, Step) else None
    problem = (node, read) if isinstance(read, str) else None
    if read is None:
        problem = _problem(node, before is not None, reader)
    if base is None or (step is None and problem is None):
        return
    if before is not None:
        before.used = True
    value = node.outputs[0]
    index = step.hits.index.value if step is not None else before.index if before is not None else None
    parts = [] if before is None else [before]
    links[value] = Link(value, parts, [base] if before is None else [], step, index, before is None, problem)


def _problem(node: ir.Node, continues: bool, reader: HitReader) -> tuple[ir.Node, str] | None:
    """Why a scatter that belongs to such a sum is no step of it."""
    where = reader.coordinates(node.inputs[1])
    reduction = attribute(node, "reduction", "none")
    if where is not None and where.hits is not None:
        if reduction not in ("none", "add"):
            return (
                node,
                f"the scatter '{node.name}' keeps the {reduction} of an expert's results, and does not add them",
            )
        return node, f"the scatter '{node.name}' does not write whole rows"
    mask = _suspect(node.inputs[1], reader)
    if mask is not None:
        return node, f"the mask of '{mask.name}' is not that of one expert, Equal(chosen experts, its number)"
    if continues:
        return node, f"the scatter '{node.name}' writes rows that are not the tokens of a mask of one expert"
    return None


def _suspect(value: ir.Value | None, reader: HitReader) -> ir.Node | None:
    """A NonZero behind coordinates, of a mask over a router's choice that is none of one expert."""
    for _ in range(12):
        node = None if value is None else value.producer()
        if node is None or not node.inputs or node.domain:
            return None
        if node.op_type == "NonZero":
            known = reader.hits(node) is not None
            return node if not known and reader.choices.about(node.inputs[0]) else None
        value = node.inputs[0]
    return None


def _add(node: ir.Node, links: dict[ir.Value, Link], reader: HitReader) -> None:
    parts = [links[item] for item in node.inputs if item in links]
    value = node.outputs[0]
    if not parts or len(parts) != len({id(part) for part in parts}):
        return
    first = parts[0]
    if any(
        part.index is not first.index
        and None not in (part.index, first.index)
        and not (part.single or first.single)
        for part in parts
    ):
        return
    if reader.dims.of(value) != reader.dims.of(first.value):
        return
    for part in parts:
        part.used = True
    addends = [item for item in node.inputs if item is not None and item not in links]
    problem = None
    for item in addends:
        scatter = producer(item, *_SCATTERS)
        problem = problem or (_problem(scatter, True, reader) if scatter is not None else None)
    links[value] = Link(value, parts, addends, None, first.index, False, problem)


def _trimmed(link: Link) -> Link:
    """Without what was added behind the last step."""
    while (
        link.step is None
        and link.problem is None
        and len(link.parts) == 1
        and not all(zeros(item) for item in link.addends)
    ):
        link = link.parts[0]
    return link


def _total(root: Link) -> Total:
    steps, addends, bases, partial, problems = [], [], [], [], []
    straight = True
    work = [root]
    while work:
        link = work.pop()
        if link is not root:
            partial.append(link.value)
        if link.problem is not None:
            problems.append(link.problem)
        if link.step is None:
            straight = False
        else:
            steps.append(link.step)
            bases += link.addends
        addends += [item for item in link.addends if not zeros(item)]
        work += link.parts
    return Total(
        root.value,
        tuple(steps[::-1]),
        tuple(addends),
        tuple(bases),
        tuple(partial),
        straight,
        tuple(problems[::-1]),
    )


def zeros(value: ir.Value) -> bool:
    """Whether all elements are provably zero."""
    while (node := producer(value, "Expand", "Cast", "Identity", *_TURNS)) is not None and node.inputs[
        0
    ] is not None:
        value = node.inputs[0]
    return is_zero(value)


def _step(node: ir.Node, reader: HitReader) -> Step | str | None:
    """The scatter as a step of a sum; a text where it is none for sure."""
    base, place, updates = node.inputs[0], node.inputs[1], node.inputs[2]
    where = reader.coordinates(place)
    if where is None or where.hits is None or base is None or updates is None:
        return None
    reduction = attribute(node, "reduction", "none")
    form = _form(node, where, reader, base)
    if form is None or reduction not in ("none", "add"):
        return None
    kinds, flattened = form
    rows, exact = _plain(updates, flattened, base, reader)
    exact = exact or "N" not in where.labels
    hits = dataclasses.replace(where.hits, wide=False)
    if reduction == "add":
        return Step(node, base, hits, kinds, rows, False, zeros(base), False, exact)
    for kept, added in _sums(rows):
        before = reader.rows(kept)
        if before is not None and flat(before.data) is flat(base):
            along = reader.along(before)
            if before.hits == hits and along is not None and along[1] == ("s" if kinds == ("s",) else "T"):
                rows, sure = _plain(added, flattened, base, reader)
                exact = exact and (sure or "N" not in where.labels)
                return Step(node, base, hits, kinds, rows, False, zeros(base), True, exact)
        if before is not None and made_of(before.data, base):
            return (
                f"the scatter '{node.name}' adds to rows of '{before.data.name}', which is computed from the sum so "
                f"far, '{base.name}', and is not it"
            )
    starts = zeros(base)
    return Step(node, base, hits, kinds, rows, not starts, starts, True, exact)


def _sums(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    node = producer(value, "Add", "Sum")
    if node is not None and len(node.inputs) == 2 and None not in node.inputs:
        a, b = node.inputs
        assert a is not None and b is not None
        yield a, b
        yield b, a


def _form(
    node: ir.Node, where: Coordinates, reader: HitReader, base: ir.Value
) -> tuple[tuple[str, ...], bool] | None:
    """Coordinates of the rows that are written whole, and whether the updates lie there element by element."""
    sizes = reader.dims.of(base)
    if sizes is None or where.hits is None:
        return None
    if node.op_type == "ScatterElements":
        fits = len(sizes) == 2 and axis(node, 0) == 0 and len(where.labels) == 2 and len(where.kinds) == 1
        fits = fits and where.labels[0] in ("n", "N") and where.labels[1] == "*" and not where.hits.wide
        # Indices and updates have one shape; narrower than the sum, they would reach its first columns alone.
        fits = fits and any(
            reader.dims.same_last(item, base) for item in node.inputs[1:3] if item is not None
        )
        return (where.kinds, False) if fits else None
    if where.labels[-1] not in ("c", "1") or (where.labels[-1] == "1" and len(where.kinds) != 1):
        return None
    inner = where.labels[:-1]
    if where.hits.wide:
        whole = inner == ("n",) and where.kinds[-1] == _features(sizes[-1]) and len(where.kinds) == len(sizes)
        return (where.kinds[:-1], True) if whole else None
    if len(inner) == 1 and inner[0] in ("n", "N"):
        return (where.kinds, False) if len(where.kinds) == len(sizes) - 1 else None
    if len(inner) == 2 and inner[0] in ("n", "N") and inner[1] in ("d", "N", "*"):
        whole = len(where.kinds) == len(sizes) and where.kinds[-1] == _features(sizes[-1])
        return (where.kinds[:-1], True) if whole else None
    return None


def _features(width: Length) -> str:
    return f"d{width.number}" if not width.atoms and width.number > 1 else ""


def _plain(value: ir.Value, flattened: bool, base: ir.Value, reader: HitReader) -> tuple[ir.Value, bool]:
    """Updates behind what only brings them into the shape of their indices; whether rows cannot have been repeated."""
    sure = True
    while (node := producer(value, *_TURNS, "Cast", "Expand", "Slice")) is not None and node.inputs[
        0
    ] is not None:
        source = node.inputs[0]
        if node.op_type in _TURNS and not flattened and not keeps_last_axis(value):
            break
        if node.op_type == "Cast" and not _floating(source, value):
            break
        if node.op_type == "Expand":
            sure = sure and _keeps_rows(node, base, reader)
        if node.op_type == "Slice" and not _whole(node):
            break
        value = source
    return value, sure


def _floating(a: ir.Value, b: ir.Value) -> bool:
    return is_float(a.dtype) and is_float(b.dtype)


def _keeps_rows(node: ir.Node, base: ir.Value, reader: HitReader) -> bool:
    """Whether an Expand's target has ones for all axes but the last: numbers, or the shape of a sum's first row.

    A sum that has no first row has no rows at all, so that nothing is lost where Expand leaves none.
    """
    target = reader.dims.vector(node.inputs[1])
    if target is not None and all(length == ONE for length in target[:-1]):
        return True
    cut = producer(measured(node.inputs[1]), "Slice")
    dimensions, source = reader.dims.rank(base), cut.inputs[0] if cut is not None else None
    if cut is None or source is None or dimensions is None or len(cut.inputs) != 4:
        return False
    if not reader.dims.same_rows(source, base):
        return False
    bounds = [ints(item) or [] for item in cut.inputs[1:]]
    ones = {at % dimensions for start, end, at in zip(*bounds, strict=False) if (start, end) == (0, 1)}
    return ones >= set(range(dimensions - 1))


def _whole(node: ir.Node) -> bool:
    """A Slice from the start of each axis to an end that is computed: torch cuts updates to their indices' shape."""
    starts, steps = ints(node.inputs[1]), ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    stepped = node.inputs[4:] and node.inputs[4] is not None and set(steps or [0]) != {1}
    if starts is None or any(starts) or stepped:
        return False
    return node.inputs[2] is not None and tensor(node.inputs[2]) is None

"""Rules of the operators that sum over axes: MatMul, Gemm and Einsum. See `rowwise`."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_onnx.matching.row_kinds import (
    Dims,
    Fixed,
    Kind,
    NotRowWise,
    Rows,
    Size,
    Step,
    broadcast,
    only_fixed,
)


def matmul(step: Step) -> Sequence[Kind]:
    """`[..., M, K] @ [..., K, N]`: rows may be batches of both, or batches and the M of the left."""
    a, b = step.settled(0), step.settled(1)
    only_fixed(step, 2)
    if step.attribute("transBatchA", 0) or step.attribute("transBatchB", 0):
        raise NotRowWise("it turns its batch axes")
    if a is None or b is None or a.dims is None or b.dims is None:
        raise NotRowWise("an operand has an unknown rank")
    turned = step.attribute("transA", 0)
    left, right = _turned(a, turned), _turned(b, step.attribute("transB", 0))
    if isinstance(a, Rows) and a.lead > len(left) - (2 if turned else 1):
        raise NotRowWise("it sums over the rows")
    if isinstance(b, Rows) and b.lead > len(right) - 2:
        raise NotRowWise("it sums over the rows, or moves them")
    if isinstance(a, Rows) and isinstance(b, Rows) and a.lead > len(left) - 2:
        raise NotRowWise("it multiplies rows with each other")
    if len(right) == 1:
        assert isinstance(a, Rows)
        return [Rows(left[:-1], a.lead)]
    if len(left) == 1:
        raise NotRowWise("it multiplies a vector from the left")
    operands: list[Fixed | Rows] = []
    for kind, dims in ((a, (*left[:-1], 1)), (b, (*right[:-2], 1, 1))):
        operands.append(Rows(dims, kind.lead) if isinstance(kind, Rows) else Fixed(dims))
    result = broadcast(step, operands)
    assert isinstance(result, Rows)
    return [Rows((*result.dims[:-1], right[-1]), result.lead)]


def _turned(kind: Fixed | Rows, turn: int) -> Dims:
    assert kind.dims is not None
    return (*kind.dims[:-2], kind.dims[-1], kind.dims[-2]) if turn and len(kind.dims) > 1 else kind.dims


def gemm(step: Step) -> Sequence[Kind]:
    a, b, c = step.rows_input(0), step.fixed(1, "matrix"), step.settled(2)
    if step.attribute("transA", 0):
        raise NotRowWise("it sums over the rows")
    if len(a.dims) != 2 or a.lead != 1 or b.dims is None:
        raise NotRowWise("its matrices have unknown ranks")
    width = b.dims[0 if step.attribute("transB", 0) else 1]
    result = Rows((a.dims[0], width), 1)
    return [result if c is None else broadcast(step, [result, c])]


def einsum(step: Step) -> Sequence[Kind]:
    equation = step.attribute("equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        raise NotRowWise(f"its equation '{equation}' is not written out")
    kinds = [step.settled(at) for at in range(len(step.kinds))]
    letters: str | None = None
    sizes: dict[str, Size] = {}
    lead = 0
    for term, kind in zip(terms.split(","), kinds, strict=True):
        if kind is None or kind.dims is None or len(kind.dims) != len(term):
            raise NotRowWise("an operand has an unknown rank")
        sizes.update(zip(term, kind.dims, strict=True))
        if isinstance(kind, Rows):
            own = term[: kind.lead]
            if letters not in (None, own) or any(term.count(letter) > 1 for letter in own):
                raise NotRowWise(f"'{equation}' mixes rows")
            letters, lead = own, kind.lead
    assert letters is not None
    inside = [term for term, kind in zip(terms.split(","), kinds, strict=True) if isinstance(kind, Fixed)]
    inner = [
        term[lead:] for term, kind in zip(terms.split(","), kinds, strict=True) if isinstance(kind, Rows)
    ]
    if any(letter in term for letter in letters for term in (*inside, *inner, result[lead:])):
        raise NotRowWise(f"'{equation}' mixes rows")
    if result[:lead] != letters:
        raise NotRowWise(f"'{equation}' sums over the rows or moves them")
    rows = next(kind for kind in kinds if isinstance(kind, Rows))
    return [Rows((*rows.dims[:lead], *(sizes[letter] for letter in result[lead:])), lead)]

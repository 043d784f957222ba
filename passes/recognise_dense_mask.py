"""Experts that all run on all tokens, lifted to the neutral form: the masks that mobius, tutorials and Llama 4 write.

    y[t] = sum_e gate[t, e] * expert_e(x[t])        gate[t, e] = 0 where token t did not choose expert e

The gates are a ScatterElements into zeros, a comparison of the chosen ids with each expert's number, a one-hot, a mask
times a softmax, a softmax over scores that are minus infinity elsewhere, or built from these. The sum is a chain of
additions, a ReduceSum over stacked experts, a MatMul or an Einsum; the experts stand apart, or are products with packed
weights ``[E, in, out]``. The block's index is what the router chose, its weight what the gates hold there.

Llama 4 multiplies the tokens instead, `sum_e expert_e(gate[t, e] * x[t])`. That is a block of rows ``w[t, k] x[t]`` of
one expert each, and only if an expert without biases gives 0 for 0.

Experts of other bodies (convolutions, three layers, a norm behind them, or not all alike) become calls of functions
that `Combine` sums up; a token may be an image then, with one gate: ``gate[b, e] * expert_e(x[b])``.

Proved: the gates are exactly 0 elsewhere; each expert 0..E-1 occurs once; gates and experts' results have the same
tokens, one by one; all experts read the same rows; a token's experts differ where the graph takes one weight for each.
A result of an infinite or NaN expert value times 0 is not kept: the block does not compute it.

Refused: a mask that is not exactly 0 (a finite fill before a softmax), a comparison with the k-th largest score (ties
choose more), a softmax over all experts, an einsum of gates, hidden values and weights at once, a missing or second
expert, an expert's value used elsewhere, and whatever else of this is not proved. Enters If, Loop and Scan bodies.
Functions were inlined before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.dense import DenseSum, DenseSums
from sparse_onnx.matching.dense_bodies import RewriteBodies, entry_of
from sparse_onnx.matching.dense_rewrite import Rewrite, behind_cast, place, zero_problem
from sparse_onnx.matching.dense_routing import Routing, order, routing
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.gate_sources import SOFT_MIXTURE, distinct
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.leading import leading as leading_axes
from sparse_onnx.matching.linear import Linear
from sparse_onnx.matching.values import size
from sparse_onnx.matching.weighted import Weighted

_ROOTS = frozenset({"Add", "Sum", "ReduceSum", "MatMul", "Einsum"})
_HINT = "each expert 0..E-1 must occur once in the sum, on the same tokens, times a gate that is exactly 0 elsewhere"
_HINT_SOFT = "mask the router's scores with -inf, or scatter the chosen weights into zeros"
_HINT_MIXTURE = "nothing is wasted: only a router that chooses some experts leaves work out"
_HINT_TIES = "take the indices of TopK instead of a comparison with its smallest value"
_HINT_BODY = "every expert must be two matrices with a known activation between, or the same function"


@dataclasses.dataclass(frozen=True)
class RecogniseDenseMask(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_dense_mask"
    summary: ClassVar[str] = "experts run on all tokens and masked by zero gates, lifted to the neutral form"

    def call(self, model: ir.Model) -> Outcome:
        shop, sums = Workshop(model, self.name), DenseSums()
        roots = [node for graph in model.graphs() for node in graph if node.op_type in _ROOTS]
        for node in roots:
            if node.graph is not None and FORM_KEY not in node.metadata_props:
                _Block(shop, sums, node).lift()
        return shop.outcome(shop.rewritten + len(shop.refusals))


class _Block:
    """One sum over experts on its way to a block."""

    def __init__(self, shop: Workshop, sums: DenseSums, node: ir.Node) -> None:
        self.shop, self.sums, self.node = shop, sums, node

    def lift(self) -> None:
        found = self.sums.read(self.node)
        if found is None:
            return
        if isinstance(found, str):
            self.shop.refuse(found, self.node, _HINT)
            return
        if found.packed is not None:
            self._packed(found, found.packed)
        elif found.scaled:
            self._scaled(found)
        else:
            self._apart(found)

    def _apart(self, found: DenseSum) -> None:
        """Experts with values of their own."""
        terms: Sequence[Weighted] = [found.weights] if found.weights is not None else found.exits
        flaw = _flaw(terms)
        if flaw:
            # What is no gate is worth a word only where experts would be chosen by it.
            if _chooses(terms) or not isinstance(self._experts(found), str):
                self.shop.refuse(flaw, self.node, _hint(flaw))
            return
        exits, leading = found.exits, found.leading
        if found.weights is None:
            ordered = order(terms)
            if isinstance(ordered, str):
                self.shop.refuse(ordered, self.node, _HINT)
                return
            terms = exits = ordered
            leading = self._leading(ordered)
        if leading is None:
            self.shop.refuse(
                "a gate is not proved to be of the same tokens as its expert's result", self.node, _HINT
            )
            return
        gate, twins = terms[0].gate, _twins(exits)
        assert gate is not None
        if twins:
            self.shop.refuse(twins, self.node, _HINT)
            return
        if found.weights is not None and gate.experts != len(exits):
            self.shop.refuse(f"{len(exits)} experts are stacked for {gate.experts} gates", self.node, _HINT)
            return
        route = routing(terms, len(exits))
        experts = self._experts(dataclasses.replace(found, exits=exits))
        if isinstance(experts, str) or leading + 1 != self.sums.dims.rank(exits[0].value):
            known = len(self.shop.refusals)
            self._bodies(found, route, terms, [exit.value for exit in exits], leading)
            if isinstance(experts, str):
                self.shop.refusals[known:] = [
                    dataclasses.replace(each, reason=f"{each.reason} (and {experts})")
                    for each in self.shop.refusals[known:]
                ]
        else:
            self._commit(found, route, terms, experts)

    def _leading(self, terms: Sequence[Weighted]) -> int | None:
        """How many axes of each result count tokens; None where a gate is not of its tokens, one by one."""
        dims, first = self.sums.dims, terms[0].value
        found = {None if term.whole is None else leading_axes(dims, term.value, term.whole) for term in terms}
        leading = found.pop() if len(found) == 1 else None
        # The last axis of rows is as long as the experts' matrices say.
        rows = leading is not None and leading + 1 == dims.rank(first)
        alike = dims.same_rows if rows else dims.same
        return leading if all(alike(term.value, first) for term in terms) else None

    def _bodies(
        self,
        found: DenseSum,
        route: Routing | str,
        terms: Sequence[Weighted],
        exits: Sequence[ir.Value],
        leading: int,
    ) -> None:
        """Experts of any body, or not all of the same."""
        if isinstance(route, str):
            self.shop.refuse(route, self.node, _HINT)
            return
        entry = entry_of(exits, leading, self.sums.dims, self.shop)
        if entry is None:
            self.shop.refuse(
                "the experts' results are not computed from the same rows alone", self.node, _HINT_BODY
            )
            return
        output = behind_cast(found, exits[0].dtype)
        RewriteBodies(self.shop, found, output, None, route, terms, (), entry, exits, leading).weighted()

    def _experts(self, found: DenseSum) -> list[Expert] | str:
        """Each expert's two layers; a text where they are not of this kind, all alike."""
        experts: list[Expert] = []
        for number, term in enumerate(found.exits):
            expert = read_expert(term.value)
            if isinstance(expert, str):
                return f"expert {number} is not two layers with constant weights: {expert}"
            if experts and rows_of(expert.entry) is not rows_of(experts[0].entry):
                return (
                    f"expert {number} reads '{expert.entry.name}', expert 0 reads '{experts[0].entry.name}'"
                )
            if experts and _sizes(expert) != _sizes(experts[0]):
                return f"expert {number} is of another kind or size than expert 0"
            experts.append(expert)
        return experts

    def _scaled(self, found: DenseSum) -> None:
        """Experts with values of their own that read weighted tokens."""
        terms = list(found.exits)
        experts = {id(term): expert for term, expert in zip(terms, found.scaled, strict=True)}
        if _flaw(terms):
            if _chooses(terms):
                self.shop.refuse(_flaw(terms), self.node, _hint(_flaw(terms)))
            return
        ordered = order(terms)
        if isinstance(ordered, str):
            self.shop.refuse(ordered, self.node, _HINT)
            return
        ours = [experts[id(term)] for term in ordered]
        rows, dtype = rows_of(ordered[0].value), ours[0].layers[next(iter(ours[0].layers))].x.dtype
        problem = next(filter(None, map(zero_problem, ours)), "")
        if any(rows_of(term.value) is not rows for term in ordered):
            problem = "the experts weight different rows"
        elif any(_sizes(expert) != _sizes(ours[0]) for expert in ours) or rows.dtype != dtype:
            problem = "experts that read weighted tokens are not all of one kind, size and type"
        elif self._leading(ordered) is None:
            problem = "a gate is not proved to be of the same tokens as what it weights"
        if problem:
            self.shop.refuse(problem, self.node, _HINT)
            return
        self._commit(found, routing(ordered, len(ours)), ordered, ours, scaled=True)

    def _packed(self, found: DenseSum, exit: ir.Value) -> None:
        """Experts whose weights are packed."""
        reader = self.sums.packed
        expert = read_expert(exit, reader.read, reader.skip)
        terms: tuple[Weighted, ...] = () if found.weights is None else (found.weights,)
        if isinstance(expert, str):
            if terms and not _flaw(terms):
                self.shop.refuse(
                    f"the experts are not proved to compute each token on its own: {expert}",
                    self.node,
                    _HINT_BODY,
                )
            return
        flaw = _flaw(terms)
        if flaw:
            self.shop.refuse(flaw, self.node, _hint(flaw))
            return
        counts = {size(layer.weight.source, 0) for layer in expert.layers.values()}
        count = counts.pop() if len(counts) == 1 else None
        first = [layer.node for role, layer in expert.layers.items() if role not in ("fc2", "down")]
        scales = [reader.scales.get(node) for node in first]
        scaled = scales[0]
        if len({None if scale is None else scale[1] for scale in scales}) > 1:
            self.shop.refuse("only some of the experts' first layers read weighted tokens", self.node, _HINT)
            return
        if not terms and scaled is None:
            return  # a plain sum of experts: nobody chooses
        if terms and scaled is not None:
            self.shop.refuse("tokens and results are both weighted by gates", self.node, _HINT)
            return
        if scaled is not None:
            gate, value = scaled
            terms = (Weighted(value, (value,), gate, value),)
            problem = _flaw(terms) or zero_problem(expert)
            if problem:
                self.shop.refuse(problem, self.node, _hint(problem))
                return
        gate_ = terms[0].gate
        if count is None or gate_ is None or gate_.experts != count:
            experts = "different numbers of" if count is None else count
            self.shop.refuse(
                f"the weights hold {experts} experts, the gates {gate_.experts if gate_ else 0}",
                self.node,
                _HINT,
            )
            return
        self._commit(found, routing(terms, count), terms, [expert], scaled is not None)

    def _commit(
        self,
        found: DenseSum,
        route: Routing | str,
        terms: Sequence[Weighted],
        experts: Sequence[Expert],
        scaled: bool = False,
    ) -> None:
        if isinstance(route, str):
            self.shop.refuse(route, self.node, _HINT)
            return
        if scaled and not distinct(route.ids, route.top_k):
            reason = f"the experts that one token chose, '{route.ids.name}', are not proved to differ from each other"
            self.shop.refuse(reason, self.node, _HINT)
            return
        candidates = [experts[0].entry, route.ids, *(term.whole for term in terms if term.whole is not None)]
        output, like = place(self.sums.dims, found, candidates, experts[0].entry.dtype)
        if self.sums.dims.rank(output) != 2 and like is None:
            self.shop.refuse(
                f"the shape of the sum '{output.name}' is not that of its tokens", self.node, _HINT
            )
            return
        rewrite = Rewrite(self.shop, found, output, like, route, terms, experts)
        if scaled:
            rewrite.scaled()
        else:
            rewrite.weighted()


def _chooses(terms: Sequence[Weighted]) -> bool:
    """Whether somebody chooses experts, whatever else is wrong."""
    gates = [term.gate for term in terms if term.gate is not None]
    return any(gate.ids is not None or "ties" in gate.flaw for gate in gates)


def _twins(exits: Sequence[Weighted]) -> str:
    seen: dict[ir.Value, int] = {}
    for number, term in enumerate(exits):
        twin = seen.setdefault(rows_of(term.value), number)
        if twin != number:
            return f"experts {twin} and {number} are the same: one result occurs twice in the sum"
    return ""


def _sizes(expert: Expert) -> object:
    """What must be alike for a neutral node: the function, and how many features each layer makes."""
    return expert.kind, tuple(expert.layers), [_outputs(layer) for layer in expert.layers.values()]


def _outputs(layer: Linear) -> int | None:
    return size(layer.weight.source, -2 if layer.out_in else -1) if layer.weight.half is None else None


def _flaw(terms: Sequence[Weighted]) -> str:
    return next((term.gate.flaw for term in terms if term.gate is not None and term.gate.flaw), "")


def _hint(flaw: str) -> str:
    if flaw == SOFT_MIXTURE:
        return _HINT_MIXTURE
    if "ties" in flaw:
        return _HINT_TIES
    return _HINT_SOFT if "soft mask" in flaw else _HINT

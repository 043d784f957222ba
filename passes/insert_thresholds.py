"""Inputs of linear layers that are close to a centre are skipped, and their weights never read. Lossy, on request.

    Y = S(X - centre) W + (bias + centre W)        S(v) = v where |v| > tau, else 0

What is close, and to what, comes from calibration (`sparse-onnx calibrate`), and how much each layer may skip from the
quality or the share of bytes that `optimize --thresholds` was asked for. One optional input of the graph,
`sparsity_level` (an int64 scalar, 0 to 100), sets all thresholds at run time; at 0 nothing is skipped and the model is
what it was. Layers that read the same value share centre and threshold.

    native    sparse_onnx::ThresholdedLinear, and ThresholdedLinearNBits for integer weights: the kernel of
              `sparse-onnx kernels build` reads no weights of skipped inputs; without it the function's body runs,
              which is right and not faster
    gather    standard operators that gather the rows that are kept: faster than a dense product above 70 % only
    simulate  the inputs are put to the centre and the layers stay as they are: for accuracy studies, never faster

Of a gated feed-forward layer the gate alone may decide (CATS): sparse_onnx::ThresholdedGatedMLP, which reads neither
up's nor down's weights of the units whose activation is small.

Weights that lie `[N, K]` are turned when the model is written; integers stay integers, of MatMulNBits and
DequantizeLinear both. A vector that is added behind the layer becomes part of it. Experts of mixture-of-experts blocks
are marked here, and skip inputs in the forms `grouped`, `branched` and (mode native) `gathered`, integers not in
`branched`. Enters If, Loop and Scan bodies.

Refused, with the reason: routers, output heads and embeddings; layers whose share is too small to pay; layers of
other types than float32, float16 and bfloat16; products of activations that are rounded to 8 bits; integers in blocks
that do not divide their axis, and such in front of an If, Loop or Scan whose body reads them (mode native); models that
have thresholds already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir

from sparse_onnx.blocks import attach_functions
from sparse_onnx.blocks.expert_thresholds import ExpertThreshold, mark
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.layers import Layer
from sparse_onnx.matching.layers import layer as fresh
from sparse_onnx.matching.sites import Site, sites
from sparse_onnx.passes.convert_opset import ConvertOpset
from sparse_onnx.sparsify.dial import emit_dial
from sparse_onnx.sparsify.emit import Threshold
from sparse_onnx.sparsify.experts import block_obstacle, block_opset
from sparse_onnx.sparsify.gated_sites import GatedSite, gated_sites, write_gated
from sparse_onnx.sparsify.layers import Writer, obstacle, oldest_opset
from sparse_onnx.sparsify.plan import Plan, SitePlan
from sparse_onnx.sparsify.record import Thresholds, forget, record_thresholds, thresholds_of


@dataclasses.dataclass(frozen=True)
class InsertThresholds(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "insert_thresholds"
    summary: ClassVar[str] = "inputs near a centre are skipped, and their weights never read"
    kind: ClassVar[Literal["exact", "lossy"]] = "lossy"

    plan: Plan = dataclasses.field(
        default_factory=Plan, metadata={"help": "what `optimize --thresholds` makes of a calibration"}
    )

    def call(self, model: ir.Model) -> Outcome:
        if not self.plan.sites:
            reason, hint = "no calibration was given", "`optimize --thresholds CALIB.json` names it"
            return Outcome(model, False, refusals=(Refusal(reason, "", hint, self.name),))
        if thresholds_of(model) is not None:
            reason, hint = "the model has thresholds already", "give the model that was calibrated"
            return Outcome(model, False, refusals=(Refusal(reason, "", hint, self.name),))
        if self.plan.gated:
            return self._gated(model)
        every = sites(model)
        refusals = [dataclasses.replace(refusal, by=self.name) for refusal in every.refusals]
        chosen: list[tuple[Site, SitePlan, list[Layer]]] = []
        for site in every:
            plan = self.plan.sites.get(site.name)
            if plan is None or plan.sparsity[self.plan.level] < self.plan.least:
                refusals += self._left(site, plan)
                continue
            kept, problems = self._apart(site, plan)
            refusals += problems
            if kept or (site.block is not None and not problems):
                chosen.append((site, plan, kept))
        oldest = max((self._oldest(site, kept) for site, _, kept in chosen), default=18)
        renewed = self._renewed(model, oldest, len(every.found), refusals)
        if renewed is not None:
            return renewed
        if chosen:
            self._write(model, chosen, self._others(site for site, *_ in chosen))
        return Outcome(model, bool(chosen), len(every.found), len(chosen), tuple(refusals))

    def _gated(self, model: ir.Model) -> Outcome:
        found = gated_sites(model)
        chosen, refusals = [], [dataclasses.replace(refusal, by=self.name) for refusal in found.refusals]
        for site in found.found:
            plan = self.plan.sites.get(site.name)
            if plan is None or plan.sparsity[self.plan.level] < self.plan.least:
                refusals.append(self._not_worth(site.name, site.node.name or "", plan))
            elif (problem := site.obstacle(self.plan.mode)) is not None:
                reason = f"site '{site.name}': {problem[0]}"
                refusals.append(Refusal(reason, site.node.name or "", problem[1], self.name))
            else:
                chosen.append((site, plan))
        oldest = max((site.opset(self.plan.mode) for site, _ in chosen), default=18)
        renewed = self._renewed(model, oldest, len(found.found), refusals)
        if renewed is not None:
            return renewed
        if chosen:
            write_gated(model, chosen, self.plan, self._others(site for site, _ in chosen))
        return Outcome(model, bool(chosen), len(found.found), len(chosen), tuple(refusals))

    def _renewed(
        self, model: ir.Model, oldest: int, found: int, refusals: Sequence[Refusal]
    ) -> Outcome | None:
        """What comes of a model that has to be converted to a newer opset first; None: it is new enough."""
        if model.opset_imports.get("", 0) >= oldest:
            return None
        outcome = ConvertOpset(oldest=oldest)(model)
        assert isinstance(outcome, Outcome)
        if not outcome.modified:
            return Outcome(model, False, found, 0, (*refusals, *outcome.refusals))
        return dataclasses.replace(self.call(model), modified=True)

    def _others(self, chosen: Iterable[Site | GatedSite]) -> list[str]:
        """Names of the sites of the plan that stay as they are."""
        names = {site.name for site in chosen}
        return [name for name in self.plan.sites if name not in names]

    def _oldest(self, site: Site, kept: Sequence[Layer]) -> int:
        """The opset that a site can be written in."""
        mode = self.plan.mode
        needed = [oldest_opset(layer.weight, layer.input.dtype, mode) for layer in kept]
        if site.block is not None:
            needed += [block_opset(site.block, role, mode) for role in site.roles]
        return max(needed, default=18)

    def _apart(self, site: Site, plan: SitePlan) -> tuple[list[Layer], list[Refusal]]:
        """The layers of a site that can skip inputs, and why others cannot."""
        kept, refusals = [], []
        for layer in site.layers:
            problem = obstacle(layer, self.plan.mode, plan.centre)
            if problem is None:
                kept.append(layer)
                continue
            reason = f"layer '{layer.output.name}': {problem[0]}"
            refusals.append(Refusal(reason, layer.node.name or "", problem[1], self.name))
        if site.block is None:
            return kept, refusals
        for role in site.roles:
            problem = block_obstacle(site.block, role, self.plan.mode, plan.centre)
            if problem is not None:
                reason = f"site '{site.name}': {problem[0]}"
                refusals.append(Refusal(reason, site.block.node.name or "", problem[1], self.name))
        return kept, refusals

    def _left(self, site: Site, plan: SitePlan | None) -> list[Refusal]:
        return [self._not_worth(site.name, site.layers[0].node.name or "" if site.layers else "", plan)]

    def _not_worth(self, name: str, node: str, plan: SitePlan | None) -> Refusal:
        if plan is None:
            return Refusal(f"site '{name}': the calibration does not know it", node, "", self.name)
        share = plan.sparsity[self.plan.level]
        reason = f"site '{name}': {share:.0%} of its inputs would be skipped, which does not pay"
        return Refusal(reason, node, f"from {self.plan.least:.0%} on it does", self.name)

    def _write(
        self, model: ir.Model, chosen: Sequence[tuple[Site, SitePlan, list[Layer]]], left: Sequence[str]
    ) -> None:
        forget(model)
        names, types = Namespace(model), [_dtype(site, kept) for site, _, kept in chosen]
        kinds = [ir.DataType.INT64] * len(types) if self.plan.top_k else types
        tables = [plan.table for _, plan, _ in chosen]
        level, bounds = emit_dial(model, names, tables, kinds, self.plan.level)
        constants = Emitter(model.graph, names, level)
        writer = Writer(names)
        for (site, plan, kept), bound, dtype in zip(chosen, bounds, types, strict=True):
            held = constants.constant(plan.centre.astype(dtype.numpy()))
            if site.block is not None:
                entry = ExpertThreshold(
                    site.name, bound.name or "", held.name or "", self.plan.mode, self.plan.top_k
                )
                for role in site.roles:
                    mark(site.block.node, role, entry)
                continue
            threshold = Threshold(site.name, bound, held, self.plan.mode, self.plan.top_k)
            for layer in kept:
                # What it reads may be the result of a layer that was rewritten before it.
                now = fresh(layer.node)
                assert now is not None
                writer.rewrite(now, threshold)
        record_thresholds(model, Thresholds(level, self.plan.mode, tuple(left)))
        attach_functions(model)


def _dtype(site: Site, kept: Sequence[Layer]) -> ir.DataType:
    if site.block is not None:
        return site.block.dtype
    assert kept[0].input.dtype is not None
    return kept[0].input.dtype

"""Where gates may say what is skipped: gated layers of a graph, and the gated experts of a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, attach_functions
from sparse_onnx.blocks.expert_thresholds import GATED_ROLE, ExpertThreshold, mark
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.gated import GatedLayer, experts_name, experts_obstacle, gated_layers
from sparse_onnx.matching.sites import sites
from sparse_onnx.sparsify.dial import emit_dial
from sparse_onnx.sparsify.emit import Threshold
from sparse_onnx.sparsify.gated import gated_obstacle, gated_opset, rewrite_gated
from sparse_onnx.sparsify.gated_experts import experts_gated_obstacle, experts_gated_opset
from sparse_onnx.sparsify.halves import apart
from sparse_onnx.sparsify.plan import Mode, Plan, SitePlan
from sparse_onnx.sparsify.record import Thresholds, forget, record_thresholds


@dataclasses.dataclass(frozen=True, eq=False)
class GatedSite:
    """A gated layer, or a block's experts as one."""

    name: str
    of: GatedLayer | MoEBlock

    @property
    def node(self) -> ir.Node:
        return self.of.node if isinstance(self.of, MoEBlock) else self.of.down.node

    @property
    def dtype(self) -> ir.DataType:
        dtype = self.of.dtype if isinstance(self.of, MoEBlock) else self.of.activated.dtype
        assert dtype is not None
        return dtype

    def obstacle(self, mode: Mode) -> Problem | None:
        """Why it cannot skip units, and what to do about it; None where it can."""
        if isinstance(self.of, MoEBlock):
            return experts_gated_obstacle(self.of, mode)
        return gated_obstacle(self.of, mode)

    def opset(self, mode: Mode) -> int:
        """The oldest that it can be written in, without an obstacle."""
        if isinstance(self.of, MoEBlock):
            return experts_gated_opset(self.of, mode)
        return gated_opset(self.of.down.weight, self.dtype, mode)


@dataclasses.dataclass(frozen=True)
class GatedSites:
    """In graph order, layers before blocks; `refusals` say what was left alone."""

    found: tuple[GatedSite, ...]
    refusals: tuple[Refusal, ...]


def gated_sites(model: ir.Model) -> GatedSites:
    """All of a model, which was prepared and whose blocks are recognised.

    Raises:
        ModelError: a malformed block.
    """
    every = sites(model)
    layers, problems = gated_layers(every)
    found = [GatedSite(layer.name, layer) for layer in layers]
    refusals = [*every.refusals, *problems]
    for block in dict.fromkeys(site.block for site in every if site.block is not None):
        assert block is not None
        problem = experts_obstacle(block)
        if problem is None:
            found.append(GatedSite(experts_name(block), block))
        else:
            refusals.append(
                Refusal(f"block '{block.name}': {problem}", block.node.name or "", "", "calibrate")
            )
    return GatedSites(tuple(found), tuple(refusals))


def write_gated(
    model: ir.Model, chosen: Sequence[tuple[GatedSite, SitePlan]], plan: Plan, left: Sequence[str]
) -> None:
    """Puts a plan's thresholds into a model: the dial, layers, marks on blocks. `left` are sites that stay dense."""
    forget(model)
    names, types = Namespace(model), [site.dtype for site, _ in chosen]
    level, bounds = emit_dial(model, names, [own.table for _, own in chosen], types, plan.level)
    constants = Emitter(model.graph, names, level)
    for (site, _), bound in zip(chosen, bounds, strict=True):
        none = constants.constant(np.zeros(1, site.dtype.numpy()))
        if isinstance(site.of, MoEBlock):
            entry = ExpertThreshold(site.name, bound.name or "", none.name or "", plan.mode, False)
            block = MoEBlock.of(
                site.node
            )  # now, since rewriting what stands before it may have replaced its tokens
            assert block is not None
            mark(apart(block, names).node, GATED_ROLE, entry)
        else:
            rewrite_gated(names, site.of, Threshold(site.name, bound, none, plan.mode, False))
    record_thresholds(model, Thresholds(level, plan.mode, tuple(left)))
    attach_functions(model)

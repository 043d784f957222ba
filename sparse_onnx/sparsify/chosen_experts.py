"""Experts' layers that skip inputs, all experts' by one operator, where each slot has chosen its expert.

Their matrices are stored as one stack ``[E, K, N]``. What lies the other way round is turned expert by expert while the
model is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.chosen_weights import ChosenWeights
from sparse_onnx.blocks.expert_thresholds import GATED_ROLE, marked
from sparse_onnx.blocks.expert_weights import obstacle
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.moe import MoEBlock, is_zero
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import DOMAIN, WeightLayout
from sparse_onnx.blocks.thresholded import N_BITS
from sparse_onnx.blocks.thresholded_experts import EXPERTS, EXPERTS_N_BITS
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import stack
from sparse_onnx.sparsify.emit import Threshold, emit_masked
from sparse_onnx.sparsify.expert_matrix import expert_weight
from sparse_onnx.sparsify.experts import block_obstacle, block_opset, expert_thresholds
from sparse_onnx.sparsify.record import Acting, tag
from sparse_onnx.sparsify.weights import Operands, folded, operands


def chosen_obstacle(block: MoEBlock) -> Problem | None:
    """Why the thresholds that are marked on a block do not act on experts that slots choose; None where they do."""
    marks = marked(block.node)
    if GATED_ROLE in marks:
        return (
            "units are skipped behind a gate of each expert's own, and it has none",
            "take grouped or branched",
        )
    other = next((mark.mode for mark in marks.values() if mark.mode != "native"), None)
    if other is not None:
        return f"thresholds of the mode '{other}' act on experts' own layers, and it has none", "take grouped"
    found = (obstacle(block.weights[name], name) for role in marks for name in (role, f"{role}_bias"))
    return next(filter(None, found), None)


def chosen_weights(block: MoEBlock, emit: Emitter, names: Namespace, slots: ir.Value) -> ChosenWeights:
    """The experts of the slots ``[S, 1]``, whose layers skip inputs where thresholds are marked on the block."""
    thresholds = expert_thresholds(names.model, block.node)
    if not thresholds:
        return ChosenWeights(block, emit, names, slots)
    return _Thresholded(block, emit, names, slots, thresholds)


class _Thresholded(ChosenWeights):
    def __init__(
        self,
        block: MoEBlock,
        emit: Emitter,
        names: Namespace,
        slots: ir.Value,
        thresholds: Mapping[str, Threshold],
    ) -> None:
        super().__init__(block, emit, names, slots)
        self.thresholds = thresholds
        self.index = emit.op("Reshape", slots, emit.ints(-1))
        self.domains.add(DOMAIN)
        self._masked: dict[int, ir.Value] = {}

    def linear(self, role: str, rows: ir.Value) -> ir.Value:
        threshold = self.thresholds.get(role)
        if threshold is None:
            return self._dense(role, rows)
        emit, dtype = self.emit, self.block.dtype
        x, bound = rows, threshold.bound
        if threshold.top_k:
            if id(rows) not in self._masked:
                self._masked[id(rows)] = emit_masked(emit, rows, threshold)
            x, bound = self._masked[id(rows)], emit.constant(np.zeros(1, dtype.numpy()))
        result = self._product(role, x, bound, threshold.centre)
        block = self.block
        nbytes = sum(expert_weight(block, role, expert).nbytes for expert in range(block.experts or 0))
        acting = "" if threshold.top_k else bound.name or ""
        entry = Acting(threshold.site, x.name or "", acting, threshold.centre.name or "", nbytes)
        tag(emit.nodes[-1], entry)
        return result

    def _dense(self, role: str, rows: ir.Value) -> ir.Value:
        """A layer that skips nothing: by the same operator where that can be, which gathers no weights."""
        block, emit, dtype = self.block, self.emit, self.block.dtype
        zero = np.zeros(1, np.float32)
        problem = obstacle(block.weights[role], role) or obstacle(
            block.weights[f"{role}_bias"], f"{role}_bias"
        )
        problem = problem or block_obstacle(block, role, "native", zero)
        if problem or block_opset(block, role, "native") > self.names.model.opset_imports.get("", 0):
            return super().linear(role, rows)
        bound, centre = (emit.constant(np.full(1, value, dtype.numpy())) for value in (-1, 0))
        return self._product(role, rows, bound, centre)

    def _product(self, role: str, x: ir.Value, bound: ir.Value, centre: ir.Value) -> ir.Value:
        emit, parts = self.emit, self._parts(role)
        values = [
            self._stored(role, name, [part.tensors[name] for part in parts]) for name in parts[0].tensors
        ]
        op, attributes = EXPERTS, parts[0].attributes
        if parts[0].op == N_BITS:
            op, attributes = EXPERTS_N_BITS, {**attributes, "axis": parts[0].axis + 1}
        inputs = [x, self.index, *values, bound, centre, self._folded(role, centre)]
        return emit.op(op, *inputs, domain=DOMAIN, **attributes)

    def _parts(self, role: str) -> list[Operands]:
        """Each expert's matrix as the operator of one layer takes it."""
        block, found = self.block, []
        for expert in range(block.experts or 0):
            name = f"{block.weights[role].name}.{expert}"
            part = operands(expert_weight(block, role, expert), block.dtype, name)
            assert isinstance(part, Operands)
            found.append(part)
        return found

    def _stored(self, role: str, name: str, parts: Sequence[ir.TensorProtocol]) -> ir.Value:
        """All experts' as an initializer; where the matrices lie as they lay, the value that holds them."""
        value = self.block.weights[role]
        quantized = Quantized.of(value)
        if name == "W" and self.block.spec.weight_layout == WeightLayout.IN_OUT:
            return value if quantized is None else quantized.values[0]
        title = f"{value.name}.in_out" + ("" if name == "W" else f".{name}")
        return self.names.initializer(self._home(role), (id(value), "chosen", name), _stacked(parts, title))

    def _folded(self, role: str, centre: ir.Value) -> ir.Value:
        """``[E, N]``: bias + centre W, with the centre as the graph rounds it."""
        block, held = self.block, self.block.weights[f"{role}_bias"]
        assert centre.const_value is not None
        shift, zero, rows = centre.const_value.numpy(), is_zero(held), []
        for expert in range(block.experts or 0):
            bias = None
            if not zero:
                assert held.const_value is not None
                bias = slice_first_axis(held.const_value, expert, f"{held.name}.{expert}")
            rows.append(folded(expert_weight(block, role, expert), shift, bias))
        total = np.stack(rows).astype(block.dtype.numpy())
        tensor = ir.Tensor(total, block.dtype, name=f"{block.weights[role].name}.folded_bias")
        return self.names.initializer(
            self._home(role), (block.dtype, total.tobytes(), "chosen folded"), tensor
        )

    def _home(self, role: str) -> ir.Graph:
        value = self.block.weights[role]
        producer = value.producer()
        home = value.graph if producer is None else producer.graph
        assert isinstance(home, ir.Graph)
        return home


def _stacked(parts: Sequence[ir.TensorProtocol], name: str) -> ir.TensorProtocol:
    try:
        return stack(parts, name)
    except ValueError:  # zero points below a byte that do not end on whole ones: few, and read here
        return ir.Tensor(np.stack([read_array(part) for part in parts]), parts[0].dtype, name=name)

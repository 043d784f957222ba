"""Each slot's weights gathered by its expert's index and multiplied in one batch: shapes follow from the input's.

Over the S = T K flattened slots, slot s of token t = s / K:

    W_s = Gather(W, index_s)                    [S, N, D], the matrices as they are stored
    z_s = W_s x_t                               [S, N, D] x [S, D, 1]; for [E, D, N] weights [S, 1, D] x [S, D, N]
    y_t = sum over k of weight[t, k] * fc2_s act(z_s)

For targets that need static shapes (QNN HTP, which was checked to take the whole graph; TensorRT): no NonZero, Loop,
If, or Split of runtime sizes; with a fixed number of tokens all shapes are constants. No matrix is turned or copied but
by the Gather, which makes the form dear on CPU (2.3 times the grouped form's time for one token, 6 times for 8) and its
memory that of T K experts.

`index=int32` is for targets without kernels for int64 (WebGPU, up to the onnxruntime that has
microsoft/onnxruntime#29830).

Exact for every routing: ties and duplicate indices, no tokens at all, and dropped slots (index = E: expert 0 computes
them, and their result and weight are put away whole, since a product with 0 is NaN for an infinite one). Enters If,
Loop and Scan bodies.

Quantized weights (outputs of DequantizeLinear) are gathered as integers with their scales and zero points, and only
what was gathered is dequantized, by Cast, Sub and Mul; blocks along either axis of a matrix, one scale an output, an
input, an expert or for all. Integers below a byte are gathered as bytes. QNN HTP leaves the Gather of integers to the
CPU, and takes the rest.

With thresholds (`optimize --thresholds`, mode native) no matrix is gathered: sparse_onnx::ThresholdedExpertLinear and
ThresholdedExpertLinearNBits take the slots with all experts' weights, and their native kernel reads of each slot's
expert those of inputs that are kept, rows of one expert together. That is made for CPU and any number of tokens: in the
functions' bodies shapes are not static, and a provider that does not load the kernels is left with a Loop over the
experts. So `optimize` sets `thresholds=false` for every target but those of ONNX Runtime's own CPU provider.

Refused: blocks of quantized weights that run across experts, experts that do not begin on whole bytes, integers or
scales that are no constants; numbers of experts that the graph does not tell; opsets below 18; thresholds of other
modes than native, on units behind a gate (CATS), on weights that are computed, with index=int32, or with
thresholds=false. `Combine` (experts of any body) is not handled: such experts have no packed weights to gather.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.chosen_weights import gather_obstacle
from sparse_onnx.blocks.expert import emit_hidden
from sparse_onnx.blocks.expert_thresholds import marked
from sparse_onnx.blocks.index_type import INDEX_TYPES, IndexedLowering, emit_index
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.blocks.weighted_sum import emit_kept_weight, emit_weighted_sum
from sparse_onnx.graph.build import Emitter
from sparse_onnx.sparsify.chosen_experts import chosen_obstacle, chosen_weights


@dataclasses.dataclass(frozen=True)
class GatherExperts(IndexedLowering):
    __doc__ = __doc__
    name: ClassVar[str] = "gather_experts"
    form: ClassVar[str] = "gathered"
    skips_inputs: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "each slot's weights gathered, one batched product: static shapes for targets that need them"
    )

    thresholds: bool = dataclasses.field(
        default=True,
        metadata={"help": "take blocks with thresholds, by an operator whose native kernel is of the CPU"},
    )

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        if marked(block.node) and not self.thresholds:
            return (
                "with thresholds it is an operator whose kernel runs on ONNX Runtime's CPU provider alone",
                "take grouped or branched, or the target cpu",
            )
        if marked(block.node) and self.index != INDEX_TYPES[0]:
            return "experts with thresholds are numbered in int64", "leave out index=int32"
        found = (gather_obstacle(value, role) for role, value in block.weights.items())
        return next(filter(None, found), None) or chosen_obstacle(block)

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        experts, top_k, width = block.experts, block.top_k, block.hidden_out
        assert experts is not None and top_k is not None and width is not None
        chosen_experts = emit_index(emit, block.expert_index, self.index)
        slots = emit.op("Reshape", chosen_experts, emit.ints(-1, 1))
        weight, kept = block.expert_weight, None
        if not never_dropped(block.expert_index, experts):
            weight = emit_kept_weight(emit, chosen_experts, weight, experts)
            kind = np.dtype(self.index)
            kept = emit.op("Less", slots, emit.constant(np.asarray(experts, kind)))
            slots = emit.op("Where", kept, slots, emit.constant(np.asarray(0, kind)))

        chosen = chosen_weights(block, emit, emit.names, slots)
        rows = _rows_of_slots(emit, block.tokens, top_k)
        projected = [chosen.linear(role, rows) for role in block.spec.roles[:-1]]
        hidden = emit_hidden(emit, block.spec, projected, block.dtype, opset)
        by_slot = chosen.linear(block.spec.roles[-1], hidden)
        if kept is not None:
            by_slot = emit.op("Where", kept, by_slot, emit.scalar(0.0, block.dtype))
        emit.replace(block.node, emit_weighted_sum(emit, by_slot, weight, top_k, width, block.dtype))
        chosen.drop_unused()
        return chosen.domains


def _rows_of_slots(emit: Emitter, tokens: ir.Value, top_k: int) -> ir.Value:
    """``[T, D] -> [T K, D]``, each token K times."""
    if top_k == 1:
        return tokens
    repeated = emit.op("Expand", emit.op("Unsqueeze", tokens, emit.ints(1)), emit.ints(1, top_k, 1))
    return emit.op("Flatten", repeated, axis=2)

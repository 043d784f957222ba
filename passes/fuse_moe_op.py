"""Neutral blocks as ONNX Runtime's own operators: `com.microsoft::MoE`, or `QMoE` where weights are quantized.

    y = total * MoE(x, log(share), fc1, fc2)      share: weights scattered over the experts, divided by their total

One node in place of the experts: the fastest form for many experts of 4 bits, one that creates a session in no time,
and leaves float32 weights where they are mapped. These run up to 1.6 times slower than by the dispatch of fuse_gating.

    relu, gelu_tanh, silu       no gate
    silu with a gate            swiglu with alpha, beta and limit; rows of gate and up in turn

Weights that do not lie as the operator wants them are written anew: gate and up one behind the other or apart, inputs
before outputs, signed integers. QMoE takes 4 or 8 bits in blocks along the inputs, or a scale a row, which is repeated
over blocks of 256: 10 times faster. 4 bits are computed at full accuracy (accuracy_level left at 0), 8 bits only with
one scale a row. Where a lossy step allowed that activations are rounded to 8 bits, accuracy_level is 4, and the model
needs ONNX Runtime 1.31 (`sparse_onnx.requires` in its metadata says so); all others need 1.24. With `rounded=false` it
stays at 0 there too, which is the faster of the two for 4 bits and very many tokens.

Exact for every router whose weights are provably not negative: ties, repeated and dropped slots, tokens without any
weight, no tokens. Slots whose weight is 0 (QMoE: up to 1e-8 of the token's sum) are not run at all, so an infinite or
NaN result times that weight is not kept; an infinite weight gives NaN. Enters If, Loop and Scan bodies.

Refused: weights of which some may be negative, since the operators drop such slots; other activations (gelu with erf,
relu2, silu with another slope and no gate, gates of another kind); outputs of another size than the inputs; types but
float32 (QMoE: and float16); weights that are not constants, quantized in part or otherwise; 8-bit blocks without that
permission.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.contrib_router import emit_logits, emit_scaled
from sparse_onnx.blocks.contrib_weights import Format, projections, quantized_format, quantized_roles
from sparse_onnx.blocks.expert_weights import ExpertWeights, obstacle
from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.blocks.lowering import Lowering, Problem, rounds_activations
from sparse_onnx.blocks.spec import Activation, ExpertSpec
from sparse_onnx.core.passes import Outcome
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.signs import non_negative

#: Metadata of a model that older runtimes cannot load.
REQUIRES_KEY = "sparse_onnx.requires"

_DOMAIN = "com.microsoft"
_ROUNDED = 4
_PLAIN = {Activation.RELU: "relu", Activation.GELU_TANH: "gelu", Activation.SILU: "silu"}
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclasses.dataclass(frozen=True)
class FuseMoEOp(Lowering):
    __doc__ = __doc__
    name: ClassVar[str] = "fuse_moe_op"
    form: ClassVar[str] = "fused"
    summary: ClassVar[str] = "experts fused into ONNX Runtime's own operators MoE and QMoE"
    rounded: bool = dataclasses.field(
        default=True, metadata={"help": "round activations to 8 bits where a lossy step allows that"}
    )

    @property
    def label(self) -> str:
        return self.form if self.rounded else f"{self.form}:rounded=false"

    def call(self, model: ir.Model) -> Outcome:
        outcome = super().call(model)
        if outcome.modified and any(map(_rounds, model.graph.all_nodes())):
            model.metadata_props[REQUIRES_KEY] = "onnxruntime>=1.31"
        return outcome

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        if not (self.rounded or rounds_activations(block)):
            return (
                "no lossy step allows to round its activations, so they never are",
                "leave rounded=false out",
            )
        return _shape_problem(block) or self._weights_problem(block) or _routing_problem(block)

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        form = self._format(block)
        assert not isinstance(form, tuple)
        logits, total = emit_logits(emit, block)
        first, last = projections(block, emit.names, form)
        attributes = _attributes(block)
        inputs: list[ir.Value | None] = [block.tokens, logits]
        if form is None:
            inputs += [first.weight, first.bias, last.weight, last.bias]
        else:
            inputs += [first.weight, first.scales, first.bias, last.weight, last.scales, last.bias]
            inputs += [None, None, None, first.zero_points, last.zero_points]
            attributes["expert_weight_bits"] = form.bits
            if form.block:
                attributes["block_size"] = form.block
                if self._rounds(block):
                    attributes["accuracy_level"] = _ROUNDED
        while inputs[-1] is None:
            inputs.pop()
        operator = "MoE" if form is None else "QMoE"
        rows = emit.op(operator, *inputs, domain=_DOMAIN, **attributes)
        weights = ExpertWeights(block, emit.names)
        emit.replace(block.node, emit_scaled(emit, rows, total, block.dtype))
        weights.drop_unused()
        return {_DOMAIN}

    def _rounds(self, block: MoEBlock) -> bool:
        return self.rounded and rounds_activations(block)

    def _weights_problem(self, block: MoEBlock) -> Problem | None:
        found = filter(None, (obstacle(value, role) for role, value in block.weights.items()))
        first = next(found, None)
        if first is not None:
            return first
        quantized = quantized_roles(block)
        plain = [role for role in block.spec.roles if role not in quantized]
        if quantized and plain:
            return (
                f"{next(iter(quantized))} is quantized and {plain[0]} is not",
                "the operator takes all quantized or none",
            )
        allowed = (_FLOAT, _HALF) if quantized else (_FLOAT,)
        if block.dtype not in allowed:
            return (
                f"its tokens are {block.dtype.name.lower()}",
                "the CPU kernels compute in float32, and in float16 with quantized weights",
            )
        for role in block.spec.roles:
            for name in (f"{role}_bias",) if quantized else (role, f"{role}_bias"):
                value = block.weights[name]
                if value.const_value is not None and value.const_value.dtype != block.dtype:
                    return (
                        f"{name} is {value.const_value.dtype.name.lower()}",
                        "all must have the tokens' type",
                    )
        form = self._format(block)
        return form if isinstance(form, tuple) else None

    def _format(self, block: MoEBlock) -> Format | Problem | None:
        """None where weights are not quantized."""
        quantized = quantized_roles(block)
        return quantized_format(block, quantized, self._rounds(block)) if quantized else None


def _rounds(node: ir.Node) -> bool:
    level = node.attributes.get("accuracy_level")
    ours = node.op_type == "QMoE" and FORM_KEY in node.metadata_props
    return ours and level is not None and level.as_int() == _ROUNDED


def _attributes(block: MoEBlock) -> dict[str, Any]:
    spec, experts, top_k = block.spec, block.experts, block.top_k
    assert experts is not None and top_k is not None
    attributes: dict[str, Any] = {
        "k": min(top_k, experts),
        "activation_type": "swiglu" if spec.gated else _PLAIN[spec.activation],
        "normalize_routing_weights": 1,
    }
    if spec.gated:
        attributes |= {"swiglu_fusion": 1, "activation_alpha": spec.alpha, "activation_beta": spec.beta}
        if spec.limit:
            attributes["swiglu_limit"] = spec.limit
    return attributes


def _shape_problem(block: MoEBlock) -> Problem | None:
    if block.hidden_out != block.hidden:
        return (
            f"it gives {block.hidden_out} values for tokens of {block.hidden}",
            "the operator's output is as wide as its input",
        )
    if not _has_activation(block.spec):
        what = f"{'a gate with ' if block.spec.gated else ''}{block.spec.name}"
        slope = f" of slope {block.spec.alpha:g}" if block.spec.activation is Activation.SILU else ""
        return (
            f"the operator has no activation that is {what}{slope}",
            "it has relu, gelu with tanh and silu without a gate, and silu with one",
        )
    return None


def _has_activation(spec: ExpertSpec) -> bool:
    if spec.gated:
        return spec.activation is Activation.SILU
    return spec.activation in _PLAIN and (spec.activation is not Activation.SILU or spec.alpha == 1)


def _routing_problem(block: MoEBlock) -> Problem | None:
    if non_negative(block.expert_weight):
        return None
    return (
        f"the weights '{block.expert_weight.name}' are not proved to be 0 or more, and the operator drops slots whose "
        "weight is not above 0",
        "only routers whose weights come from a softmax, a sigmoid or the like can be expressed",
    )

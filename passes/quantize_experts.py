"""Expert weights stored in 4 or 8 bits. Lossy: it runs only where it is asked for, and says what the weights lost.

    W[e] -> DequantizeLinear(codes[e], scale[e], point[e]) = (codes[e] - point[e]) * scale[e]

Each float matrix of a `MoE` or `GatedMoE` block becomes integers `[E, N, K]` behind a DequantizeLinear; lowerings look
through it and multiply by the integers as they are stored. Elements along the inputs share a scale:

    bits=4   `block` of them (16 to 256, a power of two; by default 32), quantized by ORT's own quantizer
    bits=8   by default a whole row: one storage serves MatMulNBits, DynamicQuantizeMatMul and QMoE

Where inputs are no multiple of the block, the largest power of two that divides them takes its place if it is 16 or
more; else the last block of a row is shorter. Zero points are the middle of the range, or with symmetric=false chosen
for each block. Matrices that lie `[inputs, outputs]` are turned, so that blocks run along the inputs. Scales have the
weights' type: MatMulNBits and QMoE take float16 as it is.

The block's node is marked with what kernels may do with activations: `int8` rounds them to 8 bits where ORT has such a
kernel (3 to 30 times faster at one token), `float` keeps them.

An expert is quantized when it is first read. Memory does not grow with the model: what is to be read again lies in a
temporary file of the result's size (TMPDIR, else /var/tmp), or is quantized again where there is no room. Routers,
embeddings, norms, biases and shared experts stay in float. Block-wise DequantizeLinear needs opset 21, which older
models become. Enters If, Loop and Scan bodies; functions were inlined before.

Refused: weights that are quantized already, that are not constants of the model, or of another type than float32 and
float16; an odd number of inputs, in 4 bits; experts of other bodies (`Combine`); models that cannot become opset 21.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, WeightLayout, blocks, combine_blocks
from sparse_onnx.blocks.expert_weights import obstacle
from sparse_onnx.blocks.integer_weights import IntegerWeights, Kept, Width
from sparse_onnx.blocks.lowering import ACTIVATIONS_KEY, Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.passes.convert_opset import ConvertOpset

_OPSET = 21
_SMALLEST, _LARGEST = 16, 256
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_OTHER = "its experts are no networks of two layers, whose matrices could be told"
#: Elements of a block that are quantized to say what they lose; of larger blocks, some experts.
_MEASURED = 1 << 23


@dataclasses.dataclass(frozen=True)
class QuantizeExperts(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "quantize_experts"
    summary: ClassVar[str] = "expert weights in 4 or 8 bits, which ORT multiplies by as they are stored"
    kind: ClassVar[Literal["exact", "lossy"]] = "lossy"

    bits: int = dataclasses.field(default=4, metadata={"help": "of a weight: 4 or 8"})
    block: int = dataclasses.field(
        default=0,
        metadata={"help": "weights that share a scale: 16 to 256; 0 is 32 of 4 bits, a whole row of 8"},
    )
    symmetric: bool = dataclasses.field(
        default=True, metadata={"help": "zero points in the middle of the range"}
    )
    activations: str = dataclasses.field(
        default="int8",
        metadata={"help": "int8: kernels may round activations to 8 bits; float: they may not"},
    )

    def __post_init__(self) -> None:
        problem = ""
        if self.bits not in (4, 8):
            problem = f"bits={self.bits} is neither 4 nor 8"
        elif self.block and (self.block not in range(_SMALLEST, _LARGEST + 1) or self.block & self.block - 1):
            problem = f"block={self.block} is no power of two from {_SMALLEST} to {_LARGEST}, nor 0"
        elif self.activations not in ("int8", "float"):
            problem = f"activations={self.activations} is neither int8 nor float"
        if problem:
            raise UsageError(f"pass '{self.name}': {problem}")

    def call(self, model: ir.Model) -> Outcome:
        found = blocks(model)
        problems = {block.node: self._problem(block) for block in found}
        chosen = [block for block in found if problems[block.node] is None]
        converted = False
        if chosen and model.opset_imports.get("", 0) < _OPSET:
            outcome = ConvertOpset(oldest=_OPSET)(model)
            assert isinstance(outcome, Outcome)
            converted = outcome.modified
            if not converted:
                reason = "; ".join(refusal.reason for refusal in outcome.refusals)
                problems |= dict.fromkeys((block.node for block in chosen), (reason, "export it at opset 21"))
                chosen = []
        work = _Work(model, self.activations)
        for block in chosen:
            work.quantize(block, self._width(block))
        refusals = [
            Refusal(f"block '{block.name}': {problem[0]}", block.node.name or "", problem[1], self.name)
            for block in found
            if (problem := problems[block.node]) is not None
        ]
        others = combine_blocks(model)
        refusals += [
            Refusal(f"block '{block.name}': {_OTHER}", block.node.name or "", by=self.name)
            for block in others
        ]
        matched, modified = len(found) + len(others), bool(chosen) or converted
        return Outcome(model, modified, matched, len(chosen), tuple(refusals), tuple(work.notes()))

    def _problem(self, block: MoEBlock) -> Problem | None:
        for role in block.spec.roles:
            value = block.weights[role]
            if Quantized.of(value) is not None:
                return f"{role} is quantized already", "it stays as it is"
            problem = obstacle(value, role)
            if problem is not None:
                return problem
            assert value.const_value is not None
            if value.const_value.dtype not in _TYPES:
                dtype = value.const_value.dtype.name.lower()
                return f"{role} is {dtype}, not float32 or float16", "export with --dtype float32"
        if not block.experts:
            return "it has no experts", ""
        odd = next((size for size in _inputs(block) if size * self.bits % 8), None)
        if odd is not None:
            return f"rows of {odd} inputs do not end on whole bytes in {self.bits} bits", "quantize to 8 bits"
        return None

    def _width(self, block: MoEBlock) -> Width:
        wanted = self.block or (32 if self.bits == 4 else 0)
        shared = math.gcd(*_inputs(block))
        fitting = shared & -shared
        return Width(self.bits, min(wanted, fitting) if fitting >= _SMALLEST else wanted, self.symmetric)


def _tensors(block: MoEBlock) -> list[ir.TensorProtocol]:
    found = [block.weights[role].const_value for role in block.spec.roles]
    return [tensor for tensor in found if tensor is not None]


def _inputs(block: MoEBlock) -> list[int]:
    """Of each matrix."""
    axis = 2 if block.spec.weight_layout == WeightLayout.OUT_IN else 1
    return [tensor.shape.numpy()[axis] for tensor in _tensors(block)]


class _Work:
    """Blocks of one model that are quantized, and what that costs them."""

    def __init__(self, model: ir.Model, activations: str) -> None:
        self.names, self.kept, self.activations = Namespace(model), Kept(), activations
        self.known: dict[tuple[ir.Value, Width, bool], tuple[IntegerWeights, ir.Value]] = {}
        self.lost: dict[Width, list[str]] = defaultdict(list)

    def quantize(self, block: MoEBlock, width: Width) -> None:
        node, changed, whole = block.node, 0.0, 0.0
        experts = _measured(block)
        for role in block.spec.roles:
            value = block.weights[role]
            weight, numbers = self._numbers(block, value, width)
            node.replace_input_with(node.inputs.index(value), numbers)
            if not value.uses() and not value.is_graph_output():
                assert isinstance(value.graph, ir.Graph)
                value.graph.initializers.pop(value.name or "")
            parts = weight.lost(experts)
            changed, whole = changed + parts[0], whole + parts[1]
        node.attributes["weight_layout"] = ir.AttrInt64("weight_layout", int(WeightLayout.OUT_IN))
        if self.activations == "int8":
            node.metadata_props[ACTIVATIONS_KEY] = self.activations
        some = "" if len(experts) == block.experts else f" ({len(experts)} of {block.experts} experts)"
        error = math.sqrt(changed / whole) if whole else 0.0
        self.lost[width].append(f"{error:.2%} in '{block.name}'{some}")

    def _numbers(self, block: MoEBlock, value: ir.Value, width: Width) -> tuple[IntegerWeights, ir.Value]:
        """The weight in integers, and the value that dequantizes them: in the graph that holds the weight."""
        turned = block.spec.weight_layout == WeightLayout.IN_OUT
        key = (value, width, turned)
        if key in self.known:
            return self.known[key]
        graph, tensor = value.graph, value.const_value
        assert isinstance(graph, ir.Graph) and tensor is not None
        weight = IntegerWeights(tensor, width, turned, self.kept)
        emit = Emitter(graph, self.names, f"{value.name}/int{width.bits}")
        inputs = []
        for what, part in (("codes", weight.data), ("scale", weight.scale), ("point", weight.zero_point)):
            part.name = f"{value.name}.{what}"
            inputs.append(self.names.initializer(graph, (*key, what), part))
        numbers = emit.op("DequantizeLinear", *inputs, axis=2, block_size=width.block or weight.inputs)
        numbers.name = self.names.free(f"{value.name}.int{width.bits}")
        numbers.dtype, numbers.shape = tensor.dtype, ir.Shape(weight.quantized().shape)
        # Right in front of its reader: a model that runs like this holds few matrices of numbers at a time.
        before = block.node if block.node.graph is graph else graph[0]
        graph.insert_before(before, emit.nodes)
        self.known[key] = weight, numbers
        return weight, numbers

    def notes(self) -> list[str]:
        """What the weights lost, a line for each way of storing them."""
        lines = []
        for width, errors in self.lost.items():
            shared = f"blocks of {width.block}" if width.block else "rows"
            points = "" if width.symmetric else " with zero points"
            kernels = "; kernels may round activations to 8 bits" if self.activations == "int8" else ""
            lines.append(
                f"experts stored in {width.bits} bits, {shared}{points}: root mean square error of the weights, "
                f"relative to their size: {', '.join(errors)}{kernels}"
            )
        return lines


def _measured(block: MoEBlock) -> list[int]:
    """Experts that say what all of them lose: all, or evenly many of a large block."""
    experts = block.experts or 0
    each = sum(tensor.size for tensor in _tensors(block)) // max(1, experts)
    count = min(experts, max(1, _MEASURED // max(1, each)))
    return sorted({int(at) for at in np.linspace(0, experts - 1, count).round()})

"""A view of `sparse_onnx::Combine`: a mixture whose experts are bodies of any kind, each a function of its own.

    y[t] = sum over k of expert_weight[t, k] * Y[expert_index[t, k], t]        Y [E, T, D] of all experts for all tokens

In neutral form Y is a stack of calls, one an expert, that read the same tokens:

    Y_e = Unsqueeze(Flatten(sparse_onnx::Expert_<hash>(tokens, weights of e ...)), 0)        Y = Concat(Y_0, Y_1, ...)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.moe import NAME_KEY, SPELLING_KEY, MoEBlock
from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.core.errors import ModelError

COMBINE = "Combine"
COMBINE_INPUTS = ("expert_index", "expert_weight", "experts")


@dataclasses.dataclass(frozen=True, eq=False)
class CombineBlock:
    """One `Combine` node.

    Attributes:
        node: the node.
        expert_index: ``[T, K]`` int64, each in [0, E]; E is a dropped slot.
        expert_weight: ``[T, K]``, of a floating-point type of its own, in which the sum is taken.
        stack: Y, ``[E, T, D_out]``.
        output: ``[T, D_out]`` of Y's type.
        calls: the output of each expert's call in order, any shape ``[T, ...]``; empty where Y is no stack of calls.
        experts, top_k, hidden_out: E, K and D_out; None where unknown.
        dtype: of Y.
    """

    node: ir.Node
    expert_index: ir.Value
    expert_weight: ir.Value
    stack: ir.Value
    output: ir.Value
    calls: tuple[ir.Value, ...]
    experts: int | None
    top_k: int | None
    hidden_out: int | None
    dtype: ir.DataType

    @staticmethod
    def of(node: ir.Node) -> CombineBlock | None:
        """The view of a node; None for a node of another operator.

        Raises:
            ModelError: missing inputs, ranks or sizes that contradict each other, or no known type.
        """
        if not is_combine(node):
            return None
        if len(node.inputs) != len(COMBINE_INPUTS) or None in node.inputs or len(node.outputs) != 1:
            raise _malformed(node, f"needs the inputs {', '.join(COMBINE_INPUTS)} and one output")
        index, weight, stack = node.inputs
        assert index is not None and weight is not None and stack is not None
        sizes = _sizes(node, {"TK": (index, weight), "ETO": (stack,), "TO": (node.outputs[0],)})
        calls = _calls(stack)
        if sizes.setdefault("E", len(calls) or None) != len(calls) and calls:
            raise _malformed(node, f"stacks {len(calls)} experts as {sizes['E']}")
        dtype = stack.dtype or node.outputs[0].dtype
        if dtype is None:
            raise _malformed(node, "works on experts of unknown type; run shape inference first")
        return CombineBlock(
            node,
            index,
            weight,
            stack,
            node.outputs[0],
            calls,
            sizes["E"],
            sizes.get("K"),
            sizes.get("O"),
            dtype,
        )

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def name(self) -> str:
        return self.node.metadata_props.get(NAME_KEY) or self.node.name or self.output.name or self.op

    @property
    def spelling(self) -> str:
        return self.node.metadata_props.get(SPELLING_KEY, "neutral")

    @property
    def tokens(self) -> ir.Value | None:
        """``[T, ...]`` that all experts read as their first input; None where they do not."""
        found = {id(node.inputs[0]): node.inputs[0] for node in self.nodes if node.inputs}
        return next(iter(found.values())) if len(found) == 1 else None

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The calls' nodes, one an expert."""
        return [node for value in self.calls if (node := value.producer()) is not None]

    @property
    def hidden(self) -> int | None:
        """Elements of one token, all its axes together; None where unknown."""
        shape = None if self.tokens is None else self.tokens.shape
        sizes = [] if shape is None else list(shape)[1:]
        static = [size for size in sizes if isinstance(size, int)]
        return math.prod(static) if static and len(static) == len(sizes) else None

    @functools.cached_property
    def parameters(self) -> int | None:
        """Elements of the experts' weights; None where they are no calls. A second output of the same experts has none
        of its own."""
        if not self.calls:
            return None
        return sum(math.prod(tensor.shape.numpy()) for tensor in self._weights())

    @property
    def active_parameters(self) -> int | None:
        if self.parameters is None or self.top_k is None or not self.experts:
            return None
        return self.parameters * min(self.top_k, self.experts) // self.experts

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._weights())

    def _weights(self) -> Iterator[ir.TensorProtocol]:
        if any(value.index() != 0 for value in self.calls):
            return
        values = {id(value): value for node in self.nodes for value in node.inputs[1:] if value is not None}
        for value in values.values():
            if value.const_value is not None:
                yield value.const_value


def is_combine(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == COMBINE and node.overload == ""


def neutral_blocks(model: ir.Model) -> list[MoEBlock | CombineBlock]:
    """All neutral blocks of either kind in graph order, those in If, Loop and Scan bodies included, in functions not.

    Raises:
        ModelError: a malformed block.
    """
    found: list[MoEBlock | CombineBlock] = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        block = MoEBlock.of(node) or CombineBlock.of(node)
        if block is not None:
            found.append(block)
    return found


def combine_blocks(model: ir.Model) -> list[CombineBlock]:
    """The `Combine` blocks alone."""
    return [block for block in neutral_blocks(model) if isinstance(block, CombineBlock)]


def make_combine(
    expert_index: ir.Value, expert_weight: ir.Value, stack: ir.Value, *, name: str, spelling: str = "neutral"
) -> ir.Node:
    """The neutral node; the arguments as in `CombineBlock`. The caller puts it into a graph, and later calls
    `attach_functions`."""
    output = ir.Value(name=f"{name}/output", type=stack.type)
    if stack.shape is not None:
        output.shape = ir.Shape(list(stack.shape)[1:])
    return ir.Node(
        DOMAIN,
        COMBINE,
        [expert_index, expert_weight, stack],
        outputs=[output],
        name=name,
        metadata_props={NAME_KEY: name, SPELLING_KEY: spelling},
    )


def _calls(stack: ir.Value) -> tuple[ir.Value, ...]:
    """What is stacked on the first axis, where each of it is an output of a function of our domain."""
    joined = stack.producer()
    if joined is not None and joined.domain == "" and joined.op_type == "Concat":
        axis = joined.attributes.get("axis")
        parts = list(joined.inputs) if axis is not None and axis.value in (0, -3) else []
    else:
        parts = [stack]
    found = [_call(part) for part in parts]
    return () if None in found else tuple(value for value in found if value is not None)


def _call(part: ir.Value | None) -> ir.Value | None:
    value = _behind(part, "Unsqueeze")
    if value is None:
        return None
    value = _behind(value, "Flatten") or value
    node = value.producer()
    if node is None or node.domain != DOMAIN or is_combine(node) or node.attributes or not node.inputs:
        return None
    return value


def _behind(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The input of an Unsqueeze at the front, or of a Flatten that keeps the first axis."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or node.op_type != op_type:
        return None
    if op_type == "Flatten":
        axis = node.attributes.get("axis")
        return node.inputs[0] if axis is None or axis.value == 1 else None
    axes = (
        ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    )
    return node.inputs[0] if axes is not None and np.ravel(axes.numpy()).tolist() in ([0], [-3]) else None


def _sizes(node: ir.Node, values: dict[str, tuple[ir.Value, ...]]) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {}
    for letters, group in values.items():
        for value in group:
            if value.shape is None:
                continue
            if len(value.shape) != len(letters):
                raise _malformed(node, f"takes '{value.name}' with {len(letters)} axes, not {value.shape}")
            for letter, size in zip(letters, value.shape, strict=True):
                if isinstance(size, int) and sizes.setdefault(letter, size) != size:
                    raise _malformed(node, f"has sizes that contradict each other: {size}, {sizes[letter]}")
    return sizes


def _malformed(node: ir.Node, problem: str) -> ModelError:
    return ModelError(f"{DOMAIN}::{node.op_type} {problem}", where=f"node '{node.name}'")

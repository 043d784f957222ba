"""Small blocks as lists of named nodes, so that a test changes one of them; and what a recogniser makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from harness import assert_close, run_model
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sparse_onnx.blocks import attach_functions, blocks
from sparse_onnx.blocks.moe import MoEBlock
from sparse_onnx.core.passes import Outcome, Pass

T, D, N, E, K = 5, 8, 6, 4, 2
"""Tokens of the feeds, hidden and inner size, experts, experts of a token."""


@dataclasses.dataclass
class Draft:
    """Nodes by the name of their first output, in order. Change `nodes`, `constants` or `outputs`, then `build`."""

    nodes: dict[str, tuple[str, list[str], dict[str, Any]]] = dataclasses.field(default_factory=dict)
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    inputs: dict[str, list[int | str]] = dataclasses.field(default_factory=lambda: {"x": ["T", D]})
    outputs: list[str] = dataclasses.field(default_factory=lambda: ["y"])
    opset: int = 20
    extra: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, op_type: str, *inputs: str, **attributes: Any) -> str:
        self.nodes[name] = (op_type, list(inputs), attributes)
        return name

    def ints(self, *values: int) -> str:
        name = "i" + "_".join(str(v).replace("-", "m") for v in values)
        self.constants[name] = np.array(values, np.int64)
        return name

    def before(self, target: str, name: str, op_type: str, *inputs: str, **attributes: Any) -> None:
        """A node put in before `target`."""
        items = list(self.nodes.items())
        at = [key for key, _ in items].index(target)
        items.insert(at, (name, (op_type, list(inputs), attributes)))
        self.nodes = dict(items)

    def split(self, place: str, source: str, *halves: str, axis: int) -> None:
        """A Split in place of the node `place`."""
        items = [
            (halves[0], ("Split", [source], {"axis": axis, "num_outputs": len(halves)}))
            if name == place
            else (name, node)
            for name, node in self.nodes.items()
        ]
        self.nodes = dict(items)
        self.extra[halves[0]] = list(halves[1:])

    def rewire(self, node: str, old: str, new: str) -> None:
        op_type, inputs, attributes = self.nodes[node]
        assert old in inputs
        self.nodes[node] = (op_type, [new if item == old else item for item in inputs], attributes)

    def build(self) -> ir.Model:
        made = []
        for name, (op_type, inputs, attributes) in self.nodes.items():
            outputs = [name, f"{name}_index"] if op_type == "TopK" else [name, *self.extra.get(name, [])]
            made.append(helper.make_node(op_type, inputs, outputs, name=f"n_{name}", **attributes))
        graph = helper.make_graph(
            made,
            "block",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        built = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
        RemoveUnusedNodesPass()(built)
        return built


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, E), "w1": (E, N, D), "w2": (E, D, N), "b1": (E, N), "b2": (E, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def recognised(model: ir.Model, rewrite: Pass, **feeds: np.ndarray) -> MoEBlock:
    """The one block that the pass makes of the model, which then computes the same for several token counts."""
    lifted = ir.from_proto(ir.to_proto(model))
    outcome = rewrite(lifted)
    assert isinstance(outcome, Outcome)
    assert (outcome.matched, outcome.rewritten, outcome.refusals) == (1, 1, ())
    [block] = blocks(lifted)
    again = rewrite(lifted)
    assert not again.modified
    attach_functions(lifted)
    onnx.checker.check_model(ir.to_proto(lifted), full_check=True)
    for count in (1, 2, T, 17):
        x = np.random.default_rng(count).standard_normal((count, D)).astype(np.float32)
        given = {"x": x} | feeds
        for expected, actual in zip(run_model(model, given), run_model(lifted, given), strict=True):
            assert_close(expected, actual, 5e-6)
    return block


def refused(model: ir.Model, rewrite: Pass, says: str) -> None:
    """The pass leaves the model as it was, and one refusal says why."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    outcome = rewrite(model)
    assert isinstance(outcome, Outcome)
    assert not outcome.modified and outcome.rewritten == 0
    assert [says in refusal.reason for refusal in outcome.refusals] == [True], outcome.refusals
    assert outcome.refusals[0].node and outcome.refusals[0].hint and outcome.refusals[0].by == rewrite.name
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def silent(model: ir.Model, rewrite: Pass) -> None:
    """What looks like no mixture of experts gets no refusal either."""
    outcome = rewrite(model)
    assert isinstance(outcome, Outcome)
    assert (outcome.matched, outcome.modified, outcome.refusals) == (0, False, ())


Change = Callable[[Draft], object]

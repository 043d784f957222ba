"""Small models with a loop over experts, of which a test changes one thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from harness import Feeds, check_rewrite
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.passes.recognise_expert_loop import RecogniseExpertLoop

TOKENS, HIDDEN, INNER = "T", 6, 10


@dataclasses.dataclass
class Loop:
    """``x [T, 6], ids`` to ``y``. Every method is one part of the loop; a test overrides what it wants otherwise."""

    experts: int = 4
    top_k: int = 2
    router: int = 0
    """Width of the router's scores; 0: as many as experts. -1: no router, indices are an input."""
    order: tuple[int, ...] = ()
    add: str = "gather"
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    initializers: list[onnx.TensorProto] = dataclasses.field(default_factory=list)
    change: dict[str, Callable[[Loop, int, str], str]] = dataclasses.field(default_factory=dict)
    extra_outputs: list[str] = dataclasses.field(default_factory=list)
    count: int = 0

    def op(self, kind: str, *inputs: str | list[int] | int, outputs: int = 1, **attributes: object) -> str:
        """A node; lists and numbers become int64 constants. Several outputs: the first one's name."""
        self.count += 1
        name = f"v{self.count}"
        names = [name, *(f"{name}_{at}" for at in range(1, outputs))]
        wired = [item if isinstance(item, str) else self.const(np.array(item, np.int64)) for item in inputs]
        self.nodes.append(helper.make_node(kind, wired, names, name=f"n{self.count}", **attributes))
        return name

    def const(self, array: np.ndarray) -> str:
        for known in self.initializers:
            value = numpy_helper.to_array(known)
            if value.dtype == array.dtype and value.shape == array.shape and (value == array).all():
                return known.name
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def at(self, what: str, expert: int, value: str) -> str:
        """The value, or what the test puts in its place."""
        return self.change[what](self, expert, value) if what in self.change else value

    def weight(self, *shape: int) -> str:
        rng = np.random.default_rng(len(self.initializers))
        return self.const((rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def routing(self) -> tuple[str, str]:
        scores = self.op("MatMul", "x", self.weight(HIDDEN, self.router or self.experts))
        values = self.op("TopK", self.op("Softmax", scores, axis=-1), [self.top_k], outputs=2, axis=-1)
        return f"{values}_1", values

    def coordinates(self, mask: str) -> tuple[str, str]:
        """(token, slot) of each hit ``[n]``."""
        pairs = self.op("Transpose", self.op("NonZero", mask), perm=[1, 0])
        token = self.op("Split", pairs, [1, 1], outputs=2, axis=1)
        return self.op("Squeeze", token, [1]), self.op("Squeeze", f"{token}_1", [1])

    def body(self, rows: str) -> str:
        hidden = self.op("Relu", self.op("MatMul", rows, self.weight(HIDDEN, INNER)))
        return self.op("MatMul", hidden, self.weight(INNER, HIDDEN))

    def build(self) -> onnx.ModelProto:
        ids, weight = ("ids", "w") if self.router < 0 else self.routing()
        total = self.at("start", -1, self.op("ConstantOfShape", self.op("Shape", "x")))
        for e in self.order or range(self.experts):
            number = int(self.at("number", e, str(e)))
            token, slot = self.coordinates(self.op("Equal", self.at("ids", e, ids), number))
            read = self.at("read", e, token)
            y = self.body(self.op("Gather", self.at("x", e, "x"), read, axis=0))
            place = self.op(
                "Concat", self.op("Unsqueeze", token, [1]), self.op("Unsqueeze", slot, [1]), axis=1
            )
            scale = self.op("GatherND", weight, self.at("place", e, place))
            y = self.at("y", e, self.op("Mul", self.op("Unsqueeze", scale, [1]), y))
            total = self.at("total", e, self.step(total, self.at("target", e, token), y))
        y = self.at("end", -1, total)
        self.nodes.append(helper.make_node("Identity", [y], ["y"], name="end"))
        return self.model()

    def step(self, total: str, token: str, y: str) -> str:
        rows = self.op("Unsqueeze", token, [1])
        if self.add == "gather":
            y = self.op("Add", self.op("GatherND", total, rows), y)
        if self.add in ("gather", "overwrite"):
            return self.op("ScatterND", total, rows, y)
        if self.add == "elements":
            wide = self.op("Expand", rows, self.op("Shape", y))
            zeros = self.op("ConstantOfShape", self.op("Shape", total))
            return self.op("Add", self.op("ScatterElements", zeros, wide, y, axis=0), total)
        return self.op("ScatterND", total, rows, y, reduction="add")

    def model(self) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TOKENS, HIDDEN])]
        if self.router < 0:
            shape = [TOKENS, self.top_k]
            inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, shape))
            inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape))
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ["y", *self.extra_outputs]
        ]
        graph = helper.make_graph(self.nodes, "loop", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def rows(tokens: int, seed: int = 0) -> Feeds:
    return {"x": np.random.default_rng(seed).standard_normal((tokens, HIDDEN)).astype(np.float32)}


def feeds() -> list[Feeds]:
    return [
        rows(0),
        rows(1),
        rows(9),
        {"x": np.tile(rows(1, 3)["x"], (5, 1))},
        {"x": np.zeros((4, HIDDEN), np.float32)},
    ]


def ready(model: onnx.ModelProto) -> ir.Model:
    found = common.CommonSubexpressionEliminationPass()(ir.from_proto(model)).model
    return common.RemoveUnusedNodesPass()(found).model


def lifted(loop: Loop, **options: object) -> ir.Model:
    after, _ = check_rewrite(
        ready(loop.build()), RecogniseExpertLoop(), rewritten=1, **({"feeds": feeds()} | options)
    )
    assert not {"NonZero", "ScatterND", "ScatterElements"} & {node.op_type for node in after.graph}
    return after


def refused(loop: Loop, reason: str) -> None:
    before = ready(loop.build())
    after, _ = check_rewrite(before, RecogniseExpertLoop(), rewritten=0, refused=[reason])
    left, right = (ir.to_proto(model).SerializeToString(deterministic=True) for model in (before, after))
    assert left == right, "what is refused stays as it was"

"""Changes that near-misses make to a block: each puts something else in the place of one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from family import Case, invalid
from onnx import helper
from spellings import Built, spoiled
from writer import Writer

Spoil = dict[str, Callable[[Writer, Any], Any]]


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """`case` with `spoil`. `says` is None where what is left looks like nothing: then silence is right too.

    `differs` is False where the numbers are those of the block on every input that routes as usual, or on all;
    None where that is the runtime's choice.
    """

    name: str
    case: Case
    spoil: Spoil
    says: str | None
    differs: bool | None = True

    def build(self) -> Built:
        return spoiled(self.case, self.spoil)


PLAIN = (("residual", "no"), ("scaled", "no"), ("value-info", "without"), ("constants", "initializers"))


def case(spelling: str, *force: str, **given: Any) -> Case:
    pairs = tuple(tuple(text.split("=")) for text in force)
    made = Case(spelling, force=(*PLAIN, *pairs), **({"opset": 18, "seed": 3} | given))
    assert not invalid(made), invalid(made)
    return made


def only(e: int, change: Callable[[Writer, Any], Any]) -> Callable[[Writer, Any], Any]:
    """The change for expert `e` alone."""
    return lambda g, value: change(g, value) if g.expert == e else value


def rolled(g: Writer, value: str) -> str:
    """The rows one further."""
    head, tail = g.slice(value, 0, 1, 0), g.slice(value, 1, 2**31, 0)
    return g.op("Concat", tail, head, axis=0)


def also_output(g: Writer, value: str) -> str:
    g.outputs.append(value)
    return value


def graph_input(g: Writer, value: str) -> str:
    """The initializer as a graph input that has no value of its own."""
    [tensor] = [t for t in g.initializers if t.name == value]
    g.initializers.remove(tensor)
    g.inputs.append(helper.make_tensor_value_info(value, tensor.data_type, list(tensor.dims)))
    return value


def overridable(g: Writer, value: str) -> str:
    """The initializer as the default of a graph input."""
    [tensor] = [t for t in g.initializers if t.name == value]
    g.inputs.append(helper.make_tensor_value_info(value, tensor.data_type, list(tensor.dims)))
    return value


def computed(g: Writer, value: str) -> str:
    """The weights times a number that the input decides."""
    return g.op("Mul", value, g.op("Sigmoid", g.op("ReduceMax", "x", keepdims=0)))


def centred(g: Writer, value: str) -> str:
    """Less the mean over all tokens."""
    return g.op("Sub", value, g.op("ReduceMean", value, g.ints(0), keepdims=1))


def swapped(items: list[Any], a: int = 1, b: int = 2) -> list[Any]:
    items = list(items)
    items[a], items[b] = items[b], items[a]
    return items


def twice(number: int, by: int) -> Callable[[Writer, int], int]:
    """Expert `number` answers to `by`."""
    return lambda g, e: by if e == number else e


def next_id(g: Writer, ids: str) -> str:
    return g.op("Mod", g.op("Add", ids, g.int(1)), g.int(g.case.experts))


def turned_slots(g: Writer, ids: str) -> str:
    """``[T K]`` as if it had been ``[K, T]``."""
    return g.flat(g.op("Transpose", g.reshape(ids, -1, g.case.top_k), perm=[1, 0]))


def guarded(g: Writer, value: str) -> str:
    """The value, or zeros where one input is large."""
    graphs = []
    for kept in (True, False):
        out = g.name()
        kind = "Identity" if kept else "Sub"
        node = helper.make_node(kind, [value] if kept else [value, value], [out])
        info = helper.make_tensor_value_info(out, g.type, ["n", "m"])
        graphs.append(helper.make_graph([node], "branch", [], [info]))
    small = g.op("Less", g.op("ReduceMax", "x", keepdims=0), g.number(2.2))
    return g.op("If", small, then_branch=graphs[0], else_branch=graphs[1])


def kth_mask(g: Writer, gates: str) -> str:
    """All probabilities that reach the K-th largest: with ties, more than K."""
    [softmax] = [n.output[0] for n in g.nodes if n.op_type == "Softmax"]
    [top] = [n.output[0] for n in g.nodes if n.op_type == "TopK"]
    k = g.case.top_k
    reached = g.op("GreaterOrEqual", softmax, g.slice(top, k - 1, k, -1))
    return g.op("Where", reached, softmax, g.number(0.0))


def filled(value: float) -> Callable[[Writer, str], str]:
    """The base of the scatter holds another number than 0."""
    return lambda g, zeros: g.op("Expand", g.number(value), g.shape(zeros))


def soft_by_fill(g: Writer, gates: str) -> str:
    """Softmax over logits that are -1e4 where not chosen: next to nothing, but not nothing."""
    [scatter] = [n for n in g.nodes if n.op_type == "ScatterElements"]
    low = g.op("Expand", g.number(-1e4), g.shape(gates))
    ids, weight = scatter.input[1:]
    return g.op("Softmax", g.op("ScatterElements", low, ids, g.op("Log", weight), axis=-1), axis=-1)


def inputs(built: Built) -> dict[str, np.ndarray]:
    """Feeds by name of the graph's extra inputs."""
    rng = np.random.default_rng(4)
    extra = {}
    given = {tensor.name for tensor in built.model.graph.initializer}
    for value in built.model.graph.input:
        if value.name != "x" and value.name not in given:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            extra[value.name] = (rng.standard_normal(shape) * 0.4).astype(np.float32)
    return extra

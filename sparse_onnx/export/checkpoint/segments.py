"""Runs a model larger than memory in ONNX Runtime, a few nodes at a time.

The nodes are cut into segments, each a model of its own. Weights are not part of these models but inputs of theirs,
read when a segment runs and forgotten behind it; values that later segments need are kept. The answers are those of the
whole model, since every node runs once, on the same values. What a float32 twin of half-precision weights widens is
widened for one segment only, and of packed experts for a few of those that tokens were sent to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx import blocks
from sparse_onnx.blocks import MoEBlock
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.extract import sources

#: Weights of one segment, in bytes as they are computed with; a single weight may be larger.
SEGMENT_BYTES = 64 << 20
#: Smaller constants stay in the graph: operators that need one while the session is created are given one.
_SMALL = 1 << 16
#: A model of more segments makes their sessions anew for each run: each has threads of its own.
_KEPT = 32


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Nodes in order, the values that they need from outside, their weights, and what others need of them."""

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    weights: list[ir.Value]
    outputs: list[ir.Value]


class Segmented:
    """The model as a function of its inputs, by name.

    Args:
        model: in neutral form; its external weights are read where they lie.
        threads: intra-op threads; None takes ORT's default.
    """

    def __init__(self, model: ir.Model, threads: int | None = None) -> None:
        self.model, self.threads = model, threads
        self._segments = list(_cut(model.graph))
        self._last = {value: at for at, segment in enumerate(self._segments) for value in segment.inputs}
        self._sessions: dict[object, object] = {}

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in order.

        Raises:
            ModelError: a weight file is gone, or ORT cannot load a part of the model.
            OutsideError: the runtime failed.
        """
        outputs = self.model.graph.outputs
        held = {
            value: feeds[value.name or ""] for value in self.model.graph.inputs if not value.is_initializer()
        }
        kept = set(outputs)
        for at, segment in enumerate(self._segments):
            results = self._run(at, segment, [held[value] for value in segment.inputs])
            held.update(zip(segment.outputs, results, strict=True))
            for value in segment.inputs:
                if self._last[value] == at and value not in kept:
                    del held[value]
        return [
            held[value] if value in held else read_array(_tensor(value))  # an output may be a constant
            for value in outputs
        ]

    def _run(self, at: int, segment: _Segment, given: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        block = MoEBlock.of(segment.nodes[0]) if len(segment.nodes) == 1 else None
        if block is not None and segment.weights:
            return [self._experts(block, dict(zip(segment.inputs, given, strict=True)))]
        session = self._sessions.get(at) or self._session(segment, given)
        if len(self._segments) <= _KEPT:
            self._sessions[at] = session
        feeds = {value.name or "": array for value, array in zip(segment.inputs, given, strict=True)}
        feeds |= {value.name or "": read_array(_tensor(value)) for value in segment.weights}
        return sessions.run(session, feeds)  # type: ignore[arg-type]

    def _session(self, segment: _Segment, given: Sequence[np.ndarray]) -> object:
        constants = [value for value in _constants(segment.nodes) if value not in set(segment.weights)]
        graph = ir.GraphView(
            [*segment.inputs, *segment.weights],
            segment.outputs,
            nodes=segment.nodes,
            initializers=constants,
            opset_imports=dict(self.model.opset_imports),
            name="segment",
        ).clone()
        for value, array in zip(graph.inputs, given, strict=False):
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        return sessions.create_session(
            ir.Model(graph, ir_version=self.model.ir_version, functions=list(self.model.functions.values())),
            threads=self.threads,
        )

    def _experts(self, block: MoEBlock, held: Mapping[ir.Value, np.ndarray]) -> np.ndarray:
        """One block, a few experts at a time: slots of others count as dropped, and what each few give adds up."""
        tokens, index, weight = (
            held[value] for value in (block.tokens, block.expert_index, block.expert_weight)
        )
        weights = {name: _tensor(value) for name, value in block.weights.items()}
        count = next(iter(weights.values())).shape.numpy()[0]
        hit = np.unique(index[index < count]) if index.size else np.zeros(0, index.dtype)
        size = sum(tensor.nbytes for tensor in weights.values()) // count
        step = max(1, SEGMENT_BYTES // max(1, size))
        total: np.ndarray | None = None
        for start in range(0, max(1, len(hit)), step):
            chosen = hit[start : start + step] if len(hit) else np.zeros(1, index.dtype)
            position = np.searchsorted(chosen, index).clip(max=len(chosen) - 1)
            own = np.where(chosen[position] == index, position, len(chosen)).astype(index.dtype)
            arrays = {name: _of_experts(tensor, chosen) for name, tensor in weights.items()}
            part = self._moe(block, [tokens, own, weight, *arrays.values()])
            total = part if total is None else total + part
        assert total is not None
        return total

    def _moe(self, block: MoEBlock, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The block's node alone, its weights from outside and of any number of experts."""
        names = ["tokens", "expert_index", "expert_weight", *block.weights]
        key = (block.spec, *(array.dtype for array in arrays))
        if key not in self._sessions:
            inputs = [
                ir.Value(
                    name=name,
                    type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                    shape=ir.Shape([None] * array.ndim),
                )
                for name, array in zip(names, arrays, strict=True)
            ]
            roles = dict(zip(names[3:], inputs[3:], strict=True))
            node = blocks.make_node(block.spec, inputs[0], inputs[1], inputs[2], roles, name="block")
            graph = ir.Graph(
                inputs, node.outputs, nodes=[node], opset_imports=dict(self.model.opset_imports), name="block"
            )
            model = ir.Model(
                graph, ir_version=self.model.ir_version, functions=list(self.model.functions.values())
            )
            self._sessions[key] = sessions.create_session(model, threads=self.threads)
        return sessions.run(self._sessions[key], dict(zip(names, arrays, strict=True)))[0]  # type: ignore[arg-type]


def _of_experts(tensor: ir.TensorProtocol, chosen: np.ndarray) -> np.ndarray:
    slices = [slice_first_axis(tensor, int(at), tensor.name or "") for at in chosen]
    if len(slices) == 1:
        return read_array(slices[0])[None]
    array = np.empty((len(slices), *tensor.shape.numpy()[1:]), tensor.dtype.numpy())
    for target, each in zip(array, slices, strict=True):
        target[...] = read_array(each)
    return array


def _cut(graph: ir.Graph) -> Iterator[_Segment]:
    last_use: dict[ir.Value, int] = {}
    groups: list[list[ir.Node]] = [[]]
    size = 0
    for node in graph:
        own = sum(_tensor(value).nbytes for value in _constants([node]) if _is_large(value))
        alone = blocks.is_neutral(node) and own > 0
        if groups[-1] and (alone or size + own > SEGMENT_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(node)
        size += own
        if alone:
            groups.append([])
            size = 0
    groups = [group for group in groups if group]
    for at, group in enumerate(groups):
        for value in _outside(group):
            last_use[value] = at
    wanted = set(graph.outputs)
    for at, group in enumerate(groups):
        made = [value for node in group for value in node.outputs]
        constants = set(_constants(group))
        yield _Segment(
            group,
            [value for value in _outside(group) if value not in constants],
            [value for value in constants if _is_large(value)],
            [value for value in made if last_use.get(value, -1) > at or value in wanted],
        )


def _outside(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """Values that the nodes use and do not make, each once, in order of use."""
    made = {value for node in nodes for value in node.outputs}
    return list(dict.fromkeys(value for node in nodes for value in sources(node) if value not in made))


def _constants(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for value in _outside(nodes) if value.is_initializer() and not value.is_graph_input()]


def _is_large(value: ir.Value) -> bool:
    return _tensor(value).nbytes > _SMALL


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value

"""Thresholded layers while the model runs: what they skip, and whether they compute what numpy does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.thresholded import is_thresholded
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array
from sparse_onnx.kernels.build import WEIGHTS_ENTRY
from sparse_onnx.matching.layers import layer
from sparse_onnx.matching.values import attribute
from sparse_onnx.optimize.watched_experts import experts_error, index_of
from sparse_onnx.optimize.watched_gated import gated_error, judged, layer_gap, stored_numbers
from sparse_onnx.sparsify.prefill import COPY_KEY, MOST_ROWS, thresholded_of
from sparse_onnx.sparsify.record import Acting, acting
from sparse_onnx.targets import session as sessions

#: A body with blocks of inputs becomes a MatMulNBits that rounds activations to 8 bits otherwise.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def unrounded(model: ir.Model) -> ir.Model:
    """The model with MatMulNBits at full accuracy; itself where it is so already."""
    rounding = [node for node in model.graph.all_nodes() if _rounds(node)]
    if not rounding:
        return model
    copy = model.clone()
    for node in copy.graph.all_nodes():
        if _rounds(node):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return copy


def _rounds(node: ir.Node) -> bool:
    return node.op_type == "MatMulNBits" and attribute(node, "accuracy_level", 0) not in (0, 1)


class Dialled:
    """A thresholded model in ORT, at any level.

    Args:
        model: in memory.
        level_input: the input that sets the level.
        threads: of the session; None: ORT's default.
        kernels: run the native kernels.
    """

    def __init__(
        self, model: ir.Model, level_input: str, threads: int | None = None, kernels: bool = False
    ) -> None:
        self.level_input = level_input
        self.session = sessions.create_session(
            model,
            threads=threads,
            entries={**EXACT, WEIGHTS_ENTRY: "shared"},  # what is compared may be as large as memory
            name="the thresholded model",
            kernels=kernels,
        )
        self.names = [value.name for value in self.session.get_outputs()]

    def __call__(self, feeds: dict[str, np.ndarray], level: int) -> list[np.ndarray]:
        return sessions.run(self.session, {**feeds, self.level_input: np.asarray(level, np.int64)})


@dataclasses.dataclass
class Seen:
    """Inputs that a site got, and those it skipped."""

    inputs: int = 0
    skipped: int = 0

    @property
    def share(self) -> float | None:
        return self.skipped / self.inputs if self.inputs else None


class Counted:
    """A thresholded model in ORT at one level that counts, as it runs, what its sites skip.

    Args:
        model: in memory.
        level_input: the input that sets the level.
        level: it.
        threads: of the session; None: ORT's default.
        kernels: run the native kernels.
    """

    def __init__(
        self,
        model: ir.Model,
        level_input: str,
        level: int,
        threads: int | None = None,
        kernels: bool = False,
    ) -> None:
        self.level = level
        self.seen = {item.site: Seen() for item in acting(model)}
        """By site. Those in the bodies of If, Loop and Scan cannot be watched."""
        watch = {
            (item.site, item.input, item.bound, item.centre): item for item in acting(model) if not item.inner
        }
        self._sites = [item.site for item in watch.values()]
        self._outputs = len(model.graph.outputs)
        copy = model.clone()
        values = values_of(copy)
        emit = Emitter(copy.graph, Namespace(copy), "sparse_onnx/skipping")
        for item in watch.values():
            skipped = _emit_skipped(emit, values, item)
            counts = [
                emit.op("ReduceSum", emit.op("Cast", skipped, to=ir.DataType.INT64), keepdims=0),
                emit.op("Size", values[item.input]),
            ]
            for value in counts:
                value.dtype, value.shape = ir.DataType.INT64, ir.Shape(())
            copy.graph.outputs.extend(counts)
        copy.graph.extend(emit.nodes)
        self._run = Dialled(copy, level_input, threads, kernels)

    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The model's own outputs."""
        results = self._run(feeds, self.level)
        for site, skipped, inputs in zip(
            self._sites, results[self._outputs :: 2], results[self._outputs + 1 :: 2], strict=True
        ):
            self.seen[site].skipped += int(skipped)
            self.seen[site].inputs += int(inputs)
        return results[: self._outputs]

    def dense(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The model's own outputs at level 0; nothing is counted."""
        return self._run(feeds, 0)[: self._outputs]


def measure_skipping(
    model: ir.Model,
    level_input: str,
    level: int,
    runs: Iterable[dict[str, np.ndarray]],
    threads: int | None = None,
) -> dict[str, Seen]:
    """What each site skips on the runs, by name. Sites in the bodies of If, Loop and Scan cannot be watched."""
    if all(item.inner for item in acting(model)):
        return {item.site: Seen() for item in acting(model)}
    run = Counted(model, level_input, level, threads)
    for feeds in runs:
        run(feeds)
    return run.seen


def _emit_skipped(emit: Emitter, values: dict[str, ir.Value], item: Acting) -> ir.Value:
    x = values[item.input]
    if not item.centre:  # of a gate
        return emit.op("LessOrEqual", emit.op("Abs", x), values[item.bound])
    centre = values[item.centre]
    assert centre.dtype is not None
    bound = values[item.bound] if item.bound else emit.scalar(0.0, centre.dtype)
    distance = emit.op("Abs", emit.op("Sub", x, centre))
    return emit.op("LessOrEqual", distance, bound)


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    found = dict(model.graph.initializers)
    found |= {value.name or "": value for value in model.graph.inputs}
    found |= {value.name or "": value for node in model.graph for value in node.outputs}
    return found


def check_layers(
    model: ir.Model,
    level_input: str,
    level: int,
    runs: Sequence[dict[str, np.ndarray]],
    *,
    kernels: bool,
    threads: int | None = None,
) -> tuple[int, float]:
    """Compares each thresholded layer of the main graph with numpy, on what it reads as the model runs.

    Returns:
        How many layers some row came to, and the largest error relative to the scale of its row.

    Raises:
        VerificationError: names the layer.
    """
    items = [item for item in acting(model) if not item.inner]
    copy = model.clone()
    values = values_of(copy)
    index = {item.layer: index_of(item, values) for item in items}
    read = (
        name for item in items for name in (item.input, item.bound, item.layer, item.rows, index[item.layer])
    )
    wanted = dict.fromkeys(name for name in read if name)
    wanted_values = [values[name] for name in wanted if not values[name].is_graph_output()]
    copy.graph.outputs.extend(value for value in wanted_values if not value.is_initializer())
    run = Dialled(copy, level_input, threads, kernels)
    reached: set[str] = set()
    worst = 0.0
    for feeds in runs:
        seen = dict(zip(run.names, run(feeds, level), strict=True))
        for item in items:
            x, y = _seen(item.input, seen, feeds, values), _seen(item.layer, seen, feeds, values)
            if x.size == 0:
                continue
            reached.add(item.layer)
            bound = seen[item.bound] if item.bound else np.zeros(1, x.dtype)
            if item.rows:
                rows = _seen(item.rows, seen, feeds, values)
                worst = max(worst, gated_error(item, values, x, rows, y, bound))
            elif index[item.layer]:
                experts = _seen(index[item.layer], seen, feeds, values)
                worst = max(worst, experts_error(item, values, x, experts, y, bound))
            else:
                worst = max(worst, _error(item, values, x, y, bound))
    return len(reached), worst


def _seen(
    name: str, seen: dict[str, np.ndarray], feeds: dict[str, np.ndarray], values: dict[str, ir.Value]
) -> np.ndarray:
    if name in seen:
        return seen[name]
    if name in feeds:
        return feeds[name]
    held = values[name].const_value
    assert held is not None
    return read_array(held)


def _error(
    item: Acting, values: dict[str, ir.Value], x: np.ndarray, y: np.ndarray, bound: np.ndarray
) -> float:
    weight, folded, centre = numbers_of(item, values)
    node = values[item.layer].producer()
    if node is not None and COPY_KEY in node.metadata_props and x.size > MOST_ROWS * weight.shape[0]:
        bound = np.full(1, -1, bound.dtype)  # as many rows skip nothing
    expected, gap = layer_gap(x, y, weight, bound, centre, folded)
    return judged(item, y, expected, gap)


def numbers_of(item: Acting, values: dict[str, ir.Value]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight ``[K, N]``, folded bias and centre of a layer, as the model holds them."""
    held = values[item.centre].const_value
    assert held is not None
    centre = read_array(held)
    node = values[item.layer].producer()
    assert node is not None
    if COPY_KEY in node.metadata_props:
        node = thresholded_of(node)
    if is_thresholded(node):
        tensors = [None if value is None else value.const_value for value in node.inputs[1:]]
        folded = read_array(tensors[-1])  # type: ignore[arg-type]
        if len(tensors) == 4:
            return read_array(tensors[0]), folded, centre  # type: ignore[arg-type]
        return (
            stored_numbers(tensors[:3], attribute(node, "axis"), attribute(node, "block_size")),
            folded,
            centre,
        )
    if item.weight:
        parts = [values[name].const_value for name in (item.weight, item.folded)]
        return read_array(parts[0]), read_array(parts[1]), centre  # type: ignore[arg-type]
    found = layer(node)
    assert found is not None
    weight = found.weight.numbers()
    base = np.zeros(found.weight.outputs)
    if found.bias is not None and found.bias.const_value is not None:
        base = read_array(found.bias.const_value).astype(np.float64).reshape(-1)
    spread = np.broadcast_to(centre.astype(np.float64).reshape(-1), (found.weight.inputs,))
    return weight, base + spread @ weight.astype(np.float64), centre

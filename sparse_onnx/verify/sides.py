"""A sparse block of one of two models, neutral or lowered, as something that runs alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, blocks, combine_blocks, reference
from sparse_onnx.blocks.lowered import LoweredBlock
from sparse_onnx.blocks.quantized import Quantized, Slices
from sparse_onnx.blocks.rounding import rounding, without_rounding
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.graph import io
from sparse_onnx.graph.save import save
from sparse_onnx.graph.scratch import scratch_folder
from sparse_onnx.graph.stacked import read_slices
from sparse_onnx.matching.values import size
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.extract import extract
from sparse_onnx.verify.feeds import Facts, Feeds
from sparse_onnx.verify.metadata import named_values, sound_blocks
from sparse_onnx.verify.skeleton import Boundary

#: Without prepacking ORT maps the weights and reads an expert's pages only when it runs.
_MAPPED = {"session.disable_prepacking": "1"}

#: Bytes of weights that are computed in memory rather than into a file.
_COMPUTED = 32 << 20

#: Along an axis of images whose size the graph leaves open.
_ANY_SIZE = 16

Run = Callable[[Feeds], np.ndarray]


class Blocks:
    """The sparse blocks of a model by name. `ambiguous` names one that two blocks share."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.values = named_values(model)
        neutral, lowered = blocks(model), sound_blocks(model, self.values)
        lowered += _called(model, self.values)
        self.neutral = {block.name: block for block in neutral}
        self.lowered = {block.name: block for block in lowered if block.name not in self.neutral}
        names = [*(block.name for block in neutral), *(block.name for block in combine_blocks(model))]
        self.ambiguous = next((name for name in names if names.count(name) > 1), None)

    @property
    def names(self) -> set[str]:
        return {*self.neutral, *self.lowered}

    def boundary(self, name: str) -> tuple[ir.Value, Boundary]:
        if name in self.neutral:
            block = self.neutral[name]
            return block.output, Boundary(name, (block.tokens, block.expert_index, block.expert_weight))
        low = self.lowered[name]
        inputs = (self.values[low.tokens], self.values[low.expert_index], self.values[low.expert_weight])
        return self.values[low.output], Boundary(name, inputs)

    def side(self, name: str, threads: int, provider: str, other: Blocks) -> Side:
        """The block, ready to run.

        Args:
            name: of the block.
            threads: of an ORT session.
            provider: of an ORT session.
            other: the other model, which may know types that this one does not.

        Raises:
            ValueError: the block does not stand alone, or its sizes are not known.
        """
        if name in self.neutral:
            return _neutral(self.neutral[name])
        known = other.neutral.get(name)
        lowered = self.lowered[name]
        if known is not None:
            dtype, weight_dtype = known.dtype, known.expert_weight.dtype or known.dtype
        else:
            dtype = self.values[lowered.tokens].dtype or ir.DataType.FLOAT
            weight_dtype = self.values[lowered.expert_weight].dtype or dtype
        return _lowered(self.model, lowered, self.values, dtype, weight_dtype, threads, provider)


@dataclasses.dataclass(frozen=True)
class Side:
    """`start` maps weights or makes a session, and gives what runs the block; both end with what it gave.

    Where kernels round `activations` (see `blocks.rounding`), `start` gives the block without that, as far as ORT has
    other kernels (`left` says how what is left rounds), and `start_deployed` gives it as it runs when deployed, with
    all of its weights packed in memory.
    """

    facts: Facts
    kind: tuple[object, ...]
    weight_bytes: int
    start: Callable[[], Run]
    left: str | None = None
    activations: str | None = None
    start_deployed: Callable[[], Run] | None = None


def _neutral(block: MoEBlock) -> Side:
    if not (block.experts and block.top_k and block.hidden):
        raise ValueError("its sizes are not known")
    stored = {role: Quantized.of(value) or _constant(value) for role, value in block.weights.items()}

    def start() -> Run:
        weights: dict[str, Any] = {
            role: Slices(weight) if isinstance(weight, Quantized) else read_slices(weight)
            for role, weight in stored.items()
        }

        def run(feeds: Feeds) -> np.ndarray:
            values = (feeds.tokens, feeds.index, feeds.weight)
            return reference(block.spec, *values, accumulate=np.float32, **weights)

        return run

    facts = Facts(
        block.experts,
        block.top_k,
        block.hidden,
        block.dtype,
        block.expert_weight.dtype or block.dtype,
        not never_dropped(block.expert_index, block.experts),
    )
    return Side(facts, (block.inner, block.spec), block.weight_bytes, start)


def _constant(value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError("its weights are not constants")
    return tensor


def _called(model: ir.Model, values: Mapping[str, ir.Value]) -> list[LoweredBlock]:
    """Neutral blocks whose experts are calls: they run in ORT as they are, every expert on every token."""
    found = [
        LoweredBlock.of(block, form="neutral") for block in combine_blocks(model) if block.tokens is not None
    ]
    return [
        block
        for block in found
        if {block.tokens, block.expert_index, block.expert_weight, block.output} <= values.keys()
    ]


def _row(block: LoweredBlock, tokens: ir.Value) -> tuple[int, ...]:
    """Sizes of one token, or image, of which those that nobody knows may be any; none where the rank is not known."""
    if tokens.shape is None or len(tokens.shape) < 3:
        return (block.hidden,) if block.hidden else ()
    return tuple(axis if isinstance(axis, int) else _ANY_SIZE for axis in list(tokens.shape)[1:])


def _lowered(
    model: ir.Model,
    block: LoweredBlock,
    values: Mapping[str, ir.Value],
    dtype: ir.DataType,
    weight_dtype: ir.DataType,
    threads: int,
    provider: str,
) -> Side:
    row = _row(block, values[block.tokens])
    if not (block.experts and block.top_k and row):
        raise ValueError("its sizes are not known")
    alone = extract(model, block, values, (dtype, ir.DataType.INT64, weight_dtype), row)
    names = (block.tokens, block.expert_index, block.expert_weight)
    activations, stored = rounding(alone.graph), _Stored(alone)
    weight_bytes = sum(weight.nbytes for weight in _weights(alone))
    # Bodies that are not lowered may fail on no rows at all; that is what their lowering must not do.
    width = size(values[block.output], -1) if block.form == "neutral" else None

    def start(rounded: bool) -> Run:
        # ORT's kernels that round activations work on packed weights alone; without prepacking it takes others.
        session = sessions.create_session(
            stored.rounded if rounded else stored.exact,
            threads=threads,
            provider=provider,
            entries=None if rounded else _MAPPED,
            name=f"block '{block.name}'",
        )

        def run(feeds: Feeds) -> np.ndarray:
            if width is not None and not len(feeds.tokens):
                return np.zeros((0, width), dtype.numpy())
            arrays = (feeds.tokens.reshape(-1, *row), feeds.index, feeds.weight)
            return sessions.run(session, dict(zip(names, arrays, strict=True)), block.name)[0]

        return run

    drops = not never_dropped(values[block.expert_index], block.experts)
    facts = Facts(block.experts, block.top_k, math.prod(row), dtype, weight_dtype, drops)
    kind = (block.inner, block.activation)
    exact, deployed = functools.partial(start, False), functools.partial(start, True)
    if activations is None:
        return Side(facts, kind, weight_bytes, exact)
    return Side(facts, kind, weight_bytes, exact, without_rounding(alone.clone()), activations, deployed)


def _weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (
            value.const_value for value in graph.initializers.values() if value.const_value is not None
        )


class _Stored:
    """A block as a model whose weights can be mapped: computed ones are in a temporary file (see TMPDIR)."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    @functools.cached_property
    def rounded(self) -> ir.Model:
        """As it runs when deployed."""
        computed = sum(each.nbytes for each in _weights(self._model) if isinstance(each, ir.LazyTensor))
        if computed <= _COMPUTED:
            return self._model
        self._folder = tempfile.TemporaryDirectory(prefix="sparse-onnx-", dir=scratch_folder())
        path = os.path.join(self._folder.name, "block.onnx")
        return io.load(save(self._model, path, weights="copy").path)

    @functools.cached_property
    def exact(self) -> ir.Model:
        """Without rounding."""
        model = self.rounded.clone()
        without_rounding(model)
        return model

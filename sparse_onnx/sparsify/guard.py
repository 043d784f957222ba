"""Prefill and the first positions kept dense, where the graph lets a run tell that it is one.

    dense = (new tokens of a sequence > 1)  or  (cached tokens of a sequence < N)
    level = Where(dense, 0, level)

SCAP (arXiv 2412.07174) leaves prefill dense, since its kernel multiplies by one row; TEAL (arXiv 2408.14690) notes that
the first tokens, on which attention leans, suffer most. In a batch the shortest sequence decides for all.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.sparsify.dial import DIAL_KEY, INPUT

_TOKENS = {"input_ids": 2, "inputs_embeds": 3}
_PAST = re.compile(r"past.*key|past_key", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """Inputs of a model that tell how many tokens are new and how many went before.

    Attributes:
        tokens: ``[B, S]`` or ``[B, S, D]``.
        positions: ``[B, S]``, or None.
        mask: ``[B, P + S]``, or None.
        past: ``[B, heads, P, size]``, or None.
    """

    tokens: ir.Value
    positions: ir.Value | None
    mask: ir.Value | None
    past: ir.Value | None

    @staticmethod
    def of(model: ir.Model) -> Clock:
        """
        Raises:
            ImpossibleError: the inputs do not tell.
        """
        given = [value for value in model.graph.inputs if not value.is_initializer()]
        named = {value.name or "": value for value in given if value.shape is not None}
        tokens = next(
            (named[name] for name, rank in _TOKENS.items() if name in named and _rank(named[name]) == rank),
            None,
        )
        past = next(
            (value for name, value in named.items() if _PAST.search(name) and _rank(value) == 4), None
        )
        if past is None:
            raise ImpossibleError(
                "nothing can stay dense: the model has no key/value cache, so every run sees whole sequences",
                "leave out --dense-first, or export with --past",
            )
        if tokens is None:
            raise ImpossibleError(
                "nothing can stay dense: no input 'input_ids' [batch, sequence] tells how many tokens are new",
                "leave out --dense-first",
            )
        positions = named.get("position_ids")
        mask = named.get("attention_mask")
        return Clock(
            tokens,
            positions if positions is not None and _rank(positions) == 2 else None,
            mask if mask is not None and _rank(mask) == 2 and _is_integer(mask) else None,
            past,
        )

    def emit_dense(self, emit: Emitter, first: int) -> ir.Value:
        """A boolean scalar."""
        count = emit.op("Squeeze", emit.op("Shape", self.tokens, start=1, end=2), emit.ints(0))
        dense = emit.op("Greater", count, _int(emit, 1))
        if first <= 0:
            return dense
        early = emit.op(
            "Cast", emit.op("Less", self._cached(emit, count), _int(emit, first)), to=ir.DataType.INT64
        )
        # A sum, not a minimum: of no sequences there is none.
        some = emit.op("Greater", emit.op("ReduceSum", early, keepdims=0), _int(emit, 0))
        return emit.op("Or", dense, some)

    def _cached(self, emit: Emitter, count: ir.Value) -> ir.Value:
        """Tokens in front of the new ones. Not the cache's own length where anything else tells: it may be a buffer."""
        if self.positions is not None:
            return emit.op("Cast", self.positions, to=ir.DataType.INT64)
        if self.mask is not None:
            wide = emit.op("Cast", self.mask, to=ir.DataType.INT64)
            return emit.op("Sub", emit.op("ReduceSum", wide, emit.ints(1), keepdims=0), count)
        return emit.op("Squeeze", emit.op("Shape", self.past, start=2, end=3), emit.ints(0))


def keep_dense(model: ir.Model, first: int) -> None:
    """Has runs of several tokens a sequence, and those with less than `first` tokens before them, skip nothing.

    Raises:
        ImpossibleError: the model's inputs do not tell, or it has no thresholds.
    """
    clock = Clock.of(model)
    node = next((node for node in model.graph if node.metadata_props.get(DIAL_KEY) == "level"), None)
    if node is None:
        raise ImpossibleError("the model has no thresholds that could stay dense", "leave out --dense-first")
    level = node.outputs[0]
    uses = list(level.uses())
    emit = Emitter(model.graph, Namespace(model), f"{INPUT}/dense")
    dense = clock.emit_dense(emit, first)
    guarded = emit.op("Where", dense, _int(emit, 0), level)
    guarded.dtype, guarded.shape = ir.DataType.INT64, ir.Shape(())
    for use in uses:
        use.node.replace_input_with(use.idx, guarded)
    model.graph.insert_after(node, emit.nodes)


def _int(emit: Emitter, value: int) -> ir.Value:
    return emit.constant(np.asarray(value, np.int64))


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _is_integer(value: ir.Value) -> bool:
    return value.dtype is not None and (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL)

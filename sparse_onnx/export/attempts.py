"""A trace of the module as it is; where that is refused, one with its Python control flow lifted."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import experts, past, planning, samples
from sparse_onnx.export import trace as tracing
from sparse_onnx.export.lifting.values import names_a_line
from sparse_onnx.export.sources import Source

Attempt = tuple[tracing.Traced, list[samples.Run], list[str]]


def trace(source: Source, found: Sequence[experts.Experts], opset: int) -> Attempt:
    """The trace, the runs that it is compared on, and notes.

    Raises:
        ImpossibleError: neither trace is right for all sizes and values, or there is none.
    """
    refused = made = None
    try:
        made = _attempt(source, found, opset, lift=False)
        if source.is_transformers or not made[0].of_values:
            return made
    except ImpossibleError as plain:
        if source.is_transformers and not _has_own_code(source):
            raise
        refused = plain
    # Numbers that depend on tensors were in the hands of Python code, which the plain trace does not watch.
    try:
        return _attempt(source, found, opset, lift=True)
    except ImpossibleError as error:
        if made is None or names_a_line(error):
            raise error from refused
        return made


def _has_own_code(source: Source) -> bool:
    """Whether it is a model whose code came with it, which nobody wrote to be exported; with a cache that code is
    traced as it is."""
    own = type(source.module).__module__.startswith("transformers_modules")
    return own and not isinstance(source, past.PastSource)


def _attempt(source: Source, found: Sequence[experts.Experts], opset: int, *, lift: bool) -> Attempt:
    if isinstance(source, past.PastSource):
        traced = past.trace_with_past(source, list(found), opset)
    else:
        traced = tracing.trace(source, list(found), opset, lift=lift)
    plan, notes = planning.plan(source, traced.assumptions, long=bool(traced.lifted))
    return traced, plan, [*traced.notes, *notes]

"""One call, five checks: what a rewrite matched, its numbers, a valid model, a fixed point, the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from sparse_onnx.core.passes import Outcome, Pass

Feeds = dict[str, np.ndarray]


def run_model(model: ir.Model, feeds: Feeds, threads: int = 1, level: int | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if level is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def check_rewrite(
    model: ir.Model,
    rewrite: Pass,
    *,
    rewritten: int,
    feeds: Sequence[Feeds] = (),
    refused: Sequence[str] = (),
    tolerance: float = 2e-6,
    threads: int = 1,
) -> tuple[ir.Model, Outcome]:
    """Applies `rewrite` to a copy of `model`.

    Args:
        model: before.
        rewrite: the pass.
        rewritten: how many matches it must rewrite.
        feeds: inputs on which before and after must agree, at ORT's highest and lowest optimization level.
        refused: one piece of text for each refusal, in order.
        tolerance: error relative to the largest output.
        threads: of the sessions.

    Returns:
        After, and the outcome.
    """
    after = copy.deepcopy(ir.to_proto(model))
    after = ir.from_proto(after)
    outcome = rewrite(after)
    assert isinstance(outcome, Outcome)
    assert outcome.rewritten == rewritten
    assert outcome.modified == (rewritten > 0)
    assert len(outcome.refusals) == len(refused), outcome.refusals
    for refusal, text in zip(outcome.refusals, refused, strict=True):
        assert text in refusal.reason
        assert refusal.by == rewrite.name

    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    for inputs in feeds:
        expected = run_model(model, inputs, threads)
        for level in (99, 0):
            actual = run_model(after, inputs, threads, level)
            for left, right in zip(expected, actual, strict=True):
                assert_close(left, right, tolerance)

    proto = ir.to_proto(after).SerializeToString(deterministic=True)
    again = rewrite(after)
    assert not again.modified and again.rewritten == 0
    assert ir.to_proto(after).SerializeToString(deterministic=True) == proto
    second = ir.from_proto(copy.deepcopy(ir.to_proto(model)))
    rewrite(second)
    assert ir.to_proto(second).SerializeToString(deterministic=True) == proto
    return after, outcome


def assert_close(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> None:
    assert expected.dtype == actual.dtype and expected.shape == actual.shape
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    # What cancels to next to nothing was computed from values of order 1, with their rounding.
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True)

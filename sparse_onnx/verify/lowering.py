"""Compares a lowered model with the neutral one that it came from, whole where memory allows, else block by block."""

from __future__ import annotations

import os
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.graph import stats
from sparse_onnx.verify.blocks import GROUP_BYTES, compare_blocks
from sparse_onnx.verify.inputs import cases
from sparse_onnx.verify.whole import compare_whole

#: Largest model that is run whole, twice at once and with prepacked copies of its weights: with that and `GROUP_BYTES`
#: `optimize` stays below 1 GB whatever the model's size.
WHOLE_BYTES = 128 << 20


def default_threads() -> int:
    """Several, since races between threads are part of what is looked for; not all of a large machine."""
    return min(4, max(2, os.cpu_count() or 1))


def verify_lowering(
    original: ir.Model,
    neutral: ir.Model,
    lowered: ir.Model,
    *,
    provider: str = "CPUExecutionProvider",
    progress: Callable[[str], None] | None = None,
) -> VerifyRecord:
    """Compares with the original itself where that fits, else block by block with its neutral form.

    All three lie in memory, their weights where they were.
    """
    threads = default_threads()
    if stats.weight_bytes(original) <= WHOLE_BYTES:
        # The inputs are the same, and the neutral form shows what functions hide of their meaning.
        return compare_whole(
            original,
            lowered,
            cases(neutral),
            threads=threads,
            provider=provider,
            progress=progress,
            neutral=neutral,
        )
    return compare_blocks(
        neutral, lowered, memory=GROUP_BYTES, threads=threads, provider=provider, progress=progress
    )

"""Compares a lowered model with the neutral one that it came from, whole where memory allows, else block by block.

Where kernels round activations, always block by block: behind the first such block every router sees other scores, and
its choices are no longer those of the original.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import onnx_ir as ir

from sparse_onnx.blocks import attach_functions, blocks
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.graph import stats
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.places import CPU
from sparse_onnx.verify.blocks import GROUP_BYTES, compare_blocks
from sparse_onnx.verify.inputs import Case, cases
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
    provider: str = CPU,
    tolerance: float | None = None,
    near_tie: float | None = None,
    progress: Callable[[str], None] | None = None,
    entries: dict[str, str] | None = None,
    whole: bool = False,
) -> tuple[VerifyRecord, str]:
    """Compares with the original itself where that fits and runs, else with its neutral form.

    All three lie in memory, their weights where they were. `entries` configure sessions of whole models; `whole` runs
    the models whole, whatever their size.

    Returns:
        The comparison, and what must be said of it: why the original was not part of it, or nothing.
    """
    threads = default_threads()
    rounds = any(block.activations for block in lowered_blocks(lowered))
    if not rounds and (whole or stats.weight_bytes(original) + _dequantized_bytes(original) <= WHOLE_BYTES):
        # The inputs are the same, and the neutral form shows what functions hide of their meaning.
        runs = cases(neutral)
        reason = ""
        try:
            record = compare_whole(
                original,
                lowered,
                runs,
                threads=threads,
                provider=provider,
                tolerance=tolerance,
                near_tie=near_tie,
                progress=progress,
                neutral=neutral,
                entries=entries,
            )
        except SparseOnnxError:
            reason = _why_not(original, runs)
            if not reason or neutral is original:
                raise
            runnable = neutral.clone()
            attach_functions(runnable)
            record = compare_whole(
                runnable,
                lowered,
                runs,
                threads=threads,
                provider=provider,
                tolerance=tolerance,
                near_tie=near_tie,
                progress=progress,
                entries=entries,
            )
        return (
            record,
            reason and f"the original does not run on {CPU}: {reason}; compared with the neutral form",
        )
    record = compare_blocks(
        neutral,
        lowered,
        memory=GROUP_BYTES,
        threads=threads,
        provider=provider,
        tolerance=tolerance,
        progress=progress,
    )
    return record, "kernels round activations to 8 bits: compared block by block" if rounds else ""


def _dequantized_bytes(model: ir.Model) -> int:
    """What the neutral blocks' quantized weights become when the model runs."""
    weights = (Quantized.of(value) for block in blocks(model) for value in block.weights.values())
    return sum(4 * math.prod(weight.shape) for weight in weights if weight is not None)


def _why_not(model: ir.Model, runs: Sequence[Case]) -> str:
    """Why the CPU provider cannot run the model at all; nothing where it can."""
    try:
        session = sessions.create_session(model, threads=default_threads())
        sessions.run(session, next(case for case in runs if not case.optional).feeds)
    except SparseOnnxError as error:
        return error.message
    return ""

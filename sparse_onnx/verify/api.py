"""`verify`: do two models on disk give the same answers?"""

from __future__ import annotations

import os
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.graph import io, stats
from sparse_onnx.graph.annotate import annotate
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.verify.blocks import GROUP_BYTES, compare_blocks
from sparse_onnx.verify.inputs import cases
from sparse_onnx.verify.lowering import default_threads
from sparse_onnx.verify.metadata import discard_unsound
from sparse_onnx.verify.sides import Blocks
from sparse_onnx.verify.whole import compare_whole

#: What a session may need beside its mapped weights: prepacked copies of them, and as much again for two sessions.
_COPIES = 4


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    target: str = "cpu",
    threads: int | None = None,
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compares B with A on inputs that put routing to the test, also at a realistic size on several threads, repeated.

    Models that fit into memory are run whole. Where they do not, and hold the same blocks, they are compared block by
    block; else not at all. `report.verify.passed` is the answer.

    Args:
        a: the original.
        b: what is judged.
        target: whose provider runs both.
        threads: intra-op threads; None takes two to four.
        tolerance: accepted error relative to the scale of its row; None takes the element type's (float32: 1e-4).
        progress: called with a line at each step.

    Raises:
        VerificationError: the two cannot be compared: other inputs or outputs.
        ModelError, ImpossibleError: one of them does not load.
    """
    profile = targets.get(target)
    first, second = io.load(a), io.load(b)
    names = (os.fspath(a), os.fspath(b))
    _require_same_interface(first, second, names)
    report = Report(
        "verify",
        target=profile.name,
        model=stats.record(first, names[0]),
        output=stats.record(second, names[1]),
    )
    for model in (first, second):
        annotate(model)
        discard_unsound(model)
    report.blocks = block_records(second)
    threads = threads or default_threads()
    needed, free = _needed(first, second), available_memory()
    names_alike = Blocks(first).names == Blocks(second).names
    rounds = any(block.activations for model in (first, second) for block in lowered_blocks(model))
    if rounds:
        how = "block by block" if names_alike else "whole all the same, since they share no blocks"
        report.notes.append(
            f"kernels round activations to 8 bits, which changes later routing: compared {how}"
        )
    if _fits(needed, free) and not (rounds and names_alike):
        report.verify = compare_whole(
            first,
            second,
            cases(first),
            threads=threads,
            provider=profile.provider,
            tolerance=tolerance,
            names=names,
            candidate_path=b,
            progress=progress,
            memory=GROUP_BYTES,
        )
    elif not names_alike or not Blocks(first).names:
        reason = (
            f"running both takes about {needed / 1e9:.1f} GB of memory, and {(free or 0) / 1e9:.1f} GB are free; "
            f"they hold no common blocks to be compared one by one"
        )
        report.verify = VerifyRecord("none", None, failure=reason)
        report.notes.append(f"not compared: {reason}")
    else:
        report.verify = compare_blocks(
            first,
            second,
            memory=GROUP_BYTES,
            threads=threads,
            provider=profile.provider,
            tolerance=tolerance,
            progress=progress,
        )
    return report


def _needed(first: ir.Model, second: ir.Model) -> int:
    return _COPIES * max(stats.weight_bytes(first), stats.weight_bytes(second))


def _fits(needed: int, free: int | None) -> bool:
    return free is None or needed < free


def available_memory() -> int | None:
    """Bytes that programs may still take, caches that would be given up included; None where nobody knows."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return None


def _require_same_interface(first: ir.Model, second: ir.Model, names: tuple[str, str]) -> None:
    for model, name in zip((first, second), names, strict=True):
        for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
            for value in values:
                if value.type is not None and not isinstance(value.type, ir.TensorType):
                    raise VerificationError(
                        f"{kind} '{value.name}' of '{name}' is no tensor but {value.type}",
                        "only models whose inputs and outputs are dense tensors can be compared",
                    )
    ours, theirs = _inputs(first), _inputs(second)
    if len(ours) != len(theirs):
        raise VerificationError(
            f"'{names[1]}' has {len(theirs)} inputs, '{names[0]}' has {len(ours)}",
            "these are not the same model",
        )
    by_name = {value.name: value for value in theirs}
    if set(by_name) == {value.name for value in ours}:
        theirs = [by_name[value.name] for value in ours]
    for left, right in zip(ours, theirs, strict=True):
        if left.dtype != right.dtype:
            raise VerificationError(
                f"input '{right.name}' of '{names[1]}' is {right.dtype}, not {left.dtype}",
                "these are not the same model",
            )
    if len(first.graph.outputs) != len(second.graph.outputs):
        raise VerificationError(
            f"'{names[1]}' has {len(second.graph.outputs)} outputs, '{names[0]}' has {len(first.graph.outputs)}",
            "these are not the same model",
        )


def _inputs(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]

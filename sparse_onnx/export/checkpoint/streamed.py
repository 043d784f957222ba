"""The export of a model whose weights stay in their checkpoint until they are written, one after the other.

What is compared is what an ordinary export compares - the graph in ONNX Runtime against the module in torch, with the
model's own weights, on inputs that were not traced - but neither side ever holds the weights: torch reads each where
the module uses it, ONNX Runtime runs a few nodes at a time. Besides, each weight's bytes in the file are compared with
the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from torch import nn

from sparse_onnx.core.errors import UsageError, VerificationError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.export import (
    block_check,
    check,
    experts,
    past,
    pipeline,
    planning,
    recognised,
    samples,
    trace,
    twin,
)
from sparse_onnx.export.checkpoint.expression import Leaf, simplified
from sparse_onnx.export.checkpoint.placeholders import Attached, attach, placed, with_weights
from sparse_onnx.export.checkpoint.segments import Segmented
from sparse_onnx.export.checkpoint.stored import Stored
from sparse_onnx.export.checkpoint.tensors import same_bytes
from sparse_onnx.export.sources import Source
from sparse_onnx.graph import files, io, stats
from sparse_onnx.graph.external import moved
from sparse_onnx.graph.save import SavedFiles
from sparse_onnx.graph.slots import tensor_slots
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.verify.compare import TOLERANCES

#: Up to this size all inputs are compared. Each one reads the weights of a larger model once more on both sides, from
#: the disk.
_ALL_RUNS_BYTES = 2 << 30
_FEW = 3
#: Tokens that an experts module is called with: its plain form takes the experts one after the other.
_ROWS = 256


def run(
    source: Source,
    out: Path,
    folder: Path,
    *,
    opset: int,
    link: bool,
    say: Callable[[str], None],
) -> Report:
    """Traces, checks, and puts the result at `out`.

    Args:
        source: its module's weights are `stored.Stored`.
        out: the graph file.
        folder: scratch space on the same file system.
        opset: of the result.
        link: leave what can be linked in the checkpoint.
        say: called with a line a step.

    Raises:
        UsageError: `link`, and the checkpoint lies elsewhere.
        ImpossibleError, VerificationError: as `sparse_onnx.export` says; nothing is at `out` then.
    """
    if link:
        _check_place(source.module, out)
    say("finding experts")
    # Each expert is compared once, from the file; trying all here would read all weights for it.
    found = experts.find(source.module, groups=1)
    notes = [*source.notes, *pipeline.about(found)]
    say("tracing")
    with placed(source.module) as table:
        if isinstance(source, past.PastSource):
            traced = past.trace_with_past(source, found, opset)
        else:
            traced = trace.trace(source, found, opset)
    attached = attach(traced.model, table)
    if isinstance(traced.program, nn.Module):
        with_weights(traced.program, table)
    plan, plan_notes = planning.plan(source, traced.assumptions, long=bool(traced.lifted))
    half = pipeline.half_type(source)
    narrow = traced.model
    wide = narrow.clone() if half else None
    say("writing")
    pipeline.neutral(narrow, traced.symbols, found)
    staged, saved = _stage(narrow, out, folder, link)
    try:
        pipeline.check_valid(staged)
        written = _weights(narrow, io.load(staged), attached)
        say("comparing each weight")
        _compare_weights(written)
        say("comparing each expert")
        block_check.compare_blocks(staged, found, _ROWS)
        size = sum(each.expression.nbytes for each, _ in written)
        runs = plan if size <= _ALL_RUNS_BYTES else _few(plan)
        record, more = _compare(source, found, traced, staged, wide, written, runs, half, say)
        pipeline.must_agree(record, source)
        say(f"saving {out.name}")
        _publish(staged, saved.data_path, out)
    finally:
        for path in (staged, saved.data_path):
            if path is not None:
                path.unlink(missing_ok=True)
    if isinstance(source, past.PastSource):
        more.append("greedy tokens were not compared with generate: each would read all weights once more")
        more.append(past.write_config(source, out))
    if not found:
        more += recognised.notes(out)
    model = io.load(out)
    return Report(
        "export",
        model=stats.record(model, out),
        blocks=block_records(model),
        verify=record,
        notes=[*notes, *plan_notes, *more],
    )


def _check_place(module: nn.Module, out: Path) -> None:
    folder = os.path.realpath(out.parent)
    for weight in module.parameters():
        found = simplified(weight.expression) if isinstance(weight, Stored) else None
        if isinstance(found, Leaf) and os.path.commonpath([folder, found.entry.path]) != folder:
            raise UsageError(
                "weights can be linked only where they lie in or below the output's folder",
                "write into the checkpoint's folder, or --weights copy",
                where=str(out),
            )


def _stage(model: ir.Model, out: Path, folder: Path, link: bool) -> tuple[Path, SavedFiles]:
    """The graph on disk, not yet under its name. A linked one must lie beside its data, as it will at the end."""
    staged = folder / out.name
    if link:
        staged, file = files.create_fresh(out.parent, (f".{out.stem}.{n}.onnx" for n in range(1000)))
        file.close()
    try:
        return staged, io.save(model, staged, weights="auto" if link else "copy")
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _weights(
    model: ir.Model, written: ir.Model, attached: Mapping[int, Attached]
) -> list[tuple[Attached, ir.TensorProtocol]]:
    """Each weight, and what became of it in the file.

    Raises:
        VerificationError: there are others, of which nobody knows what they should be.
    """
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, (ir.ExternalTensor, ir.LazyTensor)) and id(slot.tensor) not in attached:
            raise VerificationError(
                f"weight '{slot.name}' is none of the checkpoint's", "nothing was written; please report this"
            )
    return [
        (attached[id(slot.tensor)], tensor)
        for slot in tensor_slots(model)
        if id(slot.tensor) in attached
        and (tensor := written.graph.initializers[slot.name].const_value) is not None
    ]


def _compare_weights(written: Sequence[tuple[Attached, ir.TensorProtocol]]) -> None:
    for each, tensor in written:
        if not same_bytes(each.expression, tensor):
            raise VerificationError(
                f"weight '{tensor.name}' has other bytes in the file than in the checkpoint",
                "nothing was written; please report this",
            )


def _few(plan: Sequence[samples.Run]) -> list[samples.Run]:
    """The smallest of each kind: several sequences, one token, padding."""
    kinds: dict[str, samples.Run] = {}
    for each in sorted(plan, key=lambda run: math.prod(run.sizes.values())):
        several = min(each.sizes.values(), default=1) > 1
        kind = "padded" if each.name.endswith("padded") else "several" if several else "one"
        kinds.setdefault(kind, each)
    return list(kinds.values())[:_FEW]


def _compare(
    source: Source,
    found: list[experts.Experts],
    traced: trace.Traced,
    staged: Path,
    wide: ir.Model | None,
    written: Sequence[tuple[Attached, ir.TensorProtocol]],
    runs: list[samples.Run],
    half: str | None,
    say: Callable[[str], None],
) -> tuple[VerifyRecord, list[str]]:
    notes = ["compared whole, a few nodes at a time; each weight's bytes are the checkpoint's"]
    if half is None or wide is None:
        record = check.compare(
            staged,
            source,
            found,
            runs,
            tolerance=TOLERANCES["float32"],
            program=traced.program,
            progress=say,
            engine=Segmented,
        )
        return record, notes
    twin.widen(wide)
    pipeline.neutral(wide, traced.symbols, found)
    of_file = {id(each.tensor): tensor for each, tensor in written}
    for slot in tensor_slots(wide):
        if isinstance(slot.tensor, twin.Widened) and id(slot.tensor.source) in of_file:
            slot.replace(twin.Widened(of_file[id(slot.tensor.source)]))
    widened = source.widened()
    wide_found = [
        dataclasses.replace(entry, module=widened.module.get_submodule(entry.path)) for entry in found
    ]
    wide_runs = [
        dataclasses.replace(
            each,
            inputs={
                name: value.float() if value.is_floating_point() else value
                for name, value in each.inputs.items()
            },
        )
        for each in runs
    ]
    record = check.compare(
        wide,
        widened,
        wide_found,
        wide_runs,
        tolerance=TOLERANCES[half] / 10,
        progress=say,
        engine=Segmented,
    )
    notes.append(
        f"verified on a float32 twin: the same graph and weights, widened from {half}; "
        f"the {half} file itself was not run"
    )
    return record, notes


def _publish(staged: Path, data: Path | None, out: Path) -> None:
    """Renames the verified data file into place, then the graph."""
    model = io.load(staged)
    fresh: Path | None = None
    try:
        if data is not None:
            fresh, file = files.create_fresh(out.parent, files.data_names(out))
            file.close()
            for slot in tensor_slots(model):
                tensor = slot.tensor
                if isinstance(tensor, ir.ExternalTensor) and os.path.realpath(
                    tensor.path
                ) == os.path.realpath(data):
                    slot.replace(moved(tensor, fresh.name, tensor.offset or 0, str(out.parent.resolve())))
            os.replace(data, fresh)
        io.save(model, out, weights="link")
    except BaseException:
        if fresh is not None:
            fresh.unlink(missing_ok=True)
        raise

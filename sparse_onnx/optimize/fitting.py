"""Which form of each block a target runs whole: tried on the target where it can be run here, else by its profile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import FitRecord
from sparse_onnx.graph import io
from sparse_onnx.graph.infer import infer
from sparse_onnx.optimize.candidates import Kind, NotBuilt, alone_in, kinds
from sparse_onnx.optimize.runner import Planned
from sparse_onnx.optimize.tune import draw_feeds
from sparse_onnx.targets import TargetProfile, places
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.operators import unsupported
from sparse_onnx.targets.profile import FormResult
from sparse_onnx.targets.trial import attempt

#: Tokens of the runs of a block, where the graph leaves them open; and of a target that wants them fixed.
_TOKENS, _FIXED = (1, 7), 8


def needed(profile: TargetProfile) -> bool:
    """Whether forms differ in what the target runs of them: not where the CPU's kernels are all there is."""
    return profile.provider != places.CPU


def fit(
    model: ir.Model,
    profile: TargetProfile,
    planned: Sequence[Planned],
    *,
    tokens: int | None = None,
    folder: Path,
    progress: Callable[[str], None] | None = None,
) -> list[FitRecord]:
    """The first of the target's forms that it runs whole, for each kind of block; else the one of which it runs most.

    Args:
        model: in neutral form; unchanged.
        profile: of the target.
        planned: the pipeline with the user's options.
        tokens: of one run, where the shapes are to be static.
        folder: where files may go for a while: the weights of one block.
        progress: called with a line at each step.
    """
    where = places.place(profile)
    if tokens is None and profile.static:
        tokens = _FIXED
    return [
        _fit_kind(model, kind, profile, planned, where, tokens, folder, progress) for kind in kinds(model)
    ]


def _fit_kind(
    model: ir.Model,
    kind: Kind,
    profile: TargetProfile,
    planned: Sequence[Planned],
    where: str | None,
    tokens: int | None,
    folder: Path,
    progress: Callable[[str], None] | None,
) -> FitRecord:
    tried: list[tuple[Form, FormResult]] = []
    left_out: list[str] = []
    for text in profile.forms:
        form = Form.parse(text)
        if progress is not None:
            progress(f"trying {form} for {kind.names[0]}")
        try:
            alone, inputs, row = alone_in(model, kind.names[0], form, planned)
        except NotBuilt as error:
            left_out.append(f"{form}: {error}")
            continue
        if where is None:
            result = by_profile(alone, profile, tokens)
        else:
            result = _by_running(alone, inputs, row, kind, profile, where, tokens, folder)
        tried.append((form, result))
        if result.right and result.whole:
            break
        left_out.append(f"{form}: {_why(result)}")
    usable = [each for each in tried if each[1].right]
    whole = [each for each in usable if each[1].whole]
    chosen = whole[0] if whole else min(usable, key=lambda each: len(each[1].left), default=None)
    return FitRecord(
        block=kind.names[0],
        blocks=len(kind.names),
        names=list(kind.names),
        form=None if chosen is None else str(chosen[0]),
        by="profile" if where is None else places.described(where),
        whole=bool(whole),
        left=[] if chosen is None or whole else list(chosen[1].left),
        rejected=[text for text in left_out if chosen is None or not text.startswith(f"{chosen[0]}: ")],
    )


def _why(result: FormResult) -> str:
    if not result.runs:
        return f"does not run: {result.note}"
    return f"wrong: {result.note}" if not result.right else f"not on the provider: {', '.join(result.left)}"


def by_profile(alone: ir.Model, profile: TargetProfile, tokens: int | None) -> FormResult:
    """A block alone, judged by the operators of the profile. With a fixed number of tokens its shapes are constants."""
    infer(alone)
    nodes = (
        node for node in alone.graph.all_nodes() if tokens is None or node.op_type not in ("Shape", "Size")
    )
    left = sorted({node.op_type for node, _ in unsupported(nodes, profile)})
    return FormResult(True, True, not left, tuple(left), source="profile")


def _by_running(
    alone: ir.Model,
    inputs: tuple[str, str, str],
    row: tuple[int, ...],
    kind: Kind,
    profile: TargetProfile,
    where: str,
    tokens: int | None,
    folder: Path,
) -> FormResult:
    if tokens is not None:
        for value in (*alone.graph.inputs, *alone.graph.outputs):
            if value.shape is not None and len(value.shape):
                value.shape = ir.Shape([tokens, *list(value.shape)[1:]])
    feeds = [dict(zip(inputs, each, strict=True)) for each in _feeds(kind, row, tokens)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fitting-") as name:
        path = Path(name) / "block.onnx"
        io.save(alone, path, weights="copy")
        try:
            reference = sessions.create_session(path, threads=2)
            expected = [sessions.run(reference, each)[0] for each in feeds]
        except SparseOnnxError as error:
            return FormResult(False, False, False, note=error.message)
        return attempt(path, feeds, expected, profile, where)[0]


def _feeds(kind: Kind, row: tuple[int, ...], tokens: int | None) -> Iterator[tuple[np.ndarray, ...]]:
    for seed, count in enumerate(_TOKENS if tokens is None else (tokens, tokens)):
        yield draw_feeds(kind, count, row, seed)


def chosen(records: Sequence[FitRecord]) -> dict[str, Form]:
    """The form by block name."""
    return {name: Form.parse(record.form) for record in records if record.form for name in record.names}


def described(records: Sequence[FitRecord], profile: TargetProfile) -> list[str]:
    """What must be said of it: a line a kind of block."""
    return [_line(record, profile) for record in records]


def _line(record: FitRecord, profile: TargetProfile) -> str:
    name = f"{record.block} x {record.blocks}" if record.blocks > 1 else record.block
    how = "by its profile, not run here" if record.by == "profile" else f"run on {record.by}"
    if record.form is None:
        return f"{name}: no form runs on {profile.provider} ({how}): {'; '.join(record.rejected)}"
    if record.whole:
        return f"{name}: {record.form}, whole on {profile.provider} ({how})"
    return f"{name}: {record.form}, on the CPU of it: {', '.join(record.left)} ({how})"

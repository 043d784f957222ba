"""One cell of the table: a model exported, its file run in ONNX Runtime on untraced inputs, compared with torch."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_onnx.bench.coverage import cached, cached_exporters, exporters
from sparse_onnx.bench.coverage.cases import Case, Made
from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError

if TYPE_CHECKING:
    from sparse_onnx.export.samples import Run
    from sparse_onnx.export.sources import Source

BLOCK, FALLBACK, REFUSED, FAILED, WRONG = "block", "fallback", "refused", "failed", "wrong"
#: There is nothing to export: a model without key/value cache, where that is asked for.
INAPPLICABLE = "inapplicable"
#: Right where each operator is computed in float32 and rounded; the runtime has no kernel for the type itself.
NO_KERNEL = "no kernel"
OUTCOMES = (BLOCK, FALLBACK, NO_KERNEL, REFUSED, FAILED, WRONG, INAPPLICABLE)
#: Largest error that counts as exact, relative to the largest magnitude of a row. A model whose own answers in
#: float32 are further than that from its answers in float64 may be as far off, up to a limit.
EXACT, _ROUNDING, _MOST = 1e-5, 4.0, 1e-4
#: Sizes of the first two dynamic axes, and how the input is drawn; none was traced, nor is compared by our exporter.
_TWO_AXES = (
    (1, 1, "random"),
    (2, 8, "random"),
    (1, 33, "random"),
    (4, 5, "random"),
    (3, 1, "one"),
    (2, 12, "one"),
    (3, 9, "padded"),
)
_ONE_AXIS = (*((size, "random") for size in (1, 4, 8, 13, 33)), (3, "one"), (10, "one"))
_SEED = 1000
#: Inputs that are tried where torch's own answer is undecided.
_DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """`error` is the largest relative one over all inputs; `layers` counts sparse layers of the model. Of a model of 16
    bits `error` and `rounding` are what `half` says."""

    outcome: str
    reason: str = ""
    error: float | None = None
    rounding: float | None = None
    blocks: int = 0
    layers: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(case: Case, exporter: str) -> Cell:
    """Exports and compares; never raises for what the exporter or the runtime does."""
    with tempfile.TemporaryDirectory(prefix="coverage.") as folder:
        started = time.monotonic()
        made = case.make(Path(folder))
        if made.cached and (reason := cached.inapplicable(exporters.load_plain(made))):
            return Cell(INAPPLICABLE, reason, seconds=time.monotonic() - started)
        try:
            exported = exporters.EXPORTERS[exporter](made, Path(folder) / "model.onnx")
        except ImpossibleError as error:
            return Cell(REFUSED, error.message, seconds=time.monotonic() - started)
        except Exception as error:  # whatever an exporter raises is its answer
            return Cell(FAILED, one_line(error), seconds=time.monotonic() - started)
        seconds = time.monotonic() - started
        return dataclasses.replace(_judged(made, exported), seconds=round(seconds, 1))


def _judged(made: Made, exported: exporters.Exported) -> Cell:
    from sparse_onnx.targets import session as sessions

    source = exporters.load(made)
    cell = Cell(FALLBACK, blocks=exported.blocks, layers=sparse_layers(source))
    if made.half:
        from sparse_onnx.bench.coverage import half  # which uses this module

        return _blocks_told(half.judged(cell, source, exported, made.half), exported)
    worst = rounding = 0.0
    for part, path in _files(source, exported):
        try:
            session = sessions.create_session(path)
        except SparseOnnxError as error:
            reason = f"the file does not load: {error.message}"
            return dataclasses.replace(cell, outcome=FAILED, reason=reason)
        for run in untraced(part):
            if exported.feed is not None and not run.sizes.get("past_sequence", 1):
                continue  # the first step is another file of theirs
            try:
                distance, own, reason = _judged_run(part, session, run, exported.feed)
            except Exception as failure:
                reason = f"at {run.name}: {one_line(failure)}"
                return dataclasses.replace(cell, outcome=FAILED, reason=reason)
            rounding = max(rounding, own)
            if not distance <= max(EXACT, min(_ROUNDING * rounding, _MOST)):
                return dataclasses.replace(
                    cell, outcome=WRONG, reason=f"at {run.name}: {reason}", error=finite(distance)
                )
            worst = max(worst, distance)
    return _blocks_told(dataclasses.replace(cell, error=worst, rounding=rounding or None), exported)


def _blocks_told(cell: Cell, exported: exporters.Exported) -> Cell:
    """A right answer's cell, which says whether the blocks are whole."""
    if cell.outcome != FALLBACK or (exported.blocks > 0 and exported.blocks >= cell.layers):
        return dataclasses.replace(cell, outcome=BLOCK) if cell.outcome == FALLBACK else cell
    return dataclasses.replace(cell, reason="; ".join(_about_blocks(exported)))


def _files(source: Source, exported: exporters.Exported) -> list[tuple[Source, Path]]:
    """Each exported file with the model that it is to answer like: an encoder with cache has one of its own."""
    from sparse_onnx.export import past

    path = exported.path
    if isinstance(source, past.CrossSource) and source.encoder is not None and exported.feed is None:
        return [(source.encoder, path.with_name(past.ENCODER)), (source, path)]
    return [(source, path)]


def _about_blocks(exported: exporters.Exported) -> list[str]:
    """Each reason once: a model has the same for all its layers."""
    notes = [note for note in exported.notes if "operator by operator" in note or "no experts module" in note]
    return list(dict.fromkeys(note.partition(": ")[2] or note for note in notes))


def untraced(source: Source) -> list[Run]:
    """Seven inputs."""
    from sparse_onnx.export import past, samples

    if isinstance(source, past.PastSource):
        return cached.untraced(source)
    interface = source.interface
    symbols = interface.symbols
    if not symbols:
        plan: list[tuple[tuple[int, ...], Any]] = [((), kind) for kind in ("random",) * 6 + ("one",)]
    elif len(symbols) == 1:
        plan = [((size,), kind) for size, kind in _ONE_AXIS]
    else:
        plan = [
            ((first, second, *(second // 2 + 1 + extra for extra in range(len(symbols) - 2))), kind)
            for first, second, kind in _TWO_AXES
        ]
    return [
        samples.drawn(interface, dict(zip(symbols, sizes, strict=True)), kind, _SEED + seed)
        for seed, (sizes, kind) in enumerate(plan)
    ]


def _judged_run(
    source: Source, session: Any, run: Run, feed: cached_exporters.Feed | None
) -> tuple[float, float, str]:
    """The largest relative error, torch's own rounding where that matters, and a line on the error. An input at which
    rounding alone moves torch's answer by more than what is accepted gives way to others of its sizes."""
    from sparse_onnx.export import samples

    for seed in range(_DRAWS):
        distance, reason = _compared(source, session, run, feed)
        if distance <= EXACT:
            return distance, 0.0, reason
        own, moved = _own_rounding(source, run)
        if moved <= _MOST or not run.sizes:
            return distance, own, reason
        run = samples.drawn(source.interface, run.sizes, "random", 2 * _SEED + seed)
    return distance, own, reason


def _compared(
    source: Source, session: Any, run: Run, feed: cached_exporters.Feed | None = None
) -> tuple[float, str]:
    """The largest relative error of the outputs, where no padding is, and a line on it."""
    from sparse_onnx.export import ties
    from sparse_onnx.export.sources import leaves
    from sparse_onnx.targets import session as sessions

    taken = [value.name for value in session.get_inputs()]
    if feed is not None:  # the other outputs have an order of their own, too
        actual = sessions.run(session, feed(taken, run.inputs))[:1]
    else:
        actual = sessions.run(
            session, {name: value.numpy() for name, value in run.inputs.items() if name in taken}
        )
    found = _error(leaves(source.forward(run.inputs)), actual, run)
    if not found[0] <= EXACT:
        with ties.first_of_equal() as equal:
            others = leaves(source.forward(run.inputs))
        if equal.met:  # torch's own answer is one of several, and ONNX says which
            first = _error(others, actual, run)
            found = found if found[0] <= first[0] else first
    return found


def _error(outputs: Sequence[Any], actual: Sequence[np.ndarray], run: Run) -> tuple[float, str]:
    from sparse_onnx.verify.compare import difference

    expected, worst, reason = [np.asarray(value) for value in outputs], 0.0, ""
    if len(actual) != len(expected):  # other exporters may add outputs, behind the main one
        expected, actual = expected[:1], actual[:1]
    for output, (left, right) in enumerate(zip(expected, actual, strict=True)):
        keep = run.kept(output, left.shape)
        left, right = run.rows(output, left), run.rows(output, right)
        found = difference(left, right, EXACT, None if keep.all() else keep)
        if not found.max_rel <= worst:
            worst, reason = found.max_rel, found.reason
    return worst, reason


def _own_rounding(source: Source, run: Run) -> tuple[float, float]:
    """How far torch's answer in float32 is from its answer in float64; and how far it moves at most with rounding, be
    it of its weights, which is both where it does not run in float64."""
    from sparse_onnx.export import rounding
    from sparse_onnx.export.sources import leaves

    own = [np.asarray(value) for value in leaves(source.forward(run.inputs))]
    double = rounding.in_double(source, run)
    moved = max((_error(others, own, run)[0] for others in rounding.answers(source, run)), default=0.0)
    return moved if double is None else _error(double, own, run)[0], moved


def sparse_layers(source: Source) -> int:
    """Modules with the weights of several experts that take part: by their class's name, as transformers names them.
    Those of a model's vision half have no part in text, and shared experts are dense."""
    from sparse_onnx.export import past

    if isinstance(source, past.PastSource) and source.plain is not None:
        source = source.plain
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path, module in source.module.named_modules()
        if re.search("(?<!Shared)Experts$|SparseMLP$", type(module).__name__)
    ]
    try:
        source.forward(untraced(source)[1].inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(not any(path.startswith(f"{other}.") for other in ran) for path in ran)


def one_line(error: BaseException) -> str:
    from sparse_onnx.export.failure import root_line

    return error.message if isinstance(error, SparseOnnxError) else root_line(error)


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

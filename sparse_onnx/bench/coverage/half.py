"""A file in float16 or bfloat16 against torch.

Three runs of each input of the table are compared with torch's answer with its weights widened to float32. The file's
graph widened, every weight and constant of 16 bits as float32, is to answer like it at any token: there a wrong
expert or size shows. Where it does not for several inputs of a size, it is off at no more tokens than torch itself
with weights moved by half a unit in the type's last place. The graph with each operator in float32 and its result
rounded, and the file as it is in ONNX Runtime, are to be as near to it as torch's own 16 bits are, in the median
token: single tokens are further off on all sides, where rounding decides between experts. ONNX Runtime's CPU provider
leaves roundings out where it can, so that its run alone would not show that a value overflows; and it does not run
every operator.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from sparse_onnx.bench.coverage import exporters, measure, scoring
from sparse_onnx.bench.coverage.measure import FAILED, NO_KERNEL, WRONG, Cell
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.export import rounding, samples, sixteen, ties, twin
from sparse_onnx.export.samples import Run
from sparse_onnx.export.sources import Source, leaves
from sparse_onnx.graph import io
from sparse_onnx.targets import session as sessions

#: Unit in the last place of 1.
_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
#: How many units the widened graph may be off, whose constants are rounded; and how many times torch's own error the
#: file, in the median token of an input.
_MULTIPLE = 2.0
#: Inputs of a size that are tried where an answer differs: rounding decides between experts at a near tie.
_DRAWS, _SEED = 3, 3000
#: How often torch's weights are moved where the widened graph is off.
_MOVES = 4


@dataclasses.dataclass(frozen=True)
class _Errors:
    """At one input: the largest of the widened graph; of the median token those of the file and of torch."""

    widened: float
    file: float
    torch: float
    reason: str = ""


def judged(cell: Cell, source: Source, exported: exporters.Exported, kind: str) -> Cell:
    """The cell with what the comparison says. `error` is the largest at any input, in its median token, and
    `rounding` torch's."""
    runs = measure.untraced(source)
    types = scoring.differing(scoring.in_torch(source, runs[1]), scoring.in_file(io.load(exported.path)))
    if types:
        return dataclasses.replace(cell, outcome=WRONG, reason=types)
    try:
        judge = _Judge(source, exported.path, kind)
    except (SparseOnnxError, ValueError) as error:
        reason = f"the file does not load: {measure.one_line(error)}"
        return dataclasses.replace(cell, outcome=FAILED, reason=reason)
    worst = own = 0.0
    for run in runs:
        try:
            found = judge.patiently(run)
        except Exception as failure:
            reason = f"at {run.name}: {measure.one_line(failure)}"
            return dataclasses.replace(cell, outcome=FAILED, reason=reason)
        if found.reason:
            reason = f"at {run.name}: {found.reason}"
            return dataclasses.replace(cell, outcome=WRONG, reason=reason, error=measure.finite(found.file))
        worst, own = max(worst, found.file), max(own, found.torch)
    cell = dataclasses.replace(cell, error=worst, rounding=own)
    return (
        dataclasses.replace(cell, outcome=NO_KERNEL, reason=judge.file.missing)
        if judge.file.missing
        else cell
    )


class _Judge:
    """One file and its model."""

    def __init__(self, source: Source, path: Path, kind: str) -> None:
        self.source, self.kind = source, kind
        self.wide = source.widened()
        graph = io.load(path)
        twin.widen(graph)
        self.widened = sessions.create_session(graph, name=path.name)
        self.rounding, self.file = sixteen.rounding_session(path), sixteen.File(path, kind)

    def patiently(self, run: Run) -> _Errors:
        """The errors at an input, or where they are too large at another of its sizes where they are not."""
        found = self._errors(run)
        for draw in range(_DRAWS):
            if not found.reason or not run.sizes:
                break
            other = samples.drawn(self.source.interface, run.sizes, "random", _SEED + draw)
            found = self._errors(other, last=draw == _DRAWS - 1)
        return found

    def _errors(self, run: Run, last: bool = False) -> _Errors:
        """`last`: no further input is tried, and torch's own answer is asked how far rounding moves it."""
        with ties.first_of_equal():  # as ONNX prescribes; in 16 bits many scores are equal
            exact = [np.asarray(value) for value in leaves(self.wide.forward(_wide(run.inputs)))]
            own = [value.float().numpy() for value in leaves(self.source.forward(run.inputs))]
        sides = [sixteen.answers(self.widened, run), own, sixteen.answers(self.rounding, run)]
        itself = self.file.run(run)
        sides += [] if itself is None else [itself]
        graph, torchs, *files = (_per_token(exact, answers, run) for answers in sides)
        apart = float(np.median(torchs))
        found = _Errors(float(graph.max()), max(float(np.median(errors)) for errors in files), apart)
        least = _EPSILON[self.kind]
        if not found.widened <= _MULTIPLE * least and not (last and self._moves_too(graph, exact, run)):
            reason = f"its graph in float32 is off by {found.widened:.2g}"
        elif not found.file <= _MULTIPLE * max(least, apart):
            reason = f"it is off by {found.file:.2g} in the median token, and torch's own {self.kind} by {apart:.2g}"
        elif any((np.isfinite(torchs) & ~np.isfinite(errors)).any() for errors in files):
            reason = "it holds infinities or NaNs where torch has none"
        else:
            reason = ""
        return dataclasses.replace(found, reason=reason)

    def _moves_too(self, graph: np.ndarray, exact: list[np.ndarray], run: Run) -> bool:
        """Whether torch itself is off at as many tokens with its weights moved by half a unit in the last place."""
        limit, most = _MULTIPLE * _EPSILON[self.kind], 0
        for seed in range(_MOVES):
            module = copy.deepcopy(self.wide.module)
            rounding.move(module, seed, _EPSILON[self.kind] / 2)
            with ties.first_of_equal():
                moved = leaves(dataclasses.replace(self.wide, module=module).forward(_wide(run.inputs)))
            answers = [np.asarray(value) for value in moved]
            most = max(most, int((_per_token(exact, answers, run) > limit).sum()))
        return bool(np.isfinite(graph).all()) and int((graph > limit).sum()) <= most


def _wide(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def _per_token(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], run: Run) -> np.ndarray:
    """The largest error of each row of all outputs, relative to its largest magnitude, without padding."""
    if [each.shape for each in expected] != [each.shape for each in actual]:
        return np.array([np.inf])
    errors = []
    for output, (left, right) in enumerate(zip(expected, actual, strict=True)):
        gap, scale = sixteen.gaps(left, right, run, output)
        if not gap.size:
            continue
        errors.append(gap / np.maximum(scale, max(float(np.median(scale)), 1e-30)))
    return np.concatenate(errors) if errors else np.zeros(1)

"""A file in float16 or bfloat16 as it is, beside torch in that type.

In ONNX Runtime; where its CPU provider lacks an operator in the type, each operator in float32 and its result rounded,
which is how torch computes there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.core.errors import ImpossibleError, OutsideError, VerificationError
from sparse_onnx.export import rounded
from sparse_onnx.export.samples import Run
from sparse_onnx.export.sources import Source, leaves
from sparse_onnx.graph import io
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.compare import TOLERANCES

#: What ONNX Runtime says at a run where an operator has no kernel for a type.
_NO_KERNEL = re.compile("data type is not supported|NOT_IMPLEMENTED|not implemented", re.IGNORECASE)
_OPERATOR = re.compile(r"(?:implementation for|while running) (\w+)")


class File:
    """The file in ONNX Runtime. `missing`: what the provider lacks, once that is known; the file does not run then."""

    def __init__(self, path: Path, kind: str) -> None:
        self.kind, self.missing = kind, ""
        self._session: Any = None
        try:
            self._session = sessions.create_session(path, name=path.name)
        except ImpossibleError as error:
            self.missing = self._lacking(error)
            return
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        if any(
            value.type == "tensor(bfloat16)" for value in values
        ):  # which numpy, and so a run from Python, lacks
            self.missing = "no bfloat16 inputs and outputs in Python"

    def run(self, run: Run) -> list[np.ndarray] | None:
        """Its outputs as float32; None where it does not run.

        Raises:
            OutsideError: onnxruntime fails, for another reason than a kernel that it lacks.
        """
        if self.missing:
            return None
        try:
            return answers(self._session, run)
        except OutsideError as error:
            if not _NO_KERNEL.search(error.message):
                raise
            self.missing = self._lacking(error)
            return None

    def _lacking(self, error: ImpossibleError | OutsideError) -> str:
        named = _OPERATOR.search(error.message)
        return f"no {self.kind} kernel for {named[1]}" if named else error.message


def rounding_session(path: Path) -> Any:
    """The file with each operator in float32 and its result rounded.

    Raises:
        ValueError: its types are not known.
    """
    return sessions.create_session(rounded.rounding_graph(io.load(path)), name=path.name)


def answers(session: Any, run: Run) -> list[np.ndarray]:
    """The session's outputs as float32, of the inputs in the types that it takes."""
    feeds = {}
    for value in session.get_inputs():
        tensor = run.inputs[value.name]
        if tensor.is_floating_point():
            tensor = tensor.half() if value.type == "tensor(float16)" else tensor.float()
        feeds[value.name] = tensor.numpy()
    return [np.asarray(each, np.float32) for each in sessions.run(session, feeds)]


def gaps(expected: np.ndarray, actual: np.ndarray, run: Run, output: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of an output, without padding: the largest error and the largest magnitude that is finite.

    An infinity or NaN that is not the same on both sides is an infinite error; so is another shape.
    """
    if expected.shape != actual.shape:
        return np.array([np.inf]), np.ones(1)
    keep, width = run.kept(output, expected.shape), expected.shape[-1] if expected.ndim else 1
    left, right = (run.rows(output, each)[keep] for each in (expected, actual))
    if not left.size:
        return np.zeros(0), np.zeros(0)
    left, right = left.reshape(-1, width), right.reshape(-1, width)
    finite, with_finite = np.isfinite(left), np.isfinite(right)
    gap = np.abs(np.where(finite, left, 0) - np.where(finite & with_finite, right, 0)).max(axis=-1)
    same = np.where(finite, with_finite, (left == right) | (np.isnan(left) & np.isnan(right)))
    gap[~same.all(axis=-1)] = np.inf
    return gap, np.where(finite, np.abs(left), 0).max(axis=-1)


def compare(source: Source, path: Path, plan: Sequence[Run], kind: str) -> str:
    """Says how far from torch's answer in 16 bits the file lands, in the output that is furthest off. Near-tied routers
    make single tokens differ, so that the median over tokens is what tells a sound file from a broken one; the integers
    that they choose are compared only where there is nothing else.

    Raises:
        VerificationError: it is broken.
    """
    file, rounding = File(path, kind), None
    found: dict[int, list[tuple[np.ndarray, float]]] = {}
    for run in plan:
        answer = leaves(source.forward(run.inputs))
        floats = [at for at, value in enumerate(answer) if value.is_floating_point()]
        outputs = file.run(run)
        if outputs is None:
            try:
                rounding = rounding or rounding_session(path)
            except ValueError as unknown:
                return f"the {kind} file itself was not run: onnxruntime has {file.missing} on CPU, and {unknown}"
            outputs = answers(rounding, run)
        for at in floats or range(len(answer)):
            gap, scale = gaps(answer[at].float().numpy(), outputs[at], run, at)
            found.setdefault(at, []).append((gap, float(scale.max(initial=0))))
    errors = [error for each in found.values() if (error := _relative(each)).size]
    median = max((float(np.median(error)) for error in errors), default=0.0)
    if not median <= TOLERANCES[kind]:
        raise VerificationError(
            f"the {kind} file differs from torch by {median:.2g} in the median token",
            "try float32",
            where=source.name,
        )
    how = "run on CPU"
    if file.missing:
        how = f"run with each operator in float32 and its result rounded (onnxruntime: {file.missing} on CPU)"
    return (
        f"the {kind} file itself, {how}, differs from torch's {kind} by {median:.2g} in the median "
        f"token and {max((float(error.max()) for error in errors), default=0.0):.2g} at most"
    )


def _relative(found: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """The errors of an output, relative to its largest magnitude in the run; where that is zero, in any of them."""
    usual = max(scale for _, scale in found)
    return np.concatenate([gap / max(scale or usual, 1e-30) for gap, scale in found])

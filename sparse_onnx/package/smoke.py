"""The smoke input of a package, and what the model gives for it.

The input is one whose outputs hardly move when ONNX Runtime runs it again, or in another order (its graph optimizations
off), so that no near-tie of a router decides whether another machine passes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError, VerificationError
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.kernels.build import WEIGHTS_ENTRY
from sparse_onnx.optimize.static import open_axes
from sparse_onnx.package.contents import session_entries
from sparse_onnx.targets import places
from sparse_onnx.targets.profile import TargetProfile
from sparse_onnx.targets.session import create_session, first_line, run, session_options
from sparse_onnx.verify.inputs import sized_inputs

if TYPE_CHECKING:
    from sparse_onnx.package.variants import Variant

#: Largest error, relative to the largest magnitude of the output.
_TOLERANCE = 1e-3
#: Where weights or activations have fewer bits: they round differently on other processors.
_COARSE_TOLERANCE = 2e-2
_SAMPLES = 8
_TOKENS = 4
_TIMED = (1, 64)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """`error` is the largest one seen here, relative; `timed` are feeds by token count, for tuning."""

    feeds: dict[str, np.ndarray]
    outputs: list[np.ndarray]
    names: list[str]
    tolerance: float
    label: str
    on: str
    entries: dict[str, str]
    timed: dict[int, dict[str, np.ndarray]]
    runs: int = 0
    error: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)

    def differs(self, outputs: Sequence[np.ndarray]) -> str:
        """In words; empty where it does not."""
        for name, got, want in zip(self.names, outputs, self.outputs, strict=True):
            found = error(got, want)
            if not found <= self.tolerance:
                return f"output '{name}' is off by {found:.2g}, and {self.tolerance:g} is allowed"
        return ""


def record(
    model: ir.Model, made: Sequence[Variant], folder: Path, profile: TargetProfile, kernels: bool
) -> Recorded:
    """Draws the input, runs it, and has every variant and the target itself, where it is installed, give the same.

    Raises:
        ImpossibleError: an input that no file can hold, or a model that cannot be run here.
        VerificationError: a variant or the target gives something else.
    """
    main = made[0].model
    half = profile.precision != "float32"
    tolerance = max(_COARSE_TOLERANCE if half else _tolerance(model), profile.tolerance)
    entries = session_entries(model, profile)
    feeds, outputs = _chosen(model, main, tolerance, entries)
    names = [value.name or "" for value in model.graph.outputs]
    timed: dict[int, dict[str, np.ndarray]] = {}
    if len(made) > 1:
        counts = _TIMED if open_axes(model) else (_TOKENS,)
        timed = {count: _feeds(model, count, 0) for count in counts}
    label = ", ".join("x".join(map(str, array.shape)) or "scalar" for array in feeds.values())
    found = Recorded(feeds, outputs, names, tolerance, label, "", entries, timed)
    where = places.place(profile)
    notes = []
    if where is None:
        notes.append(
            f"{profile.provider} is not on this machine: expected outputs are the CPU provider's alone"
        )
    runs, worst = 1, 0.0
    for variant in made:
        places_tried = [(places.CPU, False), *([(places.CPU, True)] if kernels else ())]
        if where not in (None, places.CPU) and profile.format == "onnx":
            places_tried.append((str(where), False))
        for provider, native in places_tried:
            got = outputs_of(variant.model, feeds, provider=provider, kernels=native, entries=entries)
            runs += 1
            problem = found.differs(got)
            if problem:
                on = places.described(provider) + (" with the native kernels" if native else "")
                raise VerificationError(f"variant '{variant.name}' on {on}: {problem}")
            worst = max([worst, *(error(one, two) for one, two in zip(got, outputs, strict=True))])
    on = places.described(places.CPU if where is None else where)
    return dataclasses.replace(found, runs=runs, error=worst, notes=notes, on=on)


def outputs_of(
    path: Path,
    feeds: dict[str, np.ndarray],
    *,
    provider: str = places.CPU,
    kernels: bool = False,
    entries: dict[str, str] | None = None,
) -> list[np.ndarray]:
    """What a file gives."""
    settings = {**(entries or {}), WEIGHTS_ENTRY: "shared"}  # for one run
    session = create_session(os.fspath(path), provider=provider, kernels=kernels, entries=settings)
    return [np.asarray(array) for array in run(session, feeds, path.name)]


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest finite magnitude of `want`, at least 1e-6; infinite where shapes,
    types or what is not finite differ. Integers and booleans must be equal."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if want.dtype.kind not in "fV" or not want.size:
        return 0.0 if np.array_equal(got, want) else math.inf
    one, two = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(two)
    if not np.array_equal(finite, np.isfinite(one)) or not np.array_equal(
        one[~finite], two[~finite], equal_nan=True
    ):
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(two[finite]).max()), 1e-6)
    return float(np.abs(one[finite] - two[finite]).max()) / scale


def _tolerance(model: ir.Model) -> float:
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    values = [
        *model.graph.outputs,
        *(value for graph in model.graphs() for value in graph.initializers.values()),
    ]
    coarse = any(value.dtype in half for value in values)
    return _COARSE_TOLERANCE if coarse or any(each.rounding for each in block_records(model)) else _TOLERANCE


def _feeds(model: ir.Model, tokens: int, seed: int) -> dict[str, np.ndarray]:
    feeds = sized_inputs(model, 1, tokens, seed=seed)
    for name, array in feeds.items():
        if array.dtype.kind not in "biuf":
            raise ImpossibleError(
                f"no smoke input can be kept of type {array.dtype}", where=f"input '{name}'"
            )
    return feeds


def _chosen(
    model: ir.Model, path: Path, tolerance: float, entries: dict[str, str]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Of some inputs, the first that rounding leaves alone by a tenth of the tolerance, else the best one."""
    drawn = [_feeds(model, _TOKENS, seed) for seed in range(_SAMPLES)]
    drawn = drawn[:1] if not drawn[0] else drawn
    plain = _unoptimized(path, drawn, entries)
    try:
        session = create_session(os.fspath(path), entries=entries)
        best: tuple[float, int, list[np.ndarray]] | None = None
        for at, (feeds, other) in enumerate(zip(drawn, plain, strict=True)):
            outputs = [np.asarray(array) for array in run(session, feeds, path.name)]
            again = run(session, feeds, path.name)
            moved = max(
                (
                    error(each, want)
                    for got in (other, again)
                    for each, want in zip(got, outputs, strict=True)
                ),
                default=0.0,
            )
            if best is None or moved < best[0]:
                best = moved, at, outputs
            if moved <= tolerance / 10:
                break
    except SparseOnnxError as failure:
        raise ImpossibleError(
            f"the model cannot be run here, to learn what it gives: {failure.message}"
        ) from failure
    assert best is not None
    moved, at, outputs = best
    if not moved <= tolerance:
        raise ImpossibleError(
            f"no smoke input: for {len(drawn)} of them the outputs move by {moved:.2g} or more from run to run",
            "the model is not determined well enough to be checked elsewhere",
        )
    for value, array in zip(model.graph.outputs, outputs, strict=True):
        if array.dtype.kind not in "biuf":
            raise ImpossibleError(f"type {array.dtype} cannot be kept", where=f"output '{value.name}'")
    return drawn[at], outputs


def _unoptimized(
    path: Path, drawn: Sequence[Mapping[str, np.ndarray]], entries: dict[str, str]
) -> list[list[np.ndarray]]:
    import onnxruntime

    options = session_options(entries=entries)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[places.CPU])
        return [[np.asarray(array) for array in session.run(None, dict(feeds))] for feeds in drawn]
    except Exception as failure:  # onnxruntime's errors share no base class
        raise ImpossibleError(
            f"the model cannot be run here, to learn what it gives: {first_line(failure)}"
        ) from failure

"""The exported file in ONNX Runtime against the torch module, on inputs that were not traced."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError, OutsideError
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.export import calls, rounding, ties
from sparse_onnx.export.experts import Experts
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.guards import written
from sparse_onnx.export.samples import Run
from sparse_onnx.export.sources import Source, leaves
from sparse_onnx.export.users import users_code
from sparse_onnx.graph import io
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.compare import Difference, difference
from sparse_onnx.verify.routing import Decision, Router, decisions, flipped, observed, routers

#: Makes of a model what answers to inputs by name with its outputs.
Engine = Callable[[ir.Model], Callable[[dict[str, np.ndarray]], list[np.ndarray]]]

#: A difference is explained by rounding up to that many times what rounding alone makes of torch's own answer.
_EXPLAINED = 4.0


class _Watched:
    """The exported model in ORT with its routers' indices and scores as further outputs; made when first
    needed."""

    def __init__(self, path: Path | ir.Model, engine: Engine) -> None:
        self.path, self.engine = path, engine

    @functools.cached_property
    def _session(self) -> tuple[Any, list[Router], list[str]]:
        model = io.load(self.path) if isinstance(self.path, Path) else self.path
        watch = routers(model)
        copy = observed(model, watch)
        names = [value.name or "" for value in copy.graph.outputs]
        return self.engine(copy), watch, names

    def flips(
        self, feeds: dict[str, np.ndarray], chosen: dict[str, np.ndarray], batch: int
    ) -> tuple[np.ndarray | None, str, float]:
        """Sequences `[batch]` in which a near-tied router chose other experts than torch's (None: in none),
        what else was chosen otherwise, and the smallest margin of the routers."""
        session, watch, names = self._session
        results = session(feeds)
        after = decisions(watch, dict(zip(names, results, strict=True)))
        before = {
            name: Decision(chosen[name], decision.margin, decision.near_tie, decision.scores)
            for name, decision in after.items()
            if name in chosen
        }
        margins = [float(d.margin.min()) for d in before.values() if d.margin is not None and d.margin.size]
        return *flipped(before, after, batch), min(margins, default=np.inf)


def in_ort(model: Path | ir.Model) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """A session of its own for the whole model."""
    name = model.name if isinstance(model, Path) else model.graph.name or ""
    session = sessions.create_session(model, name=name)
    return lambda feeds: sessions.run(session, feeds, name)


def compare(
    path: Path | ir.Model,
    source: Source,
    found: Sequence[Experts],
    runs: Sequence[Run],
    *,
    tolerance: float,
    program: Callable[..., Any] | None = None,
    alongside: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    progress: Callable[[str], None] | None = None,
    engine: Engine | None = None,
) -> VerifyRecord:
    """Runs both on every input and compares all outputs.

    Args:
        path: the exported model.
        source: the reference. Its experts modules run as they are.
        found: the experts modules, whose routing is compared where outputs differ.
        runs: the inputs.
        tolerance: largest accepted error relative to the largest magnitude of an output.
        program: the traced program in torch; an assertion of it that fails is one that the file lacks.
        alongside: has experts modules of `found` that are no part of the source run beside it.
        progress: called with a line a run.
        engine: how a model in memory is run; None has ORT run the file as it is.

    Raises:
        OutsideError: the module raises.
        ImpossibleError: the traced program refuses an input which the module takes.
    """
    answer = engine(io.load(path) if isinstance(path, Path) else path) if engine else in_ort(path)
    watched = _Watched(path, engine or in_ort)
    total, margin, tokens, left_out, failure = Difference.none(), np.inf, 0, 0, None
    names, excused_runs = list[str](), 0
    for run in runs:
        names.append(run.name)
        if progress is not None:
            progress(f"comparing with torch on {run.name}")
        with _recorded(found) as chosen, users_code(source.name):
            expected = [_array(value) for value in leaves(source.forward(run.inputs))]
        if program is not None and not run.assumption:
            _run_program(program, run)
        feeds = {name: _array(value) for name, value in run.inputs.items()}
        try:
            actual = answer(feeds)
        except OutsideError as error:
            raise (_wrong_there(run) if run.assumption else error) from error
        if failure is None and not any(np.isfinite(value).any() for value in expected):
            failure = f"input {run.name}: torch itself answers without any finite value, so that nothing is compared"
        worst = _worst(run, expected, actual, tolerance)
        if not worst.within:
            with ties.first_of_equal() as equal, users_code(source.name):
                others = [_array(value) for value in leaves(source.forward(run.inputs))]
            if equal.met and (first := _worst(run, others, actual, tolerance)).within:
                worst, names[-1] = first, f"{names[-1]}, {ties.NOTE}"
        if not worst.within and alongside is not None:
            with _recorded(found) as chosen, alongside(), users_code(source.name):
                source.forward(run.inputs)
        routed = _tokens(chosen) or math.prod(expected[0].shape[: max(1, expected[0].ndim - 1)])
        tokens += routed
        if not worst.within and chosen:
            batch = expected[0].shape[0] if expected[0].ndim else 1
            tied, reason, smallest = watched.flips(feeds, chosen, batch)
            margin = min(margin, smallest)
            if tied is not None:
                worst = _worst(run, expected, actual, tolerance, ~tied)
                left_out += int(tied.sum()) * routed // batch
            elif reason:
                worst = dataclasses.replace(worst, reason=reason)
        excused = not worst.within and not run.assumption
        if excused and (moved := _moved(source, run, expected, tolerance, worst)) is not None:
            left_out += routed
            excused_runs += 1
            worst, names[-1] = Difference.none(), f"{names[-1]}, left out: {moved}"
        if not worst.within and run.assumption:
            raise _wrong_there(run)
        if not worst.within and failure is None:
            failure = f"input {run.name}: {worst.reason}"
        total = total.worse(worst)
    if excused_runs * 2 > len(runs):
        failure = failure or f"at {excused_runs} of {len(runs)} inputs rounding moves torch's own answer"
    if left_out * 2 > tokens:
        failure = failure or f"{left_out} of {tokens} tokens are near-ties, which leaves too few to compare"
    return VerifyRecord(
        method="whole",
        passed=failure is None,
        runs=len(runs),
        max_abs_error=total.max_abs,
        max_rel_error=total.max_rel,
        inputs=names,
        router_margin=float(margin) if np.isfinite(margin) else None,
        tokens_left_out=left_out,
        failure=failure,
    )


def _moved(
    source: Source, run: Run, expected: Sequence[np.ndarray], tolerance: float, worst: Difference
) -> str | None:
    """By how much torch's own answer moves with rounding, where that is more than the tolerance and explains the
    difference. A module that answers otherwise when it is asked again has a state, and nothing is explained."""
    with users_code(source.name):
        again = [_array(value) for value in leaves(source.forward(run.inputs))]
    if not all(np.array_equal(*pair, equal_nan=True) for pair in zip(expected, again, strict=True)):
        return None
    moved = max(
        (
            _worst(run, expected, [_array(value) for value in outputs], tolerance).max_rel
            for outputs in rounding.answers(source, run)
        ),
        default=0.0,
    )
    if moved <= tolerance or not worst.max_rel <= _EXPLAINED * moved:
        return None
    return f"rounding moves torch's own answer by {moved:.2g}"


def _wrong_there(run: Run) -> ImpossibleError:
    return ImpossibleError(
        f"the trace is right only where {run.assumption}, and the model also takes {written(run.sizes)}",
        "compute the size with tensor operations instead of Python, or make that axis static",
    )


def _tokens(chosen: dict[str, np.ndarray]) -> int:
    return max((len(index) for index in chosen.values()), default=0)


def _run_program(program: Callable[..., Any], run: Run) -> None:
    try:
        # It has the module's own buffers.
        kept = calls.keeping_buffers(program) if isinstance(program, nn.Module) else contextlib.nullcontext()
        with torch.no_grad(), kept:
            program(**run.inputs)
    except Exception as error:  # torch's runtime assertions share no base class
        raise ImpossibleError(
            f"the trace is not right for input {run.name}: {first_line(error)}",
            "ONNX would answer wrongly there: compute sizes with tensor operations instead of Python",
        ) from error


@contextlib.contextmanager
def _recorded(found: Sequence[Experts]) -> Iterator[dict[str, np.ndarray]]:
    """The indices `[T, K]` that each experts module is called with, by its path; not of one in several places."""
    chosen: dict[str, np.ndarray] = {}
    handles = []
    places = collections.Counter(id(entry.module) for entry in found)
    for entry in found:
        if places[id(entry.module)] > 1:
            continue

        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = entry.path
        ) -> None:
            index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
            if isinstance(index, Tensor):
                chosen[path] = index.cpu().numpy()

        handles.append(entry.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _worst(
    run: Run,
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    tolerance: float,
    sequences: np.ndarray | None = None,
) -> Difference:
    """The largest difference of any output, without padding and in these sequences `[batch]` only."""
    if len(expected) != len(actual):
        return Difference(np.inf, np.inf, False, f"{len(actual)} outputs instead of {len(expected)}")
    total = Difference.none()
    for output, (left, right) in enumerate(zip(expected, actual, strict=True)):
        keep = run.kept(output, left.shape)
        if sequences is not None and len(sequences) == len(left):
            keep = keep & sequences.reshape(-1, *[1] * (keep.ndim - 1))
        left, right = run.rows(output, left), run.rows(output, right)
        total = total.worse(difference(left, right, tolerance, None if keep.all() else keep))
    return total


def _array(value: Tensor) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy(), order="C")  # ascontiguousarray makes scalars vectors

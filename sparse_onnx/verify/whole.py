"""Two whole models on the same inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import OutsideError, SparseOnnxError
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.places import CPU, simulated
from sparse_onnx.verify.blocks import GROUP_BYTES, compare_blocks
from sparse_onnx.verify.compare import Difference, difference
from sparse_onnx.verify.coverage import Coverage, describe
from sparse_onnx.verify.inputs import Case
from sparse_onnx.verify.routing import Decision, decisions, flipped, observed, routers
from sparse_onnx.verify.sides import Blocks


class Observed:
    """A model in ORT whose routing can be watched."""

    def __init__(
        self,
        model: ir.Model,
        threads: int,
        provider: str,
        name: str,
        entries: dict[str, str] | None = None,
        near_tie: float | None = None,
    ) -> None:
        self.near_tie = near_tie
        self.watch = routers(model)
        self.outputs = len(model.graph.outputs)
        copy = observed(model, self.watch)
        self.names = [value.name or "" for value in copy.graph.outputs]
        self.session = sessions.create_session(
            copy, threads=threads, provider=provider, name=name, entries=entries
        )
        self.name = name

    def __call__(self, feeds: dict[str, np.ndarray]) -> tuple[list[np.ndarray], dict[str, Decision]]:
        results = sessions.run(self.session, feeds, self.name)
        found = decisions(self.watch, dict(zip(self.names, results, strict=True)))
        if self.near_tie is not None:
            found = {
                name: dataclasses.replace(each, near_tie=max(each.near_tie, self.near_tie))
                for name, each in found.items()
            }
        return results[: self.outputs], found


def compare_whole(
    reference: ir.Model,
    candidate: ir.Model,
    cases: Sequence[Case],
    *,
    threads: int,
    provider: str = "CPUExecutionProvider",
    tolerance: float | None = None,
    names: tuple[str, str] = ("the original", "the result"),
    candidate_path: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    memory: int = GROUP_BYTES,
    neutral: ir.Model | None = None,
    entries: dict[str, str] | None = None,
    near_tie: float | None = None,
    cover: bool = True,
) -> VerifyRecord:
    """Runs both models on every case, repeated ones several times, and compares all outputs.

    A case without tokens that the provider fails is left out where it fails on the reference too: `not_run`.
    Blocks with an expert that no case reached are compared alone besides (`compare_blocks`); where that is not
    possible the comparison does not pass, and `failure` says which experts were not reached.

    Args:
        reference: says what is right.
        candidate: what is judged, with the same inputs.
        cases: the runs.
        threads: intra-op threads of both sessions.
        provider: execution provider of the candidate's session, or a place (`targets.places`). The reference runs on
            the CPU.
        tolerance: accepted relative error; None takes the type's.
        names: what to call the two in messages.
        candidate_path: run the candidate from this file, as deployed, instead of from memory.
        progress: called with a line a case.
        memory: bytes of weights that may be mapped at once where a block is compared alone.
        neutral: the reference with its functions inlined and its blocks named apart; None where it is so itself.
        entries: configuration of all sessions.
        near_tie: margin below which another choice of a router is rounding, where the provider computes in a coarser
            type than the model's.
        cover: whether experts that no case reached are compared besides.
    """
    original = Observed(reference, threads, CPU, names[0], entries, near_tie)
    deployed = sessions.create_session(
        candidate_path if candidate_path is not None else candidate,
        threads=threads,
        provider=provider,
        name=names[1],
        entries=entries,
    )
    rename = _matching_names(
        [value.name for value in deployed.get_inputs()],
        [value.name for value in original.session.get_inputs()],
    )
    watched: Observed | None = None
    coverage = Coverage(reference)
    if (
        not coverage
    ):  # the original spells its blocks in a way of its own: the candidate says where tokens went
        coverage = Coverage(candidate)
        watched = Observed(candidate, threads, provider, names[1], entries, near_tie) if coverage else None
    only_candidate = watched is not None
    verdict = _Verdict(original.outputs)
    margin, left_out, runs = np.inf, 0, 0
    described: list[str] = []
    not_run: list[str] = []
    fatal = any(map(_dies_without_tokens, (reference, candidate)))
    cases = sorted(cases, key=lambda each: not _tokens(each))
    for case in cases:
        if fatal and not _tokens(case):
            continue
        if progress is not None:
            progress(f"comparing {case.name}")
        try:
            expected, before = original(case.feeds)
        except OutsideError:
            if not case.optional:
                raise
            continue
        feeds = {ours: case.feeds[theirs] for ours, theirs in rename.items()}
        margin = min(
            [margin, *(d.margin.min() for d in before.values() if d.margin is not None and d.margin.size)]
        )
        repeats = 1 if simulated(provider) else case.repeats  # there are no races on a device that is none
        described.append(case.name if repeats == 1 else f"{case.name} x{repeats} runs")
        left: np.ndarray | None = None
        for _ in range(repeats):
            runs += 1
            try:
                actual = sessions.run(deployed, feeds, names[1])
            except OutsideError as error:
                if not _tokens(case) and _fails(reference, cases, case, provider, threads, entries):
                    not_run.append(f"{described.pop()}: {error.message}")
                    runs -= 1
                else:
                    verdict.fail(case, str(error))
                break
            found = _compare(expected, actual, tolerance, verdict.scales)
            if before and not all(each.within for each in found):
                watched = watched or Observed(candidate, threads, provider, names[1], entries, near_tie)
                mask, reason = _near_ties(expected, before, watched, feeds)
                if reason:
                    verdict.fail(case, reason)
                if mask is not None:
                    left = mask if left is None else left | mask
                    found = _compare(expected, actual, tolerance, verdict.scales, ~mask)
            verdict.add(case, expected, found)
        if not_run:  # its process may have ended with it; nothing comes behind this case
            break
        if left is not None:
            left_out += case.size.batch * case.size.sequence * int(left.sum()) // len(left)
        if not only_candidate:
            coverage.add(before, left)
        elif watched is not None:
            coverage.add(watched(feeds)[1], left)
    record = VerifyRecord(
        method="whole",
        passed=verdict.passed(left_out),
        runs=runs,
        max_abs_error=verdict.total.max_abs,
        max_rel_error=verdict.total.max_rel,
        inputs=described,
        router_margin=float(margin) if np.isfinite(margin) else None,
        tokens_left_out=left_out,
        failure=verdict.failure(left_out),
        not_run=not_run,
    )
    missed = coverage.missed() if cover else {}
    if not record.passed or not missed:
        return record
    whole_blocks = reference if neutral is None else neutral
    if not set(missed) <= Blocks(whole_blocks).names & Blocks(candidate).names:
        return dataclasses.replace(record, passed=None, failure=describe(missed))
    alone = compare_blocks(
        whole_blocks,
        candidate,
        memory=memory,
        threads=threads,
        provider=provider,
        tolerance=tolerance,
        progress=progress,
        only=missed,
    )
    return dataclasses.replace(
        record,
        passed=alone.passed,
        runs=record.runs + alone.runs,
        max_abs_error=max(verdict.total.max_abs, alone.max_abs_error or 0.0),
        max_rel_error=max(verdict.total.max_rel, alone.max_rel_error or 0.0),
        inputs=[*described, f"{len(missed)} blocks alone: experts that no input reached"],
        failure=alone.failure,
    )


class _Verdict:
    """What all runs together say. Nothing passes of which nothing could be compared."""

    def __init__(self, outputs: int) -> None:
        self.total = Difference.none()
        self.found = [Difference.none()] * outputs
        self.given = [0] * outputs
        self.reason: str | None = None

    def fail(self, case: Case, reason: str) -> None:
        self.total = self.total.worse(Difference(0.0, 0.0, False, reason))
        self.reason = self.reason or f"input {case.name}: {reason}"

    def add(self, case: Case, expected: Sequence[np.ndarray], found: Sequence[Difference]) -> None:
        for index, (array, each) in enumerate(zip(expected, found, strict=True)):
            self.given[index] += array.size
            self.found[index] = self.found[index].worse(each)
            self.total = self.total.worse(each)
            if not each.within and self.reason is None:
                where = f"output {index}: " if len(expected) > 1 else ""
                self.reason = f"input {case.name}: {where}{each.reason}"

    @property
    def scales(self) -> list[float]:
        """Of each output, the largest over runs."""
        return [each.scale for each in self.found]

    @property
    def _blind(self) -> list[int]:
        return [
            index
            for index, (given, each) in enumerate(zip(self.given, self.found, strict=True))
            if given and not each.compared
        ]

    def passed(self, left_out: int) -> bool | None:
        if not self.total.within or (self._blind and left_out):
            return False
        return None if self._blind or not any(self.given) else True

    def failure(self, left_out: int) -> str | None:
        if self.reason is not None or self.passed(left_out):
            return self.reason
        if not self._blind:
            return "no output has any values"
        if left_out:
            return "near-ties in every sequence of every run: nothing could be compared"
        return f"output {self._blind[0]} holds nothing but infinities and NaNs: it could not be compared"


def _matching_names(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """By name where the names are the same, else by order."""
    return {name: name for name in ours} if set(ours) == set(theirs) else dict(zip(ours, theirs, strict=True))


def _compare(
    expected: Sequence[np.ndarray],
    actual: Sequence[np.ndarray],
    tolerance: float | None,
    usual: Sequence[float],
    keep: np.ndarray | None = None,
) -> list[Difference]:
    """One difference an output. `usual` are their scales in other runs; `keep` is a mask over sequences, for outputs
    that have that axis first."""
    found = []
    for left, right, scale in zip(expected, actual, usual, strict=True):
        if left.dtype != right.dtype:
            reason = f"type {right.dtype} instead of {left.dtype}"
            found.append(Difference(np.inf, np.inf, False, reason))
            continue
        mask = keep if keep is not None and left.ndim and left.shape[0] == len(keep) else None
        found.append(difference(left, right, tolerance, mask, scale))
    return found


def _near_ties(
    expected: Sequence[np.ndarray],
    before: dict[str, Decision],
    candidate: Observed,
    feeds: dict[str, np.ndarray],
) -> tuple[np.ndarray | None, str]:
    """Sequences in which rounding flipped a near-tie, or what was flipped that is none. See `flipped`."""
    batch = expected[0].shape[0] if expected and expected[0].ndim else 0
    if batch == 0:
        return None, ""
    return flipped(before, candidate(feeds)[1], batch)


def _tokens(case: Case) -> int:
    return case.size.batch * case.size.sequence


def _fails(
    model: ir.Model,
    cases: Sequence[Case],
    case: Case,
    provider: str,
    threads: int,
    entries: dict[str, str] | None,
) -> bool:
    """Whether the provider fails on the original as well, as onnxruntime 1.24 and 1.30 do at a TopK of no rows, see
    https://github.com/microsoft/onnxruntime/pull/32724. Such a run may end the provider's process. An original that
    does not run there at all excuses nothing."""
    usual = next((each for each in cases if _tokens(each)), None)
    if provider == CPU or usual is None:
        return False
    try:
        session = sessions.create_session(model, threads=threads, provider=provider, entries=entries)
        sessions.run(session, usual.feeds)
    except SparseOnnxError:
        return False
    try:
        sessions.run(session, case.feeds)
    except SparseOnnxError:
        return True
    return False


def _dies_without_tokens(model: ir.Model) -> bool:
    """Whether ONNX Runtime may end the process, not the run: its Einsum divides by the size of an axis that is summed
    over, and which of them tokens are, only its inputs' shapes tell."""
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = (node for scope in scopes for node in scope.all_nodes())
    return any(node.op_type == "Einsum" and not node.domain for node in nodes)

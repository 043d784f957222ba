"""`optimize --thresholds`: from a calibration and a wish to thresholds in the model, measured and verified.

A budget is searched for on one half of the evaluation data, on a copy of the model in which inputs are put to their
centre and all layers stay as they are; the finished model is measured on the other half, and that is what is reported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError, UsageError, VerificationError
from sparse_onnx.core.report import QualityRecord, ThresholdsRecord
from sparse_onnx.kernels import is_built
from sparse_onnx.optimize.copies import check_copies
from sparse_onnx.optimize.evaluation import evaluation_runs
from sparse_onnx.optimize.kept_weights import compare_weights
from sparse_onnx.optimize.quality import Budget, Feeds, Judge, Measured
from sparse_onnx.optimize.request import Request
from sparse_onnx.optimize.threshold_record import thresholds_record
from sparse_onnx.optimize.watched import Dialled, check_layers, measure_skipping
from sparse_onnx.sparsify.calibrated import make_plan
from sparse_onnx.sparsify.dial import set_level
from sparse_onnx.sparsify.guard import Clock, keep_dense
from sparse_onnx.sparsify.plan import Plan
from sparse_onnx.sparsify.prefill import copy_dense
from sparse_onnx.sparsify.record import acting, thresholds_of
from sparse_onnx.verify.compare import difference
from sparse_onnx.verify.inputs import sized_inputs

#: Builds the model with these thresholds as it will be deployed, from one that was prepared and recognised.
Build = Callable[[ir.Model, Plan], None]

_HIGHEST = 95  # of the levels: beyond, no sparsity was calibrated


class Thresholds:
    """One run of `optimize` with thresholds.

    Args:
        asked: what is wanted.
        model: as it was loaded, to read the evaluation data for.
        source: its path.
        fingerprint: of it.
        threads: of sessions that measure.
        progress: called with a line at each step.

    Raises:
        UsageError: the calibration is of another model, or the data cannot be used.
        ImpossibleError: first positions that the model cannot tell.
    """

    def __init__(
        self,
        asked: Request,
        model: ir.Model,
        source: str | os.PathLike[str],
        fingerprint: str,
        threads: int | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.asked, self.source, self.threads = asked, Path(source), threads
        self.say = progress or (lambda line: None)
        asked.calibration.require_model(fingerprint, asked.path)
        if asked.dense_first is not None:
            Clock.of(model)
        self.evaluation: list[Feeds] = []
        if asked.evaluation:
            self.evaluation = evaluation_runs(
                model, source, asked.evaluation, asked.tokenizer, asked.calibration
            )
            if asked.budget is not None and len(self.evaluation) < 2:
                raise UsageError(
                    "the evaluation data are one run: a budget needs two, to search on and to measure on",
                    "give more --eval-data",
                )
        self.quality: list[QualityRecord] = []
        self.plan: Plan | None = None
        self.before: ir.Model | None = None
        self.all_compared = False
        self.compared = 0
        """Layers whose weights were compared with what they were, one by one."""

    @property
    def search_half(self) -> list[Feeds]:
        return self.evaluation[::2] if self.asked.budget is not None else []

    @property
    def measure_half(self) -> list[Feeds]:
        return self.evaluation[1::2] if self.asked.budget is not None else self.evaluation

    def choose(self, model: ir.Model, build: Build) -> Plan:
        """The plan. `model` is prepared and recognised, and left as it is; `build` makes copies of it runnable.

        Raises:
            VerificationError: no level meets the budget.
            ImpossibleError: so much cannot be skipped.
        """
        asked = self.asked
        self.before = model.clone()
        if asked.budget is None:
            level, sparsity = None, asked.sparsity
        else:
            level, sparsity = self._search(model, build), None
        self.plan = make_plan(
            asked.calibration,
            sparsity=sparsity,
            level=level,
            method=asked.method,
            allocation=asked.allocation,
            mode=asked.mode,
        )
        if not any(site.sparsity[self.plan.level] >= self.plan.least for site in self.plan.sites.values()):
            least = f"{self.plan.least:.0%}"
            if asked.budget is not None:
                raise VerificationError(
                    f"within {asked.budget} no layer skips {least} of its inputs, below which nothing is gained",
                    "allow more, or take another method; nothing was written",
                )
            raise ImpossibleError(
                f"no layer skips {least} of its inputs, below which nothing is gained in this mode",
                "ask for more",
            )
        return self.plan

    def _search(self, model: ir.Model, build: Build) -> int:
        """The largest level that keeps the budget by a standard error, on the half that is searched on."""
        asked = self.asked
        assert asked.budget is not None
        plan = make_plan(
            asked.calibration,
            level=None,
            method=asked.method,
            allocation=asked.allocation,
            mode="simulate",
        )
        copy = model.clone()
        build(copy, plan)
        record = thresholds_of(copy)
        if record is None:
            raise ImpossibleError("no layer of this model can be thresholded", "--explain says why")
        run = Dialled(copy, record.level_input, self.threads)
        judge = Judge(asked.budget.metric, run, run.names, self.search_half)
        low, high = 0, _HIGHEST + 1
        while high - low > 1:
            middle = (low + high) // 2
            found = judge(middle)
            good = _safely(asked.budget, found)
            self.say(f"level {middle}: {asked.budget.metric} {found.value:.9g}, dense {found.dense:.9g}")
            low, high = (middle, high) if good else (low, middle)
        if low == 0:
            found = judge(1)
            raise VerificationError(
                f"no level keeps {asked.budget}: {found.value:.9g} at level 1, {found.dense:.9g} of the dense model",
                "allow more, or calibrate on more data; nothing was written",
            )
        return low

    def finish(self, model: ir.Model, check: bool, whole: bool) -> tuple[ThresholdsRecord, list[str]]:
        """Measures and checks the finished model, which runs at level 0 so far.

        Args:
            model: the finished model.
            check: whether to compare layers with numpy.
            whole: whether it was compared as a whole at that level; else its layers are, one by one.

        Raises:
            VerificationError: a layer is not what numpy says, or the budget is missed.
        """
        plan, record = self.plan, thresholds_of(model)
        assert plan is not None
        if record is None:
            raise ImpossibleError("no layer of this model can be thresholded", "--explain says why")
        notes = [self._check(model, record.level_input, plan.level)] if check else []
        if check and not whole and plan.mode != "simulate" and self.before is not None:
            self.compared = compare_weights(self.before, model)
            self.all_compared = self.compared == len(acting(model))
            notes.append(f"{self.compared} thresholded layers have the weights and biases that they had")
        if self.evaluation:
            self.say("measuring quality and what is skipped")
            self._measure(model, record.level_input, plan.level)
        seen = (
            measure_skipping(model, record.level_input, plan.level, self.measure_half, self.threads)
            if self.evaluation
            else {}
        )
        if plan.mode == "gather":
            low = [name for name, each in seen.items() if each.share is not None and each.share < plan.least]
            if low:
                notes.append(
                    f"measured, {len(low)} sites skip less than {plan.least:.0%}: gathering slows them down"
                )
        if self.asked.dense_first is not None:
            self._check_guard(model, record.level_input, plan.level)
            notes.append(
                f"prefill and the first {self.asked.dense_first} positions skip nothing; quality was measured as if "
                "they did"
                if self.evaluation
                else f"prefill and the first {self.asked.dense_first} positions skip nothing"
            )
        if self.asked.prefill == "copy":
            self.say("comparing the layers for many rows with numpy")
            assert self.before is not None
            found = check_copies(
                model, self.before, record.level_input, plan.level, kernels=is_built(), threads=self.threads
            )
            notes.append(found + ("; quality was measured as if all rows skipped" if self.evaluation else ""))
        if plan.mode == "simulate":
            notes.append(
                "simulated thresholds: for accuracy studies; nothing is skipped, and nothing is faster"
            )
        if plan.mode == "native":
            notes.append(
                "fast with the native kernels (`sparse-onnx kernels build`, sparse_onnx.register_kernels); "
                "without them right, and not faster"
            )
        return thresholds_record(self.asked, model, plan, record.level_input, seen, self.quality), notes

    @contextlib.contextmanager
    def turned(self, model: ir.Model) -> Iterator[None]:
        """The model, otherwise at level 0, at the level that it will run at: for whoever measures forms."""
        record = thresholds_of(model)
        if record is None or self.plan is None:
            yield
            return
        set_level(model, record.level_input, self.plan.level)
        try:
            yield
        finally:
            set_level(model, record.level_input, 0)

    def set(self, model: ir.Model) -> None:
        """Sets the finished model to its level, and keeps dense what is to stay so."""
        plan, record = self.plan, thresholds_of(model)
        assert plan is not None and record is not None
        set_level(model, record.level_input, plan.level)
        if self.asked.prefill == "copy":
            assert self.before is not None
            copy_dense(model, self.before)
        if self.asked.dense_first is not None:
            keep_dense(model, self.asked.dense_first)

    def _check(self, model: ir.Model, level_input: str, level: int) -> str:
        self.say("comparing each thresholded layer with numpy")
        runs = self.evaluation[:1] + [sized_inputs(model, 1, size, seed=size) for size in (1, 6)]
        reached, worst = 0, 0.0
        for kernels in (False, True) if is_built() and self.asked.mode == "native" else (False,):
            count, error = check_layers(
                model, level_input, level, runs, kernels=kernels, threads=self.threads
            )
            reached, worst = max(reached, count), max(worst, error)
        watched = [item for item in acting(model) if not item.inner]
        missed = len(acting(model)) - reached
        how = (
            "native kernels and function bodies"
            if is_built() and self.asked.mode == "native"
            else "the model"
        )
        error_of = f"{how}, largest relative error {worst:.1e}"
        text = f"{reached} thresholded layers agree with numpy at level {level} ({error_of})"
        if missed:
            inner = len(acting(model)) - len(watched)
            text += f"; {missed} were not reached, {inner} of them in the bodies of If, Loop or Scan"
        return text

    def _check_guard(self, model: ir.Model, level_input: str, level: int) -> None:
        """Prefill at the level must be what it is at level 0."""
        guarded = model.clone()
        assert self.asked.dense_first is not None
        keep_dense(guarded, self.asked.dense_first)
        run, feeds = Dialled(guarded, level_input, self.threads), sized_inputs(model, 2, 7)
        if not all(map(_same, run(feeds, level), run(feeds, 0))):
            raise VerificationError(
                "prefill is not dense",
                "nothing was written; please report it, this is a fault of sparse-onnx",
            )

    def _measure(self, model: ir.Model, level_input: str, level: int) -> None:
        budget = self.asked.budget
        run = Dialled(model, level_input, self.threads)
        metrics = [budget.metric] if budget is not None else []
        for metric in (*metrics, *(name for name in ("perplexity", "top1", "cosine") if name not in metrics)):
            try:
                found = Judge(metric, run, run.names, self.measure_half)(level)
            except SparseOnnxError:
                if budget is not None and metric == budget.metric:
                    raise
                continue  # a metric that nobody asked for, and that these outputs do not have
            own = budget if budget is not None and metric == budget.metric else None
            held = None if own is None else own.met(found.value, found.dense)
            self.quality.append(
                QualityRecord(
                    metric, found.value, found.dense, found.tokens, None if own is None else str(own), held
                )
            )
            if own is not None and not held:
                raise VerificationError(
                    f"the budget {own} is missed on the half of the data that was held out: {found.value:.9g} at level "
                    f"{level}, {found.dense:.9g} of the dense model",
                    "allow more, or give more evaluation data; nothing was written",
                )


def _safely(budget: Budget, found: Measured) -> bool:
    """Whether the budget is kept by a standard error: what was just within it would as often as not be missed on
    other data."""
    margin = found.error or 0.0
    return budget.met(found.value + margin if budget.upper else found.value - margin, found.dense)


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and difference(left, right).within

"""Runs passes over a model and keeps the record. Our own runner: onnx-ir's `Sequential` drops what a result carries."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.blocks import DOMAIN
from sparse_onnx.core import registry
from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import ModelError, SparseOnnxError, UsageError
from sparse_onnx.core.passes import Outcome, Pass, parse_options
from sparse_onnx.core.report import PassRecord, Refusal
from sparse_onnx.graph import stats
from sparse_onnx.passes import PHASES, PIPELINE, Phase, Step

#: How onnx-ir's passes are called where their defaults are not what the pipeline means.
_LIBRARY_OPTIONS: dict[str, dict] = {
    "InlinePass": {"criteria": lambda function: function.domain != DOMAIN},
    "LiftConstantsToInitializersPass": {"lift_all_constants": True, "size_limit": 0},
}


@dataclasses.dataclass(frozen=True)
class LibraryPass(Pass):
    """One of onnx-ir's common passes under the pass contract."""

    name: ClassVar[str] = "onnx_ir"
    summary: ClassVar[str] = "a pass of onnx-ir"
    inner: ir.passes.PassBase = dataclasses.field(default_factory=common.RemoveUnusedNodesPass)

    def call(self, model: ir.Model) -> Outcome:
        result = self.inner(model)
        return Outcome(model, result.modified, int(result.modified), int(result.modified))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step of the plan: the pass with its options set, or why it does not run."""

    step: Step
    run: Pass | None
    reason: str


def plan(
    forms: Sequence[str], settings: Mapping[str, Mapping[str, str]] | None = None, skip: Sequence[str] = ()
) -> list[Planned]:
    """The pipeline for a target that takes `forms`, with the user's options; passes of others at the end of `lower`.

    Raises:
        UsageError: an unknown pass or option.
    """
    settings = dict(settings or {})
    names = [step.name for step in PIPELINE]
    for name in (*settings, *skip):
        if name not in names:
            registry.get(name)
    extra = [Step("lower", name, "asked for") for name in settings if name not in names]
    steps = sorted([*PIPELINE, *extra], key=lambda step: PHASES.index(step.phase))
    planned = []
    for step in steps:
        if step.name in skip:
            planned.append(Planned(step, None, "skipped on request"))
        elif step.asked and step.name not in settings:
            planned.append(Planned(step, None, "not asked for"))
        elif step.forms and not set(step.forms) & set(forms):
            planned.append(Planned(step, None, f"no block takes the form {' or '.join(step.forms)}"))
        else:
            planned.append(Planned(step, _build(step.name, settings.get(step.name, {})), step.reason))
    return planned


def _build(name: str, settings: Mapping[str, str]) -> Pass:
    library, _, class_name = name.partition(":")
    if library == "onnx_ir":
        if settings:
            raise UsageError(f"pass '{name}' has no options")
        inner = getattr(common, class_name)(**_LIBRARY_OPTIONS.get(class_name, {}))
        return LibraryPass(inner=inner)
    pass_class = registry.get(name)
    return pass_class(**parse_options(pass_class, dict(settings)))


@dataclasses.dataclass
class Result:
    """What a run of the pipeline did. `changed` counts only passes that are the user's reason to run it."""

    records: list[PassRecord] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    changed: bool = False


def run(
    model: ir.Model,
    planned: Sequence[Planned],
    after: Callable[[Phase, Planned, ir.Model, Outcome], None] | None = None,
    progress: Callable[[str], None] | None = None,
    before: Callable[[Phase, ir.Model], None] | None = None,
) -> Result:
    """Runs a plan over `model` in place.

    Args:
        model: changed.
        planned: the plan.
        after: called behind each pass that changed the model.
        progress: called with a line at each pass.
        before: called before the first pass of each phase, of which it may exchange the options.

    Raises:
        ModelError: a pass broke, or found the model broken.
    """
    result = Result()
    with paused():
        phase = None
        nodes, size = stats.node_count(model), stats.weight_bytes(model)
        for at, item in enumerate(planned):
            if item.run is None:
                continue
            if before is not None and item.step.phase != phase:
                before(item.step.phase, model)
            phase = item.step.phase
            item = planned[at]  # its options may be known only now
            assert item.run is not None
            if progress is not None:
                progress(f"{item.step.phase}: {item.step.name}")
            start = time.perf_counter()
            outcome = _apply(item, model)
            elapsed = time.perf_counter() - start
            nodes_before, bytes_before = nodes, size
            if outcome.modified:
                nodes, size = stats.node_count(model), stats.weight_bytes(model)
            result.records.append(
                PassRecord(
                    name=item.step.name,
                    kind=item.run.kind,
                    matched=outcome.matched,
                    rewritten=outcome.rewritten,
                    refused=len(outcome.refusals),
                    ms=round(elapsed * 1e3, 3),
                    nodes_before=nodes_before,
                    nodes_after=nodes,
                    bytes_before=bytes_before,
                    bytes_after=size,
                )
            )
            result.refusals.extend(outcome.refusals)
            result.notes.extend(outcome.notes)
            if outcome.modified:
                result.changed |= item.step.phase not in ("prepare", "finish")
                if after is not None:
                    after(item.step.phase, item, model, outcome)
    return result


def _apply(item: Planned, model: ir.Model) -> Outcome:
    assert item.run is not None
    try:
        outcome = item.run(model)
    except SparseOnnxError:
        raise
    except (ir.passes.InvariantError, ir.passes.PassError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, SparseOnnxError):
            raise cause from error
        raise ModelError(f"pass '{item.step.name}' found the model broken: {cause}") from error
    assert isinstance(outcome, Outcome)
    return outcome

"""Sample blocks, and the shipped language model, in each form on a target: do they run, right, and whole?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.bench.sample_blocks import HIDDEN, Sample, build, samples
from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.graph import io
from sparse_onnx.optimize import static
from sparse_onnx.optimize.runner import plan
from sparse_onnx.targets import TargetProfile
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.profile import FormResult
from sparse_onnx.targets.trial import attempt
from sparse_onnx.verify.inputs import sized_inputs

FORMS = ("grouped", "branched", "gathered", "dense", "fused")
_TOKENS = 6
#: Rounding of a coarser type, relative, and what a token's result may change by it: more is a near-tie of its routing.
_ROUNDING, _STABLE = 2e-3, 2e-2


def form_on(target: TargetProfile, name: str) -> str:
    """The form as the target takes it; int32 indices where its preferred forms have them."""
    index = next((form.partition(":")[2] for form in target.forms if "index=" in form), "")
    default = f"{name}:{index}" if index and name in ("gathered", "dense") else name
    return next((form for form in target.forms if form.partition(":")[0] == name), default)


def try_sample(sample: Sample, form: str, target: TargetProfile, where: str) -> FormResult | None:
    """One block in one form on a target; None where the form refuses it."""
    neutral = build(sample, _TOKENS if target.static else "T")
    lowered = _lowered(neutral, form_on(target, form))
    if lowered is None:
        return None
    session = sessions.create_session(build(sample))
    x = _stable(lambda rows: sessions.run(session, {"x": rows})[0])
    outside = {node.name or "" for node in neutral.graph if node.name != "block"}
    feeds = [x, x[::-1].copy()] if target.static else [x, x[:1]]
    expected = [sessions.run(session, {"x": rows})[0] for rows in feeds]
    return attempt(lowered, [{"x": rows} for rows in feeds], expected, target, where, outside)[0]


def _stable(run) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Tokens whose routing no rounding changes."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((256, HIDDEN)).astype(np.float32)
    shaken = rows * (1 + _ROUNDING * rng.standard_normal(rows.shape)).astype(np.float32)
    plain, moved = run(rows), run(shaken)
    change = np.abs(plain - moved).max(axis=1) / np.abs(plain).max()
    return rows[change < _STABLE][:_TOKENS]


def _lowered(neutral: ir.Model, form: str) -> ir.Model | None:
    model = neutral.clone()
    for block in neutral_blocks(model):
        want(block.node, [Form.parse(form)])
    for item in plan([Form.parse(form).name]):
        if item.run is not None and item.step.phase in ("lower", "finish"):
            item.run(model)
    return None if any(node.domain == "sparse_onnx" for node in model.graph) else model


def try_language_model(
    path: Path, form: str, target: TargetProfile, where: str, tokens: int
) -> FormResult | None:
    """The language model at `path`, in neutral form, in one form on a target, with `tokens` tokens."""
    from sparse_onnx.optimize.api import optimize

    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        out = Path(folder) / "model.onnx"
        cpu = "cpu"
        optimize(path, out, target=cpu, form=form_on(target, form), verify="none")
        model = io.load(out)
        if target.static:
            model = static.specialise(model, {"batch": 1, "sequence": tokens})
        feeds = sized_inputs(model, 1, tokens)
        expected = sessions.run(sessions.create_session(io.load(path)), feeds)[0]
        return attempt(model, [feeds], [expected], target, where)[0]


def results(
    target: TargetProfile, where: str, some: list[Sample] | None = None
) -> Iterator[tuple[str, str, FormResult | None]]:
    """Form, name of the block and result, of all samples or of some, at a place that runs the target."""
    for form in FORMS:
        for sample in some if some is not None else samples():
            yield form, sample.name, try_sample(sample, form, target, where)

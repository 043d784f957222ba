"""What every test here asks of `optimize`: the report, and the numbers before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from spellings import Built, error, session

import sparse_onnx
from sparse_onnx.core.report import Report

Errors = onnxruntime.capi.onnxruntime_pybind11_state
TOLERANCE = {"float32": 1e-5, "float16": 2e-2}
Feeds = dict[str, dict[str, np.ndarray]]


def optimized(model: onnx.ModelProto, folder: Path, **options: object) -> tuple[Path, Report]:
    """The model behind `optimize`, on disk, without its own verification: the test compares."""
    source, out = folder / "in.onnx", folder / "out.onnx"
    onnx.save(model, source)
    options = {"verify": "none"} | options
    return out, sparse_onnx.optimize(source, out, **options)


def feeds(built: Built) -> Feeds:
    """Inputs by what they are: token counts, all to one expert, exact ties, no token."""
    made = {name: {"x": x} for name, x in built.routings().items()}
    shape = (6, built.case.hidden)
    made["ties"] = {"x": built.shaped(np.zeros(shape, built.case.numpy))}
    made["0 tokens"] = {"x": built.shaped(np.zeros((0, built.case.hidden), built.case.numpy))}
    return made


def differences(before: onnx.ModelProto, after: str, inputs: Feeds) -> dict[str, float]:
    """Relative error by input. An input that `before` does not take is left out.

    ONNX Runtime's Einsum divides by the size of an axis: without a token it ends the whole process.
    """
    old, new = session(before), session(after)
    einsum = "Einsum" in {node.op_type for node in before.graph.node}
    found = {}
    for name, values in inputs.items():
        if name == "0 tokens" and einsum:
            continue
        try:
            expected = old.run(None, values)
        except (Errors.RuntimeException, Errors.Fail, Errors.InvalidArgument):
            if name != "0 tokens":
                raise
            continue
        actual = new.run(None, values)
        for left, right in zip(expected, actual, strict=True):
            assert left.shape == right.shape, (name, left.shape, right.shape)
            found[name] = max(found.get(name, 0.0), error(left, right))
    return found


def check_recognised(built: Built, folder: Path) -> Report:
    """One block, lifted as what it was generated as, and the same numbers."""
    out, report = optimized(built.model, folder)
    case = built.case
    assert not report.refusals, report.refusals
    found = [
        (b.spelling, b.experts, b.top_k, b.activation, b.gated, b.hidden, b.inner) for b in report.blocks
    ]
    gated = case.gated != "none"
    wanted = (case.spelling, case.experts, case.top_k, case.label, gated, case.hidden, case.inner)
    assert found == [wanted]
    [record] = [r for r in report.passes if r.name.startswith("recognise_") and r.matched]
    assert (record.matched, record.rewritten, record.refused) == (1, 1, 0)
    check_same(built, str(out))
    return report


def check_same(built: Built, after: str) -> None:
    """The same numbers as before on every input that the model took before."""
    for name, value in differences(built.model, after, feeds(built)).items():
        assert value <= TOLERANCE[built.case.dtype], (name, value)

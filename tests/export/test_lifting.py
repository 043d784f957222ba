"""Python control flow that depends on tensors: lifted rightly, or refused with the line that it is in."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import lifting_modules as modules  # noqa: E402
import onnxruntime  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError, VerificationError  # noqa: E402
from sparse_onnx.export import lifting  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402

AXES = {"x": {0: "batch", 1: "sequence"}}

RIGHT = [
    modules.AddsBias,
    modules.Breaks,
    modules.WritesMaskBetween,
    modules.WritesMaskBefore,
    modules.Raises,
    modules.Closure,
    modules.OneHotHits,
    modules.MultiHotCounts,
    modules.Decorated,
    modules.DropsBeyond,
]
MORE = [
    modules.ElseSide,
    modules.OtherMask,
    modules.RebindsMask,
    modules.SecondCondition,
    modules.AtLeastTwo,
    modules.SignedSum,
    modules.SortedHits,
    modules.LeavesLoops,
]
#: And a part of the line that is named.
REFUSED = [
    (modules.ReturnsCount, "if mask.any()"),
    (modules.CountsInAttribute, "if mask.any()"),
    (modules.CountsInDict, "if mask.any()"),
    (modules.StacksList, "if mask.any()"),
    (modules.CountsList, "if mask.any()"),
    (modules.StacksRows, "if mask.any()"),
    (modules.RemembersLast, "if mask.any()"),
    (modules.FirstOnly, "if mask.any()"),
    (modules.RebindsThenWrites, "if len(row) > 0"),
    (modules.Halves, "while x.abs()"),
    (modules.PicksNumber, "scale = 2 if"),
    (modules.TriesFirst, "if not mask.any()"),
    (modules.PaddedHits, "for number in torch.unique"),
    (modules.SetOfHits, "for number in set("),
]


def sample() -> torch.Tensor:
    return torch.randn(3, 5, modules.HIDDEN, generator=torch.Generator().manual_seed(1))


def inputs() -> list[torch.Tensor]:
    """Few tokens and many, so that experts go without; and values that take other branches."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 1), (1, 2), (2, 1), (1, 3), (4, 9), (2, 30)]
    drawn = [torch.randn(*shape, modules.HIDDEN, generator=generator) for shape in shapes]
    return [*drawn, drawn[4] - 2, drawn[4] + 2, drawn[3] * 0.01]


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_lifted_rightly(kind: type, tmp_path: Path) -> None:
    module = kind().eval()
    sparse_onnx.export((module, sample(), AXES), tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    for x in inputs():
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE, ids=lambda kind: kind.__name__)
def test_more_is_lifted_rightly(kind: type, tmp_path: Path) -> None:
    test_lifted_rightly(kind, tmp_path)


@pytest.mark.parametrize(("kind", "line"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_with_its_line(kind: type, line: str, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError) as caught:
        sparse_onnx.export((kind().eval(), sample(), AXES), tmp_path / "out.onnx")
    found = re.search(r"lifting_modules\.py:(\d+): `(.*?)`", caught.value.message)
    assert found is not None and line in found[2]
    source, first = inspect.getsourcelines(kind)
    assert first <= int(found[1]) < first + len(source)
    assert caught.value.hint and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [modules.WritesMaskInside, modules.WritesThroughView, modules.Normalises])
def test_right_or_refused(kind: type, tmp_path: Path) -> None:
    """How far torch gets with these may change; wrong they never are."""
    try:
        test_lifted_rightly(kind, tmp_path)
    except SparseOnnxError as error:
        assert not isinstance(error, VerificationError)


def test_what_is_skipped_for_emptiness_only_leaves_no_condition(tmp_path: Path) -> None:
    sparse_onnx.export((modules.MultiHotCounts().eval(), sample(), AXES), tmp_path / "out.onnx")
    assert "If" not in {node.op_type for node in io.load(tmp_path / "out.onnx").graph.all_nodes()}


def test_what_is_not_is_a_condition(tmp_path: Path) -> None:
    sparse_onnx.export((modules.AddsBias().eval(), sample(), AXES), tmp_path / "out.onnx")
    assert "If" in {node.op_type for node in io.load(tmp_path / "out.onnx").graph.all_nodes()}


def test_an_error_that_the_graph_does_not_raise_is_a_note(tmp_path: Path) -> None:
    report = sparse_onnx.export((modules.Raises().eval(), sample(), AXES), tmp_path / "out.onnx")
    assert any("if torch.isnan(x).any()" in note and "raises an error" in note for note in report.notes)
    assert any("assert (x.abs() < 1e6).all()" in note and "not checked" in note for note in report.notes)


def test_the_module_is_left_as_it_was() -> None:
    module = modules.Closure().eval()
    before = dict(vars(module))
    with lifting.lifted(module):
        assert "forward" in vars(module)
    assert vars(module) == before
    with pytest.raises(RuntimeError, match="stop"), lifting.lifted(module):
        raise RuntimeError("stop")
    assert vars(module) == before


def test_outside_of_a_trace_rewritten_code_is_the_code() -> None:
    for kind in (*RIGHT, *MORE):
        module = kind().eval()
        for x in inputs():
            with torch.no_grad():
                expected = module(x)
                with lifting.lifted(module):
                    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)

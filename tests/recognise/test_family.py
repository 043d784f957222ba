"""The generated family: every spelling, however it is written, is recognised as what it is, and stays exact."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from checking import check_recognised
from cores import anything, matrix, structural
from family import SPELLINGS, Case, invalid
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from spellings import build, error, run, session

STRUCTURAL, MATRIX = structural(), matrix()
QUICK = MATRIX[:: len(MATRIX) // 40]


def name_of(case: Case) -> str:
    text = f"{case.spelling}-E{case.experts}k{case.top_k}-{case.activation}-{case.gated}-{case.router}"
    return "-".join([text, *[f"{name}={option}" for name, option in case.force]])


@pytest.mark.parametrize("case", [*STRUCTURAL, *QUICK], ids=name_of)
def test_the_generator_computes_what_it_says(case: Case) -> None:
    built = build(case)
    assert {name for name, _ in case.force} <= set(built.picked)
    model = session(built.model)
    for what, x in built.routings().items():
        expected = built.expected(x.reshape(-1, case.hidden))
        actual = model.run(None, {"x": x})[0]
        assert error(expected, actual) < (2e-2 if case.dtype == "float16" else 2e-5), what


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_swapped_expert_would_be_seen(spelling: str) -> None:
    built = build(Case(spelling, router="softmax-renorm", force=(("residual", "no"),)))
    x = built.routings()["33 tokens"]
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    [down] = [t for t in model.graph.initializer if list(t.dims) == [4, 8, 12]]
    values = numpy_helper.to_array(down)
    down.CopyFrom(numpy_helper.from_array(values[[0, 2, 1, 3]], down.name))
    assert error(run(built.model, x), run(model, x)) > 0.05


@pytest.mark.parametrize("case", [*STRUCTURAL, *QUICK], ids=name_of)
def test_recognised_and_exact(case: Case, tmp_path: Path) -> None:
    check_recognised(build(case), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MATRIX if case not in QUICK], ids=name_of)
def test_the_whole_matrix(case: Case, tmp_path: Path) -> None:
    check_recognised(build(case), tmp_path)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(anything())
def test_any_member(case: Case) -> None:
    _any(case)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(anything())
def test_any_member_at_length(case: Case) -> None:
    _any(case)


def _any(case: Case) -> None:
    assert not invalid(case)
    with tempfile.TemporaryDirectory() as folder:
        check_recognised(build(case), Path(folder))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**20))
@example(0)
def test_the_same_case_is_the_same_model(seed: int) -> None:
    case = Case("grouped", seed=seed)
    first = build(case).model.SerializeToString(deterministic=True)
    build.cache_clear()
    assert build(case).model.SerializeToString(deterministic=True) == first
    assert np.isfinite(build(case).weights.router).all()

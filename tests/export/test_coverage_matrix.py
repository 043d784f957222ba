"""Every architecture with experts of the installed transformers: exported, exact, and one block a sparse layer.

What else is expected of one, and why, is in coverage_expected.toml. An architecture that a new release adds is expected
to give blocks: where it does not, the failing test says what is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomllib

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import cases, measure

EXPECTED = tomllib.loads(Path(__file__).with_name("coverage_expected.toml").read_text())
ALL = {case.name: case for case in cases.architectures()}
CACHED = {case.name: case for case in cases.with_cache()}
#: Router groups that no other ordinary test has: a selection bias without groups, a hash table, a linear attention.
ORDINARY = ("flint", "solar_open", "jamba")
EACH = [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in ALL]


@pytest.mark.parametrize("name", EACH)
def test_architecture(name: str) -> None:
    _check(ALL[name], EXPECTED.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CACHED))
def test_with_cache(name: str) -> None:
    expected = EXPECTED.get(name, {})
    _check(CACHED[name], {**expected, **expected.get("cached", {})})


def _check(case: cases.Case, expected: Mapping[str, Any]) -> None:
    for package in expected.get("needs", ()):
        pytest.importorskip(package)
    cell = measure.measure(case, "ours")
    assert cell.outcome == expected.get("outcome", measure.BLOCK), cell.reason
    if cell.outcome != measure.INAPPLICABLE:
        assert expected.get("reason", "") in cell.reason


def test_what_is_expected_is_of_this_table() -> None:
    rows = [*EXPECTED.values(), *(row["cached"] for row in EXPECTED.values() if "cached" in row)]
    outcomes = {row.get("outcome", measure.BLOCK) for row in rows}
    assert outcomes <= set(measure.OUTCOMES) - {measure.WRONG, measure.FAILED}
    assert EXPECTED.keys() <= ALL.keys()

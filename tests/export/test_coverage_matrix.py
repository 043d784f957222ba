"""Every architecture with experts of the installed transformers: exported, exact, and one block a sparse layer.

What else is expected of one, and why, is in coverage_expected.toml. An architecture that a new release adds is expected
to give blocks: where it does not, the failing test says what is new.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import cases, measure

EXPECTED = tomllib.loads(Path(__file__).with_name("coverage_expected.toml").read_text())
ALL = {case.name: case for case in cases.architectures()}
#: Router groups that no other ordinary test has: a selection bias without groups, a hash table, a linear attention.
ORDINARY = ("flint", "solar_open", "jamba")
EACH = [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in ALL]


@pytest.mark.parametrize("name", EACH)
def test_architecture(name: str) -> None:
    expected = EXPECTED.get(name, {"outcome": measure.BLOCK})
    for package in expected.get("needs", ()):
        pytest.importorskip(package)
    cell = measure.measure(ALL[name], "ours")
    assert cell.outcome == expected["outcome"], cell.reason
    assert expected.get("reason", "") in cell.reason


def test_what_is_expected_is_of_this_table() -> None:
    assert not [name for name, row in EXPECTED.items() if row["outcome"] not in measure.OUTCOMES]
    assert measure.WRONG not in {row["outcome"] for row in EXPECTED.values()}

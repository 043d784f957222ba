"""What Python is asked about values that depend on tensors: answered as in a plain run, or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import choosing_modules  # noqa: E402
import python_modules  # noqa: E402
from python_modules import Matched, Routed  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

REFUSED = {**python_modules.REFUSED, **choosing_modules.REFUSED}


def exported(kind: type[Routed], out: Path) -> sparse_onnx.Report:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = kind().eval()
    return sparse_onnx.export((module, torch.randn(9, 8), {"x": {0: "tokens"}}), out)


@pytest.mark.parametrize("kind", [*python_modules.RIGHT, *choosing_modules.RIGHT])
def test_right(kind: type[Routed], tmp_path: Path) -> None:
    verify = exported(kind, tmp_path / "out.onnx").verify
    assert verify is not None and verify.passed
    assert verify.max_rel_error is not None and verify.max_rel_error < 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: type[Routed], tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError) as caught:
        exported(kind, tmp_path / "out.onnx")
    line, reason = REFUSED[kind]
    assert line in caught.value.message and reason in caught.value.message
    assert "_modules.py:" in caught.value.message and not (tmp_path / "out.onnx").exists()


def test_a_plain_run_is_as_written() -> None:
    """What Python asks of values that are known is Python's to answer."""
    module, rows = Matched().eval(), torch.arange(2)
    assert [module.rows(rows[:n]) for n in (0, 1, 2)] == [0.5, 2.0, 2.0]

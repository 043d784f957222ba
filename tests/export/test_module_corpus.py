"""The corpus of hand-written modules: exported rightly, but for those whose reason is known."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage.modules import MODULES  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402

#: Refused, and a part of the reason.
REFUSED = {
    "ponder": "while (halted < 1).any():",
    "split_by_unique": "makes a Python list of a length that depends on tensor values",
    "token_loop": "for t in range(tokens.size(0)):",
    "mixture_of_depths": "the trace is right only where max(1, trunc(0.5*",
}
#: Few, each of another kind: the rest is slow.
QUICK = (
    "loop_continue",
    "loop_hits_packed",
    "sorted_slices",
    "early_exit_layers",
    "soft_mixture",
    "sparse_mixer",
    "deepspeed_top1",
    "collected_jobs",
    "token_loop",
)


def check(name: str, tmp_path: Path) -> None:
    if name in REFUSED:
        with pytest.raises(ImpossibleError) as caught:
            sparse_onnx.export(MODULES[name](), tmp_path / "out.onnx")
        assert REFUSED[name] in str(caught.value)
        return
    report = sparse_onnx.export(MODULES[name](), tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed and report.verify.runs >= 7
    assert report.verify.max_rel_error is not None and report.verify.max_rel_error < 1e-5


@pytest.mark.parametrize("name", QUICK)
def test_some(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODULES) - set(QUICK)))
def test_all(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_every_case_is_a_new_module() -> None:
    for build in MODULES.values():
        first, x, axes = build()
        second, again, _ = build()
        assert first is not second and not first.training and set(axes) == {"x"}
        torch.testing.assert_close(x, again)


def test_a_mixture_of_all_experts_is_said_to_be_dense(tmp_path: Path) -> None:
    report = sparse_onnx.export(MODULES["soft_mixture"](), tmp_path / "out.onnx")
    assert any("soft mixture" in note and "dense" in note for note in report.notes)

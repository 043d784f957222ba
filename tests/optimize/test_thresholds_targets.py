"""Which form experts with thresholds take on each target, as far as its profile tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx import targets
from sparse_onnx.targets import places

#: Targets none of whose forms has layers that skip inputs.
WITHOUT = ("coreml", "nnapi", "qnn-htp", "tensorrt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("targets")
    shape = Shape(experts=4, hidden=32, inner=48, biases=True)
    save_external(layered_model(shape, layers=1), place / "in.onnx")
    x = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    np.savez(place / "train.npz", x=x)
    sparse_onnx.calibrate(place / "in.onnx", place / "train.npz", place / "calib.json", threads=1)
    return place


@pytest.mark.parametrize("form", ["auto", "gathered"])
@pytest.mark.parametrize("target", targets.names())
def test_the_operator_of_all_experts_is_for_the_cpu_provider_alone(
    folder: Path, target: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "place", lambda profile: None)  # by the profile, whatever is installed here
    profile = targets.get(target)
    if form != "auto" and form not in profile.form_names:
        return
    report = sparse_onnx.optimize(
        folder / "in.onnx",
        None,
        target=target,
        form=form,
        thresholds=folder / "calib.json",
        sparsity=0.4,
        threads=1,
        static=[{"T": 1}] if profile.static else [],
        verify="none",
        dry_run=True,
    )
    [block] = report.blocks
    told = "; ".join([refusal.reason for refusal in report.refusals])
    told += "; ".join(text for record in report.fitting or () for text in record.rejected)
    if profile.provider == places.CPU:
        assert block.form == ("grouped" if form == "auto" else "gathered")
        assert "CPU provider alone" not in told
        return
    takes = target not in WITHOUT and (form == "auto" or profile.forms[0] == "grouped")
    assert block.form == ("grouped" if takes else None)
    assert report.thresholds is not None and len(report.thresholds.sites) == (2 if block.form else 0)
    if "gathered" in profile.form_names and profile.forms[0] != "grouped":
        assert "CPU provider alone" in told

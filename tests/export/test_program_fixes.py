"""Operators that torch's ONNX exporter translates wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import onnxruntime  # noqa: E402

from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import operators, program_fixes, translate  # noqa: E402


class Resized(torch.nn.Module):
    def __init__(self, mode: str, scales: tuple[float, float]) -> None:
        super().__init__()
        self.mode, self.scales = mode, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, scale_factor=self.scales, mode=self.mode)


class Patches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Squeezed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(0).squeeze(1)


def exported(module: Any, example: torch.Tensor, place: Path, *, fixed: bool = True) -> Any:
    program = torch.export.export(module, (example,))
    if fixed:
        program_fixes.apply(program.graph_module)
    model = translate.to_onnx(program, opset=20, input_names=["x"], table=operators.TABLE if fixed else None)
    path = place / "model.onnx"
    import onnx_ir as ir

    ir.save(model, path)
    return onnxruntime.InferenceSession(path).run(None, {"x": example.numpy()})[0]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("scales", [(1.525, 1.025), (2.1, 1.5), (0.525, 1.0)])
def test_an_axis_that_keeps_its_length_is_copied(
    mode: str, scales: tuple[float, float], tmp_path: Path
) -> None:
    module, example = Resized(mode, scales), torch.randn(1, 3, 4, 4)
    expected = module(example)
    torch.testing.assert_close(torch.from_numpy(exported(module, example, tmp_path)), expected)
    right = torch.from_numpy(exported(module, example, tmp_path, fixed=False))
    wrong = scales[1] == 1.025 or (mode == "nearest" and scales[0] == 2.1)
    assert torch.allclose(right, expected, atol=1e-5) is not wrong  # when torch mends it, this fix goes


def test_an_open_axis_that_a_scale_may_keep_is_refused() -> None:
    free = torch.export.Dim.DYNAMIC
    for scales, mode, refused in (
        ((1.3, 2.0), "bilinear", r"by 1\.3"),
        ((1.25, 2.0), "bilinear", r"by 1\.25, which may keep"),
        (
            (2.3, 1.0),
            "bilinear",
            r"by 2\.3, which no float32 is",
        ),  # 50 becomes 114, and 115 in single precision
        ((0.7, 1.0), "bicubic", r"by 0\.7, which no float32 is"),
        ((2.5, 2.0), "bilinear", ""),
        ((2.0, 2.0), "nearest", ""),
    ):
        program = torch.export.export(
            Resized(mode, scales), (torch.randn(1, 3, 8, 9),), dynamic_shapes={"x": {2: free, 3: free}}
        )
        if refused:
            with pytest.raises(ImpossibleError, match=refused):
                program_fixes.apply(program.graph_module)
        else:
            program_fixes.apply(program.graph_module)


def test_a_convolution_of_three_axes_needs_no_bias(tmp_path: Path) -> None:
    module, example = Patches(), torch.randn(6, 3, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(exported(module, example, tmp_path)), module(example), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(Exception, match="bias"):
        exported(module, example, tmp_path, fixed=False)


def test_an_axis_that_is_longer_than_one_stays(tmp_path: Path) -> None:
    module, example = Squeezed(), torch.randn(6, 1, 4)
    torch.testing.assert_close(torch.from_numpy(exported(module, example, tmp_path)), module(example))


class Narrow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hot = (x > 0).long() * 100
        sums = hot.sum(0, dtype=torch.int8), hot.sum(dtype=torch.uint8), hot.float().sum(dtype=torch.int16)
        return *sums, torch.cumsum(hot, 0, dtype=torch.int8)


def test_narrow_sums_wrap(tmp_path: Path) -> None:
    import sparse_onnx

    x = torch.randn(700, 3).abs()
    report = sparse_onnx.export((Narrow(), x, {"x": {0: "rows"}}), tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed
    results = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    for expected, actual in zip(Narrow()(x), results, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected)
    assert int(results[0][0]) == (70_000 + 128) % 256 - 128


class GivesBack(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        twice = x * 2
        return twice, x, twice


def test_an_input_may_be_an_output(tmp_path: Path) -> None:
    import sparse_onnx

    x = torch.randn(4, 3)
    sparse_onnx.export((GivesBack(), x, {"x": {0: "rows"}}), tmp_path / "out.onnx")
    results = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    for expected, actual in zip(GivesBack()(x), results, strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected)

"""Ways in which other exporters answer wrongly without a word, each shown there, and what ours does instead.

A test that fails in its first half says that upstream has mended it: the workaround of ours that it names can go.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import onnxruntime  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage.modules import MODULES  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError  # noqa: E402
from sparse_onnx.export import translate  # noqa: E402

#: Above any rounding.
WRONG = 1e-2
MENDED = "upstream answers right now: "


def error(path: Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Largest error relative to the largest magnitude; infinite for another shape, or where it is not a number."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = module(**inputs).numpy()
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return math.inf
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def dynamo(module: nn.Module, x: Tensor, axes: Mapping[int, str], path: Path, **settings: Any) -> None:
    shapes = {"x": dict.fromkeys(axes, torch.export.Dim.DYNAMIC)}
    with translate.quiet():
        torch.onnx.export(
            module,
            (),
            kwargs={"x": x},
            f=str(path),
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
            **settings,
        )


def legacy(module: nn.Module, x: Tensor, axes: Mapping[int, str], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (x,),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": dict(axes)},
            opset_version=17,
        )


def ours_is_right(module: nn.Module, x: Tensor, axes: Any, inputs: Mapping[str, Tensor], path: Path) -> None:
    sparse_onnx.export((module, x, axes), path)
    assert error(path, module, inputs) < 1e-5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["gshard_all_tokens", "gshard_int"])
def test_torch_onnx_drops_the_assumptions_of_the_trace(name: str, tmp_path: Path) -> None:
    """torch.export notes that a size was fixed; torch.onnx does not hand it on, so that other sizes pass."""
    module, x, axes = MODULES[name]()
    other = {"x": drawn(9, 11, 16)}
    dynamo(module, x, axes["x"], tmp_path / "theirs.onnx")
    assert error(tmp_path / "theirs.onnx", module, other) > WRONG, MENDED + "`export/guards.py` can go"
    ours_is_right(module, x, axes, other, tmp_path / "ours.onnx")


def test_the_legacy_tracer_drops_experts_that_the_sample_misses(tmp_path: Path) -> None:
    module, x, axes = MODULES["loop_continue"]()
    other = {"x": drawn(3, 11, 16)}
    legacy(module, x[:1, :1], axes["x"], tmp_path / "theirs.onnx")
    assert error(tmp_path / "theirs.onnx", module, {"x": x[:1, :1]}) < 1e-5
    assert error(tmp_path / "theirs.onnx", module, other) > WRONG, (
        MENDED + "the legacy tracer keeps all experts"
    )
    ours_is_right(module, x, axes, other, tmp_path / "ours.onnx")


def test_the_legacy_tracer_keeps_the_traced_branch(tmp_path: Path) -> None:
    module, x, axes = MODULES["early_exit"]()
    samples = [drawn(2, 3, 16) * scale for scale in (-3.0, -1.0, 1.0, 3.0)]
    with torch.no_grad():
        hidden = [each + module.first(each) for each in samples]
        leaves = [bool(torch.sigmoid(module.halt(each)).mean() > 0.5) for each in hidden]
    assert len(set(leaves)) == 2, "the samples must take both branches"
    other = {"x": samples[leaves.index(not leaves[0])]}
    legacy(module, samples[0], axes["x"], tmp_path / "theirs.onnx")
    assert error(tmp_path / "theirs.onnx", module, other) > WRONG, (
        MENDED + "the legacy tracer keeps both branches"
    )
    ours_is_right(module, x, axes, other, tmp_path / "ours.onnx")


class Normalised(nn.Module):
    """DeepSeek's routers and their kin: weights over their sum, with a small number against division by zero."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.sum(-1, keepdim=True) + self.epsilon)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-12, 1e-20])
def test_the_onnxscript_optimizer_removes_a_small_addend(epsilon: float, tmp_path: Path) -> None:
    module, x = Normalised(epsilon), torch.rand(3, 16)
    zeros = torch.cat([torch.zeros(1, 16), torch.ones(1, 16)])
    dynamo(module, x, {0: "tokens"}, tmp_path / "theirs.onnx")
    wrong = error(tmp_path / "theirs.onnx", module, {"x": zeros})
    assert wrong > WRONG, MENDED + "`translate.tidy` can use onnxscript's optimizer whole"
    ours_is_right(module, x, {"x": {0: "tokens"}}, {"x": zeros}, tmp_path / "ours.onnx")


def test_nllb_moe_of_transformers_uses_two_experts_only(tmp_path: Path) -> None:
    """A one-hot mask is passed where indices are expected: what any faithful export inherits."""
    models = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    from transformers import NllbMoeConfig

    config = NllbMoeConfig(
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_experts=8,
        expert_capacity=64,
        router_bias=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = models.NllbMoeSparseMLP(config, ffn_dim=24).eval()
    x = drawn(2, 9, 16)
    first: Callable[[Any], Tensor] = lambda result: result[0] if isinstance(result, tuple) else result  # noqa: E731
    with torch.no_grad():
        before = first(block(x)).clone()
        experts = (
            list(block.experts.values()) if isinstance(block.experts, nn.ModuleDict) else list(block.experts)
        )
        for expert in experts[2:]:
            for parameter in expert.parameters():
                parameter.zero_()
        after = first(block(x))
    assert before.abs().max() > 0
    torch.testing.assert_close(before, after, msg=MENDED + "the warning about NLLB-MoE can go")


class Rounded(nn.Module):
    """As many rows as a capacity is: 1.1 * 20 / 4 is 5.5 and a little in double precision."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: math.ceil(x.shape[0] * 1.1 / 4)]


class FlooredFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.shape[0] // 1.1) + 1]


def test_a_float_function_without_a_double_translation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImpossibleError, match=r"`return x\[: int\(x.shape\[0\] // 1.1\) \+ 1\]`"):
        sparse_onnx.export((FlooredFloat(), torch.randn(7, 3), {"x": {0: "tokens"}}), tmp_path / "out.onnx")


def test_sizes_are_rounded_as_python_rounds_them(tmp_path: Path) -> None:
    """torch translates Python's floats to single precision."""
    differing = [
        size
        for size in range(2, 400)
        if math.ceil(size * 1.1 / 4) != math.ceil(float(np.float32(size) * np.float32(1.1) / np.float32(4)))
    ]
    assert differing
    path, module = tmp_path / "ours.onnx", Rounded()
    sparse_onnx.export((module, torch.randn(7, 3), {"x": {0: "tokens"}}), path)
    for size in (*differing, *range(1, 60)):
        assert error(path, module, {"x": torch.ones(size, 3)}) == 0

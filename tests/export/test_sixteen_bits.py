"""Models in float16 and bfloat16: what is mended for them, and how a file that cannot run in its type is compared."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from adapted_families import config  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.nllb_moe import modeling_nllb_moe  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage import exporters, registry, tiny  # noqa: E402
from sparse_onnx.bench.coverage.cases import Made  # noqa: E402
from sparse_onnx.core.errors import VerificationError  # noqa: E402
from sparse_onnx.export import adapters, overflow, patches, rounded, sixteen, twin  # noqa: E402
from sparse_onnx.export.samples import Run  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402
from sparse_onnx.graph.annotate import annotate  # noqa: E402
from sparse_onnx.passes.repair_scatter_add import loses_updates  # noqa: E402
from sparse_onnx.targets import session as sessions  # noqa: E402

AXES = {"x": {0: "batch"}}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def layers() -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    return Layers().eval(), {"x": torch.randn(3, 8)}, AXES


def test_a_bfloat16_file_is_run_rounded(tmp_path: Path) -> None:
    report = sparse_onnx.export(layers(), tmp_path / "m.onnx", dtype="bfloat16")
    (note,) = [note for note in report.notes if "file itself" in note]
    assert "each operator in float32 and its result rounded" in note and "no bfloat16 kernel for" in note


class Looked(nn.Module):
    """Values are moved only, for which onnxruntime has kernels of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.table(index)


class Moved(Looked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.cat([x, self.table.weight]).float()


@pytest.mark.parametrize(
    "source",
    [
        lambda: (
            Looked().eval(),
            {"index": torch.arange(5)},
            {"index": {0: "batch"}},
        ),  # an output in bfloat16
        lambda: (Moved().eval(), {"x": torch.randn(3, 8)}, AXES),  # an input
    ],
)
def test_a_bfloat16_file_that_onnxruntime_loads_is_run_rounded(source: Any, tmp_path: Path) -> None:
    """numpy has no bfloat16 to give to it or to take."""
    out = tmp_path / "m.onnx"
    report = sparse_onnx.export(source(), out, dtype="bfloat16")
    sessions.create_session(out)
    (note,) = [note for note in report.notes if "file itself" in note]
    assert (
        "no bfloat16 inputs and outputs in Python" in note and "differs from torch's bfloat16 by 0 " in note
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_broken_file_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    sparse_onnx.export(layers(), out, dtype=kind)
    source = exporters.load(Made(layers(), {"dtype": kind}))
    runs = [source.interface.run("3", source.interface.draw({"batch": 3}), {"batch": 3})]
    assert "differs from torch's" in sixteen.compare(source, out, runs, kind)
    with torch.no_grad():
        source.module.first.weight += 1
    with pytest.raises(VerificationError, match=f"the {kind} file differs from torch by"):
        sixteen.compare(source, out, runs, kind)


class Masked(nn.Module):
    """Rows without anything to look at: the lowest number takes up their scores, in each type its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        least = torch.where(mask, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        return torch.softmax(self.scores(x) + least, dim=-1)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_lowest_number_is_that_of_each_type(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3])
    inputs = {"x": torch.randn(3, 8), "mask": mask}
    axes = {name: {0: "batch"} for name in inputs}
    out = tmp_path / "m.onnx"
    report = sparse_onnx.export((Masked().eval(), inputs, axes), out, dtype=kind)
    assert report.verify is not None and report.verify.passed
    wide, rounding = io.load(out), io.load(out)
    twin.widen(wide)
    alike = inputs["x"].to(getattr(torch, kind))
    run = Run("2", {"x": alike[:2], "mask": torch.zeros(2, 6, dtype=torch.bool)}, {"batch": 2})
    for graph in (wide, rounded.rounding_graph(rounding)):
        (answer,) = sixteen.answers(sessions.create_session(graph), run)
        np.testing.assert_allclose(answer, np.full((2, 6), 1 / 6), rtol=1e-2)


def test_a_number_as_an_answer(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 4))
    module.forward = types.MethodType(lambda self, input: self[0](input).sum(), module)  # type: ignore[method-assign]
    report = sparse_onnx.export(
        (module.eval(), {"input": torch.randn(3, 8)}, {"input": {0: "batch"}}),
        tmp_path / "m.onnx",
        dtype="float16",
    )
    assert report.verify is not None and report.verify.passed


class Chosen(nn.Module):
    """The two best of each row; all others are left out by minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.scores(x)
        values, index = scores.topk(2, dim=-1)
        return torch.full_like(scores, float("-inf")).scatter(-1, index, values)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_infinities_that_are_the_models_own(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = (Chosen().eval(), {"x": torch.randn(3, 8)}, AXES)
    report = sparse_onnx.export(source, tmp_path / "m.onnx", dtype=kind)
    assert any("file itself" in note and "nan" not in note for note in report.notes)


class Several(nn.Module):
    """Integers first, then nothing, and what is computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = self.scores(x)
        return scores.argmax(-1), scores[:, 6:], scores


def test_all_outputs_are_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = (Several().eval(), {"x": torch.randn(3, 8)}, AXES)
    out = tmp_path / "m.onnx"
    sparse_onnx.export(given, out, dtype="float16")
    source = exporters.load(Made(given, {"dtype": "float16"}))
    runs = [source.interface.run("3", source.interface.draw({"batch": 3}), {"batch": 3})]
    assert "differs from torch's" in sixteen.compare(source, out, runs, "float16")
    with torch.no_grad():
        source.module.scores.weight[1:] *= 0.5
    with pytest.raises(VerificationError, match="the float16 file differs from torch by"):
        sixteen.compare(source, out, runs, "float16")


def test_what_is_not_finite_is_to_be_the_same_and_padding_anything() -> None:
    inf, nan = np.inf, np.nan
    expected = np.array(
        [[[inf, nan, 2], [1, 2, 4], [-inf, 1, 1], [1, 1, 1], [nan, 1, 1], [0, 0, 0]]], np.float32
    )
    actual = np.array(
        [[[inf, nan, 3], [1, 2, 4], [inf, 1, 1], [1, nan, 1], [inf, 1, 1], [9, inf, 9]]], np.float32
    )
    run = Run("1x6", {"mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, {}, frozenset({"mask"}))
    gap, scale = sixteen.gaps(expected, actual, run, 0)
    np.testing.assert_array_equal(gap, [1, 0, inf, inf, inf])
    np.testing.assert_array_equal(scale, [2, 4, 1, 1, 1])
    assert sixteen.gaps(expected[:, :0], actual[:, :0], Run("1x0", {}, {}), 0)[0].shape == (0,)
    assert np.isinf(sixteen.gaps(expected, actual[:, :2], run, 0)[0]).all()


@pytest.mark.parametrize("largest", [1.0, 65504.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["NllbMoeEncoderLayer", "NllbMoeDecoderLayer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_overflow_are_clamped_in_the_graph(kind: str, dtype: torch.dtype, largest: float) -> None:
    """As transformers' own layers do it: all values, where one is not finite."""
    layer: Any = getattr(modeling_nllb_moe, kind)(config("nllb")).to(dtype).eval()
    for name, parameter in layer.named_parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[0, 0, :2] = largest  # the residual's, which comes out of the layer again
    states[0, 1, 3] = -65504.0
    with torch.no_grad():
        expected = layer(states, None)
        with patches.replaced(layer) as names:
            actual = layer(states, None)
    assert names == [kind] and modeling_nllb_moe.torch is torch
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_other_threads_keep_their_torch() -> None:
    """transformers' module is the same object in all of them."""
    seen: list[Any] = []

    class Layer(modeling_nllb_moe.NllbMoeDecoderLayer):
        def self_attn_layer_norm(self, states: torch.Tensor) -> torch.Tensor:  # in the midst of the forward
            seen.append(modeling_nllb_moe.torch)
            return states

    Layer.__module__ = modeling_nllb_moe.__name__
    layer = Layer.__new__(Layer)
    nn.Module.__init__(layer)
    with pytest.raises(AttributeError, match="self_attn"):  # of which it has none
        overflow.clamped(layer, modeling_nllb_moe.NllbMoeDecoderLayer.forward, torch.ones(1, 2, 4))
    assert seen == [torch]


def test_a_layer_that_asks_nothing_is_left_alone() -> None:
    layer = types.SimpleNamespace()
    assert overflow.clamped(layer, lambda self, x: x, 7) == 7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_is_no_other_where_scores_are_equal(dtype: str, tmp_path: Path) -> None:
    """Doge's attention keeps the best keys, and in 16 bits the last of them often equals the next."""
    doge = next(each for each in registry.architectures() if each.name == "doge")
    folder = str(tiny.write(doge, tmp_path / "doge"))
    source = exporters.load(Made(folder, {"random_weights": True, "dtype": dtype}))
    adapted = adapters.adapt(source)
    assert not [note for note in adapted.notes if "does not fit" in note]
    assert {type(entry.module).__name__ for entry in adapted.replaced} == {"DogeCDMoE", "DogeAttention"}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_sums_over_repeated_rows_are_safe(dtype: str, tmp_path: Path) -> None:
    """JetMoE's attention experts, which are no block: onnxruntime adds rows in float32 only, and loses some that
    ScatterND repeats."""
    config("jetmoe").save_pretrained(tmp_path / "model")
    out = tmp_path / "out.onnx"
    report = sparse_onnx.export(tmp_path / "model", out, random_weights=True, dtype=dtype)
    assert dtype == "float32" or any("the float16 file itself, run on CPU" in note for note in report.notes)
    model = io.load(out)
    annotate(model)
    nodes = [node for node in model.graph if node.op_type.startswith("Scatter")]
    sums = [node for node in nodes if node.attributes.get_string("reduction", "none") == "add"]
    assert {node.outputs[0].dtype for node in sums} == {ir.DataType.FLOAT}
    assert {node.op_type for node in sums} == {"ScatterND", "ScatterElements"}
    assert not any(loses_updates(node) for node in model.graph)


@pytest.mark.slow
def test_nllb_in_float16(tmp_path: Path) -> None:
    config("nllb").save_pretrained(tmp_path / "model")
    report = sparse_onnx.export(
        tmp_path / "model", tmp_path / "out.onnx", random_weights=True, dtype="float16"
    )
    assert report.verify is not None and report.verify.passed and len(report.blocks) == 2
    assert np.isfinite(report.verify.max_rel_error or np.inf)

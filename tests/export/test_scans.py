"""Loops over a sequence become scans that hold for every length; others stay what they are."""

from __future__ import annotations

import types
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import looping  # noqa: E402
import onnxruntime  # noqa: E402

from sparse_onnx.export import scan_source, scans, substitution, translate  # noqa: E402


class Layer(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def rewritten(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """The function with its loop lifted, as a function of its own."""
    code = scans._rewritten(function)
    if code is None:
        return None
    names = {**function.__globals__, **scans._HELPERS, scan_source.SCAN: lambda *args: scans.scan([], *args)}
    names[scan_source.PADDING] = lambda *args: scans.padding([], *args)
    return types.FunctionType(code, names, function.__name__, function.__defaults__)


@pytest.mark.parametrize("function", [looping.writes, looping.appends])
def test_a_lifted_loop_is_right_for_every_length(function: Callable[..., torch.Tensor]) -> None:
    layer, lifted = Layer(function).eval(), Layer(rewritten(function)).eval()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(lifted, (), {"x": torch.randn(2, 7, 4)}, dynamic_shapes=shapes)
    assert not program._guards_code or all("==" not in code for code in program._guards_code)
    model = translate.to_onnx(program, opset=20, input_names=["x"])
    translate.tidy(model)
    assert [node.op_type for node in model.graph.all_nodes()].count("Scan") == 1
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for batch, length in ((1, 1), (3, 2), (2, 7), (1, 40)):
        x = torch.randn(batch, length, 4)
        (actual,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(actual, layer(x).numpy(), rtol=1e-5, atol=1e-6)


def test_an_ordinary_length_runs_the_loop_itself() -> None:
    x, w = torch.randn(2, 5, 4), torch.randn(4, 4)
    assert torch.equal(rewritten(looping.writes)(x, w), looping.writes(x, w))


@pytest.mark.parametrize(
    "function",
    [
        looping.reads_its_index,
        looping.reads_a_neighbour,
        looping.reads_what_it_writes,
        looping.branches,
        looping.reads_its_index_behind,
        looping.reads_a_step_behind,
        looping.writes_in_place,
    ],
)
def test_other_loops_are_left_alone(function: Callable[..., torch.Tensor]) -> None:
    assert rewritten(function) is None


def test_a_triangular_inverse_in_few_steps() -> None:
    a = torch.randn(2, 3, 13, 13, generator=torch.Generator().manual_seed(1)).tril(-1)
    expected = looping.triangular(a.clone(), 13)
    assert torch.allclose(
        substitution.substituted(a, 13), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    fast = rewritten(looping.triangular)
    assert fast is not None and torch.allclose(fast(a.clone(), 13), expected, rtol=1e-4, atol=1e-2)


def test_chunks_are_right_for_every_length() -> None:
    """A number of chunks of 1 is no case of its own."""
    layer, lifted = Layer(looping.chunked).eval(), Layer(rewritten(looping.chunked)).eval()
    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(lifted, (), {"x": torch.randn(2, 7, 4)}, dynamic_shapes=shapes)
        for length in (1, 8, 9, 30):
            x = torch.randn(3, length, 4)
            assert torch.allclose(program.module()(x=x), layer(x), atol=1e-5)


def test_functions_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = types.ModuleType("package.modeling_looping")
    source = "import torch\nfrom torch import nn\nclass Model(nn.Module):\n    pass\n"
    exec(source, modeling.__dict__)
    modeling.Model.__module__ = modeling.__name__
    function = types.FunctionType(
        looping.writes.__code__, {"torch": torch, "__name__": modeling.__name__}, "writes"
    )
    function.__module__ = modeling.__name__
    modeling.writes = function
    monkeypatch.setitem(__import__("sys").modules, modeling.__name__, modeling)
    before = function.__code__
    with scans.lifted(modeling.Model()) as ran:
        assert function.__code__ is not before and ran == []
    assert function.__code__ is before and scan_source.SCAN not in function.__globals__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_that_begins_in_half_precision(dtype: torch.dtype) -> None:
    """Jamba's: zeros of the model's type, which the first step turns into float32. A scan has one type throughout."""

    def step(state: torch.Tensor, factor: torch.Tensor) -> tuple[tuple[torch.Tensor], tuple[torch.Tensor]]:
        after = state * factor + 1
        return (after,), (after.to(dtype),)

    factors = torch.rand(2, 6, 4)
    (state,), (outputs,) = scans.scan([], step, 6, [torch.zeros(2, 4, dtype=dtype)], [(factors, 1)], [])
    expected = torch.zeros(2, 4, dtype=dtype)
    for at in range(6):
        (expected,), (output,) = step(expected, factors[:, at])
        assert torch.equal(outputs[at], output)
    assert state.dtype == torch.float32 and torch.equal(state, expected)

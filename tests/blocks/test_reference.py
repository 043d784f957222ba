"""The numpy reference against a loop over tokens and slots, and against torch."""

from __future__ import annotations

import math
import sys

import ml_dtypes
import numpy as np
import pytest
from moe_cases import Case, label, routings, specs

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, reference

ALL = list(specs())
SWIGLU = ExpertSpec(Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN)


def literal(spec: ExpertSpec, feeds: dict, weights: dict) -> np.ndarray:
    """The definition, one token, slot and neuron at a time."""
    tokens, index, weight = (feeds[key] for key in ("tokens", "expert_index", "expert_weight"))
    experts, outputs = list(weights.values())[-1].shape
    result = [[0.0] * outputs for _ in tokens]
    for t, x in enumerate(tokens):
        for k, e in enumerate(index[t]):
            if e < experts:
                for o, y in enumerate(expert(spec, x, {name: value[e] for name, value in weights.items()})):
                    result[t][o] += float(weight[t, k]) * y
    return np.array(result, np.float64).reshape(len(tokens), outputs)


def expert(spec: ExpertSpec, x: np.ndarray, own: dict) -> list[float]:
    def linear(role: str, values) -> list[float]:
        matrix = own[role] if spec.weight_layout == WeightLayout.OUT_IN else own[role].T
        sums = [sum(float(m) * float(v) for m, v in zip(row, values, strict=True)) for row in matrix]
        return [s + float(b) for s, b in zip(sums, own[f"{role}_bias"], strict=True)]

    if spec.gate_layout == GateLayout.NONE:
        return linear("fc2", [act(spec, p) for p in linear("fc1", x)])
    if spec.gate_layout == GateLayout.SEPARATE:
        pairs, last = zip(linear("gate", x), linear("up", x), strict=True), "down"
    else:
        p, last = linear("fc1", x), "fc2"
        half = len(p) // 2
        halves = (p[:half], p[half:]) if spec.gate_layout == GateLayout.CONCATENATED else (p[::2], p[1::2])
        pairs = zip(*halves, strict=True)
    hidden = []
    for g, u in pairs:
        if spec.limit > 0 and spec.activation is Activation.SILU_SOFTCAP:
            u = spec.limit * math.tanh(u / spec.limit)
        elif spec.limit > 0:
            g, u = min(g, spec.limit), max(-spec.limit, min(u, spec.limit))
        hidden.append(act(spec, g) * (u + spec.beta))
    return linear(last, hidden)


def act(spec: ExpertSpec, x: float) -> float:
    return {
        Activation.SILU: lambda: x / (1 + math.exp(-spec.alpha * x)),
        Activation.GELU: lambda: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        Activation.GELU_TANH: lambda: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        Activation.RELU: lambda: max(x, 0.0),
        Activation.RELU2: lambda: max(x, 0.0) ** 2,
        Activation.SILU_SOFTCAP: lambda: spec.alpha * math.tanh(x / spec.alpha) / (1 + math.exp(-x)),
    }[spec.activation]()


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_is_the_definition(spec: ExpertSpec) -> None:
    case = Case(spec, hidden=4, inner=3, outputs=5)
    rng = np.random.default_rng(0)
    weights = case.weights(rng)
    for name, index in routings(case.experts, case.top_k, rng).items():
        feeds = case.routing(rng, index)
        expected = literal(spec, feeds, weights)
        actual = reference(spec, *feeds.values(), **weights)
        assert actual.dtype == np.float32 and actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected.astype(np.float32), rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("activation", Activation, ids=lambda activation: activation.label)
def test_is_what_torch_computes(activation: Activation) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    functions = {
        Activation.SILU: functional.silu,
        Activation.GELU: functional.gelu,
        Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
        Activation.RELU: functional.relu,
        Activation.RELU2: lambda x: functional.relu(x).square(),
        Activation.SILU_SOFTCAP: lambda x: torch.tanh(x) * torch.sigmoid(x),
    }
    spec = ExpertSpec(activation, GateLayout.CONCATENATED, WeightLayout.OUT_IN)
    case = Case(spec, experts=1, top_k=1)
    rng = np.random.default_rng(0)
    weights = case.weights(rng)
    feeds = case.routing(rng, np.zeros((9, 1), np.int64))
    x, w = (torch.from_numpy(feeds[key]).double() for key in ("tokens", "expert_weight"))
    fc1, fc1_bias, fc2, fc2_bias = (torch.from_numpy(value[0]).double() for value in weights.values())
    gate, up = functional.linear(x, fc1, fc1_bias).chunk(2, dim=-1)
    expected = w * functional.linear(functions[activation](gate) * up, fc2, fc2_bias)
    actual = reference(spec, *feeds.values(), **weights)
    np.testing.assert_allclose(actual, expected.float().numpy(), rtol=1e-6, atol=1e-7)


def test_clamped_swiglu_is_gpt_oss() -> None:
    """The formula of transformers' GptOssExperts, written out."""
    torch = pytest.importorskip("torch")
    spec = ExpertSpec(Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, 7.0, 1.702, 1.0)
    case = Case(spec, experts=1, top_k=1)
    rng = np.random.default_rng(0)
    weights = case.weights(rng)
    feeds = case.routing(rng, np.zeros((9, 1), np.int64))
    feeds["tokens"] *= 20  # far past the clamps
    x, w = (torch.from_numpy(feeds[key]).double() for key in ("tokens", "expert_weight"))
    fc1, fc1_bias, fc2, fc2_bias = (torch.from_numpy(value[0]).double() for value in weights.values())
    gate_up = x @ fc1 + fc1_bias
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    assert (gate == 7).any() and (up == 7).any() and (up == -7).any()
    expected = w * (((up + 1) * (gate * torch.sigmoid(gate * 1.702))) @ fc2 + fc2_bias)
    actual = reference(spec, *feeds.values(), **weights)
    np.testing.assert_allclose(actual, expected.float().numpy(), rtol=1e-6, atol=1e-6)


def test_types() -> None:
    """Nothing is rounded before the end: bfloat16 and float16 results are the exact ones, rounded once."""
    case = Case(SWIGLU, dtype="bfloat16", weight_dtype="float16")
    rng = np.random.default_rng(0)
    weights, feeds = case.weights(rng), case.routing(rng, rng.integers(0, 6, (4, 2)))
    wide = {key: value.astype(np.float64) for key, value in (feeds | weights).items()}
    wide["expert_index"] = feeds["expert_index"]
    exact = reference(SWIGLU, **wide)
    actual = reference(SWIGLU, **feeds, **weights)
    assert exact.dtype == np.float64 and actual.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(actual, exact.astype(ml_dtypes.bfloat16))
    single = reference(SWIGLU, **wide, accumulate=np.float32)
    np.testing.assert_allclose(single, exact, rtol=1e-4, atol=1e-5)
    assert (single != exact).any()


class Watched:
    """A packed weight that notes which experts are read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.read = array, array.shape, set()

    def __getitem__(self, expert: int) -> np.ndarray:
        self.read.add(int(expert))
        return self.array[expert]


def test_reads_only_experts_that_are_hit() -> None:
    case = Case(SWIGLU)
    rng = np.random.default_rng(0)
    weights = {name: Watched(value) for name, value in case.weights(rng).items()}
    reference(SWIGLU, *case.routing(rng, np.array([[1, 3], [3, 5]])).values(), **weights)
    assert all(weight.read == {1, 3} for weight in weights.values())


@pytest.mark.parametrize("layout", WeightLayout)
def test_a_matrix_is_converted_part_by_part(layout: WeightLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(ExpertSpec(Activation.GELU, GateLayout.CONCATENATED, layout))
    rng = np.random.default_rng(0)
    weights, feeds = case.weights(rng), case.routing(rng, rng.integers(0, 5, (4, 2)))
    whole = reference(case.spec, **feeds, **weights)
    monkeypatch.setattr(sys.modules["sparse_onnx.blocks.reference"], "_PART_BYTES", 100)
    np.testing.assert_allclose(reference(case.spec, **feeds, **weights), whole, rtol=1e-6)


def test_memory_mapped_weights(tmp_path) -> None:
    case = Case(SWIGLU)
    rng = np.random.default_rng(0)
    weights, feeds = case.weights(rng), case.routing(rng, rng.integers(0, 6, (4, 2)))
    mapped = {}
    for name, value in weights.items():
        value.tofile(tmp_path / name)
        mapped[name] = np.memmap(tmp_path / name, value.dtype, "r", shape=value.shape)
    expected = reference(SWIGLU, **feeds, **weights)
    np.testing.assert_array_equal(reference(SWIGLU, **feeds, **mapped), expected)


def test_refused() -> None:
    case = Case(SWIGLU)
    rng = np.random.default_rng(0)
    weights, feeds = case.weights(rng), case.routing(rng, np.array([[0, 1]]))
    for bad in (-1, 6):
        with pytest.raises(ValueError, match="outside"):
            reference(SWIGLU, **feeds | {"expert_index": np.array([[0, bad]])}, **weights)
    del weights["fc2_bias"]
    with pytest.raises(ValueError, match="fc2_bias"):
        reference(SWIGLU, **feeds, **weights)

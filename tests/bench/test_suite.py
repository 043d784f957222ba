"""The layers that the suite measures, and the rivals that are built of them, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench import contestants, layers, rivals  # noqa: E402
from sparse_onnx.bench.measure import Contestant  # noqa: E402
from sparse_onnx.core.errors import VerificationError  # noqa: E402

SMALL = {
    "mixtral": lambda: layers.mixtral_layers(hidden=32, experts=4, top_k=2, inner=48, layers=2),
    "qwen3": lambda: layers.qwen3_layers(hidden=32, experts=8, top_k=4, inner=16, layers=1),
}


@pytest.fixture(params=SMALL)
def case(request: pytest.FixtureRequest) -> layers.Case:
    return layers.Case(request.param, SMALL[request.param])


def test_layers_are_the_same_every_time(case: layers.Case) -> None:
    x = torch.randn(5, 32)
    assert torch.equal(case.build()(x), case.build()(x))


def test_routing_uses_every_expert_and_is_no_tie(case: layers.Case) -> None:
    built = case.build()
    logits = torch.randn(512, 32) @ built.parts[0].gate.weight.T
    chosen = logits.topk(built.top_k).indices
    assert len(chosen.unique()) == logits.shape[1]
    assert logits.std() > 1, "near-ties would be common"


def test_the_dense_form_is_the_same_function(case: layers.Case) -> None:
    built = case.build()
    x = torch.randn(9, 32)
    torch.testing.assert_close(rivals.DenseLayers(built)(x), built(x), rtol=1e-4, atol=1e-4)


def test_dense_experts_stand_in_for_the_modules(case: layers.Case) -> None:
    experts = case.build().parts[0].experts
    count = experts.gate_up_proj.shape[0]
    x, index = torch.randn(9, 32), torch.stack([torch.randperm(count)[:2] for _ in range(9)])
    weight = torch.rand(9, 2)
    expected = experts(x, index, weight)
    torch.testing.assert_close(
        rivals.dense_experts(experts, x, index, weight), expected, rtol=1e-4, atol=1e-4
    )


def test_the_contrib_operator_is_the_same_function(case: layers.Case, tmp_path: Path) -> None:
    built = case.build()
    path = tmp_path / "contrib.onnx"
    rivals.build_contrib_moe(built, path)
    session = contestants.create(path, 1)
    for tokens in (1, 6):
        x = torch.randn(tokens, 32)
        actual = session.run(None, {"hidden_states": x.numpy()})[0]
        np.testing.assert_allclose(actual, built(x).numpy(), rtol=1e-4, atol=1e-4)


def test_active_weights_are_those_of_the_chosen_experts(case: layers.Case) -> None:
    built = case.build()
    views = rivals.active_weights(built, np.random.default_rng(0).standard_normal((1, 32), dtype=np.float32))
    block = built.parts[0]
    one_expert = block.experts.gate_up_proj[0].numel() + block.experts.down_proj[0].numel()
    assert sum(view.size for view in views) == len(built.parts) * (
        built.top_k * one_expert + block.gate.weight.numel()
    )
    assert all(np.shares_memory(view, view.base) for view in views if view.base is not None)


def test_a_wrong_contestant_is_not_timed() -> None:
    right, wrong = (
        Contestant("right", lambda _: np.ones((2, 3))),
        Contestant("wrong", lambda _: np.ones((2, 3)) * 1.001),
    )
    contestants.check(right, [right], 1)
    with pytest.raises(VerificationError, match="wrong"):
        contestants.check(right, [wrong], 1)
    with pytest.raises(VerificationError, match="instead of"):
        contestants.check(right, [Contestant("flat", lambda _: np.ones(6))], 1)
    with pytest.raises(VerificationError):
        contestants.check(right, [Contestant("nan", lambda _: np.full((2, 3), np.nan))], 1)

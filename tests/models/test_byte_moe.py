"""models/byte_moe.py: the architecture and its interface to exporters. Weights: test_byte_moe_weights.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_onnx.core.errors import ModelError
from sparse_onnx.models import byte_moe
from sparse_onnx.models.byte_moe import ByteMoE, ByteMoEConfig, Experts

SMALL = ByteMoEConfig(hidden=24, layers=2, heads=3, experts=5, top_k=2, inner=20)


@pytest.fixture(scope="module")
def model() -> ByteMoE:
    torch.manual_seed(0)
    return ByteMoE(SMALL).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def ids(batch: int, sequence: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, (batch, sequence), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 11), (2, 300)])
def test_shapes(model, batch, sequence):
    logits, routing = model.with_routing(ids(batch, sequence))
    assert logits.shape == (batch, sequence, 256) and logits.dtype == torch.float32
    assert [x.shape for x in routing] == [(batch * sequence, 5)] * 2


@pytest.mark.parametrize("position", [0, 5, 10])
def test_a_later_byte_never_changes_earlier_logits(model, position):
    first = ids(2, 11)
    second = first.clone()
    second[:, position] = (second[:, position] + 1) % 256
    before, after = model(first), model(second)
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=1e-5, atol=1e-5)
    assert (before[:, position:] - after[:, position:]).abs().amax(-1).min() > 1e-3


def test_a_row_does_not_depend_on_the_others_of_its_batch(model):
    batch = ids(5, 13)
    alone = torch.cat([model(row[None]) for row in batch])
    torch.testing.assert_close(model(batch), alone, rtol=1e-5, atol=1e-5)


def test_positions_are_relative(model):
    """Rotary scores depend on distances only: a layer's attention over a shifted text is the same."""
    cos, sin = byte_moe._rotary(20, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    score = [
        byte_moe._rotate(q, cos[i + 3], sin[i + 3]) @ byte_moe._rotate(k, cos[i], sin[i]) for i in (0, 7, 16)
    ]
    torch.testing.assert_close(score[0], score[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score[0], score[2], rtol=1e-4, atol=1e-4)
    other = byte_moe._rotate(q, cos[5], sin[5]) @ byte_moe._rotate(k, cos[0], sin[0])
    assert abs(other - score[0]) > 1e-3


def experts_by_definition(experts: Experts, x, index, weight):
    result = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weight.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if expert < experts.num_experts:
                gate, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
                result[token] += share * (experts.down_proj[expert].double() @ (F.silu(gate) * up))
    return result.float()


@pytest.mark.parametrize(
    "case", ["spread", "one token", "no token", "all to one", "dropped", "twice the same"]
)
def test_experts_are_their_definition(model, case):
    experts = model.layers[0].moe.experts
    generator = torch.Generator().manual_seed(3)
    tokens = {"one token": 1, "no token": 0}.get(case, 17)
    x = torch.randn(tokens, 24, generator=generator)
    index = torch.rand(tokens, 5, generator=generator).topk(2).indices
    if case == "all to one":
        index[:, 0], index[:, 1] = 3, 1
    if case == "dropped":
        index[::2, 1] = 5
    if case == "twice the same":
        index[:, 1] = index[:, 0]
    weight = torch.rand(tokens, 2, generator=generator)
    expected = experts_by_definition(experts, x, index, weight)
    torch.testing.assert_close(experts(x, index, weight), expected, rtol=1e-5, atol=1e-5)
    assert tokens == 0 or expected.abs().max() > 0.05


def test_the_experts_have_the_interface_of_transformers(model, monkeypatch):
    """transformers' own implementations run on the module as it is."""
    moe = pytest.importorskip("transformers.integrations.moe")
    for added_by_its_decorator in ("_is_expert_parallel", "has_post_expert_norm"):
        monkeypatch.setattr(Experts, added_by_its_decorator, False, raising=False)
    experts = model.layers[0].moe.experts
    x, index, weight = torch.randn(9, 24), torch.randint(5, (9, 2)), torch.rand(9, 2)
    for implementation in (moe.batched_mm_experts_forward, moe.grouped_mm_experts_forward):
        torch.testing.assert_close(
            implementation(experts, x, index, weight), experts(x, index, weight), rtol=1e-5, atol=1e-5
        )


def test_routing_weights_are_the_renormalised_top_probabilities(model):
    moe = model.layers[0].moe
    caught = []
    handle = moe.experts.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    try:
        _, router_logits = moe(torch.randn(2, 3, 24))
    finally:
        handle.remove()
    _, index, weight = caught[0]
    for logits, chosen, shares in zip(router_logits.double(), index, weight, strict=True):
        order = logits.argsort(descending=True)[:2]
        assert chosen.tolist() == order.tolist()
        expected = logits[order].exp() / logits[order].exp().sum()
        torch.testing.assert_close(shares.double(), expected, rtol=1e-5, atol=1e-6)


def dense_experts(experts, hidden_states, top_k_index, top_k_weights):
    """Every expert for every token: what an exporter without a sparse form makes of the module."""
    share = (F.one_hot(top_k_index, experts.num_experts) * top_k_weights[..., None]).sum(1)
    inner = experts._apply_gate(torch.einsum("th,eih->tei", hidden_states, experts.gate_up_proj))
    return torch.einsum("tei,ehi,te->th", inner, experts.down_proj, share)


def test_it_exports_with_free_batch_and_sequence(model, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    expected = {shape: model(ids(*shape)) for shape in [(1, 1), (1, 9), (5, 2), (2, 70), (7, 1)]}
    monkeypatch.setattr(Experts, "forward", dense_experts)
    path = tmp_path / "model.onnx"
    axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    torch.onnx.export(
        model,
        (),
        str(path),
        kwargs={"input_ids": ids(3, 11)},
        dynamo=True,
        dynamic_shapes=axes,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [type(size) for size in session.get_inputs()[0].shape] == [str, str]
    for shape, logits in expected.items():
        found = session.run(None, {session.get_inputs()[0].name: ids(*shape).numpy()})[0]
        np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-4, err_msg=str(shape))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_model_is_a_model_error(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="not the weights of a byte MoE") as caught:
        byte_moe.read(path)
    assert "\n" not in str(caught.value) and caught.value.where == str(path)

"""models/routing.py: balance, load and margins."""

import pytest
import torch

from sparse_onnx.models import routing


def test_balanced_routing_costs_one():
    logits = 50 * torch.eye(4) + 49 * torch.eye(4).roll(1, 0)  # each expert is first once and second once
    assert routing.load_balancing_loss(torch.zeros(8, 4) + logits.repeat(2, 1), 2) == pytest.approx(
        1.0, abs=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_collapsed_routing_costs_experts_over_top_k(top_k):
    logits = torch.full((16, 8), -50.0)
    logits[:, :top_k] = torch.tensor([50.0, 50.0 - 1e-3])[:top_k]
    assert routing.load_balancing_loss(logits, top_k).item() == pytest.approx(8 / top_k, rel=1e-3)


def test_the_loss_pushes_from_the_loaded_expert_to_the_idle():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4, requires_grad=True)
    routing.load_balancing_loss(logits, 1).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 2] < 0).all()


def test_load_counts_every_choice():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0]])
    assert routing.expert_load(logits, 2).tolist() == [0.5, 0.25, 0.25, 0.0]


def test_margin_is_between_the_last_chosen_and_the_first_not_chosen():
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    assert routing.margin(logits, 2).tolist() == [1.5, 0.0]


def test_statistics_has_one_entry_a_layer():
    layers = [torch.randn(1000, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
    found = routing.statistics(layers, 2)
    assert len(found) == 3
    for entry in found:
        assert sum(entry.load) == pytest.approx(1.0) and 0 < entry.margin_p1 < entry.margin_p10

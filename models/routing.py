"""What routers do: the loss that balances them, how loaded the experts are, how sure the choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Tensor, top_k: int) -> Tensor:
    """``E · sum over e of f_e · P_e``: 1 if balanced, E / top_k if all tokens go to the same experts.

    f_e is the share of all assignments that expert e got, P_e its mean probability (Switch Transformer,
    arXiv 2101.03961, equation 4; over top-k assignments as in Mixtral).

    Args:
        router_logits: ``[T, E]``.
    """
    return (
        router_logits.shape[-1]
        * (expert_load(router_logits, top_k) * router_logits.softmax(dim=-1).mean(dim=0)).sum()
    )


def expert_load(router_logits: Tensor, top_k: int) -> Tensor:
    """Each expert's share of the assignments: ``[T, E] -> [E]``, which sums to 1."""
    chosen = router_logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=router_logits.shape[-1]) / chosen.numel()


def margin(router_logits: Tensor, top_k: int) -> Tensor:
    """By how much the last chosen expert's logit is above the first not chosen: ``[T, E] -> [T]``."""
    highest = router_logits.topk(top_k + 1, dim=-1).values
    return highest[:, top_k - 1] - highest[:, top_k]


@dataclasses.dataclass(frozen=True)
class RoutingStatistics:
    """Of one layer on some text: shares of the assignments, percentiles of the margin between logits."""

    load: list[float]
    margin_p1: float
    margin_p10: float


def statistics(router_logits: Sequence[Tensor], top_k: int) -> list[RoutingStatistics]:
    """One entry for each layer's ``[T, E]``."""
    result = []
    for logits in router_logits:
        p1, p10 = torch.quantile(margin(logits, top_k), torch.tensor([0.01, 0.10])).tolist()
        result.append(RoutingStatistics(expert_load(logits, top_k).tolist(), p1, p10))
    return result

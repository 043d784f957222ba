"""Modules whose control flow looks like a test for emptiness, and is more, or is one in disguise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, EXPERTS = 8, 4


class Routed(nn.Module):
    """One expert a token."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.gate = nn.Parameter(4 * torch.randn(HIDDEN, EXPERTS, generator=generator))
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        for expert in self.experts:
            nn.init.normal_(expert.weight, generator=generator)
            nn.init.normal_(expert.bias, generator=generator)
        self.bias = nn.Parameter(torch.randn(HIDDEN, generator=generator))
        self.calls = 0

    def index(self, x: Tensor) -> Tensor:
        return (x @ self.gate).argmax(-1)

    def masks(self, x: Tensor) -> Any:
        index = self.index(x)
        return [index == expert for expert in range(EXPERTS)]


class AddsBias(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                out[mask] += expert(x[mask])
                out[:1] += self.bias
        return out


class ReturnsCount(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, used = torch.zeros_like(x), 0
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                out[mask] += expert(x[mask])
                used += 1
        return out / used


class CountsInAttribute(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, self.calls = torch.zeros_like(x), 0
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                out[mask] += expert(x[mask])
                self.calls += 1
        return out * self.calls


class CountsInDict(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, seen = torch.zeros_like(x), {}
        for number, mask in enumerate(self.masks(x)):
            if mask.any():
                out[mask] += self.experts[number](x[mask])
                seen[number] = True
        return out * len(seen)


class ElseSide(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                out[mask] += expert(x[mask])
            else:
                out += self.bias
        return out


class OtherMask(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, masks = torch.zeros_like(x), self.masks(x)
        for number, expert in enumerate(self.experts):
            other = masks[number - 1]
            if masks[number].any():
                out[other] += expert(x[other])
        return out


class Breaks(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if not mask.any():
                break
            out[mask] += expert(x[mask])
        return out


class WritesMaskBetween(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            some = mask.any()
            mask[..., 0] = True
            if some:
                out[mask] += expert(x[mask])
        return out


class WritesMaskInside(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                mask[..., 0] = True
                out[mask] += expert(x[mask])
        return out


class WritesMaskBefore(Routed):
    """The mask is another when it is tested, and from then on the same: no test of emptiness is wrong here."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, mask in enumerate(self.masks(x)):
            if number % 2:
                mask[..., :1] = False
            if mask.any():
                out[mask] += self.experts[number](x[mask])
        return out


class RebindsMask(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.sum() > 0:
                mask = ~mask
                out[mask] += expert(x[mask])
        return out


class StacksList(Routed):
    def forward(self, x: Tensor) -> Tensor:
        means = []
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                means.append(expert(x[mask]).sum())
        return torch.stack(means).mean() + x


class CountsList(Routed):
    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                rows.append(expert(x[mask]))
        return torch.cat(rows).sum() / len(rows) + x


class StacksRows(Routed):
    """`stack` reads the list past its methods."""

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                rows.append(expert(x[mask]).sum(0, keepdim=True)[:0])
        return torch.stack(rows).sum() + x


class RemembersLast(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, last = torch.zeros_like(x), 0
        for number, mask in enumerate(self.masks(x)):
            if mask.any():
                out[mask] += self.experts[number](x[mask])
                last = number
        return out * (last + 1)


class FirstOnly(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out, first = torch.zeros_like(x), None
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                rows = expert(x[mask])
                if first is None:
                    first = rows.mean()
                out[mask] += rows
        return out * first


class SecondCondition(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any() and x.mean() > 0:
                out[mask] += expert(x[mask])
        return out


class AtLeastTwo(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.sum() > 1:
                out[mask] += expert(x[mask])
        return out


class SignedSum(Routed):
    """A sum that is not above zero says nothing of terms of both signs."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            share = mask.to(x.dtype) * torch.sign(x[..., 0])
            if share.sum() > 0:
                out = out + share[..., None] * expert(x)
        return out


class WritesThroughView(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        flat = out.view(-1, HIDDEN)
        for expert, mask in zip(self.experts, self.masks(x.reshape(-1, HIDDEN)), strict=True):
            if mask.any():
                flat[mask] += expert(x.reshape(-1, HIDDEN)[mask])
                flat.mul_(1.5)
        return out


class RebindsThenWrites(Routed):
    """Where no token is chosen `out` stays the tensor that `kept` is too."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x).flatten(0, -2)
        kept = out
        row = torch.where(self.masks(x)[0].flatten())[0]
        if len(row) > 0:
            out = out.index_add(0, row, self.experts[0](x.flatten(0, -2)[row]))
        out += 1
        return out + kept


class Normalises(Routed):
    """Its body cannot be run on no rows: `max` of nothing."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            if mask.any():
                rows = expert(x[mask])
                out[mask] = rows - rows.max()
        return out


class Halves(Routed):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x * 0.5
        return x


class PicksNumber(Routed):
    def forward(self, x: Tensor) -> Tensor:
        scale = 2 if x.mean() > 0 else 3
        return x * scale


class TriesFirst(Routed):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, mask in zip(self.experts, self.masks(x), strict=True):
            try:
                if not mask.any():
                    continue
                out[mask] += expert(x[mask])
            finally:
                out = out + 0
        return out


class Raises(Routed):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            raise ValueError("not a number")
        assert (x.abs() < 1e6).all(), "too large"
        return self.experts[0](x)


class Closure(Routed):
    """A nested function, a helper outside the class, `super()`, a default argument."""

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        out = torch.zeros_like(x)

        def run(number: int, mask: Tensor) -> None:
            if not mask.any():
                return
            out[mask] = add(out[mask], self.experts[number](x[mask]) * scale)

        for number, mask in enumerate(super().masks(x)):
            run(number, mask)
        return out


def add(left: Tensor, right: Tensor) -> Tensor:
    return left + right if right.numel() else left


class SortedHits(Routed):
    """`sorted(set(...))` of the experts in use."""

    def forward(self, x: Tensor) -> Tensor:
        out, index = torch.zeros_like(x), self.index(x)
        for number in sorted(set(index.flatten().tolist())):
            mask = index == number
            out[mask] = self.experts[number](x[mask])
        return out


class OneHotHits(Routed):
    """Hits of a multi-hot matrix, by a comparison with all experts."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen = (tokens @ self.gate).topk(2, dim=-1).indices
        hot = (chosen[..., None] == torch.arange(EXPERTS)).any(1)
        out = torch.zeros_like(tokens)
        for number in hot.any(0).nonzero().flatten():
            row = hot[:, number].nonzero().squeeze(1)
            out = out.index_add(0, row, self.experts[number](tokens[row]))
        return out.view_as(x)


class MultiHotCounts(Routed):
    """`scatter_` into a matrix, counts of its columns."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weight, chosen = (tokens @ self.gate).softmax(-1).topk(2, dim=-1)
        gates = torch.zeros(tokens.shape[0], EXPERTS).scatter_(1, chosen, weight)
        counts = torch.zeros(tokens.shape[0], EXPERTS, dtype=torch.long).scatter_(1, chosen, 1).sum(0)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            if int(counts[number]) > 0:
                row = (chosen == number).any(-1)
                out[row] += gates[row, number].unsqueeze(-1) * F.relu(expert(tokens[row]))
        return out.unflatten(0, x.shape[:-1])


class PaddedHits(Routed):
    """Hits that are not known to be experts: they come with the input's values."""

    def forward(self, x: Tensor) -> Tensor:
        for number in torch.unique((x * 2).long()):
            x = x + number
        return x


class SetOfHits(Routed):
    """A set of numbers has no order, and each turn writes over what the one before wrote."""

    def forward(self, x: Tensor) -> Tensor:
        out, index = torch.zeros_like(x), self.index(x)
        for number in set(index.flatten().tolist()):
            out[index >= number] = self.experts[number](x[index >= number])
        return out


class Decorated(Routed):
    """A decorator, a private method, a keyword argument, `elif`."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, mask in enumerate(self.masks(x)):
            self.__add(out=out, mask=mask, number=number, x=x)
        return out

    def __add(self, out: Tensor, mask: Tensor, number: int, x: Tensor) -> None:
        if self.training:
            raise RuntimeError("not now")
        elif not mask.any():
            pass
        else:
            out[mask] += self.experts[number](x[mask])


class LeavesLoops(Routed):
    """Loops in loops, left by `break`, `continue` and `return`, of tensors and of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(4):
            if turn == 3:
                break
            for expert in self.experts:
                if turn == 1:
                    continue
                x = torch.tanh(expert(x))
                if turn == 2 and expert is self.experts[1]:
                    break
            else:
                x = x + self.bias
            if x.mean() > 0.05:
                return x * 2
        return x


class DropsBeyond(Routed):
    """Tokens beyond a capacity, which `max` and `min` bound, in a `while` of Python's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        capacity = min(max(int(1.1 * len(tokens) / EXPERTS), 2), tokens.shape[0])
        out, number = tokens.clone(), 0
        while number < EXPERTS:
            row = (self.index(tokens) == number).nonzero(as_tuple=True)[0]
            if row.shape[0] > capacity:
                row = row[:capacity]
            out[row] = self.experts[number](tokens[row])
            number += 1
        return out.view(x.shape)

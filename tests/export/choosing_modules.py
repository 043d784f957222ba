"""Modules whose Python chooses by what depends on tensors: items of lists, one of several modules, a larger number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from test_lifting_rows import Routed
from torch import Tensor, nn


class FirstOfSome(Routed):
    """The first item is not there for all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        index, jobs = self.index(x), []
        for e in range(3):
            if (index == e).sum() > 2:
                jobs.append(e)
        for e in jobs:
            return self.experts[e](x)
        return x


class FirstHit(Routed):
    def forward(self, x: Tensor) -> Tensor:
        for e in torch.unique(self.index(x)):
            x = self.experts[e](x)  # type: ignore[index]
            if e > 0:
                break
        return x


class Grows(Routed):
    """A loop over a list that it adds to."""

    def forward(self, x: Tensor) -> Tensor:
        index, jobs = self.index(x), []
        for e in range(3):
            if (index == e).any():
                jobs.append((e, 2))
        for e, left in jobs:
            x = self.experts[e](x)
            if left:
                jobs.append((e, left - 1))
        return x


class Collected(Routed):
    """Rows, and the numbers of their experts, of those that have some; looped over later."""

    def forward(self, x: Tensor) -> Tensor:
        index, out, jobs, rows, outs = self.index(x), torch.zeros_like(x), [], [], []
        for e, expert in enumerate(self.experts):
            mine = torch.where(index == e)[0]
            if mine.numel() == 0:
                continue
            jobs.append((e, mine))
            rows.append(mine)
            outs.append(expert(x[mine]))
        for e, mine in jobs:
            out[mine] += x[mine] * (e + 1)
        for mine, own in zip(rows, outs):  # noqa: B905 - as people write it
            out.index_add_(0, mine, own)
        return out


class CollectedBesideAll(Routed):
    """The second of those that have rows is not the second expert."""

    def forward(self, x: Tensor) -> Tensor:
        index, out, rows = self.index(x), torch.zeros_like(x), []
        for e in range(3):
            mine = torch.where(index == e)[0]
            if mine.numel():
                rows.append(mine)
        for mine, expert in zip(rows, self.experts):  # noqa: B905
            out[mine] = expert(x[mine])
        return out


class CollectedNumbers(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, used = self.index(x), []
        for e in range(3):
            if (index == e).any():
                used.append(e)
        return x + torch.tensor(used).sum()


class CollectedThenChanged(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, used = self.index(x), []
        some = F.one_hot(index, 3).sum(0) > 0
        for e in range(3):
            if some[e]:
                used.append(e)
        some[:] = True
        for e in used:
            x = x + self.experts[e](x)
        return x


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        if rows.numel() == 0:
            return x[:0]
        return x[rows]


class AutogradFunction(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(index == e)[0]
            out[rows] = expert(_Pick.apply(x, rows))
        return out


class RowsAndSlots(Routed):
    """Both sides need rows and slots, which are views of one tensor; a result that nobody takes differs."""

    def forward(self, x: Tensor) -> Tensor:
        weight, index = (x @ self.gate).softmax(-1).topk(2)
        out = torch.zeros_like(x)

        def run(e: int) -> int:
            nonlocal out
            rows, slots = torch.where(index == e)
            if rows.numel() == 0:
                return 0
            out = out.index_add(0, rows, self.experts[e](x[rows]) * weight[rows, slots, None])
            return 1

        for e in range(3):
            run(e)
        return out


class Listed(Routed):
    """Comprehensions that leave some out; `any` and `all` of truths."""

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=3).tolist()
        chunks = x[order].split(counts)
        outs = [self.experts[e](rows) for e, rows in enumerate(chunks) if rows.shape[0] > 0]
        out[order] = torch.cat(outs)
        for e in [e for e in range(3) if counts[e] > 0 and e != 1]:
            out[index == e] += self.experts[e](x[index == e])
        masks = [index == e for e in range(3)]
        if any(mask.all() for mask in masks) or not all(mask.any() for mask in masks):
            return out * 2
        return out


class OneOfThem(Routed):
    """One expert for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x.mean(0) @ self.gate
        first, second = scores.argmax().item(), scores.topk(2).indices[1]
        other = self.experts[second]
        return self.experts[first](x) + 2 * other(x)


class OneOfTooMany(Routed):
    """Numbers of the gate that no expert has."""

    def forward(self, x: Tensor) -> Tensor:
        number = int((x.sum() * 0).abs())
        return self.experts[number](x)


class OneAsked(Routed):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.experts[(x.mean(0) @ self.gate).argmax().item()]
        return x @ chosen.weight


class ByKey(Routed):
    def forward(self, x: Tensor) -> Tensor:
        functions = {0: torch.relu, 1: torch.tanh, 2: torch.sigmoid}
        number = self.index(x)[0].item()
        return functions[number](x)  # type: ignore[index]


class LeastFirst(Routed):
    def forward(self, x: Tensor) -> Tensor:
        counts = torch.bincount(self.index(x), minlength=3).tolist()
        for e in sorted(range(3), key=lambda e: counts[e]):
            x = self.experts[e](x)
        return x


class Between(Routed):
    """Chained comparisons, and numbers in tuples and sets."""

    def forward(self, x: Tensor) -> Tensor:
        number, mean = self.index(x)[0].item(), x.mean()
        if number in (0, 2):
            x = self.experts[0](x)
        if number not in {1, 2} or -0.1 < mean < 0.1:
            x = x * 2
        return x + 1 if 0 < number < 2 else x


class LargestOf(Routed):
    """Python's `max` of a tensor and a size."""

    def forward(self, x: Tensor) -> Tensor:
        index = self.index(x)
        classes = max(index.max() + 2, x.shape[0])
        return x + F.one_hot(index, classes)[:, : x.shape[0]].sum(1, keepdim=True)


class Normed(Routed):
    """Batch normalisation, and a layer that torch has run over a sequence, of rows whose number is open."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.copy_(torch.linspace(-1, 1, 8))  # type: ignore[union-attr]
        self.norm.running_var.copy_(torch.linspace(0.5, 2, 8))  # type: ignore[union-attr]
        self.recurrent = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = index == e
            if mine.any():
                states, _ = self.recurrent(x[mine].unflatten(1, (2, 4)))
                out[mine] = self.norm(expert(x[mine])) + states[:, -1]
        return out


RIGHT = [
    Collected,
    AutogradFunction,
    RowsAndSlots,
    LargestOf,
    Listed,
    Normed,
    OneOfThem,
    Between,
]
#: And the statement that the refusal names, with a part of its reason.
REFUSED: dict[type[Routed], tuple[str, str]] = {
    FirstOfSome: ("for e in jobs:", "leaves the loop half-way"),
    FirstHit: ("for e in torch.unique(", "leaves the loop half-way"),
    Grows: ("for e, left in jobs:", "decides how many items a list has"),
    CollectedBesideAll: ("if mine.numel():", "decides how many items a list has"),
    CollectedNumbers: ("if (index == e).any():", "decides how many items a list has"),
    ByKey: ("return functions[number](x)", "needs a number or truth that depends on tensor values"),
    LeastFirst: ("for e in sorted(range(3)", "needs a number or truth that depends on tensor values"),
    OneOfTooMany: ("return self.experts[number](x)", "is not known to be one of them"),
    OneAsked: ("chosen = self.experts", "asks for more than the answer"),
    CollectedThenChanged: ("if some[e]:", "decides how many items a list has"),
}

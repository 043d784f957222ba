"""Modules that ask Python about values which depend on tensors: by `isinstance`, `match`, `except`, numpy, texts."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from test_lifting_rows import Routed
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


class Kinds(Routed):
    """Lists, numbers and truths are of Python's classes."""

    def taken(self, x: Tensor, rows: Any) -> Tensor:
        return x[rows] if isinstance(rows, list) and type(rows) is list else x[rows] * 2

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        counts = torch.bincount(index, minlength=3).tolist()
        for e, expert in enumerate(self.experts):
            rows = torch.where(index == e)[0]
            scale = 1 / (1 + counts[e]) if isinstance(counts[e], int) else 5.0
            out[rows] = expert(self.taken(x, rows.tolist())) * scale
        return out


class Matched(Routed):
    def rows(self, rows: Tensor) -> float:
        match rows.numel():
            case 0:
                return 0.5
            case 1 | 2 if not self.training:
                return 2.0
            case _:
                return 1.0

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(index == e)[0]
            match rows.numel():
                case 0:
                    continue
                case number:
                    out[rows] = expert(x[rows]) * (1 + number)
        return out


class MatchedList(Routed):
    def forward(self, x: Tensor) -> Tensor:
        match torch.unique(self.index(x)).tolist():
            case [only]:
                return self.experts[only](x)
            case _:
                return x


class ExceptAnything(Routed):
    """What the trace refuses would be handled."""

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        try:
            hits = [int(e) for e in torch.unique(index).tolist()]
        except Exception:
            hits = [0]
        for e in hits:
            out[index == e] = self.experts[e](x[index == e])
        return out


class ExceptEmpty(Routed):
    """torch has no largest of no rows, and the trace does not know."""

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), x
        for e, expert in enumerate(self.experts):
            rows = x[index == e]
            if rows.shape[0] == 0:
                out = out + 0
            try:
                out = out + rows.amax(0)
            except IndexError:
                out = out + expert(x)
        return out


class ExceptAssertion(Routed):
    def checked(self, x: Tensor) -> Tensor:
        assert (x > 0).any(), "nothing"
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.checked(x)
        except AssertionError:
            return x


class ExceptImport(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        try:
            import no_such_module_at_all as fast
        except ImportError:
            fast = None
        for e, expert in enumerate(self.experts):
            if fast is None and (index == e).any():
                out[index == e] = expert(x[index == e])
        return out


class Logged(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        counts = torch.bincount(index, minlength=3).tolist()
        _logger.info("load %s, share %.2f", counts, x.mean().item())
        print(f"{counts} of {x.shape[0]:4d}: {x.mean().item():.3f}", "busy: %d" % counts[0])  # noqa: UP031
        for e, expert in enumerate(self.experts):
            if counts[e] == 0:
                _logger.debug("expert {} of {} has none".format(e, counts[e]))  # noqa: UP032
                continue
            out[index == e] = expert(x[index == e])
        return out


class TextAsKey(Routed):
    def forward(self, x: Tensor) -> Tensor:
        number = self.index(x)[0].item()
        table = {f"expert_{e}": expert for e, expert in enumerate(self.experts)}
        return table.get(f"expert_{number}", self.experts[0])(x)


class TextCompared(Routed):
    def forward(self, x: Tensor) -> Tensor:
        first = str(self.index(x)[0].item())
        return x * 2 if first == "1" else x


class Arrays(Routed):
    """numpy's arithmetic is element by element."""

    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        counts = torch.bincount(index, minlength=3).numpy()
        ends = np.concatenate([[0], np.cumsum(counts)])
        order, twice, share = index.argsort(stable=True), counts * 2 + counts, counts / counts.sum()
        for e, expert in enumerate(self.experts):
            rows = order[ends[e] : ends[e + 1]]
            out[rows] = expert(x[rows]) * float(share[e]) + twice[e]
        return out


class ArraysCompared(Routed):
    def forward(self, x: Tensor) -> Tensor:
        index, out = self.index(x), torch.zeros_like(x)
        counts = torch.bincount(index, minlength=3).numpy()
        for e in np.flatnonzero(counts > 0):
            out[index == int(e)] = self.experts[e](x[index == int(e)])
        return out


class OrElse(Routed):
    """`or` gives a value here, no truth."""

    def forward(self, x: Tensor) -> Tensor:
        index = self.index(x)
        scale = (index == 0).sum() or 7
        if (index == 1).any() and (index == 2).any():
            return x * scale
        return x * scale


class IsTrue(Routed):
    def forward(self, x: Tensor) -> Tensor:
        some = bool((self.index(x) == 0).any())
        return x * 2 if some is True else x


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


class Yields(Routed):
    """A generator is not lifted, and says so."""

    def jobs(self, index: Tensor) -> Any:
        for e in range(3):
            rows = torch.where(index == e)[0]
            if rows.numel() == 0:
                continue
            yield e, rows

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, rows in self.jobs(self.index(x)):
            out[rows] = self.experts[e](x[rows])
        return out


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


_last: Any = None


class SetsGlobal(Routed):
    def forward(self, x: Tensor) -> Tensor:
        global _last
        index, out = self.index(x), torch.zeros_like(x)
        _last = index
        for e, expert in enumerate(self.experts):
            rows = torch.where(index == e)[0]
            if rows.numel() == 0:
                continue
            out[rows] = expert(x[rows])
        return out


class SetsGlobalMaybe(Routed):
    """Both sides of the branch would set it in the trace."""

    def forward(self, x: Tensor) -> Tensor:
        global _last
        _last = 1
        if (self.index(x) == 0).any():
            _last = 2
        return x * _last


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
    Kinds,
    Matched,
    ExceptImport,
    Logged,
    Arrays,
    Collected,
    AutogradFunction,
    RowsAndSlots,
    LargestOf,
    Listed,
    Normed,
    OneOfThem,
    SetsGlobal,
    Between,
]
#: And the statement that the refusal names, with a part of its reason.
REFUSED: dict[type[Routed], tuple[str, str]] = {
    MatchedList: ("match torch.unique", "matches patterns"),
    ExceptAnything: ("hits = [int(e)", "loops over tensor values"),
    ExceptEmpty: ("try:", "handles an error that torch raises or not"),
    ExceptAssertion: ("assert (x > 0).any()", "raises an error or not"),
    TextAsKey: ('f"expert_{number}"', "makes a text of tensor values"),
    TextCompared: ("first = str(", "makes a text of tensor values"),
    ArraysCompared: ("counts = torch.bincount", "takes tensor values to numpy"),
    OrElse: ("scale = (index == 0).sum() or 7", "gives one of several values"),
    IsTrue: ("some is True", "asks by `is`"),
    CollectedBesideAll: ("if mine.numel():", "decides how many items a list has"),
    CollectedNumbers: ("if (index == e).any():", "decides how many items a list has"),
    Yields: ("if rows.numel() == 0:", "and is not lifted: it is a generator"),
    ByKey: ("return functions[number](x)", "needs a number or truth that depends on tensor values"),
    LeastFirst: ("for e in sorted(range(3)", "needs a number or truth that depends on tensor values"),
    SetsGlobalMaybe: ("if (self.index(x) == 0).any():", "and is not lifted: it assigns to globals"),
    OneOfTooMany: ("return self.experts[number](x)", "is not known to be one of them"),
    OneAsked: ("chosen = self.experts", "asks for more than the answer"),
    CollectedThenChanged: ("if some[e]:", "decides how many items a list has"),
}

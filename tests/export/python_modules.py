"""Modules that ask Python about values which depend on tensors: by `isinstance`, `match`, `except`, numpy, texts."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from test_lifting_rows import Routed
from torch import Tensor

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


class TextJoined(Routed):
    def forward(self, x: Tensor) -> Tensor:
        number = self.index(x)[0].item()
        key = "_".join(["expert", str(number)]) + "!"
        return {"expert_0!": self.experts[0]}.get(key, self.experts[1])(x)


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


RIGHT = [
    Kinds,
    Matched,
    ExceptImport,
    Logged,
    Arrays,
    SetsGlobal,
]
#: And the statement that the refusal names, with a part of its reason.
REFUSED: dict[type[Routed], tuple[str, str]] = {
    MatchedList: ("match torch.unique", "matches patterns"),
    ExceptAnything: ("hits = [int(e)", "loops over tensor values"),
    ExceptEmpty: ("try:", "handles an error that torch raises or not"),
    ExceptAssertion: ("assert (x > 0).any()", "raises an error or not"),
    TextAsKey: ('f"expert_{number}"', "makes a text of tensor values"),
    TextJoined: ('key = "_".join', "makes a text of tensor values"),
    TextCompared: ("first = str(", "makes a text of tensor values"),
    ArraysCompared: ("counts = torch.bincount", "takes tensor values to numpy"),
    OrElse: ("scale = (index == 0).sum() or 7", "gives one of several values"),
    IsTrue: ("some is True", "asks by `is`"),
    Yields: ("if rows.numel() == 0:", "and is not lifted: it is a generator"),
    SetsGlobalMaybe: ("if (self.index(x) == 0).any():", "and is not lifted: it assigns to globals"),
}

"""Which of equal scores is taken: torch leaves that open, and ONNX takes the first.

A model that chooses by `topk` or `sort` has several right answers where the scores at the edge are equal to the bit:
repeated tokens in Doge's product keys and windows, say. With `first_of_equal` torch gives the one that ONNX prescribes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN: Any = torch.ops.aten


#: What a report says of a comparison that was made so.
NOTE = "of equal scores the first"


def _topk(
    self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


def _sort(self: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return torch.sort(self, dim=dim, descending=descending, stable=True)


#: The values are those of the operator itself, always.
_STABLE: dict[Any, Callable[..., Any]] = {_ATEN.topk.default: _topk, _ATEN.sort.default: _sort}


class first_of_equal(TorchDispatchMode):
    """Within the block `topk` and `sort` give equal elements in the order of their index. `met` says whether any of
    them would have given another order."""

    met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _STABLE:
            return func(*args, **(kwargs or {}))
        values, indices = _STABLE[func](*args, **(kwargs or {}))
        self.met = self.met or not torch.equal(func(*args, **(kwargs or {}))[1], indices)
        return values, indices

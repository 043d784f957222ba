"""Constants of a trace that are none.

`torch.ceil(tokens / experts * torch.tensor(1.25))`, a capacity as DeepSpeed computes it: torch's fake tensors compute
with the values of constants, and with some number or other in place of a size that comes as a float. Python then gets a
capacity that is wrong, and the same for all inputs, without an assumption being noted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Within the block what is computed with a size of the trace has no value that is known."""
    mode = torch._subclasses.FakeTensorMode
    original = mode._dispatch_impl

    def dispatch(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(each, (torch.SymFloat, torch.SymBool)) for each in given):
            return original(self, func, types, args, kwargs)
        known = [(each, each.constant) for each in given if getattr(each, "constant", None) is not None]
        for tensor, _ in known:
            tensor.constant = None
        try:
            return original(self, func, types, args, kwargs)
        finally:
            for tensor, constant in known:
                tensor.constant = constant

    with mock.patch.object(mode, "_dispatch_impl", dispatch):
        yield

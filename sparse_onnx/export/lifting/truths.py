"""The truth of values of a trace, where it is one for all inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparse_onnx.export.lifting.program import Sym, data_dependent
from sparse_onnx.export.lifting.values import Count, Negated, SomeItems


def is_truth(value: Any) -> bool:
    """Whether a value is no other than its truth."""
    lists = (SomeItems, Count, Negated)
    return isinstance(value, (bool, torch.SymBool, *lists)) or (
        isinstance(value, Tensor) and value.dtype == torch.bool
    )


def truth(value: Any) -> bool:
    """The truth of a value that does not depend on tensors."""
    found = known(value) if isinstance(value, Sym) else None
    return bool(value) if found is None else found


def known(value: Any) -> bool | None:
    """The truth of a size or truth that depends on tensors, where it is the same for all of them."""
    if not data_dependent(value):
        return None
    one = value != 0 if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
    if statically_known_true(one):
        return True
    return False if statically_known_true(torch.sym_not(one)) else None


def fake(value: Tensor) -> bool:
    """Whether a tensor is one of a trace."""
    return isinstance(value, torch._subclasses.FakeTensor) or torch._is_functional_tensor(value)

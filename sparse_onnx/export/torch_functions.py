"""Functions of torch that its export or its ONNX exporter cannot follow, by others that both can.

Replaced while a model is traced, as `torch.NAME`, `Tensor.NAME` and `torch.nn.functional.NAME`. Each gives what the
original gives; the exported file is compared with the original in any case.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: Products that are written out one after the other.
_FACTORS = 64

Function = Callable[..., Any]


def _take_along_dim(original: Function, input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch's fixes the sizes that it is traced with."""
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    dim %= input.dim()
    if input.dim() != indices.dim():
        return original(input, indices, dim)
    sizes = torch.broadcast_shapes(
        *((*each.shape[:dim], 1, *each.shape[dim + 1 :]) for each in (input, indices))
    )
    input, indices = (
        each.expand(*sizes[:dim], each.shape[dim], *sizes[dim + 1 :]) for each in (input, indices)
    )
    return input.gather(dim, indices)


def _masked_select(original: Function, input: Tensor, mask: Tensor) -> Tensor:
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask]


def _var_mean(original: Function, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    shaped = {key: value for key, value in kwargs.items() if key in ("dim", "keepdim")}
    if args and not isinstance(args[0], bool):  # else it is `unbiased`, and there are no axes
        shaped["dim"] = args[0]
        if len(args) > 2:
            shaped["keepdim"] = args[2]
    return torch.var(input, *args, **kwargs), torch.mean(input, **shaped)


def _kthvalue(original: Function, input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    found = input.topk(k, dim, largest=False, sorted=True)
    return _chosen(torch.return_types.kthvalue, found, k - 1, dim, keepdim)


def _median(original: Function, input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """The lower of two medians, as torch gives."""
    if dim is None:
        middle = input.flatten().sort().values[(input.numel() - 1) // 2]
        return torch.where(input.isnan().any(), torch.nan, middle) if input.is_floating_point() else middle
    found = input.sort(dim)
    chosen = _chosen(torch.return_types.median, found, (input.shape[dim] - 1) // 2, dim, keepdim)
    if not input.is_floating_point():
        return chosen
    nan = input.isnan().any(dim, keepdim=keepdim)
    return torch.return_types.median((torch.where(nan, torch.nan, chosen.values), chosen.indices))


def _chosen(kind: Any, found: Any, index: Any, dim: int, keepdim: bool) -> Any:
    both = (found.values.select(dim, index), found.indices.select(dim, index))
    return kind(tuple(each.unsqueeze(dim) for each in both) if keepdim else both)


def _cumprod(original: Function, input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    size = input.shape[dim]
    if not isinstance(size, int) or not 0 < size <= _FACTORS:
        return original(input, dim, dtype=dtype)
    if dtype is None and not (input.is_floating_point() or input.is_complex()):
        dtype = torch.int64
    factors = (input if dtype is None else input.to(dtype)).unbind(dim)
    products = [factors[0]]
    for factor in factors[1:]:
        products.append(products[-1] * factor)
    return torch.stack(products, dim)


def _isin(
    original: Function,
    elements: Any,
    test_elements: Any,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> Tensor:
    if not isinstance(elements, Tensor) or not isinstance(test_elements, Tensor):
        return original(elements, test_elements, assume_unique=assume_unique, invert=invert)
    found = (elements.unsqueeze(-1) == test_elements.flatten()).any(-1)
    return ~found if invert else found


def _searchsorted(original: Function, sorted_sequence: Tensor, input: Any, **kwargs: Any) -> Tensor:
    known = set(kwargs) <= {"right", "side", "out_int32"}
    if not isinstance(input, Tensor) or sorted_sequence.dim() != 1 or not known:
        return original(sorted_sequence, input, **kwargs)
    right = kwargs.get("right", False) or kwargs.get("side") == "right"
    values = input.unsqueeze(-1)
    before = sorted_sequence <= values if right else sorted_sequence < values
    return before.sum(-1, dtype=torch.int32 if kwargs.get("out_int32") else torch.int64)


def _cdist(original: Function, x1: Tensor, x2: Tensor, p: float = 2.0, **kwargs: Any) -> Tensor:
    if p != 2.0:
        return original(x1, x2, p, **kwargs)
    return (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1).sqrt()


def _attention(
    original: Function, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """torch.onnx translates that of four axes only."""
    given = (query, key, value)
    mask = args[0] if args else kwargs.get("attn_mask")
    axes = {each.dim() for each in given}
    if axes != {3} or kwargs.get("enable_gqa") or (mask is not None and mask.dim() not in (2, 3)):
        return original(*given, *args, **kwargs)
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
        args, kwargs = ((mask, *args[1:]), kwargs) if args else (args, kwargs | {"attn_mask": mask})
    return original(*(each.unsqueeze(1) for each in given), *args, **kwargs).squeeze(1)


_FUNCTIONS: dict[str, Function] = {
    "take_along_dim": _take_along_dim,
    "masked_select": _masked_select,
    "var_mean": _var_mean,
    "kthvalue": _kthvalue,
    "median": _median,
    "cumprod": _cumprod,
    "isin": _isin,
    "searchsorted": _searchsorted,
    "cdist": _cdist,
    "scaled_dot_product_attention": _attention,
}


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Within the block torch's functions are those of the table."""
    with contextlib.ExitStack() as stack:
        for name, function in _FUNCTIONS.items():
            for owner in (torch, Tensor, torch.nn.functional):
                if hasattr(owner, name):
                    other = _bound(function, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, other))
        yield


def _bound(function: Function, original: Function) -> Function:
    return lambda *args, **kwargs: function(original, *args, **kwargs)

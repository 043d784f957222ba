"""torch's reckoning of strides and shapes without assumptions that make no difference.

Whether a tensor is contiguous, and whether a reshape is a view or a copy, depends on which sizes are 1; the
values do not, nor does ONNX, which has no strides. torch notes an assumption each time all the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: Functions that find strides, of results whose shape is given.
_FUNCTIONS = (
    ("torch._prims_common", "check_contiguous_sizes_strides"),
    ("torch._prims_common", "is_contiguous"),
    ("torch._prims_common", "compute_elementwise_output_logical_to_physical_perm"),
    ("torch._prims_common", "compute_elementwise_output_strides"),
    ("torch._prims_common", "_is_non_overlapping_and_dense_or_false"),
    ("torch._prims_common", "is_non_overlapping_and_dense_or_false"),
    ("torch._refs", "_reshape_view_helper_core_alg"),
)

#: Functions that find the shape of several shapes together.
_BROADCASTS = (("torch._refs", "_broadcast_shapes"), ("torch._subclasses.fake_impls", "infer_size"))


@contextlib.contextmanager
def without_assumptions() -> Iterator[None]:
    """Within the block these functions note nothing. One that torch no longer has is passed over: the trace then
    refuses more."""
    with contextlib.ExitStack() as stack:
        for place, name in (*_FUNCTIONS, *_BROADCASTS):
            module = importlib.import_module(place)
            function = getattr(module, name, None)
            if function is not None:
                setattr(module, name, (_broadcast if (place, name) in _BROADCASTS else quiet)(function))
                stack.callback(setattr, module, name, function)
        yield


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without assumptions."""

    @functools.wraps(function)
    def silent(*args: Any, **kwargs: Any) -> Any:
        env = _environment(args)
        if env is None:
            return function(*args, **kwargs)
        with env.suppress_guards():
            return function(*args, **kwargs)

    return silent


def _environment(args: Any) -> Any:
    mode = torch._guards.detect_fake_mode(args)
    if mode is not None:
        return mode.shape_env
    symbols = [each for each in torch.utils._pytree.tree_leaves(args) if isinstance(each, torch.SymInt)]
    return symbols[0].node.shape_env if symbols else None


def _broadcast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Along an axis of one size and ones, it makes no difference whether that size is 1."""
    silent = quiet(function)

    @functools.wraps(function)
    def broadcast(*shapes: Any) -> Any:
        return silent(*shapes) if one_size(shapes) else function(*shapes)

    return broadcast


def one_size(shapes: Any) -> bool:
    """Whether along each axis these shapes are of one size, or 1."""
    for sizes in itertools.zip_longest(*(reversed(tuple(shape or ())) for shape in shapes), fillvalue=1):
        longer = [size for size in sizes if not (isinstance(size, int) and size == 1)]
        if any(not statically_known_true(size == longer[0]) for size in longer[1:]):
            return False
    return True

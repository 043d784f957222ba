"""torch's reckoning of strides without assumptions about sizes.

Whether a tensor is contiguous, and whether a reshape is a view or a copy, depends on which sizes are 1; the
values do not, nor does ONNX, which has no strides. torch notes an assumption each time all the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

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


@contextlib.contextmanager
def without_assumptions() -> Iterator[None]:
    """Within the block these functions note nothing. One that torch no longer has is passed over: the trace then
    refuses more."""
    with contextlib.ExitStack() as stack:
        for place, name in _FUNCTIONS:
            module = importlib.import_module(place)
            function = getattr(module, name, None)
            if function is not None:
                setattr(module, name, quiet(function))
                stack.callback(setattr, module, name, function)
        yield


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without assumptions."""

    @functools.wraps(function)
    def silent(*args: Any, **kwargs: Any) -> Any:
        mode = torch._guards.detect_fake_mode(args)
        env = getattr(mode, "shape_env", None)
        if env is None:
            return function(*args, **kwargs)
        with env.suppress_guards():
            return function(*args, **kwargs)

    return silent

"""How far torch's own answer moves with rounding: where scores are nearly tied, no other runtime need agree with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_onnx.export.checkpoint.stored import is_stored
from sparse_onnx.export.samples import Run
from sparse_onnx.export.sources import Source, leaves

#: Half a unit in the last place of float32.
_LEAST = 2.0**-24
_TIMES = 4
#: Weights of which copies are made.
_MOST_BYTES = 1 << 30


def answers(source: Source, run: Run) -> Iterator[list[Tensor]]:
    """What the module gives in float64, and with its weights moved by half a unit in the last place, several times."""
    double = in_double(source, run)
    if double is not None:
        yield double
    for seed in range(_TIMES if _is_small(source) else 0):
        module = copy.deepcopy(source.module)
        move(module, seed)
        yield leaves(dataclasses.replace(source, module=module).forward(run.inputs))


def in_double(source: Source, run: Run) -> list[Tensor] | None:
    """None: it does not run in float64, or is too large for a copy."""
    if not _is_small(source):
        return None
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in run.inputs.items()
    }
    wide = dataclasses.replace(source, module=copy.deepcopy(source.module).double())
    try:
        outputs = leaves(wide.forward(inputs))
    except Exception:  # a module that names float32 itself
        return None
    return [value.float() if value.is_floating_point() else value for value in outputs]


def _is_small(source: Source) -> bool:
    if is_stored(source.module):
        return False
    return sum(each.nbytes for each in source.module.parameters()) <= _MOST_BYTES


@torch.no_grad()
def move(module: Any, seed: int, least: float = _LEAST) -> None:
    """Moves the weights at random, by `least` of themselves, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.double() * (1 + least * noise.double()))

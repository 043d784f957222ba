"""Layers that have weights of their own for many rows, against the model without them and against numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import VerificationError
from sparse_onnx.optimize.watched import Dialled, check_layers, unrounded
from sparse_onnx.sparsify.prefill import MOST_ROWS, copy_dense
from sparse_onnx.verify.compare import difference
from sparse_onnx.verify.inputs import sized_inputs


def check_copies(
    model: ir.Model,
    before: ir.Model,
    level_input: str,
    level: int,
    *,
    kernels: bool,
    threads: int | None = None,
) -> str:
    """Puts the copies into a clone of a thresholded model: at level 0 nothing must change, and each layer must be what
    numpy says, at the model's level too, where few rows skip inputs and many skip nothing. Copies do not round here;
    that they do in the file is ORT's part.

    Args:
        model: with thresholds.
        before: the same without.
        level_input: the input that sets the level.
        level: that the model is made for.
        kernels: compare what the native kernels give, too.
        threads: of the sessions.

    Returns:
        A line for the report.

    Raises:
        VerificationError: something differs.
        ImpossibleError: no layer would be faster.
    """
    copied = model.clone()
    found = copy_dense(copied, before)
    copied = unrounded(copied)
    plain, both = (Dialled(each, level_input, threads) for each in (model, copied))
    few, many = (sized_inputs(model, 1, size, seed=size) for size in (1, MOST_ROWS + 60))
    for feeds in (few, many):
        if not all(map(_same, both(feeds, 0), plain(feeds, 0))):
            raise VerificationError(
                "with weights of their own for many rows the layers differ",
                "nothing was written; please report it, this is a fault of sparse-onnx",
            )
    for at in (0, level):
        for native in (False, True) if kernels else (False,):
            check_layers(copied, level_input, at, [few, many], kernels=native, threads=threads)
    text = (
        f"runs of more than {MOST_ROWS} rows go through {found.layers} layers as they were and skip nothing there: "
        f"{found.nbytes / 1e6:.3g} MB of weights a second time, in the file and in memory"
    )
    return text + (f"; {found.others} others have no copy" if found.others else "")


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and difference(left, right).within

"""What the user wants of thresholds: the options of `optimize --thresholds`, checked together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from sparse_onnx.core.calibration import Calibration
from sparse_onnx.core.calibration_file import read_calibration
from sparse_onnx.core.errors import UsageError
from sparse_onnx.optimize.quality import Budget
from sparse_onnx.sparsify.calibrated import ALLOCATIONS, METHODS, Allocation, Method
from sparse_onnx.sparsify.plan import MODES, Mode
from sparse_onnx.sparsify.prefill import PREFILLS, Prefill


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for. `evaluation` names files that calibration has not seen; `tokenizer` reads them where
    they are text and none lies beside the model; `dense_first` is None where all tokens skip inputs, and `prefill` says
    whether many rows have weights of their own."""

    calibration: Calibration
    path: str
    budget: Budget | None
    sparsity: float | None
    evaluation: tuple[str, ...]
    method: Method
    allocation: Allocation
    mode: Mode
    dense_first: int | None
    tokenizer: str | None = None
    prefill: Prefill = "shared"


def request(
    path: str | os.PathLike[str],
    *,
    budget: str | None,
    sparsity: float | None,
    evaluation: Sequence[str | os.PathLike[str]],
    method: str,
    allocation: str,
    mode: str,
    dense_first: int | None,
    tokenizer: str | os.PathLike[str] | None,
    prefill: str,
) -> Request:
    """
    Raises:
        UsageError: options that contradict each other, or values that do not exist.
        ModelError: the file is no calibration.
    """
    for what, value, known in (
        ("method", method, METHODS),
        ("allocation", allocation, ALLOCATIONS),
        ("threshold mode", mode, MODES),
        ("prefill", prefill, PREFILLS),
    ):
        if value not in known:
            raise UsageError(f"unknown {what} '{value}'", f"one of: {', '.join(known)}")
    if budget is not None and sparsity is not None:
        raise UsageError("a budget and a sparsity are two ways to say how much", "give one of them")
    if budget is None and sparsity is None and method != "relu":
        raise UsageError(
            "nothing says how much may be skipped", "--budget 'perplexity<=2%' or --sparsity 0.25"
        )
    if method == "relu" and (sparsity is not None or budget is not None):
        raise UsageError(
            "the method 'relu' skips the exact zeros, and loses nothing", "leave out --sparsity and --budget"
        )
    if budget is not None and not evaluation:
        raise UsageError(
            "a budget is measured on data", "--eval-data names files that calibration has not seen"
        )
    if dense_first is not None and dense_first < 0:
        raise UsageError(f"{dense_first} first positions", "0 keeps prefill alone dense")
    if prefill == "copy" and (mode != "native" or method == "topk"):
        raise UsageError(
            "--prefill copy is for thresholds in the mode 'native'"
            + (", and 'topk' bounds each token by itself" if mode == "native" else ""),
            "leave out --prefill",
        )
    return Request(
        read_calibration(path),
        os.fspath(path),
        None if budget is None else Budget.parse(budget),
        sparsity,
        tuple(os.fspath(path) for path in evaluation),
        method,  # type: ignore[arg-type]
        allocation,  # type: ignore[arg-type]
        mode,  # type: ignore[arg-type]
        dense_first,
        None if tokenizer is None else os.fspath(tokenizer),
        prefill,  # type: ignore[arg-type]
    )

"""Each block of the exported file against its module, expert by expert.

Comparing whole models does not do: with many experts a few inputs visit some of them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_onnx import blocks
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.export import experts
from sparse_onnx.export.users import users_code
from sparse_onnx.graph import io
from sparse_onnx.graph.external import read_array


def compare_blocks(path: Path, found: Sequence[experts.Experts], rows: int | None = None) -> None:
    """Computes the blocks by the numpy reference, with the weights as they are in the file.

    Args:
        path: the exported model.
        found: the experts modules; they run as they are.
        rows: tokens at a time; None takes few where experts are large, since a module may copy them for each.

    Raises:
        VerificationError: an expert answers otherwise, or a block is of no known module.
    """
    modules = {entry.path: entry for entry in found if entry.spec is not None}
    for block in blocks.blocks(io.load(path)):
        entry = modules.get(block.name)
        if entry is None:
            raise VerificationError(
                f"block '{block.name}' comes from none of the experts modules", where=path.name
            )
        wrong = _wrong_experts(block, entry, rows)
        if wrong:
            raise VerificationError(
                f"block '{block.name}' differs from its module in expert {wrong[0]}"
                + (f" and {len(wrong) - 1} more" if wrong[1:] else ""),
                "nothing was written; please report this",
                where=path.name,
            )


@torch.no_grad()
def _wrong_experts(block: blocks.MoEBlock, entry: experts.Experts, rows: int | None) -> list[int]:
    weights = {
        role: read_array(value.const_value)
        for role, value in block.weights.items()
        if value.const_value is not None
    }
    if len(weights) != len(block.weights):
        raise VerificationError(f"block '{block.name}' computes its weights", "nothing was written")
    good, bad = set[int](), set[int]()
    for tokens, index, weight in experts.probes(entry.module, rows):
        with users_code(entry.path):
            expected = entry.module(tokens, index, weight)
        actual = blocks.reference(
            block.spec,
            _array(tokens, block.dtype.numpy()),
            index.cpu().numpy(),
            _array(weight, np.float32),
            accumulate=np.float32,
            **weights,
        )
        found = torch.from_numpy(actual.astype(np.float32)).to(expected)
        for row, pair in enumerate(index.tolist()):
            agrees = experts.same_rows(expected[row : row + 1], found[row : row + 1])
            (good if agrees else bad).update(pair)
    return sorted(bad - good or bad)


def _array(value: Tensor, dtype: np.dtype | type) -> np.ndarray:
    return value.float().cpu().numpy().astype(dtype)

"""The matrices of a block's experts as arrays, of which only those that tokens reach are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, WeightLayout
from sparse_onnx.blocks.quantized import Quantized, Slices
from sparse_onnx.blocks.reference import gated_rows, inner_rows
from sparse_onnx.graph.stacked import read_slices


class Experts:
    """The experts of a block whose weights are constants."""

    def __init__(self, block: MoEBlock) -> None:
        self.block = block
        self._stored: dict[str, Any] = {role: _sliced(value) for role, value in block.weights.items()}

    def matrix(self, role: str, expert: int) -> np.ndarray:
        """One expert's, ``[K, N]`` float32."""
        array = np.asarray(self._stored[role][expert]).astype(np.float32)
        return array.T if self.block.spec.weight_layout == WeightLayout.OUT_IN else array

    def inner(self, tokens: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """What the last matrix reads: of each token ``[n, D]`` in its expert ``[n]``, ``[n, I]`` float32."""
        [result] = self._between(tokens, experts, 1)
        return result

    def gated(self, tokens: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gates' activations, and the same times up's results; each as `inner`."""
        activated, up = self._between(tokens, experts, 2)
        return activated, activated * up

    def _between(self, tokens: np.ndarray, experts: np.ndarray, parts: int) -> list[np.ndarray]:
        assert self.block.inner is not None
        results = [np.zeros((len(tokens), self.block.inner), np.float32) for _ in range(parts)]
        roles = self.block.spec.roles[:-1]
        for expert, at in by_expert(experts):
            names = [name for role in roles for name in (role, f"{role}_bias")]
            own = {name: np.asarray(self._stored[name][expert]) for name in names}
            rows = tokens[at].astype(np.float32)
            with np.errstate(over="ignore"):
                if parts == 2:
                    results[0][at], results[1][at] = gated_rows(self.block.spec, rows, own)
                else:
                    results[0][at] = inner_rows(self.block.spec, rows, own)
        return results

    def parts(
        self, roles: tuple[str, ...], rows: np.ndarray, experts: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows ``[n, K]`` of each expert ``[n]``, and the matrices that they go through."""
        for expert, at in by_expert(experts):
            for role in roles:
                yield rows[at], self.matrix(role, expert)


def by_expert(experts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert that is there, and its places, in order."""
    for expert in np.unique(experts):
        yield int(expert), np.nonzero(experts == expert)[0]


def _sliced(value: ir.Value) -> Any:
    quantized = Quantized.of(value)
    if quantized is not None:
        return Slices(quantized)
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:  # a bias that the graph computes from constants
        return _computed(value)
    return read_slices(tensor)


def _computed(value: ir.Value) -> np.ndarray:
    """Zeros: of a ConstantOfShape, which `is_zero` knows."""
    assert value.shape is not None
    return np.zeros(tuple(value.shape.numpy()), np.float32)

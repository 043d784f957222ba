"""Where tokens go: loads, co-activation and weights of one block's routing, counted over a stream."""

from __future__ import annotations

import numpy as np

from sparse_onnx.calibrate.describe import quantiles, rounded
from sparse_onnx.calibrate.reservoir import Reservoir
from sparse_onnx.core.calibration import MOST_COACTIVATION, BlockRecord

#: Routing weights that are sampled for their quantiles.
_WEIGHTS = 1 << 16


class Routing:
    """Statistics of one block.

    Args:
        name: of the block.
        experts: E.
        seed: of the sample of weights.
    """

    def __init__(self, name: str, experts: int, seed: tuple[int, ...]) -> None:
        self.name, self.experts = name, experts
        self.tokens = self.top_k = self.dropped = 0
        self.loads = np.zeros(experts, np.int64)
        together = experts if experts <= MOST_COACTIVATION else 0
        self.coactivation = np.zeros((together, together), np.int64)
        self._weights = Reservoir(np.empty((_WEIGHTS, 1), np.float32), seed)

    def add(self, index: np.ndarray, weight: np.ndarray) -> None:
        """Choices ``[T, K]`` of more tokens; an index of E is a dropped slot."""
        kept = index < self.experts
        self.tokens += len(index)
        self.top_k = max(self.top_k, index.shape[1])
        self.dropped += int((~kept).sum())
        self.loads += np.bincount(index[kept].astype(np.int64), minlength=self.experts)
        if self.coactivation.size:
            chosen = np.zeros((len(index), self.experts + 1), np.float32)
            np.put_along_axis(chosen, index.astype(np.int64), 1, axis=1)
            chosen = chosen[:, : self.experts]
            self.coactivation += np.rint(chosen.T @ chosen).astype(np.int64)
        self._weights.add(weight[kept].astype(np.float32).reshape(-1, 1))

    def record(self, sites: tuple[str, ...]) -> BlockRecord:
        weights = self._weights.rows if self._weights.seen else np.zeros((1, 1), np.float32)
        together = tuple(tuple(row) for row in self.coactivation.tolist()) if self.coactivation.size else None
        return BlockRecord(
            name=self.name,
            experts=self.experts,
            top_k=max(1, self.top_k),
            tokens=self.tokens,
            loads=tuple(self.loads.tolist()),
            dropped=self.dropped,
            unused=tuple(np.nonzero(self.loads == 0)[0].tolist()),
            coactivation=together,
            weight_quantiles=tuple(map(rounded, quantiles(weights))),
            layers=sites,
        )

"""What skipping inputs costs whole models, and what they skip, on text that nothing was calibrated on.

Every variant runs as it is deployed, thresholds by the native kernels. It is compared with the dense model in float32,
also where its weights are integers: what it costs to quantize is part of the number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.bench.thresholded.cases import Case, Feeds
from sparse_onnx.bench.thresholded.variants import Variant, plan_of
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.report import ThresholdsRecord
from sparse_onnx.graph import io
from sparse_onnx.graph.external import read_array
from sparse_onnx.optimize.quality import Judge, Measured
from sparse_onnx.optimize.request import request
from sparse_onnx.optimize.threshold_record import thresholds_record
from sparse_onnx.optimize.watched import Counted
from sparse_onnx.sparsify.record import thresholds_of
from sparse_onnx.targets import session as sessions

#: Relative error between the dense model in float32 and a thresholded one at level 0, which skips nothing.
_SAME = 1e-3


@dataclasses.dataclass(frozen=True)
class Quality:
    """`metrics`: value, and the standard error of its difference to the dense model's where that is known. `bytes` are
    those of linear weights that a token would read (0 of a dense model), `skipped` the share of them that it skips."""

    key: str
    metrics: dict[str, tuple[float, float | None]]
    skipped: float = 0.0
    bytes: int = 0
    level: int = 0


class Examiner:
    """Measures the variants of one case. The dense float32 model runs once, and its outputs are kept.

    Args:
        case: the model and its text.
        threads: of the sessions.
    """

    def __init__(self, case: Case, threads: int = 1) -> None:
        self.case, self.threads = case, threads
        session = sessions.create_session(case.file(Variant("float32", "dense")), threads=threads)
        self._dense = [self._result(sessions.run(session, feeds)) for feeds in case.held_out]
        self._now = self._dense
        at = {id(feeds): number for number, feeds in enumerate(case.held_out)}

        def run(feeds: Feeds, level: int) -> list[np.ndarray]:
            return [(self._now if level else self._dense)[at[id(feeds)]]]

        names = ("cosine",) if case.encoder else ("perplexity", "top1")
        self._judges = {name: Judge(name, run, ["result"], case.held_out) for name in names}

    def __call__(self, variant: Variant) -> Quality:
        """
        Raises:
            VerificationError: what should skip nothing at level 0 differs from the dense model.
            ImpossibleError: so much cannot be skipped.
        """
        path = self.case.file(variant)
        if variant.kind == "dense":
            session = sessions.create_session(path, threads=self.threads)
            self._run(lambda feeds: sessions.run(session, feeds))
            return Quality(variant.key, self._metrics())
        model = io.load(path)
        found = thresholds_of(model)
        assert found is not None
        level = _level(model, found.level_input)
        counted = Counted(model, found.level_input, level, self.threads, kernels=True)
        if variant.weights == "float32":
            self._require_same(counted, path)
        self._run(counted)
        record = self._record(variant, model, found.level_input, level, counted)
        return Quality(variant.key, self._metrics(), record.share_skipped, record.bytes, level)

    def _run(self, run: Callable[[Feeds], Sequence[np.ndarray]]) -> None:
        self._now = []  # before the next ones are computed
        self._now = [self._result(run(feeds)) for feeds in self.case.held_out]

    def _result(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Logits ``[1, S, V]``; of an encoder the embedding ``[1, H]``, mean-pooled as its authors do."""
        first = np.asarray(outputs[0])
        return first.mean(axis=1) if self.case.encoder else first

    def _metrics(self) -> dict[str, tuple[float, float | None]]:
        found: dict[str, tuple[float, float | None]] = {}
        for name, judge in self._judges.items():
            measured: Measured = judge(1)
            found[name] = (measured.value, measured.error)
        if self.case.encoder:
            dense, now = (np.concatenate(each) for each in (self._dense, self._now))
            found["order"] = (order_of_pairs(dense, now), None)
            found["neighbour"] = (same_neighbour(dense, now), None)
        return found

    def _record(
        self, variant: Variant, model: ir.Model, level_input: str, level: int, counted: Counted
    ) -> ThresholdsRecord:
        """As the report of `optimize` has it."""
        calibration, path = self.case.calibration(variant)
        asked = request(
            path,
            budget=None,
            sparsity=0.5,
            evaluation=(),
            method="cats" if variant.kind == "CATS" else "scap",
            allocation="greedy",
            mode="native",
            dense_first=None,
            prefill="shared",
            tokenizer=None,
        )
        plan = dataclasses.replace(plan_of(variant, calibration), level=level)
        return thresholds_record(asked, model, plan, level_input, counted.seen, [])

    def _require_same(self, counted: Counted, path: Path) -> None:
        expected = self._dense[0]
        found = self._result(counted.dense(self.case.held_out[0]))
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not error <= _SAME:
            raise VerificationError(
                f"at level 0 it differs from the dense model by {error:.1e}", where=str(path)
            )


def _level(model: ir.Model, level_input: str) -> int:
    held = model.graph.initializers[level_input].const_value
    assert held is not None
    return int(read_array(held))


def _similarities(rows: np.ndarray) -> np.ndarray:
    """``[N, N]`` cosines of embeddings ``[N, H]``."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def order_of_pairs(dense: np.ndarray, now: np.ndarray) -> float:
    """Spearman's rank correlation of the similarities of all pairs, embeddings ``[N, H]``, N at least 3."""
    upper = np.triu_indices(len(dense), 1)
    ranks = [np.argsort(np.argsort(_similarities(each)[upper])).astype(np.float64) for each in (dense, now)]
    centred = [each - each.mean() for each in ranks]
    return float(centred[0] @ centred[1] / (centred[0] @ centred[0]))


def same_neighbour(dense: np.ndarray, now: np.ndarray) -> float:
    """The share of embeddings whose most similar other one is the same."""
    nearest = []
    for each in (dense, now):
        found = _similarities(each)
        np.fill_diagonal(found, -2)
        nearest.append(found.argmax(axis=1))
    return float((nearest[0] == nearest[1]).mean())

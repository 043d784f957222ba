"""Two models too large to run twice, compared block by block within a memory bound.

Outside the blocks the graphs must be the same (`skeleton`); a block that is neutral in both belongs to that. Else a
block runs alone in both models, with the routing put in from outside: a few experts at a time, so that only their
weights are ever in memory. A neutral block is computed by the numpy reference, a lowered one by ORT, which reads the
weights of an expert only when a token is sent there.

Where the kernels of a lowered block round activations to 8 bits, it is compared twice: by kernels that do not round and
multiply by the same stored integers, as exactly as any other; then as it is deployed, within `compare.ROUNDED`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.targets.places import simulated
from sparse_onnx.verify.compare import ROUNDED, Difference, difference
from sparse_onnx.verify.constants import Constants
from sparse_onnx.verify.feeds import Facts, routings
from sparse_onnx.verify.sides import Blocks, Run, Side
from sparse_onnx.verify.skeleton import same_outside

#: Bytes of weights that are mapped at once: with `lowering.WHOLE_BYTES` it keeps `optimize` below 1 GB.
GROUP_BYTES = 192 << 20
#: Bytes of a block's weights that ORT may pack in memory, all at once, to run it as it is deployed.
PACKED_BYTES = 320 << 20
#: Inputs of a block as it is deployed, beside the other comparison: each expert, kernels for one row and for many.
_DEPLOYED = ("every expert", "one token", "256 tokens")


def compare_blocks(
    reference_model: ir.Model,
    candidate: ir.Model,
    *,
    memory: int,
    threads: int,
    provider: str = "CPUExecutionProvider",
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
    only: Collection[str] | None = None,
) -> VerifyRecord:
    """Compares two models with the same blocks, each neutral or lowered on either side.

    Args:
        reference_model: says what is right.
        candidate: what is judged.
        memory: bytes of expert weights that may be mapped at once; one expert is always allowed.
        threads: intra-op threads.
        provider: execution provider.
        tolerance: accepted relative error; None takes the type's, or that of how kernels round.
        progress: called with a line a block.
        only: names of blocks; then just these are compared, and nothing outside them.

    Raises:
        ModelError: a weight file is gone.
    """
    first, second = Blocks(reference_model), Blocks(candidate)
    names = [name for name in (*first.neutral, *first.lowered) if only is None or name in only]
    kept = [name for name in names if name in first.neutral and name in second.neutral]
    run = [name for name in names if name not in kept]
    failure = _unpaired(first, second, only)
    if failure is None and only is None:
        ours, theirs = (dict(map(side.boundary, run)) for side in (first, second))
        if not same_outside(reference_model, candidate, ours, theirs):
            failure = "the graphs differ outside the sparse blocks"
    if failure is None and only is not None:
        differing = [name for name in kept if not _same_block(first.neutral[name], second.neutral[name])]
        failure = f"block '{differing[0]}' has other weights" if differing else None
    total, runs, kinds = Difference.none(), 0, set()
    described: list[str] = []
    rounded: list[bool] = []
    for name in run:
        if failure is not None:
            break
        if progress is not None:
            progress(f"comparing block {name}")
        try:
            left = first.side(name, threads, provider, second)
            right = second.side(name, threads, provider, first)
        except ValueError as error:
            failure = f"block '{name}' cannot run alone: {error}"
            break
        if (left.facts.experts, left.facts.top_k, left.facts.hidden) != (
            right.facts.experts,
            right.facts.top_k,
            right.facts.hidden,
        ):
            failure = f"block '{name}' has other sizes"
            break
        kind = (left.facts, left.kind)
        found = Difference.none()
        for compare in _comparisons(left, right, tolerance):
            found = found.worse(compare.run(memory, kind not in kinds, simulated(provider)))
            runs += compare.runs
            described = described or compare.described
        if right.start_deployed is not None:
            rounded.append(right.weight_bytes <= PACKED_BYTES)
        kinds.add(kind)
        total = total.worse(found)
        if not found.within:
            failure = f"block '{name}': {found.reason}"
        elif not found.compared:
            failure = f"block '{name}' gives nothing but infinities and NaNs"
    if kept and failure is None and not described:
        described = ["weights byte by byte"]
    if any(rounded):
        described.append(f"{sum(rounded)} blocks once more as deployed, activations rounded to 8 bits")
    if not all(rounded):
        few = len(rounded) - sum(rounded)
        described.append(f"{few} blocks not as deployed: too large to be packed here for kernels that round")
    passed: bool | None = failure is None
    if not names and failure is None:
        passed, failure = None, "there is no sparse block to compare"
    return VerifyRecord(
        method="blocks",
        passed=passed,
        runs=runs,
        max_abs_error=total.max_abs if runs else None,
        max_rel_error=total.max_rel if runs else None,
        inputs=described,
        failure=failure,
    )


def _unpaired(first: Blocks, second: Blocks, only: Collection[str] | None) -> str | None:
    shared = first.ambiguous or second.ambiguous
    if shared is not None:
        return f"two blocks share the name '{shared}'"
    missing = (first.names ^ second.names) if only is None else set(only) - (first.names & second.names)
    return f"blocks without a counterpart: {', '.join(sorted(missing)[:3])}" if missing else None


def _same_block(first: MoEBlock, second: MoEBlock) -> bool:
    """Whether two neutral blocks compute the same by the same weights."""
    sides = [
        [ir.convenience.get_const_tensor(value) for value in block.weights.values()]
        for block in (first, second)
    ]
    ours, theirs = ([tensor for tensor in side if tensor is not None] for side in sides)
    if first.spec != second.spec or len(ours) != len(first.weights) or len(theirs) != len(ours):
        return False
    constants = Constants(ours, theirs)
    return [constants.digest(tensor) for tensor in ours] == [constants.digest(tensor) for tensor in theirs]


def _comparisons(left: Side, right: Side, tolerance: float | None) -> list[_Comparison]:
    """Of one block: without rounding as far as there are kernels for it, and as deployed where those round."""
    size = max(1, left.weight_bytes, right.weight_bytes)
    accepted = _accepted(tolerance, left.left, right.left)
    found = [_Comparison(left.facts, size, left.start, right.start, accepted)]
    if right.start_deployed is not None and right.weight_bytes <= PACKED_BYTES:
        accepted = _accepted(tolerance, left.left, right.activations)
        found.append(_Comparison(left.facts, size, left.start, right.start_deployed, accepted, at_once=True))
    return found


def _accepted(tolerance: float | None, *kinds: str | None) -> float | None:
    rounded = [ROUNDED[kind] for kind in kinds if kind is not None]
    return max(rounded) if tolerance is None and rounded else tolerance


class _Comparison:
    """One block in both models."""

    def __init__(
        self,
        facts: Facts,
        size: int,
        expected: Callable[[], Run],
        actual: Callable[[], Run],
        tolerance: float | None,
        at_once: bool = False,
    ) -> None:
        self.facts, self.size, self.at_once = facts, size, at_once
        self.expected, self.actual, self.tolerance = expected, actual, tolerance
        self.runs = 0
        self.described: list[str] = []

    def run(self, memory: int, large: bool, once: bool = False) -> Difference:
        """Every expert, as many at a time as `memory` allows; at a realistic size too where `large`, not repeated where
        `once`."""
        experts = self.facts.experts
        group = experts if self.at_once else int(max(1, min(experts, memory * experts // self.size)))
        total = Difference.none()
        for start in range(0, experts, group):
            chosen = np.arange(start, min(start + group, experts))
            total = total.worse(self._group(chosen, large and start == 0, once))
        return total

    def _group(self, chosen: np.ndarray, large: bool, once: bool) -> Difference:
        # Both die with this call, which unmaps this group's weights before the next one's are touched.
        expect, act = self.expected(), self.actual()
        total = Difference.none()
        for feeds in routings(
            self.facts, chosen, seed=int(chosen[0]), first=int(chosen[0]) == 0, large=large
        ):
            if self.at_once and feeds.name not in _DEPLOYED:
                continue
            expected = expect(feeds)
            repeats = 1 if once else feeds.repeats
            for _ in range(repeats):
                actual = act(feeds)
                if actual.dtype != expected.dtype:
                    found = Difference(np.inf, np.inf, False, f"{actual.dtype} instead of {expected.dtype}")
                else:
                    found = difference(expected, actual, self.tolerance)
                if not found.within:
                    reason = f"{feeds.name}, experts {chosen[0]}..{chosen[-1]}: {found.reason}"
                    found = dataclasses.replace(found, reason=reason)
                total = total.worse(found)
                self.runs += 1
            if chosen[0] == 0:
                self.described.append(feeds.name if repeats == 1 else f"{feeds.name} x{repeats} runs")
        return total

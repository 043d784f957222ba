"""Which experts the inputs of a comparison reached: what no input reached was not compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.verify.metadata import sound_blocks
from sparse_onnx.verify.routing import Decision


class Coverage:
    """Counts the experts of each sparse block of a model, blocks in subgraphs included."""

    def __init__(self, model: ir.Model) -> None:
        experts = {block.name: block.experts or 0 for block in neutral_blocks(model)}
        experts |= {block.name: block.experts or 0 for block in sound_blocks(model)}
        self._hit = {name: np.zeros(count, np.bool_) for name, count in experts.items()}

    def __bool__(self) -> bool:
        return bool(self._hit)

    def add(self, decisions: Mapping[str, Decision], left_out: np.ndarray | None = None) -> None:
        """Counts a run.

        Args:
            decisions: of the routers that could be watched.
            left_out: mask `[sequences]` of what was not compared.
        """
        for name, decision in decisions.items():
            hit = self._hit.get(name)
            index = decision.index
            if hit is None:
                continue
            if left_out is not None and len(left_out) and len(index) % len(left_out) == 0:
                index = index[~np.repeat(left_out, len(index) // len(left_out))]
            inside = index[(index >= 0) & (index < len(hit))]
            hit[inside.astype(np.int64)] = True

    def missed(self) -> dict[str, Sequence[int]]:
        """Experts that no run reached, by block. A block whose routing cannot be watched counts as never reached."""
        found = {name: np.flatnonzero(~hit).tolist() for name, hit in self._hit.items()}
        return {name: experts for name, experts in found.items() if experts or not len(self._hit[name])}


def describe(missed: Mapping[str, Sequence[int]]) -> str:
    """One line about blocks with experts that no input reached."""
    name, experts = next(iter(missed.items()))
    some = ", ".join(map(str, experts[:4])) + (", ..." if len(experts) > 4 else "")
    more = f" and of {len(missed) - 1} more blocks" if len(missed) > 1 else ""
    return f"no input reached {len(experts)} experts of block '{name}' ({some}){more}"

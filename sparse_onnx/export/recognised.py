"""Notes on the blocks of a file that was exported operator by operator."""

from __future__ import annotations

from pathlib import Path

from sparse_onnx.inspect.api import inspect
from sparse_onnx.matching.gate_sources import SOFT_MIXTURE


def notes(path: Path) -> list[str]:
    """What `optimize` will find, and that a mixture of all experts is dense."""
    report = inspect(path)
    blocks = [block for block in report.blocks if block.kind == "moe"]
    found = []
    if blocks:
        count = f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}"
        found.append(f"exported operator by operator; `optimize` finds {count} of experts in the graph")
    elif report.blocks:
        kinds = ", ".join(dict.fromkeys(block.kind for block in report.blocks))
        found.append(f"{kinds}: exported as written")
    else:
        found.append(
            "no experts module was found, so no block was kept whole; `inspect` says what is in the graph"
        )
    if any(refusal.reason == SOFT_MIXTURE for refusal in report.refusals):
        found.append(f"{SOFT_MIXTURE}, so that it is exported dense")
    return found

"""Thresholds of a block's experts: marked on its neutral node, and put in front of experts' layers by a lowering.

The neutral operators have no thresholds. At level 0 there are none in effect, and so the marked node says what the
lowered block computes then.
"""

from __future__ import annotations

import dataclasses
import json

import onnx_ir as ir

#: Metadata of a neutral node: JSON, an `ExpertThreshold` a role.
THRESHOLDS_KEY = "sparse_onnx.expert_thresholds"

#: In place of a role: the gate says which units up and down skip.
GATED_ROLE = "gated"


@dataclasses.dataclass(frozen=True)
class ExpertThreshold:
    """`bound` and `centre` are names of values of the main graph."""

    site: str
    bound: str
    centre: str
    mode: str
    top_k: bool


def mark(node: ir.Node, role: str, threshold: ExpertThreshold) -> None:
    entries = json.loads(node.metadata_props.get(THRESHOLDS_KEY, "{}"))
    entries[role] = dataclasses.asdict(threshold)
    node.metadata_props[THRESHOLDS_KEY] = json.dumps(entries)


def marked(node: ir.Node) -> dict[str, ExpertThreshold]:
    """By role; nothing where the node has none, or none that can be read."""
    try:
        entries = json.loads(node.metadata_props.get(THRESHOLDS_KEY, "{}"))
        return {str(role): ExpertThreshold(**entry) for role, entry in entries.items()}
    except (ValueError, TypeError, AttributeError):
        return {}

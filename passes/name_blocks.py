"""Each neutral block under a name of its own: `name`, `name_1`, `name_2`, ... in the order of the graph.

A block is named by its exporter, in the metadata of its node. Inlining a function that is called twice copies the name,
and blocks of other tools may have none. Reports, provenance and verification tell blocks apart by name.

Exact: only metadata changes. Enters If, Loop and Scan bodies. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowered import NAME_KEY, lowered_blocks
from sparse_onnx.core.passes import Outcome, Pass


@dataclasses.dataclass(frozen=True)
class NameBlocks(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "name_blocks"
    summary: ClassVar[str] = "each neutral block under a name of its own"

    def call(self, model: ir.Model) -> Outcome:
        taken = {block.name for block in lowered_blocks(model)}
        found = neutral_blocks(model)
        renamed = 0
        for block in found:
            name, count = block.name, 0
            while name in taken:
                count += 1
                name = f"{block.name}_{count}"
            taken.add(name)
            if block.node.metadata_props.get(NAME_KEY) != name:
                block.node.metadata_props[NAME_KEY] = name
                renamed += 1
        return Outcome(model, renamed > 0, len(found), renamed)

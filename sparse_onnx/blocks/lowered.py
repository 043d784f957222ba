"""What a lowered block was: kept in the model's metadata, so that later tools can name, check and compare it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.blocks.combine import CombineBlock
from sparse_onnx.blocks.moe import NAME_KEY, MoEBlock
from sparse_onnx.blocks.routing import router_scores

#: Node metadata beside `NAME_KEY`: the form that the node is part of.
FORM_KEY = "sparse_onnx.form"
#: Model metadata: a JSON list, one entry a lowered block.
BLOCKS_KEY = "sparse_onnx.blocks"


__all__ = ["BLOCKS_KEY", "FORM_KEY", "NAME_KEY", "LoweredBlock", "lowered_blocks", "record_lowered"]


@dataclasses.dataclass(frozen=True)
class LoweredBlock:
    """Shape of the block and the names of its values at the boundary. `scores` is what its router's TopK reads;
    `activations` says how its kernels round them, as in `rounding`, None if not at all."""

    name: str
    kind: str
    spelling: str
    form: str
    experts: int | None
    top_k: int | None
    hidden: int | None
    inner: int | None
    activation: str | None
    gated: bool
    parameters: int | None
    active_parameters: int | None
    tokens: str
    expert_index: str
    expert_weight: str
    output: str
    scores: str | None
    activations: str | None = None

    @staticmethod
    def of(block: MoEBlock | CombineBlock, form: str) -> LoweredBlock:
        scores = router_scores(block.expert_index)
        tokens, moe = block.tokens, block if isinstance(block, MoEBlock) else None
        assert tokens is not None
        return LoweredBlock(
            name=block.name,
            kind="moe",
            spelling=block.spelling,
            form=form,
            experts=block.experts,
            top_k=block.top_k,
            hidden=block.hidden,
            inner=None if moe is None else moe.inner,
            activation=None if moe is None else moe.spec.name,
            gated=moe is not None and moe.gated,
            parameters=block.parameters,
            active_parameters=block.active_parameters,
            tokens=tokens.name or "",
            expert_index=block.expert_index.name or "",
            expert_weight=block.expert_weight.name or "",
            output=block.output.name or "",
            scores=None if scores is None else scores.name,
        )


def record_lowered(model: ir.Model, lowered: Sequence[LoweredBlock]) -> None:
    """Adds the blocks to the model's metadata, in place of former ones of the same names."""
    if lowered:
        names = {block.name for block in lowered}
        entries = [entry for entry in _entries(model) if entry.get("name") not in names]
        model.metadata_props[BLOCKS_KEY] = json.dumps([*entries, *map(dataclasses.asdict, lowered)])


def lowered_blocks(model: ir.Model) -> list[LoweredBlock]:
    """The lowered blocks that the model's metadata names. Entries that are not ours are passed over."""
    names = {field.name for field in dataclasses.fields(LoweredBlock)}
    found = [LoweredBlock(**entry) for entry in _entries(model) if set(entry) == names]
    return [block for block in found if _well_typed(block)]


def _well_typed(block: LoweredBlock) -> bool:
    kinds = {
        "str": _is_text,
        "str | None": _is_text_or_none,
        "int | None": _is_size_or_none,
        "bool": _is_flag,
    }
    return all(kinds[str(field.type)](getattr(block, field.name)) for field in dataclasses.fields(block))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_size_or_none(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _entries(model: ir.Model) -> list[dict[str, Any]]:
    try:
        entries = json.loads(model.metadata_props.get(BLOCKS_KEY, "[]"))
    except ValueError:
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

"""Which form each block is to take: as asked, as measured here, or as the target's profile says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.blocks import CombineBlock, MoEBlock, neutral_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.blocks.moe import is_zero
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.save import INLINE_BYTES
from sparse_onnx.passes import PIPELINE
from sparse_onnx.targets import TargetProfile

#: Mappings that a process may hold on Linux (vm.max_map_count), less what it holds beside the model. ORT maps each
#: external initializer by itself.
MOST_MAPPINGS = 65_530 - 5_000

#: Forms whose experts are initializers of their own, one mapping or more a matrix.
_APART = ("grouped", "branched")
_PACKED = "fused"


def parse_form(text: str, profile: TargetProfile) -> Form | None:
    """The form that the user asks for; None for `auto`.

    Raises:
        UsageError: no such form, or one that the target does not take.
    """
    if text == "auto":
        return None
    takes = f"it takes: auto, {', '.join(profile.form_names)}"
    try:
        form = Form.parse(text)
    except ValueError as error:
        raise UsageError(f"form {error}", takes) from None
    if form.name not in profile.form_names:
        known = {name for step in PIPELINE for name in step.forms}
        if form.name in known:
            raise UsageError(f"target '{profile.name}' does not take the form '{form.name}'", takes)
        raise UsageError(f"unknown form '{form.name}'", takes)
    return form if form.options else Form.parse(profile.form(form.name))


def choose(
    model: ir.Model, profile: TargetProfile, asked: Form | None, measured: Mapping[str, Form] | None = None
) -> list[str]:
    """Writes on each neutral block which forms it is wanted in.

    Args:
        model: in neutral form.
        profile: of the target.
        asked: the form for all blocks; None for the profile's choice.
        measured: forms by block name, which come before anything else.

    Returns:
        What must be said of the choice.
    """
    found = neutral_blocks(model)
    everything = sum(block.experts or 0 for block in found)
    wishes = {
        block.node: _wish(block, profile, asked, (measured or {}).get(block.name), everything)
        for block in found
    }
    notes = _spare_mappings(model, found, wishes) if asked is None and _PACKED in profile.form_names else []
    for block in found:
        first = wishes[block.node]
        rest = (
            Form.parse(text) for text in (profile.forms[:1] if asked or not profile.static else profile.forms)
        )
        want(block.node, [first, *(form for form in rest if form.name != first.name)])
    return notes


def stored_bits(block: MoEBlock | CombineBlock) -> int:
    """Width of the block's stored weights where they are quantized, else 0."""
    if isinstance(block, CombineBlock):
        return 0
    widths = [Quantized.of(block.weights[role]) for role in block.spec.roles]
    return min((weight.data.dtype.bitwidth for weight in widths if weight is not None), default=0)


def _wish(
    block: MoEBlock | CombineBlock,
    profile: TargetProfile,
    asked: Form | None,
    measured: Form | None,
    everything: int,
) -> Form:
    form = measured or asked
    if form is None:
        bits = stored_bits(block)
        rules = (rule for rule in profile.rules if rule.holds(bits, block.experts or 0, everything))
        form = next((Form.parse(rule.form) for rule in rules), Form.parse(profile.forms[0]))
    return form


def _spare_mappings(
    model: ir.Model, found: Sequence[MoEBlock | CombineBlock], wishes: dict[ir.Node, Form]
) -> list[str]:
    """Packed forms for blocks of two layers where separate experts would be more mappings than a process may hold."""
    rest = sum(
        1
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    )
    needed = rest + sum(_mappings(block) for block in found if wishes[block.node].name in _APART)
    if needed <= MOST_MAPPINGS:
        return []
    for block in found:
        if isinstance(block, MoEBlock):
            wishes[block.node] = Form(_PACKED)
    return [
        f"experts apart would be {needed} mapped weights, and a process may hold 65,530 (vm.max_map_count): "
        "packed operators are preferred"
    ]


def _mappings(block: MoEBlock | CombineBlock) -> int:
    if isinstance(block, CombineBlock):
        return 0  # their weights are apart already, and counted with the rest
    experts, count = block.experts or 0, 0
    for role, value in block.weights.items():
        quantized = Quantized.of(value)
        if quantized is not None:
            count += experts * len(quantized.values)
        elif not (role.endswith("_bias") and is_zero(value)):
            count += experts
    return count

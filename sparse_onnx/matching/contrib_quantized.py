"""What a `com.microsoft::QMoE` node says of its quantized weights, and which of it cannot be lifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_onnx.matching.contrib import STORED, Contrib, Unlike, constant_shape

_PROJECTIONS = ("fc1", "fc2", "fc3")


def require_readable_weights(given: Mapping[str, Any], opset: int, on_cpu: bool) -> None:
    bits = given["expert_weight_bits"]
    if given["quant_type"] != "int" or bits not in STORED:
        raise Unlike(
            f"its weights are quantized as '{given['quant_type']}' with {bits} bits",
            "2, 4 and 8 bit integers can be lifted",
        )
    if any(given[f"{name}_expert_weight_bits"] not in (None, bits) for name in _PROJECTIONS):
        raise Unlike("its projections are quantized to different widths", "use one width for all")
    if given["weights_prepacked"] == 1 or (given["weights_prepacked"] != 0 and not on_cpu):
        raise Unlike(
            "its weights may be stored in an order that only one GPU kernel reads",
            "export with weights_prepacked set to 0",
        )
    needed = 25 if bits == 2 else 21
    if opset < needed:
        raise Unlike(
            f"opset {opset} cannot hold {bits}-bit weights in blocks", f"convert the model to opset {needed}"
        )


def scale_block(found: Contrib, name: str, given: Mapping[str, Any]) -> int:
    """Elements of a row of `name` that share a scale."""
    scales, rows = found.inputs.get(f"{name}_scales"), found.outputs(name)
    if scales is None:
        raise Unlike(f"{name} has no scales", "integer weights need them")
    shape, width, block = constant_shape(scales), found.width(name), given["block_size"]
    if shape in ((found.experts, rows), (found.experts, rows, 1)) and (len(shape) == 2 or block >= width):
        return width
    if block <= 0 or shape != (found.experts, rows, -(-width // block)):
        raise Unlike(
            f"{name}_scales has the shape {list(shape)} for rows of {width} in blocks of {block}",
            "one scale a row, or one a block along the inputs",
        )
    return int(block)


def require_zero_points(found: Contrib, name: str) -> None:
    """``[E, N, blocks]``, rows packed into bytes; with one block a row also ``[E, N]``, experts packed into bytes."""
    points = found.inputs.get(f"{name}_zero_points")
    if points is None:
        return
    rows, blocks, each = found.outputs(name), -(-found.width(name) // found.blocks[name]), 8 // found.bits
    allowed: list[tuple[int, ...]] = [(found.experts, rows, -(-blocks // each))]
    if blocks == 1:
        allowed.append((found.experts, -(-rows // each)))
    if constant_shape(points) not in allowed:
        raise Unlike(
            f"{name}_zero_points has the shape {list(constant_shape(points))} for {rows} rows of {blocks} blocks",
            f"one of {found.bits} bits for each scale, packed into bytes",
        )


def require_full_accuracy(found: Contrib, given: Mapping[str, Any]) -> None:
    """Refuses what the CPU kernel computes with activations rounded to 8 bits."""
    rounded = found.bits == 8 or (found.bits == 4 and given["accuracy_level"] == 4)
    in_blocks = any(
        given["block_size"] and len(constant_shape(found.inputs[f"{name}_scales"])) == 3
        for name in found.roles.values()
    )
    if rounded and in_blocks and found.on_cpu:
        how = "accuracy_level 4" if found.bits == 4 else "8-bit weights in blocks"
        raise Unlike(
            f"with {how} the kernel rounds activations to 8 bits, and is off by about 1 %: nothing exact equals it",
            "it may stay as it is; set accuracy_level to 0 to have 4-bit experts rewritten",
        )

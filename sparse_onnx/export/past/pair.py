"""An encoder-decoder with its cache: two files, both of which are checked before either appears."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.export.checkpoint.stored import is_stored
from sparse_onnx.export.past.cross import ENCODER, CrossSource
from sparse_onnx.graph import io

if TYPE_CHECKING:
    from sparse_onnx.export import adapters


def run(
    source: CrossSource,
    out: Path,
    folder: Path,
    *,
    opset: int,
    say: Callable[[str], None],
    given: Sequence[adapters.Named] = (),
) -> Report:
    """`pipeline.run` for both halves: the decoder at `out`, the encoder beside it. The report is the decoder's, with
    the encoder's blocks and comparisons in it.

    Raises:
        UsageError: `out` has the encoder's name, another model's encoder is beside it, or the weights are to stay in
            their files.
    """
    from sparse_onnx.export import pipeline  # which calls this

    if is_stored(source.module):
        raise UsageError(
            "the weights of an encoder-decoder with cache cannot stay in their files",
            "leave out --stream and --weights link",
        )
    beside = out.with_name(ENCODER)
    if out.name == ENCODER:
        raise UsageError("OUT is the decoder's file; the encoder is written beside it", "name it otherwise")
    if beside.exists() and not out.exists():
        raise UsageError(
            f"the encoder would overwrite '{ENCODER}' in that folder", "give each model a folder of its own"
        )
    assert source.encoder is not None
    scratch = folder / "encoder"
    (scratch / "made").mkdir(parents=True)
    say("the encoder")
    encoder = pipeline.run(
        source.encoder, scratch / "made" / ENCODER, scratch, opset=opset, say=say, given=given
    )
    say("the decoder")
    whole = dataclasses.replace(source, encoder_path=scratch / "made" / ENCODER)
    decoder = pipeline.run(whole, out, folder, opset=opset, say=say, given=given)
    say(f"saving {ENCODER}")
    io.save(io.load(scratch / "made" / ENCODER), beside, weights="copy")
    nodes = encoder.model.nodes if encoder.model else 0
    notes = [f"the encoder is beside it: {ENCODER}, {nodes} nodes", *encoder.notes, *decoder.notes]
    return dataclasses.replace(
        decoder,
        blocks=[
            *(dataclasses.replace(block, name=f"encoder.{block.name}") for block in encoder.blocks),
            *decoder.blocks,
        ],
        verify=_together(encoder.verify, decoder.verify),
        notes=list(dict.fromkeys(notes)),
    )


def _together(encoder: VerifyRecord | None, decoder: VerifyRecord | None) -> VerifyRecord | None:
    if encoder is None or decoder is None:
        return decoder

    def largest(name: str) -> Any:
        return max(getattr(encoder, name) or 0.0, getattr(decoder, name) or 0.0)

    margins = [each.router_margin for each in (encoder, decoder) if each.router_margin is not None]
    return dataclasses.replace(
        decoder,
        runs=encoder.runs + decoder.runs,
        max_abs_error=largest("max_abs_error"),
        max_rel_error=largest("max_rel_error"),
        inputs=[*(f"encoder {name}" for name in encoder.inputs), *decoder.inputs],
        router_margin=min(margins, default=None),
        tokens_left_out=encoder.tokens_left_out + decoder.tokens_left_out,
    )

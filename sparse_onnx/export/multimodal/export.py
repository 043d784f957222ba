"""The files of a multimodal model, each verified by itself, and all together against the whole model."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.export import adapters, experts, patches, pipeline
from sparse_onnx.export.interfaces import TEXT_ALONE
from sparse_onnx.export.multimodal import chain, cutting, generation, media, parts
from sparse_onnx.export.multimodal.past import with_past
from sparse_onnx.export.multimodal.prompts import prompt
from sparse_onnx.export.multimodal.whole import Whole
from sparse_onnx.export.sources import Source
from sparse_onnx.graph import io, stats
from sparse_onnx.verify.compare import TOLERANCES

#: File of each part.
FILES = {"image": "vision.onnx", "audio": "audio.onnx", "embedding": "embedding.onnx", "text": "text.onnx"}


def run(
    source: Source,
    out: Path,
    folder: Path,
    *,
    opset: int,
    image_size: tuple[int, int] | None,
    sound_length: int | None = None,
    past: bool,
    say: Callable[[str], None],
    given: Sequence[adapters.Named] = (),
) -> Report:
    """Writes the parts of a transformers model into the folder `out`; `folder` is scratch space on the same file
    system, `image_size` height and width in pixels, `sound_length` frames or samples, `given` the user's adapters.

    Raises:
        ImpossibleError: the model cannot be cut, or its embeddings or its decoder cannot be exported.
        VerificationError: a file, or all of them together, answer otherwise than torch. Nothing was written.
    """
    say("finding the parts")
    module: Any = source.module
    samples, notes = media.of_model(module, image_size, sound_length)
    whole = cutting.cut(module, samples)
    made, left_out = dict[str, Report](), list(notes)
    for each in whole.media:
        try:
            made[each.kind] = _encoder(source, whole, each, folder, opset, say, given)
        except ImpossibleError as error:
            left_out.append(f"no {FILES[each.kind]}: {error.message}")
    made["embedding"] = _export(
        parts.embedding(source, whole), whole.embed, "embedding", folder, opset, say, given
    )
    made["text"] = _export(
        _text(source, whole), _logits(whole), "text", folder, opset, say, given, whole if past else None
    )
    record = _chain(source, whole, folder, made, past, say)
    pipeline.must_agree(record, source)
    stale = [FILES[part] for part in FILES if part not in made and (out / FILES[part]).exists()]
    if stale:
        raise UsageError(
            f"the folder has a {stale[0]} of another export, and this one makes none",
            "remove it, or name another folder",
            os.fspath(out),
        )
    say(f"saving into {out.name}")
    out.mkdir(exist_ok=True)
    for part in made:
        io.save(io.load(folder / part / FILES[part]), out / FILES[part], weights="copy")
    return _report(source, whole, out, made, record, left_out)


def _export(
    part: Source,
    function: Any,
    name: str,
    folder: Path,
    opset: int,
    say: Callable[[str], None],
    given: Sequence[adapters.Named],
    cached: Whole | None = None,
) -> Report:
    """`cached` is how the model is cut, for a text part that is to have a cache."""
    place, scratch = folder / name, folder / f"{name}.scratch"
    place.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    with parts.as_part(part, function):
        part = part if cached is None else with_past(part, cached)
        return pipeline.run(
            part,
            place / FILES[name],
            scratch,
            opset=opset,
            say=lambda line: say(f"{FILES[name]}: {line}"),
            given=given,
        )


def _encoder(
    source: Source,
    whole: Whole,
    each: media.Media,
    folder: Path,
    opset: int,
    say: Callable[[str], None],
    given: Sequence[adapters.Named],
) -> Report:
    """For several pieces at once where the model's code bears that, else for one."""

    def function(module: Any, **varying: Any) -> Any:
        return whole.encode(module, each.kind, **varying)

    with patches.own_attention():
        try:
            part = parts.encoder(source, whole, each.kind, several=True)
            return _export(part, function, each.kind, folder, opset, say, given)
        except ImpossibleError:
            if not part.interface.symbols or each.open_axes:
                raise
        part = parts.encoder(source, whole, each.kind, several=False)
        return _export(part, function, each.kind, folder, opset, say, given)


def _logits(whole: Whole) -> Any:
    return lambda module, **inputs: {"logits": whole.decode(module, **inputs).logits}


@torch.no_grad()
def _text(source: Source, whole: Whole) -> Source:
    module: Any = source.module
    features: dict[str, Any] = {}
    for each in whole.media:
        features |= whole.encode(module, each.kind, **each.varying)
    lengths = {each.kind: len(features[f"{each.kind}_features"]) for each in whole.media}
    asked = prompt(module.config, whole.media, lengths, [dict.fromkeys(lengths, 1)])
    embedded = whole.embed(module, asked.input_ids, **features)
    return parts.text(source, whole, embedded, cutting.types(module, whole.media, asked))


def _chain(
    source: Source, whole: Whole, folder: Path, made: Collection[str], past: bool, say: Callable[[str], None]
) -> VerifyRecord:
    """Where an encoder is missing, on prompts without its media. Half precision is compared by the float32 twins that
    the parts were compared by."""
    half = pipeline.half_type(source)
    paths = {part: folder / part / FILES[part] for part in made}
    if half:
        source, whole = source.widened(), whole.widened()
        paths = {part: folder / f"{part}.scratch" / f"float32.{FILES[part]}" for part in made}
    found, tolerance = experts.find(source.module), TOLERANCES[half] / 10 if half else TOLERANCES["float32"]
    runs = chain.planned(source, whole, made)
    record = chain.compare(source, whole, paths, found, runs, tolerance=tolerance, progress=say)
    if past and record.passed:
        record = generation.check(record, source, whole, paths, found, tolerance=tolerance, progress=say)
    return record


def _report(
    source: Source,
    whole: Whole,
    out: Path,
    made: dict[str, Report],
    record: VerifyRecord,
    left_out: list[str],
) -> Report:
    records = {FILES[part]: report.verify for part, report in made.items() if report.verify is not None}
    records["all files"] = record
    notes = [note for note in source.notes if TEXT_ALONE not in note]
    notes += [
        f"{FILES[each.kind]} takes {each.described} at a time" for each in whole.media if each.kind in made
    ]
    notes += left_out
    missing = [each.kind for each in whole.media if each.kind not in made]
    if missing:
        notes.append(f"all files together were compared on prompts without {' and '.join(missing)}")
    for part, report in made.items():
        # Every part looks at all experts of the model; the decoder's file is what it is about.
        about = [
            each for each in dict.fromkeys(report.notes) if part == "text" or "not as a block" not in each
        ]
        notes += [note for note in about if note not in notes]
    text = io.load(out / FILES["text"])
    return Report(
        "export",
        model=stats.record(text, out / FILES["text"]),
        blocks=[block for report in made.values() for block in report.blocks],
        verify=_merged(records),
        notes=notes,
    )


def _merged(records: dict[str, VerifyRecord]) -> VerifyRecord:
    margins = [each.router_margin for each in records.values() if each.router_margin is not None]
    return VerifyRecord(
        method="whole",
        passed=all(each.passed for each in records.values()),
        runs=sum(each.runs for each in records.values()),
        max_abs_error=max(each.max_abs_error or 0.0 for each in records.values()),
        max_rel_error=max(each.max_rel_error or 0.0 for each in records.values()),
        inputs=[f"{name}: {run}" for name, each in records.items() for run in each.inputs],
        router_margin=min(margins, default=None),
        tokens_left_out=sum(each.tokens_left_out for each in records.values()),
    )

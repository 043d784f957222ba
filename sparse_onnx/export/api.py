"""`export`: PyTorch -> ONNX with the sparse blocks whole, checked on inputs that were not traced."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparse_onnx.core.errors import OutsideError, UsageError
from sparse_onnx.core.report import Report

if TYPE_CHECKING:
    from torch import nn

_DTYPES = ("float32", "float16", "bfloat16")
#: What torch.onnx and onnxscript translate and convert to; for others torch leaves the opset as it was.
_OLDEST_OPSET, _NEWEST_OPSET = 18, 25


def export(
    source: str | os.PathLike[str] | tuple[nn.Module, Any] | tuple[nn.Module, Any, Any],
    out: str | os.PathLike[str],
    *,
    random_weights: bool = False,
    dtype: str | None = None,
    opset: int = 20,
    past: bool = False,
    multimodal: bool = False,
    image_size: tuple[int, int] | None = None,
    sound_length: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapters: Sequence[str | os.PathLike[str] | Callable[[nn.Module], nn.Module | None]] = (),
    stream: bool | None = None,
    weights: Literal["copy", "link"] = "copy",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Exports a torch model. Each mixture-of-experts block arrives as one `sparse_onnx::MoE` node.

    All axes that can vary are dynamic: batch and sequence of Hugging Face models (ids and attention mask in,
    logits out, no cache). Where a source of Python code does not say which, axis 0 of every input that is as
    long there as the first input is ``batch``, and axis 1 of integer inputs of two axes is ``sequence``.

    The file is run in ONNX Runtime against the module on inputs that were not traced before `out` appears.

    Args:
        source: a Hugging Face folder or hub id, ``zoo:NAME``, ``FILE.py:NAME`` or ``package.module:NAME`` - a
            function or class that gives ``(module, inputs)`` or ``(module, inputs, dynamic_axes)``; THIS RUNS
            THAT CODE - or such a tuple itself. Inputs are a tensor, a tuple or a dict by name; dynamic axes
            are ``{input: {axis: name}}``.
        out: path of the ONNX file; its weights go into a data file beside it. The folder, with `multimodal`.
        random_weights: build a Hugging Face model from its configuration alone.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None keeps the source's own.
        opset: version of the ONNX operators, 18 to 25.
        past: with the key/value cache among inputs and outputs, for models of transformers that generate text; of an
            encoder-decoder `out` is the decoder, and the encoder's file lies beside it. See `docs/generation.md`.
        multimodal: write a model that takes images or sound as several files, its encoders, its embeddings and its
            decoder, into the folder `out`; see `docs/multimodal.md`.
        image_size: height and width in pixels of the images that such an encoder is for; None takes the
            configuration's own, or 32 patches each way.
        sound_length: frames of a spectrogram, or samples of a waveform, of the pieces of sound that such an encoder is
            for; None takes 320 frames, or 40 tokens of samples.
        trust_remote_code: run Python code that comes with a Hugging Face model.
        allow_pickle: load weights from pickles, which can run code.
        adapters: teach it unknown mixture-of-experts modules: functions that get a module and give another one
            that computes the same and calls `PackedExperts`, or None; or ``FILE.py:NAME`` of such a function - THIS
            RUNS THAT CODE. Each replacement is compared with its module before it is used. See docs/adapters.md.
        stream: export a Hugging Face folder of safetensors without loading its weights; None does so where they
            would not fit into memory (docs/large-models.md).
        weights: ``link`` streams, and leaves what the checkpoint stores as the graph wants it in the
            checkpoint's files, which must lie in or under the folder of `out`.
        progress: called with a line at each step.

    Returns:
        A report: model, blocks, verify, and notes on what to know about this export.

    Raises:
        UsageError: an argument is wrong, or torch or transformers is not installed.
        ModelError: the source is missing, unreadable or unsafe.
        OutsideError: the source's own code raised, or the disk is full.
        ImpossibleError: torch cannot export it, or the trace holds for some sizes only.
        VerificationError: ORT's answers differ from torch's, or an adapter's from its module's. Nothing was written.
    """
    out = Path(out)
    _check_out(out, multimodal)
    if image_size is not None and not multimodal:
        raise UsageError("an image's size is for --multimodal only", "add --multimodal")
    if sound_length is not None and not multimodal:
        raise UsageError("the length of sound is for --multimodal only", "add --multimodal")
    if sound_length is not None and sound_length < 1:
        raise UsageError(f"sound of length {sound_length}", "--sound-length with 1 or more")
    if multimodal and (stream or weights == "link"):
        raise UsageError("a multimodal model is loaded whole", "leave --stream and --weights link out")
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", f"one of {', '.join(_DTYPES)}")
    if opset < _OLDEST_OPSET:
        raise UsageError(f"opset {opset} is too old", f"{_OLDEST_OPSET} is the oldest")
    if opset > _NEWEST_OPSET:
        raise UsageError(f"opset {opset} is too new", f"{_NEWEST_OPSET} is the newest that torch gives")
    if weights not in ("copy", "link"):
        raise UsageError(f"weights cannot be '{weights}'", "one of copy, link")
    if weights == "link" and stream is False:
        raise UsageError("weights that are loaded whole cannot be linked", "leave --no-stream out")
    _require_torch()
    import torch

    from sparse_onnx.export import pipeline, settings, sources
    from sparse_onnx.export.adapters import user
    from sparse_onnx.export.checkpoint.stored import is_stored
    from sparse_onnx.export.failure import terminable

    say = progress or (lambda text: None)
    with terminable(), settings.left_as_it_was(source):
        say("loading the model")
        types: dict[str, Any] = {"dtype": None if dtype is None else getattr(torch, dtype)}
        if not isinstance(source, (str, os.PathLike)):
            given = source if isinstance(source, tuple) else (source,)
            loaded = sources.of_objects(given, **types)
        else:
            loaded = sources.resolve(
                os.fspath(source),
                random_weights=random_weights,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                stream=True if weights == "link" else False if multimodal else stream,
                **types,
            )
        if (stream or weights == "link") and not is_stored(loaded.module):
            raise UsageError(
                "only the weights of a folder of safetensors can stay in their files",
                f"leave out {'--weights link' if weights == 'link' else '--stream'}",
                where=loaded.name,
            )
        if multimodal and not loaded.is_transformers:
            raise UsageError("--multimodal takes models of Hugging Face", "leave it out", where=loaded.name)
        if past and not multimodal:
            from sparse_onnx.export.past import with_past

            loaded = with_past(loaded)
        given_adapters = user.load(adapters, source)
        try:
            scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutsideError(
                f"the output's folder cannot be written to: {reason}", where=str(out.parent)
            ) from error
        with scratch as folder:
            if multimodal:
                from sparse_onnx.export.multimodal import export as parts

                return parts.run(
                    loaded,
                    out,
                    Path(folder),
                    opset=opset,
                    image_size=image_size,
                    sound_length=sound_length,
                    past=past,
                    say=say,
                    given=given_adapters,
                )
            return pipeline.run(
                loaded,
                out,
                Path(folder),
                opset=opset,
                say=say,
                given=given_adapters,
                link=weights == "link",
            )


def _check_out(out: Path, folder: bool) -> None:
    """Raises UsageError where nothing can be written there."""
    if not out.parent.is_dir():
        raise UsageError("the output's folder does not exist", where=str(out))
    if folder and out.exists() and not out.is_dir():
        raise UsageError("this is a file, and the parts of a model need a folder", where=str(out))
    if not folder and out.is_dir():
        raise UsageError("this is a folder", where=str(out))


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError("export needs torch", "pip install 'sparse-onnx[hf]'") from error

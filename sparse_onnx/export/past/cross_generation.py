"""Greedy generation by both files of an encoder-decoder: what differs from that of a decoder alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sparse_onnx.export import samples
from sparse_onnx.export.past.cross import CrossSource
from sparse_onnx.export.past.cross_cache import HIDDEN, IDS, MASK
from sparse_onnx.targets import session as sessions


def start_token(module: Any) -> int:
    """What the decoder begins with, as `generate` chooses it."""
    places = (getattr(module, "generation_config", None), module.config)
    names = ("decoder_start_token_id", "bos_token_id")
    found = (getattr(place, name, None) for name in names for place in places)
    return int(next((value for value in found if isinstance(value, int)), 0))


def by_onnxruntime(
    session: Any, source: CrossSource, ids: np.ndarray, mask: np.ndarray, tokens: np.ndarray
) -> Iterator[np.ndarray]:
    """Logits `[batch, vocabulary]` of each step by the decoder's session, after the encoder's file, or torch's encoder
    where there is no file of this precision; the next step is fed with `tokens`."""
    if source.encoder_path is None:
        hidden = _by_torch(source, ids, mask)
    else:
        encoder = sessions.create_session(source.encoder_path, name=source.encoder_path.name)
        (states,) = sessions.run(encoder, {IDS: ids, "attention_mask": mask}, "generation")
        hidden = torch.from_numpy(states)
    names = [output.name for output in session.get_outputs()]
    given = _decoder_inputs(source, ids, mask, tokens, hidden)
    fixed = {name: given[name].numpy() for name in (HIDDEN, MASK)}
    past = {slot.past: given[slot.past].numpy() for slot in source.slots}
    begun = given[IDS].numpy()
    for at in range(begun.shape[1]):
        feeds = {IDS: np.ascontiguousarray(begun[:, at : at + 1]), **fixed, **past}
        results = dict(zip(names, sessions.run(session, feeds, "generation"), strict=True))
        past = {slot.past: results[slot.present] for slot in source.slots}
        yield results["logits"][:, -1].astype(np.float32)


def whole_text(source: CrossSource, ids: np.ndarray, mask: np.ndarray, tokens: np.ndarray) -> samples.Run:
    """All tokens at once, from torch's own encoder."""
    given = _decoder_inputs(source, ids, mask, tokens, _by_torch(source, ids, mask))
    return source.interface.run("the generated text", given, _sizes(ids, tokens))


def _by_torch(source: CrossSource, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """What the encoder gives."""
    assert source.encoder is not None
    inputs = {IDS: torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    hidden: torch.Tensor = source.encoder.forward(inputs)[0]
    return hidden


def _decoder_inputs(
    source: CrossSource, ids: np.ndarray, mask: np.ndarray, tokens: np.ndarray, hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Without a past: the token that begins, and all but the last of those that follow."""
    drawn = source.interface.draw(_sizes(ids, tokens))
    begin = np.full((len(ids), 1), start_token(source.module))
    begun = np.concatenate([begin, tokens[:, :-1]], axis=1)
    return drawn | {IDS: torch.from_numpy(begun), HIDDEN: hidden, MASK: torch.from_numpy(mask)}


def _sizes(ids: np.ndarray, tokens: np.ndarray) -> dict[str, int]:
    return {
        "batch": len(ids),
        "sequence": tokens.shape[1],
        "past_sequence": 0,
        "encoder_sequence": ids.shape[1],
    }

"""One measure of quality for a byte-level language model in any form: torch, exported, optimized.

Bits per byte = mean over the scored bytes of ``-log2 p(byte | the bytes before it in its window)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from sparse_onnx.core.errors import UsageError
from sparse_onnx.models.corpus import held_out_text

__all__ = ["bits_per_byte", "held_out_text"]

VOCABULARY = 256


def bits_per_byte(
    logits_fn: Callable[[npt.NDArray[np.int64]], npt.ArrayLike],
    text: bytes,
    *,
    window: int = 256,
    batch: int = 16,
) -> float:
    """Bits that the model needs for a byte of `text`, cut into windows that do not overlap.

    The first byte of a window has no context and is not scored. What is left over is one shorter window.

    Args:
        logits_fn: int64 ids ``[B, S]`` -> float logits ``[B, S, 256]`` of the byte that follows each.
        text: at least two bytes.
        window: bytes in a window, at least 2.
        batch: windows in a call, at most.

    Raises:
        UsageError: nothing to score, or logits of another shape.
    """
    if len(text) < 2 or window < 2 or batch < 1:
        raise UsageError(
            f"no byte of {len(text)} has a context in windows of {window}", "give a longer text or window"
        )
    total, scored = 0.0, 0
    for ids in _batches(np.frombuffer(text, np.uint8).astype(np.int64), window, batch):
        logits = np.asarray(logits_fn(ids))
        if logits.shape != (*ids.shape, VOCABULARY):
            raise UsageError(
                f"the model gave logits {logits.shape} for ids {ids.shape}", "expected [B, S, 256]"
            )
        bits = _bits(logits[:, :-1].astype(np.float64), ids[:, 1:])
        total += float(bits.sum())
        scored += bits.size
    return total / scored


def _batches(ids: npt.NDArray[np.int64], window: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
    whole = len(ids) // window
    windows = ids[: whole * window].reshape(whole, window)
    for start in range(0, whole, batch):
        yield windows[start : start + batch]
    rest = ids[whole * window :]
    if len(rest) >= 2:
        yield rest[None]


def _bits(logits: npt.NDArray[np.float64], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """-log2 softmax(logits)[targets]: logits ``[B, S, 256]``, targets ``[B, S]`` -> ``[B, S]``."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    target = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    bits: npt.NDArray[np.float64] = np.log2(np.exp(logits).sum(axis=-1)) - target / np.log(2.0)
    return bits

"""models/quality.py: bits per byte."""

import numpy as np
import pytest

from sparse_onnx.core.errors import UsageError
from sparse_onnx.models.quality import bits_per_byte, held_out_text


def constant(value):
    return lambda ids: np.full((*ids.shape, 256), value, np.float32)


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_a_uniform_model_needs_exactly_eight_bits(value):
    assert bits_per_byte(constant(value), held_out_text()[:3000]) == 8.0


def test_a_model_that_knows_needs_none():
    text = bytes(range(100))

    def next_byte(ids):
        logits = np.zeros((*ids.shape, 256))
        np.put_along_axis(logits, (ids[..., None] + 1) % 256, 1e4, -1)
        return logits

    assert bits_per_byte(next_byte, text) == 0.0


def test_the_probability_is_of_the_byte_that_follows():
    logits = np.log(np.array([0.5, 0.25, 0.125] + [0.125 / 253] * 253))

    def unigram(ids):
        return np.broadcast_to(logits, (*ids.shape, 256))

    # scored: 1 -> 2 bits, 0 -> 1 bit, 2 -> 3 bits; the first byte is not
    assert bits_per_byte(unigram, bytes([2, 1, 0, 2])) == pytest.approx(2.0, abs=1e-12)


def test_windows_do_not_overlap_and_their_first_bytes_are_not_scored():
    seen = []

    def spy(ids):
        seen.append(ids.copy())
        assert ids.dtype == np.int64
        return np.where(np.arange(256) == 7, 0.0, -np.inf) + np.zeros((*ids.shape, 1))

    text = bytes([0, 7, 7, 7] * 5 + [0, 7])  # a 0 only where it is first in a window: never scored
    assert bits_per_byte(spy, text, window=4, batch=2) == 0.0
    assert [x.shape for x in seen] == [(2, 4), (2, 4), (1, 4), (1, 2)]
    assert np.concatenate([x.ravel() for x in seen]).tolist() == list(text)


def test_a_last_single_byte_has_no_context():
    assert bits_per_byte(constant(0.0), bytes(5), window=4) == 8.0


def test_batching_changes_nothing():
    table = np.random.default_rng(0).normal(size=(256, 256))
    text = held_out_text()[:3000]
    assert bits_per_byte(lambda ids: table[ids], text, batch=1) == pytest.approx(
        bits_per_byte(lambda ids: table[ids], text, batch=64), rel=1e-12
    )


@pytest.mark.parametrize(
    "text, options", [(b"", {}), (b"a", {}), (b"abc", {"window": 1}), (b"abc", {"batch": 0})]
)
def test_nothing_to_score_is_refused(text, options):
    with pytest.raises(UsageError):
        bits_per_byte(constant(0.0), text, **options)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"expected \[B, S, 256\]"):
        bits_per_byte(lambda ids: np.zeros((*ids.shape, 255)), b"abcd")

"""Sample sound for a multimodal model of transformers, in the form that its own processor gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.export.multimodal.configs import setting

#: Frames of a spectrogram: about 3 seconds at Whisper's 100 frames a second, a multiple of what encoders take together.
_FRAMES = 320
#: Tokens of a waveform, and of frames that are a token each.
_TOKENS = 40
_BINS = ("num_mel_bins", "feature_size", "n_mel_bins", "input_feat_size")


@dataclasses.dataclass(frozen=True)
class Sound:
    """One piece: see `media.Media`."""

    varying: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    described: str
    open_axes: Mapping[int, str] = dataclasses.field(default_factory=dict)


def sample(model: Any, takes: set[str], length: int | None = None) -> Sound:
    """
    Args:
        model: a transformers model.
        takes: the arguments of its `get_audio_features`.
        length: in frames or samples, where it is fixed; None: about 3 seconds.

    Raises:
        UsageError: it takes no sound of this length.
        ImpossibleError: it takes sound in no form that is known.
    """
    config, generator = model.config.audio_config, torch.Generator().manual_seed(1)
    samples = getattr(config, "samples_per_token", None)
    if "input_values" in takes and samples is not None:  # a waveform
        length = _TOKENS * samples if length is None else length
        if length % samples:
            raise UsageError(
                f"{length} samples of sound are no multiple of the model's {samples} a token",
                f"--sound-length {max(1, round(length / samples)) * samples}",
            )
        wave = torch.randn(1, length, generator=generator).to(model.dtype)
        return Sound({"input_values": wave}, {}, f"{length} samples of sound")
    bins, words = _bins(config), getattr(config, "mel_vocab_size", None)
    if bins is None:
        raise ImpossibleError("sound in a form that is not known")
    if (
        "audio_input_ids" in takes and words is not None
    ):  # a spectrogram of so many loudnesses, a token each frame
        if length is not None:
            raise UsageError("the model takes sound of any length", "leave out --sound-length")
        ids = torch.randint(words, (1, _TOKENS, bins), generator=generator)
        ids[..., 0, 0] = words - 1  # the sample tells the range of others
        return Sound({"audio_input_ids": ids}, {}, "any number of frames of sound", {1: "frames"})
    length = _FRAMES if length is None else length
    form = _spectrogram(config, takes, length)
    if "input_features" not in takes or form is None:
        raise ImpossibleError("sound in a form that is not known")
    frames_last, fixed = form
    shape = (1, bins, length) if frames_last else (1, length, bins)
    features = torch.randn(*shape, generator=generator).to(model.dtype)
    return Sound({"input_features": features}, fixed, f"{length} frames of sound")


def _bins(config: Any) -> int | None:
    channels = getattr(config, "subsampling_conv_channels", None)
    # Gemma 4's encoder halves bins twice and takes as many of them as its first convolution has channels.
    return setting(config, _BINS) or (channels[0] if channels else None)


def _spectrogram(config: Any, takes: set[str], length: int) -> tuple[bool, dict[str, Tensor]] | None:
    """Whether frames are the last axis, and what says that all of them are sound."""
    if "feature_attention_mask" in takes:
        return True, {"feature_attention_mask": torch.ones(1, length, dtype=torch.int64)}
    if "input_features_mask" in takes:
        return False, {"input_features_mask": torch.ones(1, length, dtype=torch.bool)}
    hop = getattr(config, "hop_length", None)
    if "chunk_sample_lengths" in takes and hop is not None:
        return True, {"chunk_sample_lengths": torch.tensor([length * hop])}
    return None

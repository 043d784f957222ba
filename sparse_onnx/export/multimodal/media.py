"""Sample images and sound for a multimodal model of transformers, in the form that its own processor gives.

Each family has one of a few forms, which the arguments of its `get_image_features` or `get_audio_features` tell apart
(for sound see `sound`). What the form has beside the pixels or the sound - a grid, positions, lengths - follows from
the size alone, and the export takes it as fixed.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.export.multimodal import sound
from sparse_onnx.export.multimodal.configs import setting

#: Patches of an image's side where neither the configuration nor the user fixes its size.
_SIDE = 32
_PATCH = ("patch_size",)
_CHANNELS = ("in_channels", "num_channels")


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or one piece of sound. `varying` are the inputs of its encoder's graph, by the names of the model's
    forward, `fixed` those that become constants of it; `described` is its size in words, `open_axes` names axes of the
    varying inputs of any length, beside the number of pieces; `option` is the one that gave the size, where the user
    did."""

    kind: str
    method: str
    token: int
    varying: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    described: str
    open_axes: Mapping[int, str] = dataclasses.field(default_factory=dict)
    option: str = ""

    def drawn(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Another piece of the same size."""
        return {name: _another(value, generator) for name, value in self.varying.items()}

    def repeated(self, pieces: int) -> dict[str, Tensor]:
        """What a forward gets beside the varying inputs of so many pieces, one after the other."""
        return {name: torch.cat([value] * pieces) for name, value in self.fixed.items()}


def _another(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    return torch.randint(int(value.max()) + 1, value.shape, generator=generator).to(value.dtype)


def owner(model: nn.Module, method: str) -> Any:
    """The innermost part of the model with this method, or None."""
    found = [module for module in model.modules() if method in _methods(type(module))]
    return found[-1] if found else None


def of_model(
    model: Any, image_size: tuple[int, int] | None, sound_length: int | None = None
) -> tuple[list[Media], tuple[str, ...]]:
    """A sample of each kind that the model takes, and notes on kinds that are left out.

    Args:
        model: a transformers model.
        image_size: height and width in pixels; None: the configuration's own, else 32 patches each way.
        sound_length: frames of a spectrogram or samples of a waveform; None: 320 frames, or 40 tokens of samples.

    Raises:
        UsageError: the model takes no images of this size, or no sound of this length.
        ImpossibleError: it takes neither images nor sound, or in no form that is known.
    """
    kinds: dict[str, tuple[str, Any, Any, str]] = {
        "image": ("get_image_features", _image, image_size, "--image-size"),
        "audio": ("get_audio_features", _audio, sound_length, "--sound-length"),
    }
    found, reasons = [], []
    for kind, (method, make, size, option) in kinds.items():
        part = owner(model, method)
        if (
            part is None
            or getattr(model.config, "vision_config" if kind == "image" else "audio_config", None) is None
        ):
            continue
        token = setting(model.config, (f"{kind}_token_id", f"{kind}_token_index"), deep=False)
        try:
            if token is None:
                raise ImpossibleError("its configuration names no token for it")
            made = make(model, set(inspect.signature(getattr(part, method)).parameters), token, size)
            found.append(made if size is None else dataclasses.replace(made, option=option))
        except ImpossibleError as error:
            reasons.append(f"no {kind} encoder: {error.message}")
    if not found:
        raise ImpossibleError(
            reasons[0] if reasons else "the model takes neither images nor sound", "leave out --multimodal"
        )
    if sound_length is not None and found[-1].kind != "audio":
        raise UsageError("the model takes no sound that can be exported", "leave out --sound-length")
    return found, tuple(reasons)


def _image(model: Any, takes: set[str], token: int, size: tuple[int, int] | None) -> Media:
    config, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    patch, channels = _square(setting(config, _PATCH) or 1), setting(config, _CHANNELS) or 3
    frames = setting(config, ("temporal_patch_size", "patch_temporal")) or 1
    fixed: dict[str, Tensor] = {}

    def media(*shape: int) -> Media:
        pixels = torch.randn(*shape, generator=generator).to(model.dtype)
        return Media("image", "get_image_features", token, {"pixel_values": pixels}, fixed, described)

    if "image_grid_thw" in takes:
        merge = setting(config, ("spatial_merge_size", "merge_size")) or 1
        height, width = size or _default_size(config, patch * merge)
        _must_divide(height, width, patch * merge)
        rows, columns = height // patch, width // patch
        described = f"{height}x{width} pixels"
        if config.model_type == "inkling2_vision":  # one row a token, its patches whole
            fixed["image_grid_thw"] = torch.tensor([[1, rows // merge, columns // merge]])
            side = merge * patch
            return media(rows * columns // merge**2, side, side, channels)
        fixed["image_grid_thw"] = torch.tensor([[1, rows, columns]])
        return media(rows * columns, channels * frames * patch**2)
    if "image_position_ids" in takes:
        pool = setting(config, ("pooling_kernel_size",)) or 1
        height, width = size or (patch * pool * 8,) * 2
        _must_divide(height, width, patch * pool)
        rows, columns = height // patch, width // patch
        described = f"{height}x{width} pixels"
        grid = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
        fixed["image_position_ids"] = torch.stack(grid, -1).reshape(1, -1, 2)
        return media(1, rows * columns, channels * patch**2)
    if "image_sizes" in takes:
        side = patch * (setting(model.config, ("spatial_merge_size",), deep=False) or 1)
        height, width = size or _default_size(config, side)
        _must_divide(height, width, side)
        described = f"{height}x{width} pixels"
        fixed["image_sizes"] = torch.tensor([[height, width]])
        return media(1, channels, height, width)
    own = setting(config, ("image_size",))
    if own is None:  # each patch of an image by itself
        described = f"patches of {patch}x{patch} pixels"
        return media(2, frames, patch, patch, channels)
    height, width = (own, own) if isinstance(own, int) else tuple(own)
    if size not in (None, (height, width)):
        raise UsageError(f"the model takes images of {height}x{width} pixels only", "leave out --image-size")
    described = f"{height}x{width} pixels"
    return media(1, channels, height, width)


def _audio(model: Any, takes: set[str], token: int, length: int | None) -> Media:
    found = sound.sample(model, takes, length)
    return Media(
        "audio", "get_audio_features", token, found.varying, found.fixed, found.described, found.open_axes
    )


def _default_size(config: Any, multiple: int) -> tuple[int, int]:
    """The configuration's own size, else 32 patches each way, as a multiple of what one token covers."""
    own = setting(config, ("image_size", "max_image_size"))
    patch = _square(setting(config, _PATCH) or 1)
    side = own if isinstance(own, int) else _SIDE * patch
    side = max(multiple, math.floor(side / multiple) * multiple)
    return side, side


def _must_divide(height: int, width: int, multiple: int) -> None:
    if height % multiple or width % multiple:
        raise UsageError(
            f"images of {height}x{width} pixels do not divide into the model's {multiple}x{multiple} pixels a token",
            f"--image-size with multiples of {multiple}",
        )


def _square(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def _methods(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in vars(base)}

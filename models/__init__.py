"""The zoo: small sparse models, one architecture a file. This is its catalogue; only `load` imports torch."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, NamedTuple

from sparse_onnx.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class ZooModel(NamedTuple):
    """What an export needs: the module in eval mode, one input of each name, and which of its axes vary.

    `dynamic_axes` maps an input's name to {axis: "batch" or "sequence"}.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic_axes: dict[str, dict[int, str]]


@dataclasses.dataclass(frozen=True)
class ZooEntry:
    """A model of the zoo. `loader` is ``module:function``, which takes nothing and gives a `ZooModel`."""

    name: str
    description: str
    loader: str

    def load(self) -> ZooModel:
        """Imports the loader and runs it.

        Raises:
            UsageError: torch or safetensors is not installed.
            ModelError: its weights are missing or damaged.
        """
        module, _, function = self.loader.partition(":")
        try:
            model: ZooModel = getattr(importlib.import_module(module), function)()
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "safetensors"):
                raise
            raise UsageError(
                f"the model needs {error.name}", "pip install 'sparse-onnx[hf]'", f"zoo:{self.name}"
            ) from error
        return model


_ENTRIES = (
    ZooEntry(
        "byte-moe",
        "byte-level language model, trained: 4 layers of 8 SwiGLU experts, softmax top-2 routing",
        "sparse_onnx.models.byte_moe:load",
    ),
)


def names() -> list[str]:
    """Names of all models, sorted."""
    return sorted(entry.name for entry in _ENTRIES)


def get(name: str) -> ZooEntry:
    """The entry of that name; nothing is loaded yet.

    Raises:
        UsageError: no such model.
    """
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    close = difflib.get_close_matches(name.replace("_", "-").lower(), names(), n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"the zoo has: {', '.join(names())}"
    raise UsageError(f"the zoo has no model '{name}'", hint)

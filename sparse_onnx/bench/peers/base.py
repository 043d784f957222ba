"""What the peers of the benchmark share: what each is made from, and what each has to answer.

Importing this needs neither torch nor any of the peers' packages.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from sparse_onnx.bench.contestants import Feeds
from sparse_onnx.bench.measure import Contestant
from sparse_onnx.core.errors import ImpossibleError

if TYPE_CHECKING:
    from sparse_onnx.bench.layers import SparseLayers

Precision = Literal["float32", "int8", "int4"]


class Peer(Protocol):
    """One way to run the layers, prepared once."""

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        """Ready to be timed on ``{"hidden_states": [T, hidden]}``; each run gives ``[T, hidden]`` float32."""
        ...

    def close(self) -> None:
        """Lets go of what it holds; its contestants can no longer run."""
        ...


@dataclasses.dataclass
class Setting:
    """What peers are made from.

    Attributes:
        layers: the model; its weights are read, never changed.
        precision: of the experts' weights. Routers, activations and results are float32 in every peer.
        folder: where files go.
        threads: that each peer computes on.
        ours: the layers by this project in float32 and standard operators, for other runtimes; None writes them here.
    """

    layers: SparseLayers
    precision: Precision
    folder: Path
    threads: int
    ours: Path | None = None
    _written: dict[str, Path] = dataclasses.field(default_factory=dict)

    def file(self, stem: str, write: Callable[[Path], None]) -> Path:
        """The file that `write` makes; several peers read the same one, which is written once."""
        if stem not in self._written:
            path = self.folder / f"{stem}.onnx"
            write(path)
            self._written[stem] = path
        return self._written[stem]

    def with_experts(self, implementation: str) -> SparseLayers:
        """The layers with another of transformers' implementations of experts, on the same weights."""
        shared = {id(parameter): parameter for parameter in self.layers.parameters()}
        copied: SparseLayers = copy.deepcopy(self.layers, shared)
        copied.set_experts_implementation(implementation)
        return copied

    def optimized(self) -> Path:
        """The layers by this project, in the grouped form: operators that other runtimes read too."""
        return self.ours if self.ours is not None else self.file("peer-ours", self._write_ours)

    def transformers(self) -> Path:
        """The layers by transformers' OnnxExporter, as it is by default."""
        from sparse_onnx.bench.spelled import write_grouped

        return self.file("peer-transformers", lambda path: write_grouped(self.layers, path))

    def _write_ours(self, path: Path) -> None:
        import torch

        from sparse_onnx.export.api import export
        from sparse_onnx.optimize.api import optimize

        neutral = self.folder / "peer-neutral.onnx"
        sample = {"hidden_states": torch.randn(7, self.layers.config.hidden_size)}
        export((self.layers, sample, {"hidden_states": {0: "tokens"}}), neutral)
        optimize(neutral, path, target="cpu", form="grouped", verify="none")


def require(module: str, package: str) -> None:
    """Nothing is imported.

    Raises:
        ImpossibleError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ImpossibleError("not installed", f"pip install {package}")


def environment(**values: str) -> None:
    """Sets variables that a package reads when it is imported, where they are not set."""
    for name, value in values.items():
        os.environ.setdefault(name, value)

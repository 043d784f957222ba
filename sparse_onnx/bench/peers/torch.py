"""PyTorch, by transformers' implementations of experts and by its compiler. Importing this needs torch and
transformers."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from sparse_onnx.bench import contestants
from sparse_onnx.bench.contestants import Feeds
from sparse_onnx.bench.layers import SparseLayers
from sparse_onnx.bench.measure import Contestant
from sparse_onnx.bench.peers.base import Setting
from sparse_onnx.bench.recognised import FITS, copied_bytes
from sparse_onnx.core.errors import ImpossibleError

_COMPILATIONS = 64


class Eager:
    """The modules as they are, with one of transformers' implementations of experts: `eager`, `grouped_mm` ...

    Args:
        name: of the contestants.
        setting: see there.
        experts: the implementation.
    """

    def __init__(self, name: str, setting: Setting, experts: str) -> None:
        self._name = name
        self._model: SparseLayers | None = setting.with_experts(experts)

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        assert self._model is not None
        return contestants.eager(self._name, self._model, feeds)

    def close(self) -> None:
        self._model = None


class Compiled:
    """`torch.compile` for exactly the feeds' token count, with inductor: its C++ needs a compiler.

    Under the compiler transformers runs `grouped_mm` in an operator of its own, a loop over the experts that hides
    their products from inductor, since torch's grouped product is not compiled in float32. `batched_mm` is compiled
    whole, and gathers the matrices of each token's experts: for few tokens.

    Args:
        name: of the contestants.
        setting: see there.
        experts: the implementation: `grouped_mm` or `batched_mm`.
    """

    def __init__(self, name: str, setting: Setting, experts: str) -> None:
        self._name = name
        self._gathers = experts == "batched_mm"
        self._model: SparseLayers | None = setting.with_experts(experts)

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        """
        Raises:
            ImpossibleError: the gathered matrices of so many tokens do not fit.
        """
        assert self._model is not None
        tokens = len(next(iter(feeds[0].values())))
        if self._gathers and copied_bytes(self._model, tokens) > FITS:
            raise ImpossibleError(f"gathers {copied_bytes(self._model, tokens) / 1e9:.0f} GB of weights")
        # Each token count is one compilation of the same code, whose number is limited.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
        compiled = torch.compile(self._model, dynamic=False, fullgraph=True)
        contestant = contestants.eager(self._name, compiled, feeds)
        contestant.run(0)
        return contestant

    def close(self) -> None:
        self._model = None
        torch._dynamo.reset()
        gc.collect()

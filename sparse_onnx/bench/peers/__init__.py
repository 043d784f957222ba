"""Peers: everything else that runs the suite's MoE layers in one process, with the same weights, to be timed beside us.

| peer | float32 | int8 | int4 | is |
| --- | --- | --- | --- | --- |
| `com.microsoft::MoE`, `QMoE` | yes | blocks of 32 | blocks of 32 | ORT's fused operators, by `genai` |
| transformers | yes | - | - | its OnnxExporter, on ORT |
| mobius | yes | - | - | its dense masks (`spelled.write_masked`), on ORT |
| PyTorch | yes | - | - | transformers' experts, eager and compiled: `torch` |
| OpenVINO | yes | a channel | blocks of 32 | transformers' graph and ours; ours by NNCF: `openvino` |
| ggml | F32 | Q8_0 | Q4_0, Q4_K | `mul_mat_id` in llama.cpp's graph: `ggml` |

Activations, routers and results are float32 in all of them; what a kernel rounds inside is its own affair (ORT's QMoE
in 8 bits, OpenVINO and ggml round activations to 8 bits too). OpenVINO, NNCF and llama-cpp-python are optional: a peer
that is not installed is left out, as is one that fails or gives wrong answers, each with its reason.

Importing this needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime

from sparse_onnx.bench import contestants, rivals, spelled
from sparse_onnx.bench.contestants import Feeds
from sparse_onnx.bench.layers import SparseLayers
from sparse_onnx.bench.measure import Contestant
from sparse_onnx.bench.peers.base import Peer, Precision, Setting
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.export.failure import root_line

MOE, QMOE = "com.microsoft::MoE (onnxruntime-genai)", "com.microsoft::QMoE (onnxruntime-genai)"
TRANSFORMERS, MOBIUS = "transformers OnnxExporter", "mobius"
EAGER, GROUPED = "PyTorch eager", "PyTorch grouped_mm"
COMPILED, COMPILED_BATCHED = "PyTorch compiled grouped_mm", "PyTorch compiled batched_mm"
OPENVINO, OPENVINO_OURS = "OpenVINO, transformers' graph", "OpenVINO, our graph"
GGML_F32, GGML_Q8_0, GGML_Q4_0, GGML_Q4_K = (f"ggml {kind}" for kind in ("F32", "Q8_0", "Q4_0", "Q4_K"))

#: Largest error of a token: the norm of its difference over the norm of what the block adds to it. Rounding weights to
#: 8 bits costs 0.01 to 0.02, to 4 bits 0.14 to 0.2; a wrong expert, order or layout costs 1 and more.
BOUNDS: Mapping[Precision, float] = {"float32": 1e-3, "int8": 0.05, "int4": 0.35}
#: Tokens in a hundred that may differ by more: the router of a near tie may choose another expert.
_TIES = 1

#: Why a peer has no quantized form.
_FLOAT_ONLY = {
    TRANSFORMERS: "exports float32 experts only",
    MOBIUS: "writes quantized experts only for a model that is quantized already",
    **dict.fromkeys(
        (EAGER, GROUPED, COMPILED, COMPILED_BATCHED), "transformers has no quantized experts for CPU"
    ),
    OPENVINO: "NNCF finds no weights to compress in this graph",
}


class OnnxFile:
    """A file on ONNX Runtime, in a session that does not spin behind its runs."""

    def __init__(self, name: str, path: Path, threads: int) -> None:
        self._name = name
        self._session: onnxruntime.InferenceSession | None = contestants.create(path, threads)

    def on(self, feeds: Sequence[Feeds]) -> Contestant:
        assert self._session is not None
        return contestants.onnx(self._name, self._session, feeds)

    def close(self) -> None:
        self._session = None


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    make: Callable[[str, Setting], Peer]


def _moe(name: str, setting: Setting) -> Peer:
    # Without the biases of zeros that genai's builder adds: they only cost time.
    path = setting.file("peer-moe", lambda path: rivals.build_contrib_moe(setting.layers, path))
    return OnnxFile(name, path, setting.threads)


def _qmoe(bits: int) -> Callable[[str, Setting], Peer]:
    def make(name: str, setting: Setting) -> Peer:
        from sparse_onnx.bench.peers.genai import build_qmoe

        path = setting.file(f"peer-qmoe{bits}", lambda path: build_qmoe(setting.layers, path, bits))
        return OnnxFile(name, path, setting.threads)

    return make


def _transformers(name: str, setting: Setting) -> Peer:
    return OnnxFile(name, setting.transformers(), setting.threads)


def _mobius(name: str, setting: Setting) -> Peer:
    path = setting.file("peer-mobius", lambda path: spelled.write_masked(setting.layers, path))
    return OnnxFile(name, path, setting.threads)


def _eager(experts: str) -> Callable[[str, Setting], Peer]:
    def make(name: str, setting: Setting) -> Peer:
        from sparse_onnx.bench.peers.torch import Eager

        return Eager(name, setting, experts)

    return make


def _compiled(experts: str) -> Callable[[str, Setting], Peer]:
    def make(name: str, setting: Setting) -> Peer:
        from sparse_onnx.bench.peers.torch import Compiled

        return Compiled(name, setting, experts)

    return make


def _openvino(path: Callable[[Setting], Path], bits: int | None = None) -> Callable[[str, Setting], Peer]:
    def make(name: str, setting: Setting) -> Peer:
        from sparse_onnx.bench.peers.openvino import OpenVino, installed

        installed(bits)
        gate = setting.layers.parts[0].gate.weight
        return OpenVino(name, path(setting), setting.threads, bits, (gate.shape[1], gate.shape[0]))

    return make


def _ggml(kind: str) -> Callable[[str, Setting], Peer]:
    def make(name: str, setting: Setting) -> Peer:
        from sparse_onnx.bench.peers import ggml, ggml_library

        return ggml.Ggml(name, setting, getattr(ggml_library, kind))

    return make


_PEERS: Mapping[Precision, Sequence[_Entry]] = {
    "float32": (
        _Entry(MOE, _moe),
        _Entry(TRANSFORMERS, _transformers),
        _Entry(MOBIUS, _mobius),
        _Entry(EAGER, _eager("eager")),
        _Entry(GROUPED, _eager("grouped_mm")),
        _Entry(COMPILED, _compiled("grouped_mm")),
        _Entry(COMPILED_BATCHED, _compiled("batched_mm")),
        _Entry(OPENVINO, _openvino(Setting.transformers)),
        _Entry(OPENVINO_OURS, _openvino(Setting.optimized)),
        _Entry(GGML_F32, _ggml("F32")),
    ),
    "int8": (
        _Entry(QMOE, _qmoe(8)),
        _Entry(OPENVINO_OURS, _openvino(Setting.optimized, 8)),
        _Entry(GGML_Q8_0, _ggml("Q8_0")),
    ),
    "int4": (
        _Entry(QMOE, _qmoe(4)),
        _Entry(OPENVINO_OURS, _openvino(Setting.optimized, 4)),
        _Entry(GGML_Q4_0, _ggml("Q4_0")),
        _Entry(GGML_Q4_K, _ggml("Q4_K")),
    ),
}


class Peers:
    """All peers of one precision, made once and timed on inputs of several token counts.

    ::

        with Peers(layers, "int4", folder, threads=2) as peers:
            for feeds in ...:
                contestants, left_out = peers.on(feeds)

    Memory beyond the layers' own: in float32 about one copy of the weights for each peer on ORT (but MoE, whose file is
    mapped), one for each of OpenVINO's, none for PyTorch's and ggml's; quantized, one copy of that size each.

    Args:
        layers: the model, of one layer where `precision` is not float32: rounded experts change the routing of layers
            behind them, which the check of the answers would take for an error.
        precision: of the experts' weights.
        folder: where files go; the peers on ORT read them until `close`.
        threads: that each computes on. torch is set to it.
        ours: the layers by this project in float32, grouped, for OpenVINO; None exports and optimizes them here.
        only: names of the peers to make; None makes all of the precision.
    """

    def __init__(
        self,
        layers: SparseLayers,
        precision: Precision,
        folder: Path,
        threads: int,
        *,
        ours: Path | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self._layers = layers
        self._bound = BOUNDS[precision]
        self._peers: dict[str, Peer] = {}
        self._left_out = {
            name: reason
            for name, reason in _FLOAT_ONLY.items()
            if precision != "float32" and (only is None or name in only)
        }
        setting = Setting(layers, precision, folder, threads, ours)
        for entry in _PEERS[precision]:
            if only is not None and entry.name not in only:
                continue
            try:
                self._peers[entry.name] = entry.make(entry.name, setting)
            except Exception as error:  # whatever others' packages raise
                self._left_out[entry.name] = _reason(error)
            gc.collect()

    def on(self, feeds: Sequence[Feeds]) -> tuple[list[Contestant], dict[str, str]]:
        """Contestants that are ready to run on these feeds, and why the other peers are left out.

        Each has run the first input once, and its answer was compared with torch's. Contestants of an earlier call may
        no longer be run.

        Args:
            feeds: ``{"hidden_states": [T, hidden]}`` float32, all of the same T.
        """
        import torch

        x = feeds[0]["hidden_states"]
        with torch.inference_mode():
            expected = self._layers(torch.from_numpy(x)).numpy()
        found: list[Contestant] = []
        left_out = dict(self._left_out)
        for name, peer in self._peers.items():
            try:
                contestant = peer.on(feeds)
                error = largest_error(x, expected, np.asarray(contestant.run(0)))
            except Exception as failure:  # whatever others' packages raise
                left_out[name] = _reason(failure)
                continue
            if error <= self._bound:
                found.append(contestant)
            else:
                left_out[name] = f"wrong answers: relative error {error:.2g} > {self._bound:.2g}"
        return found, left_out

    def close(self) -> None:
        """Lets go of sessions, compiled models and copies of weights; files stay."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        gc.collect()

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def largest_error(x: np.ndarray, expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest relative error of a token's row, leaving out one row in a hundred where there are a hundred.

    Infinite for another shape, or where a number is not finite.
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    added = np.linalg.norm(expected - x, axis=-1)
    errors = np.sort(np.linalg.norm(actual - expected, axis=-1) / np.maximum(added, 1e-12))
    return float(errors[len(errors) - 1 - len(errors) * _TIES // 100])


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SparseOnnxError) else root_line(error)

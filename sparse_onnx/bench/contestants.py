"""Ways to run a model, made comparable: ONNX Runtime sessions and torch modules on the same feeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparse_onnx.bench.measure import NO_SPINNING, Contestant
from sparse_onnx.core.errors import UsageError, VerificationError
from sparse_onnx.targets import session as sessions

if TYPE_CHECKING:
    import onnxruntime
    import torch

Feeds = Mapping[str, np.ndarray]

#: PyTorch's threads spin for a while behind each call; nobody else is timed until they sleep.
SETTLE_S = 0.005


def create(path: str | os.PathLike[str], threads: int, kernels: bool = False) -> onnxruntime.InferenceSession:
    """A session that can be timed beside others; with `kernels` it runs our native ones.

    Raises:
        ModelError, ImpossibleError: it does not load.
    """
    return sessions.create_session(path, threads=threads, entries=NO_SPINNING, kernels=kernels)


def onnx(name: str, session: onnxruntime.InferenceSession, feeds: Sequence[Feeds]) -> Contestant:
    """A session on its feeds, matched by name, or by order where the names are others.

    Raises:
        UsageError: the session takes another number of inputs, or others by type or rank.
    """
    own = [_renamed(feed, session, name) for feed in feeds]
    return Contestant(name, lambda index: sessions.run(session, own[index], name)[0])


def eager(name: str, call: Callable[..., torch.Tensor], feeds: Sequence[Feeds]) -> Contestant:
    """A torch module, called with its feeds by name, on the threads that torch is set to."""
    import torch

    tensors = [{key: torch.from_numpy(array) for key, array in feed.items()} for feed in feeds]

    def run(index: int) -> np.ndarray:
        with torch.inference_mode():
            return call(**tensors[index]).numpy()

    return Contestant(name, run, SETTLE_S)


def check(reference: Contestant, others: Sequence[Contestant], inputs: int) -> None:
    """Nobody is timed for a wrong answer.

    Raises:
        VerificationError: an output that differs from the reference's by more than rounding.
    """
    for name, reason in disagreements(reference, others, inputs).items():
        raise VerificationError(reason, where=name)


def disagreements(reference: Contestant, others: Sequence[Contestant], inputs: int) -> dict[str, str]:
    """Of each contestant whose output differs from the reference's by more than rounding, how it does."""
    from sparse_onnx.verify.compare import difference

    found: dict[str, str] = {}
    for index in range(inputs):
        expected = np.asarray(reference.run(index))
        for other in others:
            if other.name in found:
                continue
            compared = difference(expected, np.asarray(other.run(index)))
            if not compared.within:
                found[other.name] = f"differs from {reference.name}: {compared.reason} on {expected.shape}"
    return found


def _renamed(feeds: Feeds, session: onnxruntime.InferenceSession, name: str) -> dict[str, np.ndarray]:
    inputs = session.get_inputs()
    wanted = [item.name for item in inputs]
    if set(wanted) == set(feeds):
        return dict(feeds)
    problem, hint = (
        f"'{name}' takes other inputs than the first model",
        "bench compares models of one interface",
    )
    if len(wanted) != len(feeds):
        raise UsageError(f"{problem}: {len(wanted)} instead of {len(feeds)}", hint)
    for item, (known, array) in zip(inputs, feeds.items(), strict=True):
        if len(item.shape) != array.ndim or item.type != _ort_type(array):
            theirs = f"'{item.name}' is {item.type} of rank {len(item.shape)}"
            raise UsageError(f"{problem}: {theirs}, '{known}' {_ort_type(array)} of rank {array.ndim}", hint)
    return dict(zip(wanted, feeds.values(), strict=True))


def _ort_type(array: np.ndarray) -> str:
    names = {"float32": "float", "float64": "double"}
    return f"tensor({names.get(array.dtype.name, array.dtype.name)})"

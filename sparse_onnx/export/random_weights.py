"""Random weights under which routing matters, so that a wrong export shows.

transformers initialises with a deviation of 0.02: experts then add almost nothing to the residual stream and
router scores nearly tie, so that swapped experts pass for rounding.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SEED = 0
ROUTER_SCALE = 3.0
_BIAS_DEVIATION = 0.1
#: Buffers that routers add to their scores to choose by: zeros would not tell whether they are added.
_ROUTER_BIASES = ("correction_bias", "expert_bias", "balancing_biases")
#: DeepSeek-V4's table `[vocabulary, K]` of experts by token id: zeros would send everything to one expert.
_HASH_TABLE = "tid2eid"


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """For building the model: what `fill` leaves alone, transformers draws from torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fills every parameter in place: matrices with deviation 1/sqrt(fan_in), routers three times that,
    embeddings 1, biases and vectors of zeros 0.1; scales of norms stay 1. Each value depends on the parameter's name
    alone, not on the order."""
    experts = {
        path.rpartition(".")[0]: module.down_proj.shape[0]
        for path, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter)
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for path, module in model.named_modules():
        transposed = bool(getattr(module, "is_transposed", False))
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.numel():  # a shared expert of no width, where a configuration says 0 of them
                continue
            deviation = _deviation(name, parameter, transposed)
            if id(parameter) in embeddings:
                deviation = 1.0
            elif parameter.dim() == 2 and (
                parameter.shape[0] == _sibling_experts(path, experts) or _is_router(path, parameter)
            ):
                deviation = ROUTER_SCALE * parameter.shape[1] ** -0.5
            if deviation:
                _normal(f"{path}.{name}", parameter, deviation)
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith(_ROUTER_BIASES):
                _normal(f"{path}.{name}", buffer, _BIAS_DEVIATION)
            elif name == _HASH_TABLE:
                _choices(f"{path}.{name}", buffer, _sibling_experts(path, experts) or 1)


def _deviation(name: str, parameter: Tensor, transposed: bool) -> float:
    """0 for what stays as it is: ones. Of zeros nobody can tell whether they are used."""
    if parameter.dim() == 1 and not parameter.any():
        return _BIAS_DEVIATION
    if parameter.dim() >= 3 and not name.endswith("bias"):
        return float(parameter.shape[-2 if transposed else -1]) ** -0.5
    if name.endswith("bias"):
        return _BIAS_DEVIATION
    return float(parameter.shape[-1]) ** -0.5 if parameter.dim() == 2 else 0.0


def _is_router(path: str, weight: Tensor) -> bool:
    """Whether a matrix belongs to what is called a router; one that keeps the width is inside a router's own network,
    and not what scores."""
    named = any(part.startswith("router") for part in path.split("."))
    return named and weight.shape[0] != weight.shape[1]


def _sibling_experts(path: str, experts: dict[str, int]) -> int | None:
    """Number of experts of the block that the module at `path` routes for."""
    while path:
        path = path.rpartition(".")[0]
        if path in experts:
            return experts[path]
    return None


def _choices(name: str, table: Tensor, experts: int) -> None:
    """Distinct experts in each row."""
    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(name.encode()))
    drawn = torch.rand(table.shape[0], experts, generator=generator).argsort(dim=1)
    table.copy_(drawn[:, : table.shape[1]])


def _normal(name: str, tensor: Tensor, deviation: float) -> None:
    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(name.encode()))
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)

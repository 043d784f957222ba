"""Functions with loops over a sequence, some of which can be lifted."""

from __future__ import annotations

import torch
from torch import Tensor


def writes(x: Tensor, w: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        y = x[:, i] @ w
        state = state * 0.5 + y
        out[:, i] = state
    return out


def appends(x: Tensor, w: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    steps = []
    length = x.shape[1]
    for index in range(length):
        state = torch.tanh(state + x[:, index, :] @ w)
        steps.append(state.unsqueeze(1))
    return torch.cat(steps, dim=1) + state.unsqueeze(1)


def reads_its_index(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = x[:, i] * i
    return out


def reads_a_neighbour(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = x[:, i - 1] @ w
    return out


def reads_what_it_writes(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = x[:, i] + out.sum(1)
    return out


def reads_its_index_behind(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = x[:, i] @ w
    return out * i


def reads_a_step_behind(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        last = x[:, i] @ w
        out[:, i] = last
    return out + last.unsqueeze(1)


def writes_in_place(x: Tensor, w: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        state[:, 0] = x[:, i, 0]
        out[:, i] = state
    return out


def branches(x: Tensor, w: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        if i > 2:
            state = state + 1
        out[:, i] = x[:, i] + state
    return out


def triangular(a: Tensor, size: int) -> Tensor:
    for i in range(1, size):
        row = a[..., i, :i].clone()
        sub = a[..., :i, :i].clone()
        a[..., i, :i] = row + (row.unsqueeze(-1) * sub).sum(-2)
    return a


def chunked(x: Tensor, w: Tensor, chunk_size: int = 8) -> Tensor:
    length = x.shape[1]
    pad = (chunk_size - length % chunk_size) % chunk_size
    chunks = torch.nn.functional.pad(x @ w, (0, 0, 0, pad)).reshape(x.shape[0], -1, chunk_size, x.shape[2])
    sums = chunks.cumsum(2)
    before = sums[:, :, -1:].cumsum(1) - sums[:, :, -1:]
    return (sums + before).flatten(1, 2)[:, :length]

"""Modules to export, good and bad. As a FILE.py source, each function here is one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS = 12, 10, 5


class PackedExperts(nn.Module):
    """An experts module with transformers' interface, plain SwiGLU unless a subclass says otherwise."""

    is_transposed = False
    has_gate = True
    has_bias = False
    count = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        width = 2 * INNER if self.has_gate else INNER
        first = torch.randn(self.count, width, HIDDEN, generator=generator) / HIDDEN**0.5
        second = torch.randn(self.count, HIDDEN, INNER, generator=generator) / INNER**0.5
        if self.is_transposed:
            first, second = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
        name = "gate_up_proj" if self.has_gate else "up_proj"
        setattr(self, name, nn.Parameter(first))
        self.down_proj = nn.Parameter(second)
        if self.has_bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(self.count, width, generator=generator)))
            self.down_proj_bias = nn.Parameter(torch.randn(self.count, HIDDEN, generator=generator))

    def act_fn(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def _apply_gate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every expert on every token, masked: exportable, so that a block without neutral form still
        exports."""
        output = torch.zeros_like(hidden_states)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        for expert in range(self.count):
            first, second = getattr(self, name)[expert], self.down_proj[expert]
            if not self.is_transposed:
                first, second = first.T, second.T
            inner = hidden_states @ first
            if self.has_bias:
                inner = inner + getattr(self, f"{name}_bias")[expert]
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            rows = inner @ second
            if self.has_bias:
                rows = rows + self.down_proj_bias[expert]
            output = output + rows * (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
        return output


class SoftcappedExperts(PackedExperts):
    """A gate that the neutral form lacks."""

    def _apply_gate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return 3 * torch.tanh(F.silu(gate) / 3) * up


class LyingExperts(PackedExperts):
    """Its weights and gate say SwiGLU, its forward adds the token."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights) + hidden_states


class OtherwiseCalledExperts(PackedExperts):
    """Weights like an experts module's, a forward that is not."""

    def forward(self, hidden_states: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        weight, index = scores.topk(2, dim=-1)
        return super().forward(hidden_states, index, weight)


class OtherwiseCalledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = OtherwiseCalledExperts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        return self.experts(tokens, tokens[:, :EXPERTS].softmax(-1)).reshape(x.shape)


class NamedArguments(PackedExperts):
    """Its own names for the arguments, which its block gives by name in another order."""

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, chosen, gates)


class NamedArgumentsBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = NamedArguments()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        gates, chosen = tokens[:, :EXPERTS].softmax(-1).topk(2, dim=-1)
        return self.experts(gates=gates, chosen=chosen, x=tokens).reshape(x.shape)


class ReluExperts(PackedExperts):
    """No gate, biases, matrices stored for `x @ W`."""

    has_gate = False
    has_bias = True
    is_transposed = True

    def act_fn(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Block(nn.Module):
    """Router and experts: `[B, S, HIDDEN] -> [B, S, HIDDEN]`."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        torch.nn.init.normal_(self.router.weight, std=1.0, generator=torch.Generator().manual_seed(2))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, index = torch.topk(self.router(tokens).softmax(-1), 2, dim=-1)
        return (tokens + self.experts(tokens, index, weight)).reshape(x.shape)


AXES = {"x": {0: "batch", 1: "sequence"}}


def _sample() -> Tensor:
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(3))


def packed() -> Any:
    return Block(PackedExperts()), _sample(), AXES


def softcapped() -> Any:
    return Block(SoftcappedExperts()), _sample(), AXES


def lying() -> Any:
    return Block(LyingExperts()), _sample(), AXES


def otherwise_called() -> Any:
    return OtherwiseCalledBlock(), _sample(), AXES


def named_arguments() -> Any:
    return NamedArgumentsBlock(), _sample(), AXES


def relu() -> Any:
    return Block(ReluExperts()), _sample(), AXES


class GShard(nn.Module):
    """Capacity of all tokens, taken from a shape: torch.export bakes in the traced number of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.router = nn.Parameter(torch.randn(HIDDEN, EXPERTS, generator=generator))
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        score, position, mask = self.route(tokens)
        slots = F.one_hot(position, tokens.shape[0]).to(x.dtype)
        dispatch = mask[:, :, None] * slots[:, None]
        inner = torch.einsum("sec,sm,emh->ech", dispatch, tokens, self.weight)
        return torch.einsum("sec,ech->sh", dispatch * score[:, None, None], inner).reshape(x.shape)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, index = (tokens @ self.router).softmax(-1).max(-1)
        mask = F.one_hot(index, EXPERTS).to(tokens.dtype)
        return score, ((mask.cumsum(0) - 1) * mask).sum(-1).long(), mask


class Capacity(GShard):
    """The usual `int(capacity_factor * tokens / experts)`."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        score, position, mask = self.route(tokens)
        kept = (position < int(2 * tokens.shape[0] / EXPERTS)).to(x.dtype)
        inner = torch.einsum("se,sm,emh->sh", mask, tokens, self.weight)
        return (inner * (score * kept)[:, None]).reshape(x.shape)


def gshard() -> Any:
    return GShard(), _sample(), AXES


def capacity() -> Any:
    return Capacity(), _sample(), AXES


class LongerIsOther(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 8 else x


def longer_is_other() -> Any:
    return LongerIsOther(), _sample(), AXES


class Positions(nn.Module):
    """Learned positions: at most 16."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(50, 8), nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position.weight[: ids.shape[1]]


def positions() -> Any:
    return Positions(), torch.tensor([[0, 49, 7], [1, 2, 3]])


class ValueBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def value_branch() -> Any:
    return ValueBranch(), _sample(), AXES


class Recurrent(nn.Module):
    """A Python loop over the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for position in range(x.shape[1]):
            state = torch.tanh(state + x[:, position])
        return state


def recurrent() -> Any:
    return Recurrent(), _sample(), AXES


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.sum(-1, keepdim=True) + 1e-12)


def normalise() -> Any:
    return Normalise(), torch.rand(3, HIDDEN)


class NearlyOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.000001


def nearly_one() -> Any:
    return NearlyOne(), torch.rand(3, HIDDEN)


class Stateful(nn.Module):
    """Answers otherwise each time: the trace cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def stateful() -> Any:
    return Stateful(), _sample(), AXES


_CALLS = itertools.count(1)


class StatefulElsewhere(nn.Module):
    """The same by what no module holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * next(_CALLS)


def stateful_elsewhere() -> Any:
    return StatefulElsewhere(), _sample(), AXES


def raises() -> Any:
    raise ValueError("no luck today\nand a second line")


class RaisesInForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("missing")


def raises_in_forward() -> Any:
    return RaisesInForward(), _sample()


def no_inputs() -> Any:
    return nn.Linear(2, 2)


class WithExamples(nn.Linear):
    """A class is a source too, when its instances know their inputs."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.example_inputs = {"input": torch.rand(2, 4)}


not_a_module = 7


class Six(nn.Module):
    """One batch size is other, in the middle of ordinary ones."""

    size = 6

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2 if x.shape[0] == self.size else self.linear(x)


class Prime(Six):
    """One batch size is other, far from the ordinary ones."""

    size = 1777


def six() -> Any:
    return Six(), torch.randn(4, HIDDEN)


def prime() -> Any:
    return Prime(), torch.randn(4, HIDDEN)


class LongCapacity(Capacity):
    """A capacity from the shape, and short sequences refused, which are the first ones to be tried."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 5:
            raise ValueError("too short")
        return super().forward(x)


def long_capacity() -> Any:
    return LongCapacity(), _sample(), AXES


class AtLeast(nn.Module):
    """Refuses most of the usual sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 7:
            raise ValueError("too long")
        return self.linear(x)


def at_most_seven() -> Any:
    return AtLeast(), _sample(), AXES


class AtMostTwo(AtLeast):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise ValueError("too many")
        return self.linear(x)


def at_most_three() -> Any:
    return AtMostTwo(), torch.randn(2, HIDDEN)


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.log(x))


def logarithm() -> Any:
    return Logarithm(), torch.rand(4, 64) + 1e-3


class AllNaN(Logarithm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x.abs())


def all_nan() -> Any:
    return AllNaN(), torch.rand(4, 64) + 1e-3


class KeepsWhere(nn.Module):
    """A mask of booleans; as traced it is not looked at."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_exporting() else 2 * torch.where(keep[:, None], x, -x)


def keeps_where() -> Any:
    return KeepsWhere(), (torch.randn(4, HIDDEN), torch.ones(4, dtype=torch.bool))


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


def zero_ids() -> Any:
    return Token(), torch.zeros(2, 7, dtype=torch.int64)


class OnlyTheSample(nn.Module):
    """As traced, wrong for a value that only the sample has."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_exporting() else 2 * torch.where(x == 0.125, 7.0, x)


def only_the_sample() -> Any:
    return OnlyTheSample(), torch.tensor([[0.125, -1.0, 2.0]])


class NoTensor(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


def no_tensor() -> Any:
    return NoTensor(), _sample()


class RaisesOnOne(nn.Module):
    """Without a guard: nothing in a trace says so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(torch.arange(x.shape[0])) + x


def raises_on_some_sizes() -> Any:
    return RaisesOnOne(), torch.randn(4, HIDDEN)


class ManyExperts(PackedExperts):
    """More experts than a few inputs visit."""

    count = 64

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for slot in range(top_k_index.shape[1]):
            expert = top_k_index[:, slot]
            inner = self._apply_gate(torch.einsum("tod,td->to", self.gate_up_proj[expert], hidden_states))
            rows = torch.einsum("tdi,ti->td", self.down_proj[expert], inner)
            output = output + rows * top_k_weights[:, slot, None]
        return output


class IgnoresOne(ManyExperts):
    """Its last but one expert adds nothing, whatever its weights are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights * (top_k_index != self.count - 2))


class TopOne(nn.Module):
    def __init__(self, experts: PackedExperts) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts.count, bias=False)
        torch.nn.init.normal_(self.router.weight, std=1.0, generator=torch.Generator().manual_seed(2))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        weight, index = torch.topk(self.router(x).softmax(-1), 1, dim=-1)
        return x + self.experts(x, index, weight)


def many() -> Any:
    return TopOne(ManyExperts()), torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(3))


def ignores_one() -> Any:
    return TopOne(IgnoresOne()), torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(3))


def axes_as_text() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), "batch"


def axes_of_an_input_as_text() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": "batch"}


def axis_as_list() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": [0]}


def axis_without_name() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": {0: 5}}


def axis_by_bad_name() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": {0: "my batch;"}}


def axis_from_behind() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": {-2: "batch"}}


def axes_of_too_many() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), [{0: "batch"}, {0: "batch"}]


def one_name_twice() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": {0: "n", 1: "n"}}


def complex_input() -> Any:
    return nn.Linear(4, 4), torch.randn(2, 4, dtype=torch.complex64)


def empty_input() -> Any:
    return nn.Linear(4, 4), torch.randn(0, 4)


def nothing() -> Any:
    return ()


def wrong_axis() -> Any:
    """An axis said to be dynamic that is not."""
    return nn.Linear(4, 4), torch.randn(2, 4), {"input": {1: "features"}}

"""What a model takes, and inputs of any size drawn for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sparse_onnx.core.errors import UsageError

#: `random`; `one`: all rows or token ids alike, floats but for a little, so that a router sends every token to the
#: same experts;
#: `padded`: the attention mask leaves out the first tokens of the first sequence.
Kind = Literal["random", "one", "padded"]
#: Share of true values in booleans.
_TRUE = 0.7
#: How far rows differ that are to go to one expert.
_LITTLE = 1e-3


@dataclasses.dataclass(frozen=True)
class Spec:
    """One input: `example` gives type, static sizes and range of values; `axes` names the dynamic ones."""

    example: Tensor
    axes: Mapping[int, str]
    mask: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.example.dtype

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(
            sizes[self.axes[axis]] if axis in self.axes else size
            for axis, size in enumerate(self.example.shape)
        )

    def draw(self, sizes: Mapping[str, int], kind: Kind, generator: torch.Generator) -> Tensor:
        """Integers and floats within the example's range, floats of both signs normal with its mean and
        deviation; booleans mostly true, all of them for `one`; a mask of ones."""
        shape = self.shape(sizes)
        if self.mask:
            return self._mask(shape, kind)
        if self.dtype == torch.bool:
            return self._booleans(shape, kind, generator)
        if self.dtype.is_floating_point:
            drawn = self._floats(shape[-1:], generator) if kind == "one" else self._floats(shape, generator)
            if kind == "one":
                drawn = self._told_apart(drawn.expand(shape), generator)
        else:
            low, high = _range(self.example) or (0, 0)
            drawn = torch.randint(
                int(low), int(high) + 1, () if kind == "one" else shape, generator=generator
            )
        return drawn.expand(shape).to(self.dtype).contiguous()

    @property
    def constant(self) -> bool:
        """Whether the example holds one integer only, so that no other can be drawn: what its range is, nobody
        says."""
        if self.mask or self.dtype == torch.bool or self.dtype.is_floating_point:
            return False
        return bool(self.example.numel()) and int(self.example.min()) == int(self.example.max())

    def _floats(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """No value outside the example's range, which may be where the model is defined: a logarithm's, say."""
        bounds = _range(self.example)
        if bounds is None:
            return torch.randn(shape, generator=generator)
        low, high = bounds
        if low == high:  # ones, say, from which no range can be told
            return torch.empty(shape).uniform_(0.5, 1.5, generator=generator) * (low or 1.0)
        if low >= 0 or high <= 0:
            return torch.empty(shape).uniform_(low, high, generator=generator)
        example = self.example.to(torch.float32)
        finite = example[example.isfinite()]
        drawn = torch.randn(shape, generator=generator) * finite.std() + finite.mean()
        return drawn.clamp(low, high)

    def _told_apart(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Equal rows but for a little: where experts choose tokens, equal ones are ties, and torch and ONNX
        Runtime may each take another."""
        low, high = _range(self.example) or (-math.inf, math.inf)
        return (rows * (1 + _LITTLE * torch.randn(rows.shape, generator=generator))).clamp(low, high)

    def _booleans(self, shape: tuple[int, ...], kind: Kind, generator: torch.Generator) -> Tensor:
        """The first of each row is true: a mask without any has no answer."""
        if kind == "one":
            return torch.ones(shape, dtype=torch.bool)
        drawn = torch.rand(shape, generator=generator) < _TRUE
        if drawn.dim():
            drawn[..., :1] = True
        return drawn

    def _mask(self, shape: tuple[int, ...], kind: Kind) -> Tensor:
        ones = torch.ones(shape, dtype=self.dtype)
        if kind == "padded" and len(shape) > 1 and shape[1] > 1:
            ones[0, : max(1, shape[1] // 3)] = 0
        return ones


def _range(example: Tensor) -> tuple[float, float] | None:
    """Smallest and largest finite value, if there is any."""
    finite = example[example.isfinite()]
    return (finite.min().item(), finite.max().item()) if finite.numel() else None


@dataclasses.dataclass(frozen=True)
class Interface:
    """The inputs of a model, in the order of its forward."""

    inputs: Mapping[str, Spec]
    cached: ClassVar[bool] = False
    """Whether a key/value cache is among them."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the dynamic axes, in order of appearance."""
        return tuple(dict.fromkeys(symbol for spec in self.inputs.values() for symbol in spec.axes.values()))

    @property
    def masks(self) -> frozenset[str]:
        return frozenset(name for name, spec in self.inputs.items() if spec.mask)

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: spec.draw(sizes, kind, generator) for name, spec in self.inputs.items()}

    @property
    def example(self) -> dict[str, Tensor]:
        """The sample inputs that the source gave."""
        return {name: spec.example for name, spec in self.inputs.items()}

    @property
    def example_sizes(self) -> dict[str, int]:
        return {
            symbol: spec.example.shape[axis]
            for spec in self.inputs.values()
            for axis, symbol in spec.axes.items()
        }

    def complete(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes and those that follow from them."""
        return sizes

    def planned(self) -> list[tuple[dict[str, int], Kind]]:
        """Sizes that were not traced, and what is drawn for them."""
        symbols = self.symbols
        plan: list[tuple[tuple[int, ...], Kind]] = []
        if not symbols:
            kinds: tuple[Kind, ...] = ("random", "random", "random", "random", "random", "one")
            plan += [((), kind) for kind in kinds]
        elif len(symbols) == 1:
            plan += [((size,), kind) for size, kind in _ONE_AXIS]
        else:
            for first, second, kind in _TWO_AXES:
                rest = tuple(math.ceil(second / 2) + 1 + extra for extra in range(len(symbols) - 2))
                plan.append(((first, second, *rest), kind))
        return [(dict(zip(symbols, values, strict=True)), kind) for values, kind in plan]

    def described(self, sizes: Mapping[str, int]) -> str:
        """How a report calls a run of these sizes."""
        return "x".join(map(str, sizes.values()))

    def run(self, name: str, inputs: dict[str, Tensor], sizes: Mapping[str, int]) -> Run:
        return Run(name, inputs, sizes, self.masks)

    def traced_sizes(self) -> dict[str, int]:
        """A size for each axis, pairwise different and at least 2: a trace takes 1 for a constant, and equal
        sizes for one."""
        sizes = (2, 7, 5, 11, 3, 13, 17, 19)
        if len(self.symbols) > len(sizes):
            raise UsageError(f"{len(self.symbols)} dynamic axes; at most {len(sizes)} can be told apart")
        return dict(zip(self.symbols, sizes, strict=False))


def interface_of(
    inputs: Mapping[str, Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]] | None,
    masks: frozenset[str] = frozenset(),
) -> Interface:
    """Which axes are dynamic.

    Where the source does not say: axis 0 of every input that is as long there as the first input is
    ``batch``, and axis 1 of integer inputs `[batch, sequence]` as long as the first of these is ``sequence``.

    Raises:
        UsageError: axes for an input that is not there, or that it does not have; one name for axes of two
            lengths; an input that ONNX has no type for, or without elements.
    """
    if dynamic_axes is None:
        dynamic_axes = _default_axes(inputs)
    sizes: dict[str, int] = {}
    for name, axes in dynamic_axes.items():
        if name not in inputs:
            raise UsageError(
                f"dynamic axes for '{name}', which is not an input", f"its inputs: {', '.join(inputs)}"
            )
        for axis, symbol in axes.items():
            if not 0 <= axis < inputs[name].dim():
                raise UsageError(f"dynamic axis {axis} of '{name}', which has {inputs[name].dim()} axes")
            size = inputs[name].shape[axis]
            if sizes.setdefault(symbol, size) != size:
                raise UsageError(
                    f"dynamic axis '{symbol}' is {sizes[symbol]} long, and {size} in axis {axis} of '{name}'",
                    "axes of one name have one length",
                )
    for name, value in inputs.items():
        if value.is_complex() or value.is_sparse or value.is_quantized:
            raise UsageError(
                f"sample input '{name}' is {value.dtype}, {value.layout}: ONNX has no such input"
            )
        if not value.numel():
            raise UsageError(f"sample input '{name}' is empty", "give one of the usual size")
    return Interface(
        {name: Spec(value, dict(dynamic_axes.get(name, {})), name in masks) for name, value in inputs.items()}
    )


def _default_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    shaped = {name: value for name, value in inputs.items() if value.dim() > 0}
    batch = next((value.shape[0] for value in shaped.values()), None)
    axes: dict[str, dict[int, str]] = {
        name: {0: "batch"} for name, value in shaped.items() if value.shape[0] == batch
    }
    sequence = None
    for name, value in shaped.items():
        if name in axes and value.dim() == 2 and not value.dtype.is_floating_point:
            sequence = value.shape[1] if sequence is None else sequence
            if value.shape[1] == sequence:
                axes[name][1] = "sequence"
    return axes


@dataclasses.dataclass(frozen=True)
class Run:
    """One comparison: how the report calls it, what goes in, and which of the inputs mask out padding; an
    `assumption` of the trace that does not hold for it."""

    name: str
    inputs: dict[str, Tensor]
    sizes: Mapping[str, int]
    masks: frozenset[str] = frozenset()
    assumption: str = ""

    def kept(self, output: int, shape: tuple[int, ...]) -> np.ndarray:
        """Which leading entries of an output of this shape are no padding."""
        keep = np.ones(shape[:2], np.bool_)
        for name in self.masks:
            mask = self.inputs[name].numpy().astype(np.bool_)
            if mask.shape == keep.shape:
                keep &= mask
        return keep

    def rows(self, output: int, value: np.ndarray) -> np.ndarray:
        """An output so that each row has a scale of its own."""
        return value


_LONG = 150
_ONE_AXIS: tuple[tuple[int, Kind], ...] = (
    (3, "random"),
    (1, "random"),
    (5, "random"),
    (11, "one"),
    (40, "random"),
    (6, "one"),
    (9, "random"),
)
_TWO_AXES: tuple[tuple[int, int, Kind], ...] = (
    (3, 11, "random"),
    (1, 1, "random"),
    (1, 5, "random"),
    (4, 1, "one"),
    (2, 9, "one"),
    (1, 40, "random"),
    (5, 3, "random"),
    (3, 6, "padded"),
)


def untraced(interface: Interface) -> list[Run]:
    """At least six inputs that were not traced: other batches and lengths, one token, all tokens to one expert, a
    long sequence, and one with padding where the model has a mask."""
    return [
        drawn(interface, sizes, kind, seed)
        for seed, (sizes, kind) in enumerate(interface.planned(), start=1)
        if kind != "padded" or interface.masks
    ]


def long(interface: Interface) -> Run:
    """One run of a long sequence."""
    first, *rest = interface.symbols
    sizes = {first: 1 if rest else _LONG} | dict.fromkeys(rest, _LONG)
    return drawn(interface, sizes, "random", _LONG)


def drawn(interface: Interface, sizes: Mapping[str, int], kind: Kind, seed: int) -> Run:
    """One run of these sizes."""
    suffix = {"random": "", "one": " one expert", "padded": " padded"}[kind]
    name = (interface.described(sizes) or f"draw {seed}") + suffix
    return interface.run(name, interface.draw(sizes, kind, seed), sizes)


def given(interface: Interface) -> Run:
    """The source's own sample inputs."""
    sizes = interface.example_sizes
    name = " ".join([interface.described(sizes), "sample"]).strip()
    return interface.run(name, interface.example, sizes)

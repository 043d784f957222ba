"""Sizes that a trace is good for.

torch.export records what it assumed about sizes; torch's ONNX exporter drops it, so that a graph with the
traced size baked in accepts every other size and answers wrongly. Here the assumptions are evaluated over
thousands of sizes, and the module itself is run where one fails.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.samples import Interface

#: Sizes of a dynamic axis that a user may well ask for: all of them in all combinations of two axes, fewer of more.
_ORDINARY = tuple(range(1, 65))
#: Larger ones, each on one axis while the others are small.
_LONG = (
    65,
    96,
    100,
    127,
    128,
    129,
    200,
    255,
    256,
    257,
    384,
    500,
    512,
    513,
    1000,
    1023,
    1024,
    1025,
    2048,
    4095,
    4096,
)
_HUGE = tuple(2**power for power in range(13, 21))
_MAX_COMBINATIONS = 4096
#: Sizes that the module itself is run on, for each guard that fails somewhere: those nearest to nothing, and others
#: spread over all that fail.
_TRIED_SMALLEST, _TRIED_SPREAD = 4, 12
#: A guard that fails at no more sizes of an axis than this, and at none larger, is compared there instead.
_FEW, _SMALL = 16, 16
#: Sizes that are compared of each such sum.
_OF_EACH = 3
#: Stands for the product of all axes among their names.
_ELEMENTS = "*"
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Guard:
    """One assumption: `text` in the names of the axes, `holds` on a size of each."""

    text: str
    holds: Callable[[Sizes], bool]


def guards_of(program: torch.export.ExportedProgram, interface: Interface) -> list[Guard]:
    """The program's assumptions about its inputs. Those that hold for every size because two axes share a
    name are among them."""
    return [_compile(code, interface) for code in program._guards_code]


def _compile(code: str, interface: Interface) -> Guard:
    text = expression = code
    for name, spec in interface.inputs.items():
        for axis, symbol in spec.axes.items():
            size = f"L['{name}'].size()[{axis}]"
            text = text.replace(size, symbol)
            expression = expression.replace(size, f"sizes[{symbol!r}]")
    compiled = compile(expression, "<guard>", "eval")
    needs_tensors = "L[" in expression

    def holds(sizes: Sizes) -> bool:
        sizes = interface.complete(sizes)
        names = {"sizes": sizes, "math": math, "torch": torch}
        if needs_tensors:
            names["L"] = {
                name: torch.empty(spec.shape(sizes), dtype=spec.dtype, device="meta")
                for name, spec in interface.inputs.items()
            }
        try:
            return bool(eval(compiled, names))
        except ArithmeticError:  # a division by what is zero for this size
            return False

    return Guard(text.replace("math.", ""), holds)


def limits(
    guards: Sequence[Guard],
    interface: Interface,
    runs: Callable[[Sizes], bool],
    planned: Iterable[Sizes] = (),
) -> list[str]:
    """Notes on sizes that the model does not have.

    Args:
        guards: all of a program's.
        interface: names the dynamic axes.
        runs: whether the original module accepts these sizes.
        planned: sizes that the export is to be compared on; each for which a guard fails is tried.

    Raises:
        ImpossibleError: the module accepts a size up to 4096 for which a guard fails.
    """
    symbols, notes = interface.symbols, []
    runs = remembered(runs)
    grid = list(_grid(symbols))
    for guard in guards:
        failing = [sizes for sizes in (*grid, *_near(guard, symbols)) if not guard.holds(sizes)]
        wanted = [sizes for sizes in planned if not guard.holds(sizes)]
        accepted = next((sizes for sizes in (*wanted, *_spread(failing)) if runs(sizes)), None)
        if accepted is not None:
            raise ImpossibleError(
                f"the trace is right only where {guard.text}, and the model also takes {written(accepted)}",
                "compute the size with tensor operations instead of Python, or make that axis static",
            )
        if failing:
            notes.append(f"the model takes only sizes where {guard.text}")
        elif too_large := next((sizes for sizes in _huge(symbols) if not guard.holds(sizes)), None):
            notes.append(f"the export is right only where {guard.text}, so not for {written(too_large)}")
    return notes


def isolated(guard: Guard, interface: Interface) -> list[dict[str, int]]:
    """Sizes to compare on where a guard fails at a few small sizes of one axis only, or of a sum of axes, or for so
    few tokens, whatever the others are: torch takes a length that is 1 there for a case of its own, which says
    nothing of whether the graph is right. Empty for any other guard, and one that holds everywhere."""
    symbols = interface.symbols
    everything = (*_grid(symbols), *_near(guard, symbols), *_huge(symbols))
    failing = [sizes for sizes in everything if not guard.holds(sizes)]
    if not failing:
        return []

    def counted(sizes: Sizes) -> dict[str, int]:
        return {**interface.complete(sizes), _ELEMENTS: math.prod(sizes[each] for each in symbols)}

    complete = [counted(sizes) for sizes in everything]
    for symbol in complete[0]:  # the axes' own, sums of them, and the number of tokens
        values = {counted(sizes)[symbol] for sizes in failing}
        alone = len(failing) == sum(sizes[symbol] in values for sizes in complete)
        if not alone or len(values) > _FEW or max(values) > _SMALL:
            continue
        if symbol == _ELEMENTS and len(values) != max(values):  # not all numbers of tokens up to one
            continue
        if symbol in symbols:
            return [
                {each: value if each == symbol else other for each in symbols}
                for value in sorted(values)
                for other in (1, 3)
            ]
        return [
            sizes
            for value in sorted(values)
            for sizes in _spread([each for each in failing if counted(each)[symbol] == value])[:_OF_EACH]
        ]
    return []


def allowed(guards: Iterable[Guard], sizes: Sizes) -> bool:
    return all(guard.holds(sizes) for guard in guards)


def possible(guards: Sequence[Guard], interface: Interface) -> Iterator[dict[str, int]]:
    """Sizes for which all guards hold, small ones first, the traced ones left out."""
    traced = interface.traced_sizes()
    for sizes in sorted(_grid(interface.symbols), key=_elements):
        if sizes != traced and allowed(guards, sizes):
            yield sizes


def written(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def remembered(runs: Callable[[Sizes], bool]) -> Callable[[Sizes], bool]:
    """The same, asked once for each size."""
    known = functools.cache(lambda items: runs(dict(items)))
    return lambda sizes: known(tuple(sizes.items()))


def _grid(symbols: tuple[str, ...]) -> Iterator[dict[str, int]]:
    values = _ORDINARY
    while symbols and len(values) ** len(symbols) > _MAX_COMBINATIONS:
        values = values[:-1]
    for combination in itertools.product(values, repeat=len(symbols)):
        yield dict(zip(symbols, combination, strict=True))
    yield from _one_large(symbols, (*_ORDINARY[len(values) :], *_LONG))


def _one_large(symbols: tuple[str, ...], sizes: Iterable[int]) -> Iterator[dict[str, int]]:
    """Each axis at each size, with 1 and with 2 on the others."""
    others = (1, 2) if len(symbols) > 1 else (1,)
    for size, symbol, other in itertools.product(sizes, symbols, others):
        yield {each: size if each == symbol else other for each in symbols}


def _huge(symbols: tuple[str, ...]) -> Iterator[dict[str, int]]:
    return _one_large(symbols, _HUGE)


def _near(guard: Guard, symbols: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Sizes around each number that the guard names, so that `size != 777` is seen to fail."""
    numbers = {int(number) for number in _NUMBER.findall(guard.text)}
    sizes = {near for number in numbers for near in (number - 1, number, number + 1)}
    yield from _one_large(symbols, sorted(size for size in sizes if 0 < size <= _LONG[-1]))


def _spread(failing: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """A few of them: the smallest, and some in between up to the largest, no two alike."""
    ordered = list({tuple(sizes.items()): sizes for sizes in sorted(failing, key=_elements)}.values())
    smallest, rest = ordered[:_TRIED_SMALLEST], ordered[_TRIED_SMALLEST:]
    steps = min(len(rest), _TRIED_SPREAD)
    return smallest + [rest[(index * (len(rest) - 1)) // max(1, steps - 1)] for index in range(steps)]


def _elements(sizes: Sizes) -> int:
    return math.prod(sizes.values())

"""Which inputs an export is compared on: at least six of sizes that were not traced, and the source's own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import guards, samples
from sparse_onnx.export.sources import Source

_LEAST_RUNS = 6
#: Sizes that are tried on the module for want of others.
_MAX_TRIED = 64
#: What is drawn at each size that is compared for an assumption of its own: no other size says anything about it.
_ALONE: tuple[samples.Kind, ...] = ("random", "random", "one")


def plan(
    source: Source, assumptions: Sequence[guards.Guard], *, long: bool = False
) -> tuple[list[samples.Run], list[str]]:
    """The runs, and notes on sizes that the model does not take; `long` adds one of several chunks of the usual 64.

    An assumption that fails at a few small sizes of one axis only is no reason to refuse: the runs are at those sizes
    too.

    A planned run for which an assumption fails gives way to one of another size only because the module refuses
    it.

    Raises:
        ImpossibleError: the module takes a size for which an assumption fails, or no size but the traced one.
    """
    interface = source.interface
    everything = samples.untraced(interface)
    runs = guards.remembered(lambda sizes: _runs(source, sizes))
    special = {
        guard.text: taken
        for guard in assumptions
        if (taken := [sizes for sizes in guards.isolated(guard, interface) if runs(sizes)])
    }
    every, assumptions = assumptions, [guard for guard in assumptions if guard.text not in special]
    notes = guards.limits(assumptions, interface, runs, [run.sizes for run in everything])
    notes += [
        f"input '{name}' was compared with one value only, the sample's {int(spec.example.flatten()[0])}: "
        "the sample shows no range to draw from"
        for name, spec in interface.inputs.items()
        if spec.constant
    ]
    kept = [
        run
        for run in everything
        if guards.allowed(assumptions, run.sizes) and (guards.allowed(every, run.sizes) or runs(run.sizes))
    ]
    if len(kept) < _LEAST_RUNS:
        more, few = _others(source, assumptions, kept)
        kept, notes = kept + more, notes + few
    alone = {tuple(sizes.items()): sizes for each in special.values() for sizes in each}
    kept += [
        samples.drawn(interface, sizes, kind, 200 + seed)
        for seed, (sizes, kind) in enumerate(itertools.product(alone.values(), _ALONE))
        if guards.allowed(assumptions, sizes)
    ]
    if long and interface.symbols:
        kept.append(samples.long(interface))
    kept.append(samples.given(interface))
    return [dataclasses.replace(run, assumption=_broken(every, run.sizes)) for run in kept], notes


def _broken(assumptions: Sequence[guards.Guard], sizes: guards.Sizes) -> str:
    return next((guard.text for guard in assumptions if not guard.holds(sizes)), "")


def _others(
    source: Source, assumptions: Sequence[guards.Guard], kept: Sequence[samples.Run]
) -> tuple[list[samples.Run], list[str]]:
    """What is lacking to six runs, of sizes that the module takes; several draws of each where these are few."""
    interface, known = source.interface, [dict(run.sizes) for run in kept]
    candidates = (sizes for sizes in guards.possible(assumptions, interface) if sizes not in known)
    taken = (sizes for sizes in itertools.islice(candidates, _MAX_TRIED) if _runs(source, sizes))
    lacking = _LEAST_RUNS - len(kept)
    other = list(itertools.islice(taken, lacking))
    sizes = [*known, *other]
    if not sizes:
        raise ImpossibleError(
            f"the trace is right for {guards.written(interface.traced_sizes())} only",
            "make the axes static that have one size",
        )
    notes = []
    if len(other) < lacking:
        notes.append(
            f"the model takes few sizes, so that only {len(sizes)} were compared besides the traced one: "
            + "; ".join(guards.written(each) for each in sizes)
        )
    wanted = [*other, *itertools.islice(itertools.cycle(sizes), lacking - len(other))]
    return [samples.drawn(interface, each, "random", 100 + seed) for seed, each in enumerate(wanted)], notes


def _runs(source: Source, sizes: guards.Sizes) -> bool:
    try:
        source.forward(source.interface.draw(sizes))
    except Exception:  # whatever the module raises, it refuses
        return False
    return True

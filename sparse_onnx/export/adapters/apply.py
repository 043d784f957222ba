"""Which modules adapters replace: each replacement is tried beside its module while the model runs on samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError, UsageError, VerificationError
from sparse_onnx.export import samples, ties
from sparse_onnx.export.adapters import compare
from sparse_onnx.export.adapters.packed import PackedExperts
from sparse_onnx.export.adapters.registry import built_in, remark
from sparse_onnx.export.failure import root_line
from sparse_onnx.export.sources import Source
from sparse_onnx.export.users import users_code

Adapter = Callable[[nn.Module], nn.Module | None]
"""Gives for a module another that computes the same from the same weights, in a form that exports whole; or None."""


@dataclasses.dataclass(frozen=True)
class Named:
    """An adapter that the user gives, and how messages call it."""

    name: str
    adapter: Adapter


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A module and what takes its place; `by` names the user's adapter, and is empty for one of ours."""

    path: str
    module: nn.Module
    replacement: nn.Module
    by: str = ""


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What adapters do to a model, and notes on it. The model itself is as it was."""

    replaced: tuple[Replaced, ...] = ()
    notes: tuple[str, ...] = ()

    @contextlib.contextmanager
    def in_place(self, source: Source) -> Iterator[Source]:
        """The source with all replacements, which are gone from its module afterwards."""
        by_module = {id(entry.module): entry.replacement for entry in self.replaced}
        places = [
            (parent, name, child)
            for parent in list(source.module.modules())
            for name, child in parent._modules.items()
            if id(child) in by_module
        ]
        try:
            for parent, name, child in places:
                parent._modules[name] = by_module[id(child)]
            root = by_module.get(id(source.module), source.module)
            yield dataclasses.replace(source, module=root)
        finally:
            for parent, name, child in places:
                parent._modules[name] = child

    @contextlib.contextmanager
    def alongside(self) -> Iterator[None]:
        """Within the block each replacement also computes what its module is called with, so that its parts can be
        watched; the model's answer stays its own."""
        by_module = {id(entry.module): entry.replacement for entry in self.replaced}

        def also(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            compare.answer(by_module[id(module)], (args, kwargs))

        handles = [entry.module.register_forward_pre_hook(also, with_kwargs=True) for entry in self.replaced]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def adapt(source: Source, given: Sequence[Named] = (), *, share: bool = False) -> Adapted:
    """Tries the adapters on the model.

    Args:
        source: runs twice, on inputs of the traced sizes and on others.
        given: the user's adapters, which come before ours. Each is called once for each module that runs, outer
            modules first; what is inside a replaced module is not looked at.
        share: has the model read its weights where they were packed, so that no weight is held twice; values stay.

    Raises:
        VerificationError: a replacement of the user's differs from its module.
        OutsideError: an adapter of the user's, or its replacement, raises.
        UsageError: an adapter of the user's gives something else than a module or None.
        ImpossibleError: a module that we know cannot be exported faithfully.
    """
    ours = {id(module) for module in source.module.modules() if built_in(module) is not None}
    if not given and not ours:
        return Adapted()
    trial = _Trial(given, {id(module): path for path, module in source.module.named_modules()}, share)
    interface = source.interface
    first = samples.drawn(interface, interface.traced_sizes(), "random", 0)
    with trial.watching(source.module, None if given else ours):
        for run in (first, *samples.untraced(interface)[:1]):
            trial.run(source, run)
    return Adapted(tuple(trial.kept.values()), tuple(_notes(source.module, trial, given)))


class _Trial:
    """Replacements as they are tried. `kept` has those that gave their module's answer every time so far; `refused`
    says of others why, by path."""

    def __init__(self, given: Sequence[Named], paths: dict[int, str], share: bool) -> None:
        self.given, self.paths, self.share = given, paths, share
        self.kept: dict[int, Replaced] = {}
        self.refused: dict[str, str] = {}
        self._found: dict[int, Replaced | None] = {}
        self._call: tuple[int, compare.Call] | None = None  # of the replaced module that runs just now
        self._busy = False

    @contextlib.contextmanager
    def watching(self, model: nn.Module, only: set[int] | None) -> Iterator[None]:
        handles: list[Any] = []
        for module in list(model.modules()):
            if only is None or id(module) in only:
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, source: Source, run: samples.Run) -> None:
        try:
            source.forward(run.inputs)
        except SparseOnnxError:
            raise
        except (
            Exception
        ):  # a size that the model does not take: whatever it raises, the trace comes upon it later
            pass
        finally:
            self._call = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy or self._call is not None:
            return
        if id(module) not in self._found:
            with self._alone():
                self._found[id(module)] = self._replacement(module)
        if self._found[id(module)] is not None:
            self._call = (id(module), compare.copied((args, kwargs)))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy or self._call is None or self._call[0] != id(module):
            return
        (_, call), self._call = self._call, None
        entry = self._found[id(module)]
        assert entry is not None
        with self._alone():
            reason = self._problem(entry, call, output)
        if reason:
            self._refuse(entry, reason)
            return
        self.kept[id(module)] = entry
        if self.share:
            for part in entry.replacement.modules():
                if isinstance(part, PackedExperts):
                    part.share()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _replacement(self, module: nn.Module) -> Replaced | None:
        path = self.paths[id(module)]
        for named in self.given:
            with users_code(named.name, "the adapter"):
                replacement = named.adapter(module)
            if isinstance(replacement, nn.Module):
                return Replaced(path, module, replacement.eval(), named.name)
            if replacement is not None:
                raise UsageError(
                    f"it gives {type(replacement).__name__} for '{path}'",
                    "an adapter gives a torch module, or None for a module that it does not know",
                    where=named.name,
                )
        adapter = built_in(module)
        if adapter is None:
            return None
        try:
            replacement = adapter(module)
        except ImpossibleError as error:
            raise ImpossibleError(error.message, error.hint, where=path) from error
        except Exception as error:  # the module is of that name, and made otherwise
            self.refused[path] = root_line(error)
            return None
        return None if replacement is None else Replaced(path, module, replacement.eval())

    def _problem(self, entry: Replaced, call: compare.Call, output: Any) -> str:
        """How the replacement differs from its module, on this call and on others like it; empty if it does not."""
        pairs = [(call, output)]
        pairs += [(each, compare.answer(entry.module, each)) for each in compare.drawn(call)]
        for each, expected in pairs:
            try:
                with users_code(entry.by, "the adapter's module") if entry.by else contextlib.nullcontext():
                    actual = compare.answer(entry.replacement, each)
            except SparseOnnxError:
                raise
            except Exception as error:  # a module of a known name that is made otherwise
                return root_line(error)
            measured, accepted = compare.error(expected, actual)
            if not measured <= accepted:
                with (
                    ties.first_of_equal() as equal
                ):  # of which torch takes any, and in 16 bits many scores are equal
                    others = compare.answer(entry.module, each), compare.answer(entry.replacement, each)
                first, _ = compare.error(*others)
                if not (equal.met and first <= accepted):
                    return _difference(expected, actual, measured)
        return ""

    def _refuse(self, entry: Replaced, reason: str) -> None:
        if entry.by:
            raise VerificationError(
                f"its replacement for '{entry.path}' computes something else: {reason}",
                "nothing was written; the replacement must give the module's own answer",
                where=entry.by,
            )
        self.kept.pop(id(entry.module), None)
        self._found[id(entry.module)] = None
        self.refused[entry.path] = reason


def _difference(expected: Any, actual: Any, error: float) -> str:
    if error < float("inf"):
        return f"it differs by {error:.2g} of the largest value of a row"
    return f"{_written(actual)} instead of {_written(expected)}, or other values that are not finite"


def _written(output: Any) -> str:
    values = compare.leaves(output)
    return (
        " and ".join(f"{value.dtype} {list(value.shape)}".removeprefix("torch.") for value in values)
        or "no tensor"
    )


def _notes(model: nn.Module, trial: _Trial, given: Sequence[Named]) -> Iterator[str]:
    for path, reason in trial.refused.items():
        yield f"{path}: our adapter for this kind of module does not fit, and was not used: {reason}"
    for named in given:
        paths = [entry.path for entry in trial.kept.values() if entry.by == named.name]
        yield f"adapter {named.name}: {_listed(paths) if paths else 'replaced no module'}"
    by_note: dict[str, list[str]] = {}
    noted = [(entry.path, getattr(entry.replacement, "note", None)) for entry in trial.kept.values()]
    for path, note in (*noted, *((path, remark(module)) for path, module in model.named_modules())):
        if isinstance(note, str):
            by_note.setdefault(note, []).append(path)
    for note, paths in by_note.items():
        yield f"{_listed(paths)}: {note}"


def _listed(paths: Sequence[str]) -> str:
    names = [path or "the whole model" for path in paths]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

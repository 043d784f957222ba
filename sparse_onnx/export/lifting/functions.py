"""Which functions of a trace are the user's, and their rewritten forms."""

from __future__ import annotations

import functools
import linecache
import sysconfig
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparse_onnx.export.lifting import rewrite
from sparse_onnx.export.lifting.values import refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

#: Packages that do without: they are traced as they are, and are large.
_LIBRARIES = frozenset({"torch", "numpy", "einops", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "sympy"})
_STANDARD = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})


def is_users(function: types.FunctionType) -> bool:
    """Whether a function is neither torch's nor Python's nor ours."""
    module = function.__module__ or ""
    top = module.partition(".")[0]
    if top in _LIBRARIES or module.startswith("sparse_onnx.export"):
        return False
    filename = function.__code__.co_filename
    return "site-packages" in filename or not filename.startswith((*_STANDARD, "<"))


class Functions:
    """Rewritten forms, each made once."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._known: dict[types.CodeType, types.FunctionType] = {}
        self._ours: set[types.CodeType] = set()
        self._left: dict[types.CodeType, str] = {}

    def find(self, function: Any) -> Any:
        """A callable's rewritten form; itself where it is not the user's, or its source is not to be had."""
        if isinstance(function, types.MethodType):
            inner = self.find(function.__func__)
            return function if inner is function.__func__ else types.MethodType(inner, function.__self__)
        if isinstance(function, functools.partial):
            inner = self.find(function.func)
            return (
                function
                if inner is function.func
                else functools.partial(inner, *function.args, **function.keywords)
            )
        if not isinstance(function, types.FunctionType) or not is_users(function):
            return function
        return self.of(function)

    def of(self, function: types.FunctionType) -> types.FunctionType:
        code = function.__code__
        if code in self._ours:
            return function
        if code not in self._known:
            try:
                self._known[code] = rewrite.rewritten(function, self.runtime)
            except rewrite.NoSource as reason:
                self._known[code] = function
                self._left[code] = str(reason)
            self._ours |= set(_all_code(self._known[code].__code__))
        made = self._known[code]
        return function if made.__code__ is code else self._with_cells_of(function, made)

    def explained(self, error: Exception) -> Exception:
        """Of an error that a number or truth depends on tensors: the user's line, and why it was not lifted."""
        frames = [each for each in traceback.walk_tb(error.__traceback__) if not _is_library(each[0].f_code)]
        if not frames:
            return error
        frame, line = frames[-1]
        name = frame.f_code.co_filename
        reason = self._left.get(frame.f_code, "")
        return refuse(
            (name, line, linecache.getline(name, line).strip()),
            f"needs a number or truth that depends on tensor values{reason and ', and is not lifted: '}{reason}",
            "use tensor operations there, or write an adapter (--adapter)",
        )

    def _with_cells_of(self, function: types.FunctionType, made: types.FunctionType) -> types.FunctionType:
        """The same code for another closure, such as another instance's."""
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        kept = dict(zip(made.__code__.co_freevars, made.__closure__ or (), strict=True))
        closure = tuple(cells.get(name, kept[name]) for name in made.__code__.co_freevars)
        new = types.FunctionType(made.__code__, function.__globals__, made.__name__, None, closure)
        new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        new.__dict__.update(function.__dict__)
        return new


def _is_library(code: types.CodeType) -> bool:
    here = str(Path(__file__).parents[1])
    return "site-packages" in code.co_filename or code.co_filename.startswith((*_STANDARD, "<", here))


def _all_code(code: types.CodeType) -> list[types.CodeType]:
    found = [code]
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found += _all_code(const)
    return found


def forward_of(module: nn.Module) -> types.FunctionType | None:
    """The forward of a module's class, if it is the user's and nothing else stands in its place."""
    found = type(module).forward
    if "forward" in vars(module) or not isinstance(found, types.FunctionType):
        return None
    return found if is_users(found) else None

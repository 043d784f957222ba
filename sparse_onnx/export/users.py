"""The user's Python: imported from a file or a module, and what it raises as one line."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_onnx.core.errors import ModelError, OutsideError, SparseOnnxError, UsageError
from sparse_onnx.export.failure import Terminated


def imported(place: str, name: str, contract: str, what: str = "the source") -> Any:
    """The object of that name in a Python file or module, which is run.

    Raises:
        ModelError: no such file.
        UsageError: no such module, or nothing of that name in it; `contract` says what is wanted.
        OutsideError: the code raises.
    """
    if place.endswith(".py") and not os.path.isfile(place):
        raise ModelError("no such file", "check the path", where=place)
    with users_code(f"{place}:{name}", what):
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(name, names, n=1)
        raise UsageError(
            f"it has no '{name}'", f"did you mean '{close[0]}'?" if close else contract, where=place
        )
    return getattr(module, name)


def module_key(path: Path) -> str:
    """What a Python file is called in `sys.modules`."""
    return f"_sparse_onnx_source_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


def _import_file(path: Path) -> types.ModuleType:
    key = module_key(path)
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses and pickling look their module up by name
    with _first_on_path(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> types.ModuleType:
    with _first_on_path(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                raise UsageError(
                    f"no Python module '{name}'", "is it installed, or in this folder?"
                ) from None
            raise


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def users_code(where: str, what: str = "the source") -> Iterator[None]:
    """What the user's code raises, as one line: type, message, and the place in their code. What it prints
    goes to standard error: standard output may be our JSON."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (SparseOnnxError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())[:300]
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
        raise OutsideError(
            f"{what} raised {text}{place_of(error)}", "--debug shows all of it", where=where
        ) from error


def place_of(error: BaseException) -> str:
    """Where in the user's code it was raised; empty if nowhere there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not is_library(frame.filename)]
    if not outside:
        return ""
    return f" at {outside[-1].filename}:{outside[-1].lineno}"


def is_library(filename: str) -> bool:
    """Python's own, a package's, or ours: no code of the user's."""
    here = str(Path(__file__).parent)
    return filename.startswith((here, "<", sys.base_prefix)) or "site-packages" in filename

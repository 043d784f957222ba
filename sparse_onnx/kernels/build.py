"""The library of kernels, compiled by the machine's own C++ compiler and kept in the user's cache.

One file serves every ONNX Runtime from 1.17 on and every processor of the machine's architecture: on x86-64 the code is
compiled for three levels, of which the best that the processor has runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError

if TYPE_CHECKING:
    import onnxruntime

#: A library somewhere else, for machines without a compiler.
PATH_VARIABLE = "SPARSE_ONNX_KERNELS"

#: Of a session's configuration, as `register.cc` reads it: "held" (the default) or "shared".
WEIGHTS_ENTRY = "sparse_onnx.weights"

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-w")
#: Compiled once, not once a level.
_ONCE = ("dispatch", "call", "product", "gated", "thresholded", "expert_linear", "held", "register")
_LEVELS: dict[str, tuple[str, ...]] = {"base": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    _LEVELS |= {
        "v3": ("-mavx2", "-mfma", "-mf16c"),
        "v4": (
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ),
    }


def path() -> Path:
    """Where the library is.

    Raises:
        UsageError: it was not built, or SPARSE_ONNX_KERNELS names no file.
    """
    given = os.environ.get(PATH_VARIABLE)
    found = Path(given) if given else _built()
    if not found.is_file():
        raise UsageError(
            "there is no such library" if given else "the native kernels were not built on this machine",
            f"{PATH_VARIABLE} names it" if given else "`sparse-onnx kernels build` compiles them",
            where=str(found) if given else "",
        )
    return found


def is_built() -> bool:
    """Whether there is a library to register."""
    try:
        path()
    except UsageError:
        return False
    return True


def build(*, force: bool = False, progress: Callable[[str], None] | None = None) -> Path:
    """Compiles the library, unless these very sources were compiled already.

    Args:
        force: compile in any case.
        progress: called with a line at each step.

    Raises:
        ImpossibleError: there is no C++ compiler, or not for this system.
        OutsideError: the compiler fails, or the cache cannot be written.
    """
    target = _built()
    if target.is_file() and not force:
        return target
    say = progress or (lambda line: None)
    compiler = _compiler()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            objects = []
            for name, source, flags in _units():
                say(f"compiling {name}")
                objects.append(f"{folder}/{name}.o")
                _run([*compiler, *_FLAGS, *flags, "-c", str(source), "-o", objects[-1]])
            say("linking")
            library = f"{folder}/{target.name}"
            _run([*compiler, "-shared", "-o", library, *objects, "-pthread"])
            os.replace(library, target)  # whole or not at all: another process may be building, too
    except OSError as error:
        raise OutsideError(
            f"the kernels cannot be written: {error.strerror or error}", where=str(target.parent)
        ) from error
    return target


def register_kernels(options: onnxruntime.SessionOptions, *, hold_weights: bool = True) -> None:
    """Has sessions made with these options run the native kernels.

    Args:
        options: of sessions still to be made.
        hold_weights: whether sessions copy the weights of these layers into large pages of memory, where they are
            read faster (Linux; where the system has none, nothing is copied). Otherwise they stay where ONNX Runtime
            has them: in the mapped file, or in its memory.

    Raises:
        UsageError: the library was not built.
        OutsideError: ONNX Runtime cannot load it.
    """
    library = path()
    options.add_session_config_entry(WEIGHTS_ENTRY, "held" if hold_weights else "shared")
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime's errors share no base class
        reason = " ".join(str(error).split())
        raise OutsideError(f"onnxruntime cannot load the kernels: {reason}", where=str(library)) from error


def _units() -> list[tuple[str, Path, tuple[str, ...]]]:
    levels = [
        (f"linear.{name}", _SOURCES / "linear.cc", (f"-DLEVEL={name}", *flags))
        for name, flags in _LEVELS.items()
    ]
    return [*levels, *((name, _SOURCES / f"{name}.cc", ()) for name in _ONCE)]


def _built() -> Path:
    return (
        _cache()
        / "sparse-onnx"
        / "kernels"
        / f"{_digest()}-{platform.machine()}"
        / f"libsparse_onnx{_suffix()}"
    )


def _suffix() -> str:
    return ".dylib" if sys.platform == "darwin" else ".so"


@functools.cache
def _digest() -> str:
    """Of the sources and flags: what was built from others is not taken."""
    digest = hashlib.sha256(repr((_FLAGS, _LEVELS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _compiler() -> list[str]:
    """$CXX, which may hold arguments, or the first that there is."""
    if sys.platform == "win32":
        raise ImpossibleError("the kernels are not built on Windows yet", "models run without them, too")
    given = shlex.split(os.environ.get("CXX", ""))
    for candidate in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(candidate[0])
        if found:
            return [found, *candidate[1:]]
    raise ImpossibleError(
        f"there is no C++ compiler{f' {given[0]!r}' if given else ''}",
        f"install g++ or clang++, or let {PATH_VARIABLE} name a library built elsewhere; models run without it, too",
    )


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise OutsideError(
            f"the C++ compiler fails: {lines[0].strip() if lines else f'exit code {result.returncode}'}",
            f"g++ 11 or clang++ 14 and newer are known to work; {command[0]} was tried",
        )

"""Files that appear whole or not at all, and the names of data files beside a graph."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_GRAPHS = (".onnx", ".ort")


def create_fresh(folder: Path, names: Iterable[str]) -> tuple[Path, BinaryIO]:
    """Creates the first of the names that is free. No other process can be given the same."""
    for name in names:
        path = folder / name
        with contextlib.suppress(FileExistsError):
            return path, open(path, "xb")
    raise AssertionError("names must not end")


def data_names(target: Path) -> Iterator[str]:
    """``OUT.data``, ``OUT.1.data`` ...: names for the data of the graph file `target`, in a fixed order."""
    numbers = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
    return (name for number in numbers if (name := f"{target.stem}{number}.data") != target.name)


def stage(target: Path, content: bytes) -> Path:
    """Writes what is to become the file `target` under another name, with the permissions of that one."""
    names = (f".{target.name}.{number}.tmp" for number in itertools.count())
    staged, file = create_fresh(target.parent, names)
    try:
        with file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def own_data(target: Path) -> list[Path]:
    """Data files beside the graph file `target` that carry its name (`data_names`) and that it mentions."""
    scheme = re.compile(re.escape(target.stem) + r"(\.[1-9][0-9]*)?\.data")
    found = [path for path in sorted(target.parent.iterdir()) if scheme.fullmatch(path.name)]
    return [path for path in found if path != target and mentions(target, path.name)]


def remove_unused(data: Iterable[Path]) -> None:
    """Removes those of the data files that no graph in their folder, or in a folder above, mentions.

    A graph may name data in folders below its own. Whatever cannot be found out or removed stays.
    """
    for path in data:
        with contextlib.suppress(OSError):
            used = any(mentions(graph, path.name) for folder in path.parents for graph in _graphs(folder))
            if not used and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()


def _graphs(folder: Path) -> Iterator[Path]:
    """Files that may be models, backups under any name included: by suffix, or by ONNX's first byte."""
    return (path for path in folder.iterdir() if path.suffix.lower() in _GRAPHS or _starts_like_onnx(path))


def _starts_like_onnx(path: Path) -> bool:
    """Whether the first byte is the tag of ModelProto's first field, ir_version, as every exporter writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and os.read(descriptor, 1) == b"\x08"
    finally:
        os.close(descriptor)


def mentions(path: Path, name: str) -> bool:
    """Whether the bytes of the file hold `name`: quicker than parsing it, and wrong only on the safe side."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return False
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            return content.find(os.fsencode(name)) >= 0
    finally:
        os.close(descriptor)

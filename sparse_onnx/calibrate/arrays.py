"""Arrays as runs: ``.npz`` files with an array for each input, by its name; ``.npy`` files where there is one input."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparse_onnx.calibrate.interface import Interface, Run
from sparse_onnx.calibrate.text import plain_file
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.text import printable

SUFFIXES = (".npz", ".npy")
#: Rows that a run holds at most where arrays can be cut along their first axis.
ROWS = 2048
#: Bytes of one array, once it is unpacked.
_MOST_BYTES = 4 << 30


def load_arrays(path: Path, interface: Interface) -> dict[str, np.ndarray]:
    """The arrays of a file by the input that they are for.

    Raises:
        UsageError: not a file of plain arrays, or a ``.npy`` file for a model of several inputs.
    """
    where = printable(str(path))
    plain_file(path).close()
    try:
        if path.suffix.lower() == ".npy":
            return {_only_input(interface, where): np.load(path, mmap_mode="r", allow_pickle=False)}
        with zipfile.ZipFile(path) as archive:
            large = [info.filename for info in archive.infolist() if info.file_size > _MOST_BYTES]
        if large:
            raise UsageError(
                f"array {printable(large[0])} has more than {_MOST_BYTES >> 30} GiB",
                "cut it into files",
                where,
            )
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        MemoryError,
        zipfile.BadZipFile,
        NotImplementedError,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"holds no arrays that can be read: {printable(first)}"
        raise UsageError(what, "write it with numpy.savez", where) from None


def _only_input(interface: Interface, where: str) -> str:
    names = [
        name
        for name in interface.inputs
        if "mask" not in name and "past" not in name and "position" not in name
    ]
    if len(names) != 1:
        raise UsageError(
            f"the model has the inputs {', '.join(map(printable, names))}, and a .npy file has no names",
            "put arrays by these names into an .npz file",
            where,
        )
    return names[0]


def pieces(arrays: dict[str, np.ndarray], interface: Interface) -> list[tuple[int, int]]:
    """Where the arrays are cut along their first axis, which is a batch: starts and ends. One piece where it is fixed,
    or not the same for all."""
    sizes = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    whole = [(0, max(sizes, default=0))]
    if len(sizes) != 1:
        return whole
    rows = 1
    for name, array in arrays.items():
        value = interface.inputs.get(name)
        if (
            value is None
            or value.shape is None
            or len(value.shape) != array.ndim
            or isinstance(value.shape[0], int)
        ):
            return whole
        for dim, size in zip(list(value.shape)[1:], array.shape[1:], strict=True):
            rows = max(rows, 1 if isinstance(dim, int) else size)
    step = max(1, ROWS // rows)
    return [(start, min(start + step, whole[0][1])) for start in range(0, whole[0][1], step)] or whole


def array_runs(path: Path, interface: Interface) -> Iterator[Run]:
    """The runs of a file, checked one by one."""
    arrays = load_arrays(path, interface)
    where = printable(str(path))
    if not arrays:
        raise UsageError("holds no array", "write it with numpy.savez", where)
    cuts = pieces(arrays, interface)
    for start, end in cuts:
        part = arrays if len(cuts) == 1 else {name: array[start:end] for name, array in arrays.items()}
        yield interface.run({name: np.asarray(array) for name, array in part.items()}, where)

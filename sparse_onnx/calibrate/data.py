"""The user's data as runs of the model: texts, arrays, folders of either."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.calibrate.arrays import SUFFIXES, array_runs, load_arrays, pieces
from sparse_onnx.calibrate.interface import Interface, Run
from sparse_onnx.calibrate.text import Windows, find_tokenizer
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.text import printable

#: Tokens of a window of text.
LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Place:
    """One run that can be made when it is needed: a window of text, or a piece of a file of arrays."""

    file: int
    part: int


class Data:
    """Runs of a model over the user's data, in a fixed order, each read when it is needed.

    Args:
        model: with inferred types and shapes.
        paths: files and folders: texts, or arrays in ``.npz`` and ``.npy`` files, not both.
        model_path: beside which the tokenizer lies.
        length: tokens of a window of text.
        runs: use only so many, evenly spread over the data; None: all.
        tokenizer: a tokenizer.json, or the folder that holds it.

    Raises:
        UsageError: data that the model cannot be run over; names the file.
    """

    def __init__(
        self,
        model: ir.Model,
        paths: Sequence[str | os.PathLike[str]],
        *,
        model_path: str | os.PathLike[str],
        length: int = LENGTH,
        runs: int | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        self.interface = Interface(model)
        self.files = _files(paths)
        self.note = ""
        self._windows: Windows | None = None
        arrays = [path for path in self.files if path.suffix.lower() in SUFFIXES]
        if arrays and len(arrays) < len(self.files):
            texts = [path for path in self.files if path not in arrays]
            raise UsageError(
                "data are texts or arrays, not both",
                f"{len(texts)} files are no arrays",
                printable(str(texts[0])),
            )
        if arrays:
            places = [
                Place(file, part)
                for file, path in enumerate(arrays)
                for part in range(len(pieces(load_arrays(path, self.interface), self.interface)))
            ]
        else:
            self._windows = self._text(model_path, length, tokenizer)
            places = [Place(0, part) for part in range(len(self._windows) // self._batch)]
        if runs is not None and runs < len(places):
            chosen = np.linspace(0, len(places) - 1, runs).round().astype(int)
            places = [places[at] for at in dict.fromkeys(chosen.tolist())]
        self._places = places

    def _text(
        self, model_path: str | os.PathLike[str], length: int, tokenizer: str | os.PathLike[str] | None
    ) -> Windows:
        self._ids = self.interface.token_input()
        shape = self.interface.inputs[self._ids].shape
        dims = [] if shape is None else list(shape)
        fixed = bool(dims) and isinstance(dims[-1], int)
        if fixed:
            length = dims[-1]  # type: ignore[assignment]
        self._batch = dims[0] if len(dims) == 2 and isinstance(dims[0], int) else 1
        self._rank = max(1, len(dims))
        reader = find_tokenizer(model_path, tokenizer, self.interface.bound(self._ids))
        windows = Windows(self.files, reader, length, fixed or self._batch > 1)
        if len(windows) < self._batch:
            raise UsageError(
                f"the model takes {self._batch} windows at once; the text has {len(windows)}", "give more"
            )
        self.note = f"text read by {reader.name}, in windows of {length} tokens"
        return windows

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Run]:
        """The runs.

        Raises:
            UsageError: a run that the model cannot take.
        """
        if self._windows is not None:
            for place in self._places:
                start = place.part * self._batch
                ids = np.stack([self._windows[start + at] for at in range(self._batch)])
                where = printable(str(self.files[0])) if len(self.files) == 1 else "the text"
                yield self.interface.run({self._ids: ids if self._rank == 2 else ids[0]}, where)
            return
        wanted = set(self._places)
        for file, path in enumerate(self.files):
            if any(place.file == file for place in wanted):
                for part, run in enumerate(array_runs(path, self.interface)):
                    if Place(file, part) in wanted:
                        yield run


def _files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files named, and those in the folders named, hidden ones left out, in the order of their names."""
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = [
                Path(folder) / name
                for folder, folders, names in os.walk(path)
                for name in names
                if not any(part.startswith(".") for part in (Path(folder) / name).relative_to(path).parts)
                and (Path(folder) / name).is_file()
            ]
            if not inside:
                raise UsageError(
                    "this folder holds no file", "give texts, or .npz files", printable(str(path))
                )
            found += sorted(inside)
        elif not path.exists():
            raise UsageError("there is no such file", "check the path", printable(str(path)))
        else:
            found.append(path)
    if not found:
        raise UsageError("no data given", "name files or folders of text, or .npz files")
    return found

"""Text as windows of token ids, by the tokenizer beside the model; models of 256 ids without one read bytes."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.core.errors import ModelError, UsageError
from sparse_onnx.graph.scratch import scratch_folder
from sparse_onnx.graph.text import printable, quoted

TOKENIZER = "tokenizer.json"
_BYTES = 256
#: Bytes of text that are tokenized at once; pieces end with a line, or at worst between two characters.
_PIECE = 1 << 20
_MOST_TOKENIZER = 1 << 28


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids; and the special tokens that are put in front of and behind each window."""

    encode: Callable[[bytes], Sequence[int]]
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    name: str = "bytes"


def find_tokenizer(
    model: str | os.PathLike[str], given: str | os.PathLike[str] | None, vocabulary: int | None
) -> Tokenizer:
    """The tokenizer that the user named, or the one beside the model, or bytes.

    Raises:
        UsageError: there is none, or the package that reads it is missing.
        ModelError: the file is damaged.
    """
    beside = Path(os.path.dirname(os.path.abspath(os.fspath(model)))) / TOKENIZER
    path = beside if given is None else Path(given)
    if path.is_dir():
        path /= TOKENIZER
    if path.is_file():
        return _read(path)
    if given is not None:
        raise UsageError("there is no tokenizer.json", "name the file or its folder", printable(str(given)))
    if vocabulary == _BYTES:
        return Tokenizer(list)
    raise UsageError(
        f"there is no {TOKENIZER} beside the model to read text with",
        "--tokenizer names one; or give token ids in an .npz file",
        printable(os.fspath(model)),
    )


def _read(path: Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise UsageError(
            "reading text needs the package 'tokenizers'", "pip install 'sparse-onnx[calibrate]'"
        ) from None
    try:
        if path.stat().st_size > _MOST_TOKENIZER:
            raise ValueError("too large")
        loaded = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        loaded.no_padding()
        loaded.no_truncation()
        probe = loaded.encode("a")
    except Exception as error:  # tokenizers raises bare Exception
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"this is no tokenizer: {printable(first)}", "", printable(str(path))) from None

    def encode(text: bytes) -> list[int]:
        ids: list[int] = loaded.encode(text.decode("utf-8"), add_special_tokens=False).ids
        return ids

    special = list(probe.special_tokens_mask)
    plain = [at for at, flag in enumerate(special) if not flag]
    if not plain:
        return Tokenizer(encode, name=str(path))
    return Tokenizer(encode, tuple(probe.ids[: plain[0]]), tuple(probe.ids[plain[-1] + 1 :]), str(path))


class Windows:
    """Windows of token ids ``[length]`` over texts, one file behind the other; no window spans two files.

    The ids of all files are kept in a temporary file without a name. The last window of a file may be shorter, but not
    below two tokens; with `fixed` all are of the same length, and what is left over is not used.

    Raises:
        UsageError: a file that is no text, or nothing to read.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Tokenizer, length: int, fixed: bool) -> None:
        self.tokenizer = tokenizer
        self.content = length - len(tokenizer.before) - len(tokenizer.behind)
        if self.content < 1:
            raise UsageError(
                f"windows of {length} tokens hold nothing but special tokens", "--length gives more"
            )
        self._ids = tempfile.TemporaryFile(dir=scratch_folder())  # noqa: SIM115 - it lives as long as the windows
        self._spans: list[tuple[int, int]] = []
        written = 0
        for path in files:
            start = written
            for piece in _pieces(path):
                ids = np.asarray(_encoded(tokenizer, piece, path), np.int32)
                self._ids.write(ids.tobytes())
                written += len(ids)
            if written == start:
                raise UsageError("holds no text", "leave it out", printable(str(path)))
            self._cut(start, written, fixed)
        self._ids.flush()
        if not self._spans:
            least = self.content if fixed else 2
            raise UsageError(f"the text has {written} tokens, and a window needs {least}", "give more text")

    def _cut(self, start: int, end: int, fixed: bool) -> None:
        for at in range(start, end, self.content):
            size = min(self.content, end - at)
            if size == self.content or (not fixed and size + len(self.tokenizer.before) >= 2):
                self._spans.append((at, size))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> np.ndarray:
        start, size = self._spans[index]
        content = os.pread(self._ids.fileno(), size * 4, start * 4)
        ids = np.frombuffer(content, np.int32)
        return np.concatenate([self.tokenizer.before, ids, self.tokenizer.behind]).astype(np.int64)


def _encoded(tokenizer: Tokenizer, piece: bytes, path: Path) -> Sequence[int]:
    try:
        return tokenizer.encode(piece)
    except UnicodeDecodeError:
        raise UsageError(
            "is not text in UTF-8",
            "calibration data are texts, or .npz and .npy arrays",
            printable(str(path)),
        ) from None


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in pieces, cut behind lines where they are not too long."""
    with plain_file(path) as file:
        rest = b""
        while piece := file.read(_PIECE):
            piece = rest + piece
            cut = piece.rfind(b"\n") + 1 or _whole_characters(piece)
            rest = piece[cut:]
            if cut:
                yield piece[:cut]
        if rest:
            yield rest


def _whole_characters(piece: bytes) -> int:
    """Bytes of the piece without a character of UTF-8 that it cuts."""
    for back in range(1, min(4, len(piece)) + 1):
        byte = piece[-back]
        if byte < 0x80:
            return len(piece) - back + 1
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(piece) if back >= needed else len(piece) - back
    return len(piece)


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)  # or opening a named pipe would wait for a writer


def plain_file(path: Path) -> Any:
    """The file, opened for reading.

    Raises:
        UsageError: it is not there, or a pipe or device.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}", "check the path", printable(str(path))
        ) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError("is not a regular file", "copy the data into one", quoted(str(path)))
    return file

"""The user's data become runs of the model, or are refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from data_models import lookup, rows, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.calibrate.data import Data
from sparse_onnx.calibrate.interface import Run
from sparse_onnx.calibrate.text import Tokenizer, Windows
from sparse_onnx.core.errors import ModelError, UsageError


def runs(model: ir.Model, *paths: Path, **options: Any) -> list[Run]:
    data = Data(model, paths, model_path=paths[0].parent / "m.onnx", **options)
    found = list(data)
    assert len(found) == len(data)
    return found


def write(path: Path, content: str | bytes = "", **arrays: np.ndarray) -> Path:
    if arrays:
        np.savez(path, **arrays)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    return path


def test_text_is_cut_into_windows_by_the_tokenizer_beside_the_model(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, special=False)
    text = write(tmp_path / "a.txt", "the cat sat on the mat\nthe dog")
    found = runs(lookup(), text, length=5)
    assert [run.feeds["input_ids"].tolist() for run in found] == [[[0, 1, 2, 3, 0]], [[4, 0, 5]]]
    assert [run.tokens for run in found] == [5, 3] and found[0].feeds["input_ids"].dtype == np.int64


def test_special_tokens_are_put_around_each_window(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, special=True)
    text = write(tmp_path / "a.txt", "the cat sat on the mat")
    found = runs(lookup(), text, length=5)
    assert [run.feeds["input_ids"].tolist() for run in found] == [[[6, 0, 1, 2, 7]], [[6, 3, 0, 4, 7]]]


def test_a_model_of_bytes_needs_no_tokenizer(tmp_path: Path) -> None:
    [run] = runs(lookup(256), write(tmp_path / "a.txt", "aé\n"))
    assert run.feeds["input_ids"].tolist() == [[97, 0xC3, 0xA9, 10]]


def test_masks_positions_segments_and_empty_caches_are_filled_in(tmp_path: Path) -> None:
    model = lookup(
        256,
        "int64[batch, seq] input_ids, int64[batch, total] attention_mask, int64[batch, seq] position_ids,"
        "int64[batch, seq] token_type_ids, float[batch, 2, past, 8] past_0_key, bool[1] use_cache_branch",
        "t = Gather (types, token_type_ids)",
    )
    [run] = runs(model, write(tmp_path / "a.txt", "abc"))
    feeds = run.feeds
    assert feeds["attention_mask"].tolist() == [[1, 1, 1]] and feeds["position_ids"].tolist() == [[0, 1, 2]]
    assert not feeds["token_type_ids"].any() and feeds["token_type_ids"].shape == (1, 3)
    assert feeds["past_0_key"].shape == (1, 2, 0, 8)
    assert feeds["use_cache_branch"].tolist() == [False]


def test_fixed_axes_are_filled_and_what_is_left_over_is_not_used(tmp_path: Path) -> None:
    found = runs(lookup(256, "int64[2, 4] input_ids"), write(tmp_path / "a.txt", "0123456789abcdefghi"))
    assert [bytes(run.feeds["input_ids"].ravel().tolist()) for run in found] == [b"01234567", b"89abcdef"]


def test_folders_are_read_in_order_and_no_window_spans_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    write(folder / "b.txt", "bbbbb")
    write(folder / "inner" / "c.md", "cc")
    write(folder / "a.txt", "aaaa")
    write(folder / ".hidden", "hidden")
    found = runs(lookup(256), folder, length=4)
    assert [bytes(run.feeds["input_ids"].ravel().tolist()) for run in found] == [b"aaaa", b"bbbb", b"cc"]


def test_so_many_runs_are_spread_over_the_data(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "".join(chr(97 + at) * 4 for at in range(9)))
    found = runs(lookup(256), text, length=4, runs=3)
    assert [chr(run.feeds["input_ids"][0, 0]) for run in found] == ["a", "e", "i"]


def test_arrays_are_given_by_name_and_cut_along_the_batch(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(6, 4).astype(np.int32) % 8
    mask = np.ones((6, 4), np.int64)
    mask[5, 2:] = 0
    file = write(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
    model = lookup(8, "int64[batch, seq] input_ids, int64[batch, seq] attention_mask")
    [run] = runs(model, file)
    assert run.feeds["input_ids"].dtype == np.int64 and run.tokens == 22
    assert run.mask is not None and run.mask.sum() == 22
    long = np.zeros((5, 1024), np.int64)
    assert [
        len(run.feeds["input_ids"]) for run in runs(lookup(), write(tmp_path / "b.npz", input_ids=long))
    ] == [2, 2, 1]


def test_one_input_may_be_a_npy_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3000, 4))
    np.save(tmp_path / "x.npy", x)
    found = runs(rows(), tmp_path / "x.npy")
    assert [run.tokens for run in found] == [2048, 952]
    np.testing.assert_array_equal(np.concatenate([run.feeds["x"] for run in found]), x.astype(np.float32))


def floats(**arrays: np.ndarray) -> Callable[[Path], tuple[ir.Model, Path]]:
    return lambda folder: (rows(), write(folder / "a.npz", **arrays))


def texts(
    content: str | bytes, model: Callable[[], ir.Model] = lookup
) -> Callable[[Path], tuple[ir.Model, Path]]:
    return lambda folder: (model(), write(folder / "a.txt", content))


def words(content: str | bytes, table: int = 8) -> Callable[[Path], tuple[ir.Model, Path]]:
    def make(folder: Path) -> tuple[ir.Model, Path]:
        word_tokenizer(folder, special=False)
        return lookup(table), write(folder / "a.txt", content)

    return make


def pipe(folder: Path) -> tuple[ir.Model, Path]:
    os.mkfifo(folder / "a.txt")
    return lookup(256), folder / "a.txt"


def mixed(folder: Path) -> tuple[ir.Model, Path]:
    (folder / "d").mkdir()
    write(folder / "d" / "a.txt", "a")
    write(folder / "d" / "b.npz", x=np.zeros((1, 4)))
    return lookup(256), folder / "d"


def broken_tokenizer(folder: Path) -> tuple[ir.Model, Path]:
    write(folder / "tokenizer.json", "{}")
    return lookup(), write(folder / "a.txt", "the")


def folder_of_nothing(folder: Path) -> tuple[ir.Model, Path]:
    (folder / "d").mkdir()
    return lookup(256), folder / "d"


def pickled(folder: Path) -> tuple[ir.Model, Path]:
    np.savez(folder / "a.npz", x=np.asarray([object()]))
    return rows(), folder / "a.npz"


def forged(folder: Path) -> tuple[ir.Model, Path]:
    """A header that claims more than the file holds."""
    np.save(folder / "a.npy", np.zeros((2, 4)))
    content = (folder / "a.npy").read_bytes().replace(b"(2, 4), ", b"(9999999999, 4), ")
    return rows(), write(folder / "a.npy", content[: len(content) - 9])


X = np.zeros((2, 4), np.float32)
BYTE = lambda: lookup(256)  # noqa: E731
HOSTILE: dict[str, tuple[Callable[[Path], tuple[ir.Model, Path]], str]] = {
    "no file": (lambda folder: (lookup(256), folder / "none.txt"), "no such file"),
    "an empty file": (texts("", BYTE), "holds no text"),
    "an empty folder": (folder_of_nothing, "holds no file"),
    "a pipe": (pipe, "not a regular file"),
    "one token": (texts("a", BYTE), "a window needs 2"),
    "too short a text": (texts("abc", lambda: lookup(256, "int64[1, 8] input_ids")), "needs 8"),
    "text without a tokenizer": (texts("the"), "no tokenizer.json beside the model"),
    "a broken tokenizer": (broken_tokenizer, "this is no tokenizer"),
    "bytes that are no text": (words(b"the \xff\xfe cat"), "not text in UTF-8"),
    "a tokenizer of another model": (
        words("the cat sat on mat", table=4),
        "token 4 of input 'input_ids' is outside",
    ),
    "text for a model of numbers": (texts("the", rows), "no input takes token ids"),
    "text and arrays": (mixed, "not both"),
    "text named as arrays": (
        lambda folder: (rows(), write(folder / "a.npz", "text")),
        "no arrays that can be read",
    ),
    "objects": (pickled, "no arrays that can be read"),
    "a forged header": (forged, "no arrays that can be read"),
    "another name": (floats(z=X), "no input 'z'"),
    "a missing input": (
        lambda folder: (rows("float[batch, 4] x, float[batch, 4] other"), write(folder / "a.npz", x=X)),
        "input 'other' is not in the data",
    ),
    "another width": (floats(x=X[:, :3]), "not [2, 3]"),
    "another rank": (floats(x=X[0]), "not [4]"),
    "integers for numbers": (floats(x=X.astype(np.int64)), "takes float, not int64"),
    "complex numbers": (floats(x=X.astype(np.complex64)), "takes float, not complex64"),
    "text in an array": (floats(x=np.asarray([["a"] * 4])), "takes float, not <U1"),
    "NaN": (floats(x=np.full_like(X, np.nan)), "NaN or infinity"),
    "infinity": (floats(x=np.full_like(X, np.inf)), "NaN or infinity"),
    "more than float32 holds": (floats(x=np.full((2, 4), 1e300)), "NaN or infinity"),
    "no rows": (floats(x=X[:0]), "holds no token"),
    "negative tokens": (
        lambda folder: (lookup(), write(folder / "a.npz", input_ids=np.asarray([[-100, 1]]))),
        "token -100 of input 'input_ids' is outside",
    ),
    "other batches": (
        lambda folder: (rows("float[batch, 4] x, float[batch, 4] z"), write(folder / "a.npz", x=X, z=X[:1])),
        "axis 'batch' is 2 of input 'x' and 1 of 'z'",
    ),
    "all hidden": (
        lambda folder: (
            lookup(8, "int64[batch, seq] input_ids, int64[batch, seq] attention_mask"),
            write(folder / "a.npz", input_ids=np.zeros((1, 3), int), attention_mask=np.zeros((1, 3), int)),
        ),
        "hides every token",
    ),
    "a .npy file for two inputs": (
        lambda folder: (rows("float[batch, 4] x, float[batch, 4] z"), write(folder / "a.npy", b"\x93NUMPY")),
        "has no names",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_data_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    model, path = make(tmp_path)
    with pytest.raises((UsageError, ModelError)) as error:
        runs(model, path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_is_named_must_be_there(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "the")
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        runs(lookup(), text, tokenizer=tmp_path / "nowhere")
    (tmp_path / "t").mkdir()
    word_tokenizer(tmp_path / "t", special=False)
    write(text, "the cat")
    [run] = runs(lookup(), text, tokenizer=tmp_path / "t")
    assert run.feeds["input_ids"].tolist() == [[0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=3),
    length=st.integers(2, 9),
)
def test_windows_hold_every_byte_once_and_in_order(
    tmp_path_factory: Any, texts: list[str], length: int
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    files = [
        write(folder / f"{at}.txt", text.encode("utf-8", "ignore") + b"..") for at, text in enumerate(texts)
    ]
    windows = Windows(files, Tokenizer(list), length, fixed=False)
    lost = sum(1 for file in files if file.stat().st_size % length == 1)
    held = sum(len(windows[at]) for at in range(len(windows)))
    assert held == sum(file.stat().st_size for file in files) - lost
    whole = b"".join(bytes(windows[at].tolist()) for at in range(len(windows)))
    rest = b"".join(
        content[: len(content) - (len(content) % length == 1)]
        for content in (file.read_bytes() for file in files)
    )
    assert whole == rest


def test_a_long_text_is_cut_between_characters(tmp_path: Path) -> None:
    """A line of more than a piece, of characters of three bytes."""
    word_tokenizer(tmp_path, special=False)
    text = write(tmp_path / "a.txt", "\u20ac" * 400_000 + " the")
    [*_, last] = runs(lookup(), text)
    assert last.feeds["input_ids"][0, -1] == 0

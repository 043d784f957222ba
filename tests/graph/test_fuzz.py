"""Damaged files load or are refused; nothing else may come out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph.hostile import nested
from graph.toy import branch, call, external, function, model, packed_model
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.graph.io import load, save
from sparse_onnx.graph.stats import record


def _seeds(folder: Path) -> list[bytes]:
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    body = helper.make_graph([], "body", [], out, [external("out", [4], "in.bin")])
    strings = helper.make_tensor("s", TensorProto.STRING, [2], [b"a", b"b"])
    rich = model(
        [strings, numpy_helper.from_array(np.ones(3, np.int64), "i"), external("e", [2, 2], "in.bin", 4, 16)],
        [branch(body), call("F", "x", "z")],
        [function("F", [call("G")]), function("G", [helper.make_node("Identity", ["a"], ["b"])])],
    )
    return [packed_model(folder).read_bytes(), rich.SerializeToString(), nested(5)]


def _damage(content: bytes, chance: np.random.Generator) -> bytes:
    data = bytearray(content)
    for _ in range(chance.integers(1, 6)):
        at = int(chance.integers(len(data)))
        match chance.integers(4):
            case 0:
                data[at] = int(chance.integers(256))
            case 1:
                del data[at : at + int(chance.integers(1, 20))]
            case 2:
                data[at:at] = chance.bytes(int(chance.integers(1, 10)))
            case _:
                other = int(chance.integers(len(data)))
                data[at:at] = data[other : other + 30]
        data = data or bytearray(b"\0")
    return bytes(data)


def _fuzz(folder: Path, rounds: int, seed: int) -> None:
    seeds = _seeds(folder)
    chance = np.random.default_rng(seed)
    path = folder / "m.onnx"
    loaded = 0
    for number in range(rounds):
        path.write_bytes(_damage(seeds[number % len(seeds)], chance))
        try:
            found = load(path)
            record(found, path)
            save(found, folder / "out.onnx")
            load(folder / "out.onnx")
            loaded += 1
        except SparseOnnxError as error:
            assert all(c.isprintable() for c in str(error))
    assert 0 < loaded < rounds


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def test_damaged_files(tmp_path: Path) -> None:
    _fuzz(tmp_path, 600, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_damaged_files(seed: int, tmp_path: Path) -> None:
    _fuzz(tmp_path, 10_000, seed)

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graph.toy import external, model, packed_model, watched, write
from sparse_onnx.graph.io import load, save

HASH = "0123456789abcdef" * 4


def _weights(path: Path) -> dict[str, np.ndarray]:
    """By onnx itself."""
    proto = onnx.load(path)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    loaded = load(path)
    weight = loaded.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.base_dir == str(tmp_path) and weight.raw is None
    for name, array in _weights(path).items():
        tensor = loaded.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_relative_path_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = load(path.name)
    monkeypatch.chdir("/")
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), _weights(path)["w"])


@pytest.mark.parametrize(
    "location", ["./w.bin", "sub/w.bin", "sub//w.bin", "sub/./w.bin", "..w.bin", "w..bin"]
)
def test_locations_inside_the_folder(location: str, tmp_path: Path) -> None:
    file = tmp_path / location
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    loaded = load(write(model([external("w", [4], location)]), tmp_path / "m.onnx"))
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [0, 1, 2, 3]


def test_a_model_behind_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    packed_model(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    tensor = load(tmp_path / "link" / "in.onnx").graph.initializers["w"].const_value
    assert tensor is not None and tensor.numpy().shape == (4, 32, 16)


@pytest.mark.parametrize("sub", ["", "onnx/"])
def test_hugging_face_cache(sub: str, tmp_path: Path) -> None:
    """Model and data are links into `blobs`; saving elsewhere copies, and leaves the blobs alone."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee" / sub
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "made").mkdir()
    packed_model(tmp_path / "made")
    up = "../../../" if sub else "../../"
    for index, name in enumerate(("in.onnx", "in.bin")):
        blob = HASH[index:] + HASH[:index] if name == "in.bin" else HASH[:40]
        (tmp_path / "made" / name).rename(blobs / blob)
        (snapshot / name).symlink_to(f"{up}blobs/{blob}")
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}

    loaded = load(snapshot / "in.onnx")
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    expected = tensor.numpy().copy()

    saved = save(loaded, tmp_path / "made" / "out.onnx")
    assert saved.mode == "copy"
    np.testing.assert_array_equal(_weights(saved.path)["w"], expected)
    # In the cache itself: the link is replaced, not the blob that it led to.
    save(loaded, snapshot / "in.onnx")
    assert not (snapshot / "in.onnx").is_symlink()
    np.testing.assert_array_equal(_weights(snapshot / "in.onnx")["w"], expected)
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_loading_executes_and_opens_nothing_else(corpus: Path, tmp_path: Path) -> None:
    external_model = packed_model(tmp_path)
    load(external_model)  # whatever python imports on first use
    for path in [external_model, *sorted(corpus.glob("*.onnx"))]:
        with watched() as events:
            load(path)
        assert set(events) == {("open", str(path))}


def test_reading_weights_opens_only_their_file(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    with watched() as events:
        tensor.numpy()
    assert events == [("open", str(tmp_path / "in.bin"))]


def test_corpus_round_trip(corpus: Path, tmp_path: Path) -> None:
    """Load, save, load, save: the same weights and, from then on, the same bytes."""
    for path in sorted(corpus.glob("*.onnx")):
        out = tmp_path / path.name
        first = save(load(path), out)
        graph = out.read_bytes()
        second = save(load(out), out)
        assert (first.mode, second.mode, second.data_path, second.bytes_copied) == ("copy", "link", None, 0)
        assert out.read_bytes() == graph
        assert first.data_path is not None and first.data_path.exists()
        before, after = _weights(path), _weights(out)
        assert before.keys() == after.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, strict=True)


def test_onnxruntime_answers_the_same(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    (tmp_path / "sub").mkdir()
    outputs = [tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "sub" / "c.onnx"]
    for out, weights in zip(outputs, ("link", "copy", "auto"), strict=True):
        save(load(path), out, weights=weights)  # type: ignore[arg-type]
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    results = []
    for file in (path, *outputs):
        session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])

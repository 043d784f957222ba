from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from graph.toy import external, model, packed_model, write
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.external import drop_mapping, read_array, slice_first_axis
from sparse_onnx.graph.io import load

ARRAY = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)


def _external(folder: Path) -> ir.ExternalTensor:
    (folder / "w.bin").write_bytes(b"\0" * 13 + ARRAY.tobytes())
    loaded = load(write(model([external("w", ARRAY.shape, "w.bin", 13, ARRAY.nbytes)]), folder / "m.onnx"))
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


def _tensor(kind: str, folder: Path) -> ir.TensorProtocol:
    if kind == "external":
        return _external(folder)
    if kind == "inline":
        return ir.serde.deserialize_tensor(numpy_helper.from_array(ARRAY, "w"))
    if kind == "floats":
        proto = helper.make_tensor("w", onnx.TensorProto.FLOAT, ARRAY.shape, ARRAY.ravel())
        return ir.serde.deserialize_tensor(proto)
    if kind == "lazy":
        return ir.LazyTensor(lambda: ir.tensor(ARRAY), ir.DataType.FLOAT, ir.Shape(ARRAY.shape), name="w")
    if kind == "torch":
        torch = pytest.importorskip("torch")
        return ir.tensor(torch.from_numpy(ARRAY.copy()), name="w")
    return ir.tensor(ARRAY, name="w")


KINDS = ["external", "inline", "floats", "memory", "lazy", "torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_equal_numpy(kind: str, tmp_path: Path) -> None:
    tensor = _tensor(kind, tmp_path)
    for index in range(4):
        piece = slice_first_axis(tensor, index, f"w.{index}")
        assert (piece.name, piece.dtype, list(piece.shape)) == (f"w.{index}", ir.DataType.FLOAT, [6, 8])
        np.testing.assert_array_equal(piece.numpy(), ARRAY[index], strict=True)
        np.testing.assert_array_equal(read_array(piece), ARRAY[index], strict=True)
        assert piece.tobytes() == ARRAY[index].tobytes()
        row = slice_first_axis(piece, 5, "row")
        element = slice_first_axis(row, 7, "element")
        np.testing.assert_array_equal(element.numpy(), ARRAY[index, 5, 7, ...], strict=True)


def test_slice_of_a_file_reads_nothing(tmp_path: Path) -> None:
    tensor = _external(tmp_path)
    os.unlink(tmp_path / "w.bin")
    piece = slice_first_axis(tensor, 3, "w.3")
    assert isinstance(piece, ir.ExternalTensor)
    assert (piece.location, piece.offset, piece.length) == ("w.bin", 13 + 3 * 192, 192)
    assert piece.base_dir == tensor.base_dir


@pytest.mark.parametrize("kind", ["memory", "inline", "torch"])
def test_slices_in_memory_share_it(kind: str, tmp_path: Path) -> None:
    tensor = _tensor(kind, tmp_path)
    first, again = (slice_first_axis(tensor, 2, "s").numpy() for _ in range(2))
    assert np.shares_memory(first, again)


def test_lazy_slices_stay_lazy() -> None:
    calls = []

    def make() -> ir.Tensor:
        calls.append(1)
        return ir.Tensor(ARRAY)

    tensor = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(ARRAY.shape), name="w")
    piece = slice_first_axis(tensor, 1, "w.1")
    assert calls == []
    np.testing.assert_array_equal(piece.numpy(), ARRAY[1])
    assert calls == [1]


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2)])
@pytest.mark.parametrize("kind", ["external", "packed", "unpacked"])
@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT2, ir.DataType.FLOAT4E2M1])
def test_slices_below_a_byte(kind: str, dtype: ir.DataType, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype.numpy())
    tensor: ir.TensorProtocol = ir.Tensor(values, dtype, name="w")
    content = tensor.tobytes()
    if kind == "packed":
        tensor = ir.PackedTensor(np.frombuffer(content, np.uint8), dtype, shape=shape, name="w")
    if kind == "external":
        (tmp_path / "w.bin").write_bytes(content)
        tensor = ir.ExternalTensor(
            "w.bin", 0, len(content), dtype, shape=ir.Shape(shape), name="w", base_dir=tmp_path
        )
    bits = np.prod(shape[1:]) * dtype.bitwidth
    for index in range(3):
        if bits % 8:
            with pytest.raises(ValueError, match="whole bytes"):
                slice_first_axis(tensor, index, "s")
            continue
        piece = slice_first_axis(tensor, index, "s")
        for array in (piece.numpy(), read_array(piece)):
            np.testing.assert_array_equal(array.astype(np.float32), values[index].astype(np.float32))
        assert piece.tobytes() == content[index * bits // 8 : (index + 1) * bits // 8]


def test_slices_that_do_not_exist() -> None:
    for array, index in ((ARRAY, 4), (ARRAY, -1), (np.float32(1), 0), (np.zeros((0, 3)), 0)):
        with pytest.raises(ValueError, match="has no slice"):
            slice_first_axis(ir.tensor(array, name="w"), index, "s")
    with pytest.raises(ValueError, match="strings"):
        slice_first_axis(ir.tensor(["a", "b"], name="w"), 0, "s")


@pytest.mark.parametrize("offset", [0, 1, 4096, 5000])
def test_read_array_at_any_offset(offset: int, tmp_path: Path) -> None:
    values = np.arange(3000).astype(ml_dtypes.bfloat16)
    (tmp_path / "w.bin").write_bytes(b"\1" * offset + values.tobytes())
    tensor = ir.ExternalTensor(
        "w.bin", offset, None, ir.DataType.BFLOAT16, shape=ir.Shape([3000]), name="w", base_dir=tmp_path
    )
    np.testing.assert_array_equal(read_array(tensor), values)
    assert not read_array(tensor).flags.writeable


def test_read_array_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"")
    loaded = load(write(model([external("w", [0, 4], "w.bin")]), tmp_path / "m.onnx"))
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None and read_array(tensor).shape == (0, 4)


def _mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_mappings_die_with_their_arrays(tmp_path: Path) -> None:
    tensor = _external(tmp_path)
    file = tmp_path / "w.bin"
    array = read_array(tensor)[1]
    assert _mapped(file)
    del array
    assert not _mapped(file)


def test_drop_mapping(tmp_path: Path) -> None:
    tensor = _external(tmp_path)
    file = tmp_path / "w.bin"
    held = tensor.numpy()
    drop_mapping(tensor)
    assert _mapped(file)
    np.testing.assert_array_equal(held, ARRAY)
    np.testing.assert_array_equal(tensor.numpy(), ARRAY)
    del held
    drop_mapping(tensor)
    assert not _mapped(file)
    drop_mapping(ir.tensor(ARRAY))


@pytest.mark.parametrize("change", ["gone", "short", "link", "hard link", "pipe"])
def test_files_that_changed_after_the_load(change: str, tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    tensor = load(path).graph.initializers["b"].const_value
    assert tensor is not None
    data = tmp_path / "in.bin"
    (tmp_path / "elsewhere").mkdir()
    if change == "short":
        os.truncate(data, data.stat().st_size - 1)
    elif change == "hard link":
        (tmp_path / "elsewhere" / "other").hardlink_to(data)
    else:
        data.rename(tmp_path / "elsewhere" / "in.bin")
        if change == "link":
            data.symlink_to("elsewhere/in.bin")
        if change == "pipe":
            os.mkfifo(data)
    with pytest.raises(ModelError, match=r"in\.bin"):
        read_array(tensor)

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.graph.external import slice_first_axis
from sparse_onnx.graph.retyped import retyped

BYTES = np.arange(48, dtype=np.uint8).reshape(2, 3, 8)


def forms(folder: Path) -> dict[str, ir.TensorProtocol]:
    """The same bytes as tensors of every kind."""
    (folder / "weights").write_bytes(b"pad" + BYTES.tobytes())
    proto = helper.make_tensor("raw", TensorProto.UINT8, BYTES.shape, BYTES.tobytes(), raw=True)
    return {
        "array": ir.Tensor(BYTES, name="array"),
        "strided": ir.Tensor(np.asfortranarray(BYTES), name="strided"),
        "raw": ir.serde.TensorProtoTensor(proto),
        "list": ir.serde.TensorProtoTensor(
            helper.make_tensor("list", TensorProto.UINT8, BYTES.shape, BYTES.ravel())
        ),
        "lazy": ir.LazyTensor(
            lambda: ir.Tensor(BYTES), ir.DataType.UINT8, ir.Shape(BYTES.shape), name="lazy"
        ),
        "external": ir.ExternalTensor(
            "weights",
            3,
            48,
            ir.DataType.UINT8,
            shape=ir.Shape(BYTES.shape),
            name="external",
            base_dir=str(folder),
        ),
    }


@pytest.mark.parametrize("form", ["array", "strided", "raw", "list", "lazy", "external"])
def test_same_bytes(form: str, tmp_path: Path) -> None:
    tensor = forms(tmp_path)[form]
    for dtype, last in (
        (ir.DataType.UINT4, 16),
        (ir.DataType.UINT2, 32),
        (ir.DataType.UINT8, 8),
        (ir.DataType.FLOAT, 2),
    ):
        other = retyped(tensor, dtype, (2, 3, last), "other")
        assert (other.name, other.dtype, other.shape.numpy()) == ("other", dtype, (2, 3, last))
        assert other.tobytes() == BYTES.tobytes() and other.nbytes == 48
        back = retyped(slice_first_axis(other, 1, "one"), ir.DataType.UINT8, (3, 8), "back")
        np.testing.assert_array_equal(back.numpy(), BYTES[1])
        proto = ir.to_proto(ir.Tensor(other.numpy(), dtype, name="x"))
        np.testing.assert_array_equal(numpy_helper.to_array(proto), other.numpy())


def test_the_low_half_of_a_byte_comes_first() -> None:
    halves = retyped(ir.Tensor(np.asarray([0x21, 0x43], np.uint8)), ir.DataType.UINT4, (4,), "halves")
    assert halves.numpy().astype(int).tolist() == [1, 2, 3, 4]


def test_nothing_is_read_of_a_file(tmp_path: Path) -> None:
    tensor = forms(tmp_path)["external"]
    (tmp_path / "weights").unlink()
    other = retyped(tensor, ir.DataType.UINT4, (2, 3, 16), "other")
    assert isinstance(other, ir.ExternalTensor) and (other.offset, other.length) == (3, 48)


@pytest.mark.parametrize(("dtype", "shape"), [(ir.DataType.UINT4, (2, 3, 8)), (ir.DataType.STRING, (48,))])
def test_other_sizes_are_refused(dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be read as"):
        retyped(ir.Tensor(BYTES, name="array"), dtype, shape, "other")

"""Loads models without trusting them, and saves them so that a killed save leaves the old model whole."""

from __future__ import annotations

import os
import stat

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.check import check_model
from sparse_onnx.graph.external import DataFile, moved
from sparse_onnx.graph.save import MAX_PROTO_BYTES, SavedFiles, save
from sparse_onnx.graph.slots import Slot, tensor_slots
from sparse_onnx.graph.text import printable, root_cause

__all__ = ["SavedFiles", "load", "save"]


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model in a file. External weights stay in their files, and are mapped when they are read.

    Nothing outside the model's folder is opened and nothing in the file is executed; every external tensor is
    checked against its file before anything is read.

    Raises:
        ModelError: the file is missing, not an ONNX model, damaged, or unsafe.
    """
    path = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(path))
    with paused():
        try:
            proto = _parse(_read(path))
            data_files = check_model(proto, folder)
            model = _deserialize(proto)
        except ModelError as error:
            error.where = printable(path)
            raise
        for slot in tensor_slots(model):
            if isinstance(slot.tensor, ir.ExternalTensor):
                _settle(slot, slot.tensor, data_files[os.fspath(slot.tensor.location)])
        return model


def _read(path: str) -> bytes:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelError("this is not a regular file", "give the path of an .onnx file")
            if status.st_size > MAX_PROTO_BYTES:
                raise ModelError("this is larger than 2 GB, as no ONNX graph can be", "is it the data file?")
            head = file.read(1)
            if head in (b"", b"\0"):
                raise ModelError("this is empty, or not an ONNX model", "give the path of an .onnx file")
            return head + file.read()
    except IsADirectoryError:
        raise ModelError("this is a folder", "give the path of the .onnx file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"the model cannot be read: {reason}", "check the path") from None


def _parse(content: bytes) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        deep = "Depth" in str(error)
        what = "graphs are nested too deeply" if deep else "this is not an ONNX model, or it is cut off"
        raise ModelError(what, "get the file again from its author") from None
    if not proto.HasField("graph"):
        raise ModelError("this is not an ONNX model: it has no graph", "give the path of an .onnx file")
    return proto


def _deserialize(proto: onnx.ModelProto) -> ir.Model:
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:  # whatever an invalid graph makes of onnx-ir, recursion included
        root = root_cause(error)
        raise ModelError(
            f"the graph is invalid: {printable(str(root)) or type(root).__name__}",
            "`onnx.checker.check_model` may say more",
        ) from error


def _settle(slot: Slot, tensor: ir.ExternalTensor, file: DataFile) -> None:
    tensor.base_dir = file.base_dir
    if os.path.normpath(tensor.location) != file.location:
        # In Hugging Face's cache: name the blob, since onnx-ir does not follow the link to it.
        slot.replace(moved(tensor, file.location, tensor.offset or 0, file.base_dir))

"""Saves a model: its data file first, its graph last, each whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from google.protobuf.message import EncodeError

from sparse_onnx.core.errors import ModelError, OutsideError, SparseOnnxError, UsageError
from sparse_onnx.graph import datafile, files
from sparse_onnx.graph.external import moved, opened, read_array
from sparse_onnx.graph.slots import Slot, tensor_slots
from sparse_onnx.graph.text import printable, quoted, root_cause

MAX_PROTO_BYTES = 2**31 - 1  # protobuf's limit for one message
#: Smaller tensors lie in the graph itself.
INLINE_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class SavedFiles:
    """What a save wrote.

    `data_path` is the new data file, None where no weight had to be written; `bytes_copied` are the weights
    in it. `mode` is "link" if some weights stay in files that were there before, else "copy": the files are
    all of the model.
    """

    path: Path
    data_path: Path | None
    bytes_copied: int
    mode: Literal["link", "copy"]


@dataclasses.dataclass
class _Plan:
    """What becomes of each tensor of the model in the new files."""

    inlined: list[tuple[Slot, ir.TensorProtocol]] = dataclasses.field(default_factory=list)
    linked: list[tuple[Slot, str]] = dataclasses.field(default_factory=list)
    written: list[Slot] = dataclasses.field(default_factory=list)
    inline_bytes: int = 0


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    weights: Literal["auto", "link", "copy"] = "auto",
    size_threshold: int = INLINE_BYTES,
) -> SavedFiles:
    """Writes the model. At any moment, also after a kill, `path` is the old model whole or the new one whole.

    The data goes first, into a file with a name that was free (``OUT.data``, ``OUT.1.data`` ...); the graph
    is then renamed into place. A data file of the former model at `path` is removed when no graph mentions it
    any more: load the model again from `path` instead of reading weights of `model` after replacing its own
    file.

    Args:
        model: unchanged afterwards.
        path: the graph file; it may be the one that the model was loaded from.
        weights: "link" leaves external tensors in their files, which must lie in or under the folder of
            `path`, and reads nothing; "copy" writes them to the new data file; "auto" links what it can.
        size_threshold: in bytes. Smaller tensors go into the graph, larger ones in memory into the data file.

    Raises:
        UsageError: no such folder, or "link" where a weight file cannot be linked.
        ModelError: the graph without its weights exceeds 2 GB, or a weight file is gone.
        OutsideError: the files could not be written. Nothing of them is left.
    """
    target = place(path)
    if weights not in ("auto", "link", "copy"):
        raise UsageError(f"weights cannot be {quoted(str(weights))}", "one of auto, link, copy")
    plan = _plan(tensor_slots(model), target, weights, size_threshold)
    if plan.inline_bytes > MAX_PROTO_BYTES:
        raise _too_large(plan.inline_bytes)
    try:
        return _write(model, plan, target)
    except OSError as error:
        hint = "free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OutsideError(
            f"the model could not be written: {error.strerror or error}", hint, printable(str(path))
        ) from error


def place(path: str | os.PathLike[str]) -> Path:
    """Where a save to `path` puts the graph; to be asked before long work that ends in a save.

    Raises:
        UsageError: a folder, or a file in a folder that does not exist.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"the output {what}", "give the path of a file", printable(str(path)))
    return target


def _plan(slots: list[Slot], target: Path, weights: str, size_threshold: int) -> _Plan:
    plan = _Plan()
    links = _Links(target)
    for slot in slots:
        tensor = slot.tensor
        strings = tensor.dtype == ir.DataType.STRING
        external = isinstance(tensor, ir.ExternalTensor)
        if strings or tensor.nbytes < max(size_threshold, 1) or not (external or slot.is_initializer):
            plan.inlined.append((slot, _in_memory(tensor)))
            plan.inline_bytes += 0 if strings else tensor.nbytes
            continue
        location = None
        if isinstance(tensor, ir.ExternalTensor) and weights != "copy":
            location, refusal = links.find(tensor)
            if location is None and weights == "link":
                raise UsageError(
                    f"weights of {quoted(slot.name)} cannot be linked: {refusal}",
                    "write beside the weights, or copy them",
                    printable(str(target)),
                )
        if location is None:
            plan.written.append(slot)
        else:
            plan.linked.append((slot, location))
    return plan


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(
        np.array(read_array(tensor)),
        tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


class _Links:
    """Which weight files a graph at `target` may name where they are."""

    def __init__(self, target: Path) -> None:
        self.folder = os.path.realpath(target.parent)
        self.target = os.path.join(self.folder, target.name)
        self.known: dict[str, tuple[str | None, str]] = {}

    def find(self, tensor: ir.ExternalTensor) -> tuple[str | None, str]:
        """The location to write into the graph, or None and the reason why there is none."""
        if tensor.path not in self.known:
            self.known[tensor.path] = self._find(tensor)
        return self.known[tensor.path]

    def _find(self, tensor: ir.ExternalTensor) -> tuple[str | None, str]:
        real = os.path.realpath(tensor.path)
        shown = quoted(os.fspath(tensor.location))
        if real == self.target:
            return None, f"{shown} is the output file itself"
        if os.path.commonpath([self.folder, real]) != self.folder:
            return None, f"{shown} lies outside the output's folder, which no runtime accepts"
        with opened(tensor):  # also refuses hard links, as every loader would
            return os.path.relpath(real, self.folder), ""


def _write(model: ir.Model, plan: _Plan, target: Path) -> SavedFiles:
    former_data = files.own_data(target)
    offsets, parts = datafile.layout([slot.tensor for slot in plan.written])
    data: Path | None = None
    staged: Path | None = None
    copied = 0
    try:
        with contextlib.ExitStack() as stack:
            if parts:
                data, file = files.create_fresh(target.parent, files.data_names(target))
                stack.enter_context(file)
            # Whether the graph can be written at all is quick to find out, and writing the weights is not.
            graph = _serialize(model, [*plan.inlined, *_moves(plan, offsets, data)])
            if parts:
                copied = datafile.write(parts, file)
        staged = files.stage(target, graph)
        os.replace(staged, target)
    except BaseException:
        in_place = staged is not None and not staged.exists()  # an interrupt just after the renaming
        for path in () if in_place else (data, staged):
            if path is not None:
                path.unlink(missing_ok=True)
        raise
    files.sync_folder(target.parent)
    files.remove_unused(former_data)
    return SavedFiles(target, data, copied, "link" if plan.linked else "copy")


def _moves(plan: _Plan, offsets: list[int], data: Path | None) -> Iterator[tuple[Slot, ir.TensorProtocol]]:
    for slot, location in plan.linked:
        tensor = slot.tensor
        assert isinstance(tensor, ir.ExternalTensor)
        yield slot, moved(tensor, location, tensor.offset or 0)
    for slot, offset in zip(plan.written, offsets, strict=True):
        assert data is not None
        yield slot, moved(slot.tensor, data.name, offset)


def _serialize(model: ir.Model, tensors: list[tuple[Slot, ir.TensorProtocol]]) -> bytes:
    """The graph with these tensors in these places, in bytes that are the same in every run."""
    with contextlib.ExitStack() as undo:
        for slot, tensor in tensors:
            # onnx-ir gives a tensor the name of its value while it serializes.
            undo.callback(setattr, slot.tensor, "name", slot.tensor.name)
            if isinstance(tensor, ir.serde.TensorProtoTensor) and tensor.metadata_props:
                # onnx-ir copies such a proto, then adds the metadata to it: they would double at each save.
                tensor.raw.ClearField("metadata_props")
            if tensor is not slot.tensor:
                undo.callback(slot.replace(tensor))
        try:
            proto = ir.serde.serialize_model(model)
            size = proto.ByteSize()
            if size <= MAX_PROTO_BYTES:
                return proto.SerializeToString(deterministic=True)
        except (ir.serde.SerdeError, EncodeError) as error:
            root = root_cause(error)
            if isinstance(root, (SparseOnnxError, OSError)):
                raise root from error
            raise ModelError(f"the graph cannot be serialized: {printable(str(root))}") from error
    raise _too_large(size)


def _too_large(size: int) -> ModelError:
    return ModelError(
        f"the graph is {size} bytes without its external weights, and protobuf's limit is 2 GB",
        "store large constants as initializers, so that they can be external",
    )

"""Models saved with the weights as ONNX Runtime's kernels want them, so that a session maps them and keeps no copies.

A session of ORT's CPU provider packs each constant matrix into the layout of its kernel and keeps the packed copy in
memory, whether the matrix is ever used or not. Where a tensor's external data has an entry

    prepacked_0 = OPERATOR+HASH|offset;length;0[|offset;length;0]

ORT maps those bytes of the data file. It still packs every matrix, one at a time; if that gives the same hash for the
same operator, the kernel works on the mapping and the copy is dropped. Weights of experts that are never routed to are
then not read again. Entries of another processor, or of an ORT that packs in another way, have other hashes: such a
session keeps its own copies, as it would without them.

ORT writes such entries itself, but only with a whole model, and its file is not what a user should get: its graph has
attributes that older versions refuse and lacks our metadata, and ORT before 1.32 puts packed bytes at any offset, where
kernels that align pointers crash or compute something else. So ORT writes a temporary file for a part of the weights at
a time, the others being inputs of the graph meanwhile, and the packed bytes move to their place behind the weights, on
the boundaries that `graph.datafile` gives to weights. All of ORT's optimizations run, since they decide which operators
there are. Needs ORT's memory for one part, and twice its size on the disk for a while.

Packed are weights of the main graph which its nodes read, or nodes of branches one level down: ORT packs nothing that
is read further down. What it computes from constants, such as float32 from float16, has no place in our file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, VerificationError
from sparse_onnx.graph import datafile, files, io
from sparse_onnx.graph.save import SavedFiles, place
from sparse_onnx.graph.text import printable
from sparse_onnx.targets import session as sessions

#: Weights that ORT packs at once, in bytes. Each part costs a session of the whole graph.
PART_BYTES = 1 << 30

#: External data that a process may map on Linux (vm.max_map_count), with some left for the process itself.
_MOST_MAPPINGS = 65_530 - 2_000

#: Operators that never pack what they read.
_READ_IN_PLACE = frozenset({"Gather", "GatherElements", "GatherND", "MoE"})

_KEY = "prepacked"  # how the keys of the entries begin
_SMALLEST = 1024  # bytes of a weight that goes into the data file
_PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Prepacked:
    """What was written: the files, how many weights have packed bytes in them, and how many bytes these are."""

    files: SavedFiles
    weights: int
    packed_bytes: int


def save_prepacked(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    part_bytes: int = PART_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Prepacked:
    """Writes the model with packed weights, made by the ORT and for the processor that this runs on.

    At any moment `path` is the old model whole or the new one whole, as with `io.save`; a kill may leave the new data
    file and a hidden folder.

    Args:
        model: unchanged afterwards. Its weights are copied.
        path: the graph file; it may be the one that the model was loaded from.
        part_bytes: weights that ORT packs at once.
        progress: called with a line at each part.

    Raises:
        UsageError: no such folder.
        ModelError: ORT cannot load the model, or a weight file is gone.
        ImpossibleError: the result has more weights than a process can map.
        VerificationError: ORT does not take what it packed.
        OutsideError: the files could not be written. Nothing of them is left.
    """
    target = place(path)
    former = files.own_data(target)
    try:
        with _workshop(target) as folder:
            return _write(model, target, folder, former, part_bytes, progress)
    except OSError as error:
        hint = "free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        message = f"the model could not be written: {error.strerror or error}"
        raise OutsideError(message, hint, printable(str(path))) from error


@contextlib.contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside the target, on the same file system, that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    model: ir.Model,
    target: Path,
    folder: Path,
    former: Sequence[Path],
    part_bytes: int,
    progress: Callable[[str], None] | None,
) -> Prepacked:
    data, placeholder = files.create_fresh(target.parent, files.data_names(target))
    staged: Path | None = None
    try:
        placeholder.close()
        # A graph of this name has data of that name, so that nothing has to be renamed in it.
        whole = io.save(model, folder / f"{data.stem}.onnx", weights="copy", size_threshold=_SMALLEST)
        packing = _Packing(whole)
        packing.run(part_bytes, progress)
        graph = packing.graph()
        whole.path.write_bytes(graph)
        if progress is not None:
            progress("loading the packed model")
        _require_loading(whole.path, target)
        if whole.data_path is None:
            data.unlink()
        else:
            os.replace(whole.data_path, data)
        staged = files.stage(target, graph)
        os.replace(staged, target)
    except BaseException:
        in_place = staged is not None and not staged.exists()  # an interrupt just after the renaming
        for path in () if in_place else (data, staged):
            if path is not None:
                path.unlink(missing_ok=True)
        raise
    files.sync_folder(target.parent)
    files.remove_unused(former)
    saved = dataclasses.replace(whole, path=target, data_path=whole.data_path and data)
    return Prepacked(saved, len(packing.entries), packing.packed_bytes)


def _require_loading(path: Path, target: Path) -> None:
    """From version 1.32 on, ORT compares all packed bytes with its own."""
    try:
        sessions.create_session(path, name=printable(target.name))
    except ModelError as error:
        raise VerificationError(
            f"the packed model does not load: {error.message}",
            "nothing was written; please report it, this is a fault of sparse-onnx",
        ) from error


class _Packing:
    """Packs weights of a saved model into its data file. `entries` has, by tensor, what external data gets."""

    def __init__(self, whole: SavedFiles) -> None:
        self.path, self.data = whole.path, whole.data_path
        self.proto = _read(whole.path)
        self.entries: dict[str, list[tuple[str, str]]] = {}
        self.packed_bytes = 0

    def run(self, part_bytes: int, progress: Callable[[str], None] | None) -> None:
        parts = _parts(self.proto.graph, part_bytes)
        external = sum(map(_is_external, self.proto.graph.initializer))
        for number, names in enumerate(parts, 1):
            if progress is not None:
                progress(f"packing weights: part {number} of {len(parts)}")
            self._pack(names)
            mappings = external + sum(map(len, self.entries.values()))
            if mappings > _MOST_MAPPINGS:
                raise ImpossibleError(
                    "with packed weights the model has more pieces than the 65,530 that a process may map "
                    "(vm.max_map_count)",
                    "take a form that keeps a layer's experts in one tensor, or other --weights",
                )

    def graph(self) -> bytes:
        """The graph file with its entries, the same bytes in every run."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            for key, value in self.entries.get(tensor.name, ()):
                tensor.external_data.add(key=key, value=value)
        return proto.SerializeToString(deterministic=True)

    def _pack(self, names: frozenset[str]) -> None:
        part, packed, data = (
            self.path.with_name(name) for name in ("part.onnx", "packed.onnx", "packed.bin")
        )
        part.write_bytes(_only(self.proto, names).SerializeToString())
        settings = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": data.name,
            "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST),
        }
        try:
            sessions.create_session(part, entries=settings, name=self.path.name, optimized_to=packed)
        except ModelError as error:
            if "ToGraphProtoWithExternalInitializers" in str(error.__cause__):  # where ORT writes its file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        found = {
            tensor.name: [
                _Entry.of(entry, data) for entry in tensor.external_data if entry.key.startswith(_KEY)
            ]
            for tensor in _read(packed).graph.initializer
            if tensor.name in names
        }
        self._append([entry for entries in found.values() for entry in entries])
        for name, entries in found.items():
            if entries:
                self.entries[name] = [(entry.key, entry.value()) for entry in entries]
        for path in (part, packed, data):
            path.unlink(missing_ok=True)

    def _append(self, entries: Sequence[_Entry]) -> None:
        """Moves the packed bytes of the entries behind the model's weights."""
        blobs = [blob for entry in entries for blob in entry.blobs]
        if not blobs:
            return
        assert self.data is not None
        offsets, parts = datafile.layout(blobs)
        end = self.data.stat().st_size
        end += -end % _PAGE
        with open(self.data, "r+b") as file:
            self.packed_bytes += datafile.write(
                [dataclasses.replace(part, offset=part.offset + end) for part in parts], file
            )
        places = iter(offsets)
        for entry in entries:
            entry.offsets = [next(places) + end for _ in entry.blobs]


@dataclasses.dataclass
class _Entry:
    """Packed bytes of one weight for one operator: where ORT wrote them, and from `offsets` on, where they are now."""

    key: str
    operator: str
    blobs: list[ir.ExternalTensor]
    checksums: list[str]
    offsets: list[int] = dataclasses.field(default_factory=list)

    @staticmethod
    def of(entry: onnx.StringStringEntryProto, data: Path) -> _Entry:
        operator, *ranges = entry.value.split("|")
        found = _Entry(entry.key, operator, [], [])
        for text in ranges:
            start, length, checksum = text.split(";")
            shape = ir.Shape([int(length)])
            blob = ir.ExternalTensor(
                data.name,
                int(start),
                int(length),
                ir.DataType.UINT8,
                shape=shape,
                name=operator,
                base_dir=data.parent,
            )
            found.blobs.append(blob)
            found.checksums.append(checksum)
        return found

    def value(self) -> str:
        places = zip(self.offsets, self.blobs, self.checksums, strict=True)
        return "|".join(
            [self.operator, *(f"{offset};{blob.nbytes};{check}" for offset, blob, check in places)]
        )


def _read(path: Path) -> onnx.ModelProto:
    """A graph that ORT or we wrote. onnx-ir has no place for these entries, hence the protobuf."""
    proto = onnx.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _parts(graph: onnx.GraphProto, part_bytes: int) -> list[frozenset[str]]:
    """Names of the main graph's external constants that nodes read, all of a node together, so many bytes a part.

    A kernel may pack its matrix in another way when its scales are not constant.
    """
    sizes = {
        tensor.name: next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
        for tensor in graph.initializer
        if _is_external(tensor)
    }
    for value in graph.input:  # a default that a caller may replace is no constant
        sizes.pop(value.name, None)
    parts: list[frozenset[str]] = []
    names: set[str] = set()
    done: set[str] = set()
    size = 0
    for node in _nodes(graph):
        own = {name for name in node.input if name in sizes} - names
        if node.op_type in _READ_IN_PLACE or own <= done:
            continue
        length = sum(sizes[name] for name in own)
        if names and size + length > part_bytes:
            parts.append(frozenset(names))
            names, size = set(), 0
            own = {name for name in node.input if name in sizes}
        names |= own
        done |= own
        size += length
    return [*parts, frozenset(names)] if names else parts


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph and of its bodies."""
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            yield node
            pending.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
            pending.extend(body for attribute in node.attribute for body in attribute.graphs)


def _only(proto: onnx.ModelProto, names: frozenset[str]) -> onnx.ModelProto:
    """The model with inputs in place of all other external weights of its main graph."""
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    inputs = {value.name for value in proto.graph.input}
    del part.graph.initializer[:]
    for tensor in proto.graph.initializer:
        if tensor.name in names or not _is_external(tensor):
            part.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in inputs:
            kind = part.graph.input.add(name=tensor.name).type.tensor_type
            kind.elem_type = tensor.data_type
            for size in tensor.dims:
                kind.shape.dim.add(dim_value=size)
    return part

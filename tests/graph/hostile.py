"""Model files that must be refused. Each case writes files into a folder, and answers with the model's path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph.toy import branch, call, external, function, model, write

Case = Callable[[Path], Path]
CASES: dict[str, tuple[Case, str]] = {}
ESC = "\x1b]0;owned\x07\x1b[2J"
HASH = "ab" * 32


def case(name: str, text: str) -> Callable[[Case], Case]:
    """Registers a case: the refusal must contain `text`."""

    def register(build: Case) -> Case:
        assert name not in CASES
        CASES[name] = build, text
        return build

    return register


def _add(name: str, text: str, proto: Callable[[], onnx.ModelProto]) -> None:
    def build(folder: Path) -> Path:
        (folder / "w.bin").write_bytes(b"\0" * 1024)
        return write(proto(), folder / "m.onnx")

    case(name, text)(build)


def _raw(name: str, text: str, content: bytes) -> None:
    case(name, text)(lambda folder: _bytes(folder / "m.onnx", content))


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# The file itself.
_raw("empty file", "empty", b"")
_raw("zeros", "not an ONNX model", b"\0" * 100)
_raw("text", "not an ONNX model", b"this is no model")
_raw("random bytes", "not an ONNX model", bytes(np.random.default_rng(1).integers(1, 255, 5000, np.uint8)))
_raw("no graph", "no graph", onnx.ModelProto(ir_version=10).SerializeToString())
_raw("cut off", "cut off", model([external("w", [4], "w.bin")]).SerializeToString()[:-9])
_raw("not UTF-8", "not UTF-8", model().SerializeToString().replace(b"Identity", b"Identi\xff\xfe"))


def _noted() -> bytes:
    proto = model([], [], [function("F", [call("Identity")])])
    proto.doc_string = "documentation"
    proto.graph.node[0].metadata_props.add(key="the key", value="the value")
    proto.functions[0].opset_import[0].domain = "the domain"
    return proto.SerializeToString()


for _part in (b"documentation", b"the key", b"the value", b"the domain"):
    _raw(f"{_part.decode()} is not UTF-8", "not UTF-8", _noted().replace(_part, b"\xff" * len(_part)))


@case("missing file", "cannot be read: No such file")
def _(folder: Path) -> Path:
    return folder / "absent.onnx"


@case("path with a NUL", "cannot be read")
def _(folder: Path) -> Path:
    return folder / "a\0b.onnx"


@case("path with escapes", "cannot be read")
def _(folder: Path) -> Path:
    return folder / f"{ESC}.onnx"


@case("folder", "folder")
def _(folder: Path) -> Path:
    (folder / "m.onnx").mkdir()
    return folder / "m.onnx"


@case("named pipe", "not a regular file")
def _(folder: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


@case("device", "not a regular file")
def _(folder: Path) -> Path:
    return Path("/dev/zero")


@case("dangling link", "cannot be read")
def _(folder: Path) -> Path:
    (folder / "m.onnx").symlink_to("nowhere")
    return folder / "m.onnx"


@case("3 GB", "larger than 2 GB")
def _(folder: Path) -> Path:
    with open(folder / "m.onnx", "wb") as file:
        file.truncate(3 << 30)
    return folder / "m.onnx"


# Where external data lies.
for _name, _location, _text in [
    ("empty location", "", "is empty"),
    ("parent folder", "../secret", "leads out"),
    ("parent folder inside", "a/../../secret", "leads out"),
    ("parent folder and back", "../m/w.bin", "leads out"),
    ("only the folder", ".", "leads out"),
    ("absolute", "/etc/passwd", "is absolute"),
    ("Windows drive", "C:/secret", "is absolute"),
    ("backslashes", "..\\secret", "backslash"),
    ("NUL in location", "w.bin\0.txt", "control character"),
    ("escape in location", f"w{ESC}.bin", "control character"),
    ("newline in location", "w\n.bin", "control character"),
    ("ORT address", "*/_ORT_MEM_ADDR_/*", "memory address"),
    ("absent file", "absent.bin", "cannot be found"),
    ("file as folder", "w.bin/x", "cannot be found"),
    ("very long location", "w" * 5000, "cannot be found"),
    ("URL", "https://example.com/w.bin", "cannot be found"),
]:
    _add(_name, _text, lambda location=_location: model([external("w", [4], location)]))
_add("no location", "is empty", lambda: model([external("w", [4], None)]))


def _data(name: str, text: str) -> Callable[[Callable[[Path], None]], None]:
    """A model whose data is `w.bin`, which the decorated function puts into the model's folder."""

    def register(put: Callable[[Path], None]) -> None:
        def build(folder: Path) -> Path:
            (folder / "secret").write_bytes(b"\0" * 64)
            (folder / "model").mkdir()
            put(folder / "model" / "w.bin")
            return write(model([external("w", [4], "w.bin")]), folder / "model" / "m.onnx")

        case(name, text)(build)

    return register


_data("link out of the folder", "symbolic link")(lambda path: path.symlink_to("../secret"))
_data("link to an absolute path", "symbolic link")(lambda path: path.symlink_to("/etc/passwd"))
_data("link to a device", "symbolic link")(lambda path: path.symlink_to("/dev/zero"))
_data("link to itself", "symbolic link")(lambda path: path.symlink_to("w.bin"))
_data("hard link", "hard link")(lambda path: path.hardlink_to(path.parent.parent / "secret"))
_data("pipe as data", "not a regular file")(lambda path: os.mkfifo(path))
_data("folder as data", "not a regular file")(lambda path: path.mkdir())


@_data("link inside the folder", "symbolic link")
def _(path: Path) -> None:
    (path.parent / "real.bin").write_bytes(b"\0" * 64)
    path.symlink_to("real.bin")


@case("linked folder", "behind a symbolic link")
def _(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "w.bin").write_bytes(b"\0" * 64)
    (folder / "model").mkdir()
    (folder / "model" / "sub").symlink_to("../elsewhere")
    return write(model([external("w", [4], "sub/w.bin")]), folder / "model" / "m.onnx")


def _cache(name: str, text: str, blob: Callable[[Path], None], link: str) -> None:
    """Hugging Face's layout, with something wrong."""

    def build(folder: Path) -> Path:
        (folder / "secret").write_bytes(b"\0" * 64)
        snapshot = folder / "repo" / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        blob(folder / "repo" / "blobs")
        (snapshot / "w.bin").symlink_to(link.format(folder=folder))
        return write(model([external("w", [4], "w.bin")]), snapshot / "m.onnx")

    case(f"cache: {name}", text)(build)


def _blob(blobs: Path, name: str = HASH) -> None:
    blobs.mkdir()
    (blobs / name).write_bytes(b"\0" * 64)


def _linked_blob(blobs: Path) -> None:
    blobs.mkdir()
    (blobs / HASH).symlink_to("../../secret")


def _linked_blobs(blobs: Path) -> None:
    (blobs.parent.parent / "other").mkdir()
    (blobs.parent.parent / "other" / HASH).write_bytes(b"\0" * 64)
    blobs.symlink_to("../other")


def _hard_linked_blob(blobs: Path) -> None:
    blobs.mkdir()
    (blobs / HASH).hardlink_to(blobs.parent.parent / "secret")


_cache("name is no hash", "symbolic link", lambda blobs: _blob(blobs, "passwd"), "../../blobs/passwd")
_cache("beside blobs", "symbolic link", _blob, f"../../blobs/../../secret/{HASH}")
_cache("out of blobs", "symbolic link", _blob, "../../blobs/../../secret")
_cache("other repository", "symbolic link", _blob, f"../../../other/blobs/{HASH}")
_cache("absolute link", "symbolic link", _blob, f"{{folder}}/repo/blobs/{HASH}")
_cache("blob is a link", "symbolic link", _linked_blob, f"../../blobs/{HASH}")
_cache("blobs is a link", "symbolic link", _linked_blobs, f"../../blobs/{HASH}")
_cache("blob is a hard link", "hard link", _hard_linked_blob, f"../../blobs/{HASH}")
_cache("blob is absent", "cannot be found", lambda blobs: blobs.mkdir(), f"../../blobs/{HASH}")

# Ranges and keys. The file has 1024 bytes.
for _name, _arguments, _text in [
    ("negative offset", {"offset": -4}, "is no size"),
    ("offset past the end", {"offset": 1024}, "truncated"),
    ("offset near the end", {"offset": 1012}, "truncated"),
    ("offset beyond 64 bits", {"offset": 2**70}, "is no size"),
    ("largest offset", {"offset": 2**63 - 1}, "truncated"),
    ("offset in words", {"offset": "four"}, "is no size"),
    ("offset with underscore", {"offset": "1_0"}, "is no size"),
    ("offset with a sign", {"offset": "+4"}, "is no size"),
    ("offset with space", {"offset": " 4"}, "is no size"),
    ("offset in other digits", {"offset": "٤"}, "is no size"),
    ("empty offset", {"offset": ""}, "is no size"),
    ("negative length", {"length": -16}, "is no size"),
    ("length too short", {"length": 12}, "needs 16"),
    ("length too long", {"length": 20}, "needs 16"),
    ("length zero", {"length": 0}, "needs 16"),
    ("unknown key", {"shape": "4"}, "strange external data key"),
    ("attribute as key", {"__class__": "x"}, "strange external data key"),
    ("escape in key", {ESC: "x"}, "strange external data key"),
]:
    _add(_name, _text, lambda arguments=_arguments: model([external("w", [4], "w.bin", **arguments)]))


def _twice() -> onnx.ModelProto:
    tensor = external("w", [4], "w.bin")
    tensor.external_data.add(key="location", value="../secret")
    return model([tensor])


_add("location twice", "strange external data key", _twice)
_add("truncated data", "truncated", lambda: model([external("w", [257], "w.bin")]))
_add("huge external shape", "truncated", lambda: model([external("w", [2**31, 2**31], "w.bin")]))

# Tensors.
for _name, _tensor, _text in [
    ("negative dimension", external("w", [-4], "w.bin"), "negative dimension"),
    ("two negative dimensions", external("w", [-2, -2], "w.bin"), "negative dimension"),
    ("negative inline dimension", TensorProto(name="w", data_type=1, dims=[-1]), "negative dimension"),
    ("65 dimensions", TensorProto(name="w", data_type=1, dims=[1] * 65, float_data=[1.0]), "65 dimensions"),
    ("unknown type", TensorProto(name="w", data_type=99, dims=[4], raw_data=b"\0" * 16), "no known type"),
    ("no type", TensorProto(name="w", dims=[4], raw_data=b"\0" * 16), "no known type"),
    ("external strings", external("w", [4], "w.bin", dtype=TensorProto.STRING), "string tensor"),
    ("claims 10^12 elements", TensorProto(name="w", data_type=1, dims=[10**12]), "carries 0"),
    (
        "claims 2^62 elements",
        TensorProto(name="w", data_type=1, dims=[2**31, 2**31], raw_data=b"\0"),
        "carries 1",
    ),
    ("too few bytes", TensorProto(name="w", data_type=1, dims=[4], raw_data=b"\0" * 15), "carries 15 of 16"),
    ("too many bytes", TensorProto(name="w", data_type=1, dims=[4], raw_data=b"\0" * 17), "carries 17 of 16"),
    ("too few floats", TensorProto(name="w", data_type=1, dims=[4], float_data=[1, 2]), "carries 2 of 4"),
    ("too few 4-bit", TensorProto(name="w", data_type=22, dims=[5], int32_data=[1, 2]), "carries 2 of 3"),
    ("too few strings", TensorProto(name="w", data_type=8, dims=[5], string_data=[b"a"]), "carries 1 of 5"),
    ("escape in a tensor name", TensorProto(name=f"w{ESC}", data_type=1, dims=[0]), "control characters"),
    ("escape in a bad tensor", external(f"w{ESC}", [-1], "../x"), "control characters"),
]:
    _add(_name, _text, lambda tensor=_tensor: model([tensor]))

# The same in other places than the main graph's initializers.
_OUT = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
_BAD = external("w", [4], "../secret")


def _constant(tensor: TensorProto, output: str = "out") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], value=tensor)


_add("in a node attribute", "leads out", lambda: model([], [_constant(_BAD)]))
_add(
    "in a list attribute",
    "leads out",
    lambda: model([], [helper.make_node("Custom", [], ["out"], domain="test", tensors=[_BAD, _BAD])]),
)
_add(
    "in a subgraph",
    "leads out",
    lambda: model([], [branch(helper.make_graph([], "body", [], _OUT, [external("out", [4], "../secret")]))]),
)
_add(
    "in a subgraph's attribute",
    "leads out",
    lambda: model([], [branch(helper.make_graph([_constant(_BAD)], "body", [], _OUT))]),
)
_add("in a function", "leads out", lambda: model([], [], [function("F", [_constant(_BAD, "b")])]))
_add(
    "in a function's subgraph",
    "leads out",
    lambda: model(
        [], [], [function("F", [branch(helper.make_graph([_constant(_BAD)], "body", [], _OUT), "b")])]
    ),
)


def _default(**attribute: object) -> onnx.ModelProto:
    defined = function("F", [call("Identity")])
    defined.attribute_proto.extend(helper.make_attribute(key, value) for key, value in attribute.items())
    return model([], [], [defined])


_add("in a function's default", "leads out", lambda: _default(bias=_BAD))
_add("graph as a default", "as default", lambda: _default(body=helper.make_graph([], "g", [], [])))


def _sparse(where: str) -> onnx.ModelProto:
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.asarray([1])), [4])
    if where == "attribute":
        return model([], [helper.make_node("Constant", [], ["out"], sparse_value=sparse)])
    proto = model()
    proto.graph.sparse_initializer.append(sparse)
    return proto


_add("sparse initializer", "sparse initializers", lambda: _sparse("initializer"))
_add("sparse attribute", "sparse tensor", lambda: _sparse("attribute"))


# The structure.
def nested(depth: int) -> bytes:
    """A model with Ifs inside each other, written byte by byte: protobuf's own writer would recurse."""

    def field(number: int, payload: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(payload)) + payload

    graph = b""
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute)) + field(2, b"g")
    return b"\x08\x0a" + field(7, graph)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_raw("33 deep", "more than 32 deep", nested(33))
_raw("34 deep", "nested too deeply", nested(34))
_raw("5000 deep", "nested too deeply", nested(5000))


def _functions(*bodies: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Functions F0, F1 ..., and a call of F0."""
    return model([], [call("F0", "x", "z")], [function(f"F{i}", body) for i, body in enumerate(bodies)])


_add("function calls itself", "calls itself", lambda: _functions([call("F0")]))
_add(
    "functions call each other", "calls itself", lambda: _functions([call("F1")], [call("F2")], [call("F0")])
)
_add(
    "function calls itself in a branch",
    "calls itself",
    lambda: _functions([branch(helper.make_graph([call("F0", "a", "out")], "body", [], _OUT), "b")]),
)
_add(
    "chain of 5000 functions",
    "deep",
    lambda: _functions(
        *([call(f"F{i + 1}")] for i in range(5000)), [helper.make_node("Identity", ["a"], ["b"])]
    ),
)
_add(
    "functions that double 40 times",
    "expand to",
    lambda: _functions(
        *([call(f"F{i + 1}", "a", "c"), call(f"F{i + 1}", "c", "b")] for i in range(40)),
        [helper.make_node("Identity", ["a"], ["b"])],
    ),
)
_add(
    "function twice",
    "same name",
    lambda: model([], [], [function("F", [call("Identity")]), function("F", [call("Identity")])]),
)
_FLOAT = numpy_helper.from_array(np.ones(2, np.float32), "w")
_add("initializer twice", "defined twice", lambda: model([_FLOAT, _FLOAT]))
_add("output twice", "defined twice", lambda: model([], [helper.make_node("Identity", ["x"], ["y"])]))
_add("initializer is an output", "defined twice", lambda: model([_FLOAT], [_constant(_FLOAT, "w")]))
_add(
    "escape in a node name",
    "control characters",
    lambda: model([], [helper.make_node("Abs", ["x"], ["z"], ESC)]),
)
_add("escape in an operator", "control characters", lambda: model([], [helper.make_node(ESC, ["x"], ["z"])]))
_add(
    "escape in a value",
    "control characters",
    lambda: model([], [helper.make_node("Abs", ["x"], [f"z{ESC}"])]),
)
_add("escape in a function", "control characters", lambda: model([], [], [function(ESC, [call("Identity")])]))
_add(
    "escape in an attribute",
    "control characters",
    lambda: model([], [helper.make_node("Abs", ["x"], ["z"], **{ESC: 1})]),
)


def _inputs(dimension: object) -> onnx.ModelProto:
    proto = model()
    proto.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [dimension]))
    return proto


_add("escape in a dimension", "control characters", lambda: _inputs(ESC))
_add("dimension of -7", "negative dimension", lambda: _inputs(-7))


def _typed(kind: onnx.TypeProto) -> onnx.ModelProto:
    proto = model()
    proto.graph.input.append(onnx.ValueInfoProto(name="extra", type=kind))
    return proto


def _sequences(depth: int) -> onnx.TypeProto:
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    for _ in range(depth):
        kind = helper.make_sequence_type_proto(kind)
    return kind


_add("type 40 deep", "not supported", lambda: _typed(_sequences(40)))
_add(
    "map type",
    "not supported",
    lambda: _typed(helper.make_map_type_proto(TensorProto.INT64, _sequences(0))),
)

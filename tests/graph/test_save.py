from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from graph.toy import external, model, packed_model, write
from sparse_onnx.core.errors import ModelError, OutsideError, UsageError
from sparse_onnx.graph import save as save_module
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.io import load, save


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def _places(path: Path) -> dict[str, str]:
    """Initializer -> file that holds it, "" when it is in the graph."""
    proto = onnx.load(path, load_external_data=False)
    return {
        t.name: next((e.value for e in t.external_data if e.key == "location"), "")
        for t in proto.graph.initializer
    }


def _offsets(path: Path) -> dict[str, int]:
    proto = onnx.load(path, load_external_data=False)
    return {
        t.name: int(e.value) for t in proto.graph.initializer for e in t.external_data if e.key == "offset"
    }


def _add(loaded: ir.Model, tensor: ir.TensorProtocol) -> None:
    loaded.graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))


def test_link_names_the_same_file_and_writes_none(tmp_path: Path) -> None:
    path = packed_model(tmp_path)
    saved = save(load(path), tmp_path / "out.onnx", weights="link", size_threshold=100)
    assert (saved.mode, saved.data_path, saved.bytes_copied) == ("link", None, 0)
    assert _places(saved.path) == {"w": "in.bin", "b": "in.bin", "zero": ""}
    assert _offsets(saved.path) == _offsets(path)
    assert _names(tmp_path) == ["in.bin", "in.onnx", "out.onnx"]


def test_link_from_a_folder_above(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = packed_model(tmp_path / "sub")
    saved = save(load(path), tmp_path / "out.onnx", weights="link")
    assert _places(saved.path)["w"] == "sub/in.bin"
    np.testing.assert_array_equal(_arrays(saved.path)["w"], _arrays(path)["w"])


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    loaded = load(packed_model(tmp_path))
    with pytest.raises(UsageError, match="lies outside the output's folder"):
        save(loaded, tmp_path / "sub" / "out.onnx", weights="link")
    assert _names(tmp_path / "sub") == []


def test_link_refuses_a_file_that_became_a_hard_link(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    (tmp_path / "other").hardlink_to(tmp_path / "in.bin")
    with pytest.raises(ModelError, match="hard link"):
        save(loaded, tmp_path / "out.onnx", weights="link")


def test_auto_copies_where_it_cannot_link(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = packed_model(tmp_path)
    saved = save(load(path), tmp_path / "sub" / "out.onnx")
    assert saved.mode == "copy" and saved.data_path == tmp_path / "sub" / "out.data"
    assert saved.bytes_copied == 4 * 32 * 16 * 4  # b is small, and in the graph
    for name, array in _arrays(path).items():
        np.testing.assert_array_equal(_arrays(saved.path)[name], array, strict=True)


def test_auto_links_some_and_copies_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    loaded = load(packed_model(tmp_path / "a"))
    other = load(packed_model(tmp_path / "b")).graph.initializers["w"].const_value
    assert isinstance(other, ir.ExternalTensor)
    other.name = "other"
    _add(loaded, other)
    saved = save(loaded, tmp_path / "a" / "out.onnx")
    assert saved.mode == "link" and saved.bytes_copied == other.nbytes
    assert _places(saved.path) == {"w": "in.bin", "b": "", "zero": "", "other": "out.data"}


def test_what_is_small_goes_into_the_graph(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    _add(loaded, ir.tensor(np.ones(256, np.float32), name="large"))
    _add(loaded, ir.tensor(np.ones(255, np.float32), name="small"))
    _add(loaded, ir.tensor(["a" * 2000], name="text"))
    _add(loaded, ir.tensor(np.zeros((0, 5), np.float32), name="empty"))
    saved = save(loaded, tmp_path / "out.onnx", weights="copy")
    places = _places(saved.path)
    assert {name for name, place in places.items() if place == ""} == {"zero", "b", "small", "text", "empty"}
    assert _arrays(saved.path)["text"].tolist() == ["a" * 2000]
    saved = save(loaded, tmp_path / "out.onnx", weights="copy", size_threshold=0)
    places = _places(saved.path)
    assert {name for name, place in places.items() if place == ""} == {"text", "empty"}


def test_offsets_are_aligned(tmp_path: Path) -> None:
    proto = model(
        [numpy_helper.from_array(np.ones(size, np.float32), f"t{size}") for size in (300, 20_000, 301)]
    )
    saved = save(load(write(proto, tmp_path / "m.onnx")), tmp_path / "out.onnx")
    assert _offsets(saved.path) == {"t300": 0, "t20000": 4096, "t301": 84096}


def test_shared_and_overlapping_ranges_are_written_once(tmp_path: Path) -> None:
    """A packed tensor, its slices, one of them twice: as many bytes as the packed tensor."""
    (tmp_path / "out").mkdir()
    loaded = load(packed_model(tmp_path, rows=128))
    packed = loaded.graph.initializers["w"].const_value
    assert packed is not None
    for index in (2, 0, 3):
        _add(loaded, slice_first_axis(packed, index, f"w.{index}"))
    _add(loaded, slice_first_axis(packed, 3, "again"))
    twice = ir.tensor(np.random.default_rng(1).standard_normal(1000))
    for name in ("first", "second"):
        loaded.graph.register_initializer(ir.Value(name=name, const_value=twice))
    saved = save(loaded, tmp_path / "out" / "out.onnx")
    arrays = _arrays(saved.path)
    assert saved.bytes_copied == packed.nbytes + 4 * 128 * 4 + twice.nbytes
    assert {_places(saved.path)[name] for name in ("w", "w.2", "again")} == {"out.data"}
    for name, expected in (("w.2", arrays["w"][2]), ("w.0", arrays["w"][0]), ("again", arrays["w"][3])):
        np.testing.assert_array_equal(arrays[name], expected)
    np.testing.assert_array_equal(arrays["second"], twice.numpy())
    np.testing.assert_array_equal(arrays["w"], packed.numpy())


def test_slices_alone_leave_the_rest_behind(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    loaded = load(packed_model(tmp_path))
    packed = loaded.graph.initializers["w"].const_value
    assert packed is not None
    expected = packed.numpy()[1:3].copy()
    loaded.graph.initializers["w"].const_value = slice_first_axis(packed, 1, "w")
    _add(loaded, slice_first_axis(packed, 2, "v"))
    saved = save(loaded, tmp_path / "out" / "out.onnx")
    assert saved.bytes_copied == 2 * 32 * 16 * 4
    np.testing.assert_array_equal(_arrays(saved.path)["w"], expected[0])
    np.testing.assert_array_equal(_arrays(saved.path)["v"], expected[1])


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_in_is_out(weights: str, tmp_path: Path) -> None:
    """Over and over: the weights stay, and of our own data files only the one in use."""
    path = packed_model(tmp_path)
    expected = _arrays(path)
    for _ in range(3):
        save(load(path), path, weights=weights)  # type: ignore[arg-type]
        for name, array in expected.items():
            np.testing.assert_array_equal(_arrays(path)[name], array)
    own = [name for name in _names(tmp_path) if name.endswith(".data")]
    assert len(own) == (1 if weights == "copy" else 0)
    assert (tmp_path / "in.bin").exists(), "a data file with a name that is not ours is nobody's to remove"


def test_data_of_the_former_output_stays_while_others_name_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    loaded = load(packed_model(tmp_path / "sub"))
    out = tmp_path / "sub" / "out.onnx"
    save(loaded, out, weights="copy")
    neighbour, above = tmp_path / "sub" / "neighbour.onnx", tmp_path / "above.onnx"
    for user in (neighbour, above):
        save(load(out), user, weights="link")
        save(loaded, out, weights="copy")
        assert _names(tmp_path / "sub").count("out.data") == 1
        assert (tmp_path / "sub" / "out.1.data").exists()
        save(load(user), user)
        _arrays(user)
        user.unlink()
        (tmp_path / "sub" / "out.1.data").unlink()
        out.unlink()
        (tmp_path / "sub" / "out.data").unlink()
        save(loaded, out, weights="copy")
    save(loaded, out, weights="copy")
    assert _names(tmp_path / "sub") == ["in.bin", "in.onnx", "out.1.data", "out.onnx"]


def test_weights_inside_the_file_to_be_replaced(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    (tmp_path / "in.bin").rename(tmp_path / "out.onnx")
    for name in ("w", "b"):
        old = loaded.graph.initializers[name].const_value
        assert isinstance(old, ir.ExternalTensor)
        loaded.graph.initializers[name].const_value = ir.ExternalTensor(
            "out.onnx", old.offset, old.length, old.dtype, shape=old.shape, name=name, base_dir=tmp_path
        )
    expected = read_array(loaded.graph.initializers["w"].const_value).copy()  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the output file itself"):
        save(loaded, tmp_path / "out.onnx", weights="link")
    save(loaded, tmp_path / "out.onnx")
    np.testing.assert_array_equal(_arrays(tmp_path / "out.onnx")["w"], expected)


def test_names_of_data_files(tmp_path: Path) -> None:
    (tmp_path / "out.data").write_bytes(b"somebody else's")
    loaded = load(packed_model(tmp_path))
    saved = save(loaded, tmp_path / "out.onnx", weights="copy")
    assert saved.data_path == tmp_path / "out.1.data"
    assert (tmp_path / "out.data").read_bytes() == b"somebody else's"
    saved = save(loaded, tmp_path / "x.data", weights="copy")
    assert saved.data_path == tmp_path / "x.1.data"


def test_the_model_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    value = numpy_helper.from_array(np.ones(9, np.float32), "inner name")
    nodes = [helper.make_node("Constant", [], ["c"], value=external("k", [400], "w.bin"))]
    nodes.append(helper.make_node("Constant", [], ["d"], value=value))
    (tmp_path / "w.bin").write_bytes(bytes(1600))
    loaded = load(write(model([external("w", [400], "w.bin"), value], nodes), tmp_path / "m.onnx"))
    stranger = ir.tensor(np.ones(3), name="another name")
    loaded.graph.register_initializer(ir.Value(name="renamed", const_value=stranger))

    def state() -> list[object]:
        tensors = [value.const_value for value in loaded.graph.initializers.values()]
        attributes = [attribute for node in loaded.graph for attribute in node.attributes.values()]
        return [*tensors, *attributes, *(tensor and tensor.name for tensor in tensors)]

    before = state()
    for weights in ("link", "copy"):
        save(loaded, tmp_path / "out.onnx", weights=weights)  # type: ignore[arg-type]
        save(loaded, tmp_path / "sub" / "out.onnx", weights="copy", size_threshold=0)
        after = state()
        assert all(a is b or a == b for a, b in zip(before, after, strict=True))


def test_external_tensors_in_attributes_move_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    data = np.arange(400, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(data.tobytes())
    tensors = [external("", [400], "w.bin"), external("", [100], "w.bin", 400)]
    nodes = [helper.make_node("Custom", [], ["c"], domain="test", one=tensors[0], several=tensors)]
    loaded = load(write(model([], nodes), tmp_path / "m.onnx"))
    save(loaded, tmp_path / "sub" / "out.onnx")
    again = load(tmp_path / "sub" / "out.onnx").graph[1].attributes
    np.testing.assert_array_equal(again["one"].as_tensor().numpy(), data)
    np.testing.assert_array_equal(again["several"].as_tensors()[1].numpy(), data[100:200])
    assert os.path.getsize(tmp_path / "sub" / "out.data") == data.nbytes


def test_same_bytes_each_time(tmp_path: Path) -> None:
    """Other process, other hash seed: the same two files. Metadata does not grow."""
    tensor = numpy_helper.from_array(np.ones(1000, np.float32), "t")
    small = numpy_helper.from_array(np.ones(2, np.float32), "small")
    for proto in (tensor, small):
        for key in ("b", "a"):
            proto.metadata_props.add(key=key, value=key)
    path = write(model([tensor, small, external("w", [4000], "w.bin")]), tmp_path / "m.onnx")
    (tmp_path / "w.bin").write_bytes(bytes(range(250)) * 64)
    script = f"""
        import sys
        from sparse_onnx.graph.io import load, save
        save(load({str(path)!r}), sys.argv[1], weights="copy")
        save(load(sys.argv[1]), sys.argv[1])
    """
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(folder / "out.onnx")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        found.append([(name, (folder / name).read_bytes()) for name in _names(folder)])
    assert found[0] == found[1]
    saved = onnx.load(tmp_path / "1" / "out.onnx")
    assert [len(tensor.metadata_props) for tensor in saved.graph.initializer] == [2, 2, 0]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("FLOAT16", (33, 7)),
        ("BFLOAT16", (8, 100)),
        ("INT4", (64, 65)),
        ("UINT2", (77, 31)),
        ("FLOAT8E4M3FN", (1200,)),
    ],
)
def test_types(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """In memory -> new file -> copied -> inlined: the same bytes, in every element width."""
    kind = ir.DataType[dtype]
    values = np.random.default_rng(0).integers(0, 2, shape).astype(kind.numpy())
    loaded = load(write(model(), tmp_path / "m.onnx"))
    _add(loaded, ir.Tensor(values, kind, name="t"))
    for out, threshold in (("a.onnx", 0), ("b.onnx", 0), ("c.onnx", 10**6)):
        save(loaded, tmp_path / out, weights="copy", size_threshold=threshold)
        loaded = load(tmp_path / out)
        tensor = loaded.graph.initializers["t"].const_value
        assert tensor is not None and tensor.dtype == kind
        np.testing.assert_array_equal(tensor.numpy().astype(np.float32), values.astype(np.float32))


def test_lazy_tensors_are_evaluated_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []
    peak: list[int] = []

    class Big(np.ndarray):
        def __del__(self) -> None:
            alive.pop()

    def make(value: int) -> ir.Tensor:
        alive.append(1)
        peak.append(len(alive))
        array = np.full(5000, value, np.float32)
        return ir.Tensor(np.ndarray.__new__(Big, (5000,), np.float32, array.tobytes()), ir.DataType.FLOAT)

    loaded = load(write(model(), tmp_path / "m.onnx"))
    for index in range(4):
        _add(
            loaded,
            ir.LazyTensor(
                lambda index=index: make(index), ir.DataType.FLOAT, ir.Shape([5000]), name=f"t{index}"
            ),
        )
    save(loaded, tmp_path / "out.onnx")
    assert len(peak) == 4 and max(peak) == 1
    assert [int(_arrays(tmp_path / "out.onnx")[f"t{index}"][7]) for index in range(4)] == [0, 1, 2, 3]


def test_a_lazy_tensor_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    for size in (999, 1001):
        loaded = load(write(model(), tmp_path / "m.onnx"))
        lazy = ir.LazyTensor(
            lambda size=size: ir.tensor(np.ones(size, np.float32)),
            ir.DataType.FLOAT,
            ir.Shape([1000]),
            name="t",
        )
        _add(loaded, lazy)
        with pytest.raises((ModelError, OutsideError), match=r"more bytes|only 3996 of 4000"):
            save(loaded, tmp_path / "out.onnx")
        assert _names(tmp_path) == ["m.onnx"]


def test_holes_stay_holes(tmp_path: Path) -> None:
    """64 MiB of which two stretches hold data; copied to another offset."""
    (tmp_path / "out").mkdir()
    size = 64 << 20
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(4096 + size)
        for place in (10 << 20, 50 << 20):
            file.seek(place)
            file.write(b"\1" * 10_000)
    if os.stat(tmp_path / "w.bin").st_blocks * 512 > size // 2:
        pytest.skip("this file system has no holes")
    proto = model(
        [external("small", [300], "w.bin", 0, 1200), external("w", [size // 4], "w.bin", 4096, size)]
    )
    saved = save(load(write(proto, tmp_path / "m.onnx")), tmp_path / "out" / "out.onnx")
    assert saved.data_path is not None and saved.bytes_copied == size + 1200
    assert saved.data_path.stat().st_size == size + 4096
    assert saved.data_path.stat().st_blocks * 512 < 1 << 20
    np.testing.assert_array_equal(_arrays(saved.path)["w"], _arrays(tmp_path / "m.onnx")["w"])


def test_copies_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    loaded = load(packed_model(tmp_path, rows=3000))

    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    saved = save(loaded, tmp_path / "out" / "out.onnx")
    np.testing.assert_array_equal(_arrays(saved.path)["w"], _arrays(tmp_path / "in.onnx")["w"])


def test_a_weight_file_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    loaded = load(packed_model(tmp_path))
    os.truncate(tmp_path / "in.bin", 5000)
    for weights in ("auto", "copy"):
        with pytest.raises(ModelError, match="truncated"):
            save(loaded, tmp_path / "out" / "out.onnx", weights=weights)  # type: ignore[arg-type]
    assert _names(tmp_path / "out") == []


def test_an_overlap_that_shrank_is_no_hole(tmp_path: Path) -> None:
    """The first of two overlapping ranges is whole, the second no more: nothing may pass for zeros."""
    (tmp_path / "out").mkdir()
    (tmp_path / "w.bin").write_bytes(b"\1" * 200_000)
    proto = model([external("a", [25_000], "w.bin"), external("b", [25_000], "w.bin", 100_000 - 4)])
    loaded = load(write(proto, tmp_path / "m.onnx"))
    os.truncate(tmp_path / "w.bin", 150_000)
    with pytest.raises((ModelError, OutsideError), match=r"truncated|shorter"):
        save(loaded, tmp_path / "out" / "out.onnx")
    assert _names(tmp_path / "out") == []


def test_usage_errors(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    for path, weights, text in [
        (tmp_path / "absent" / "out.onnx", "auto", "folder that does not exist"),
        (tmp_path, "auto", "is a folder"),
        (tmp_path / "out.onnx", "move", "weights cannot be 'move'"),
    ]:
        with pytest.raises(UsageError, match=text):
            save(loaded, path, weights=weights)  # type: ignore[arg-type]
    assert _names(tmp_path) == ["in.bin", "in.onnx"]


def test_a_graph_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller limit; once found out by adding up sizes, once by serializing."""
    loaded = load(packed_model(tmp_path))
    _add(loaded, ir.tensor(np.ones(1000), name="large"))
    monkeypatch.setattr(save_module, "MAX_PROTO_BYTES", 4000)
    with pytest.raises(ModelError, match="limit is 2 GB"):
        save(loaded, tmp_path / "out.onnx", size_threshold=10**9)
    for index in range(100):
        loaded.graph.append(ir.node("Identity", list(loaded.graph.inputs), name=f"node{index:050}"))
    with pytest.raises(ModelError, match="limit is 2 GB"):
        save(loaded, tmp_path / "out.onnx")
    assert _names(tmp_path) == ["in.bin", "in.onnx"]


def test_permissions_stay(tmp_path: Path) -> None:
    loaded = load(packed_model(tmp_path))
    out = tmp_path / "out.onnx"
    save(loaded, out)
    assert out.stat().st_mode & 0o777 == (tmp_path / "in.onnx").stat().st_mode & 0o777
    out.chmod(0o640)
    save(loaded, out)
    assert out.stat().st_mode & 0o777 == 0o640


def _failing(function: Callable[..., object], at: int, number: int) -> Callable[..., object]:
    calls = [0]

    def wrapped(*arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(number, os.strerror(number))
        return function(*arguments, **named)

    return wrapped


@pytest.mark.parametrize("function", ["copy_file_range", "fsync", "replace", "ftruncate", "fchmod"])
@pytest.mark.parametrize("at", [1, 2])
def test_errors_of_the_system_leave_the_old_model(
    function: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_model(tmp_path, rows=2000)
    out = tmp_path / "out.onnx"
    save(load(path), out, weights="copy")
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    loaded = load(path)
    _add(loaded, ir.tensor(np.ones(5000), name="more"))
    monkeypatch.setattr(os, function, _failing(getattr(os, function), at, 28))
    failed = False
    try:
        save(loaded, out, weights="copy")
    except OutsideError as error:
        failed = True
        assert "No space left" in str(error) and error.exit_code == 1 and error.hint
    monkeypatch.undo()
    if failed:
        assert {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)} == before
    else:
        assert at == 2 and "more" in _arrays(out)


@pytest.mark.parametrize("limit", [0, 1000, 100_000, 300_000])
def test_no_space(limit: int, tmp_path: Path) -> None:
    """The kernel refuses to write beyond `limit` bytes of any file: data by copy, data by numpy, graph."""
    path = packed_model(tmp_path, rows=1000)
    out = tmp_path / "out.onnx"
    loaded = load(path)
    _add(loaded, ir.tensor(np.ones(20_000), name="more"))
    save(load(path), out, weights="link")
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(OutsideError, match="could not be written"):
            save(loaded, out, weights="copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)} == before

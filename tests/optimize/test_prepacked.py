"""Models with packed weights: what is in the files, that sessions use it, and that nothing breaks where they cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, UsageError, VerificationError
from sparse_onnx.graph import datafile, io
from sparse_onnx.optimize import prepacked
from sparse_onnx.optimize.prepacked import save_prepacked
from sparse_onnx.targets import session as sessions

SHAPE = Shape(experts=4, hidden=64, inner=48, separate=True)
VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """A lowered model with weights in one file beside it."""
    source = save_external(layered_model(SHAPE), tmp_path / "neutral.onnx")
    path = tmp_path / "grouped.onnx"
    sparse_onnx.optimize(source, path, form="grouped", weights="copy", verify="none")
    for name in ("neutral.onnx", "neutral.data"):
        (tmp_path / name).unlink()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def entries(path: Path) -> dict[str, list[str]]:
    """What the file says about packed weights, by tensor."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {
        tensor.name: [entry.value for entry in tensor.external_data if entry.key.startswith("prepacked_")]
        for tensor in graph.initializer
    }
    return {name: values for name, values in found.items() if values}


def ranges(path: Path) -> list[tuple[int, int]]:
    """First byte and length of each packed piece."""
    pieces = [
        piece for values in entries(path).values() for value in values for piece in value.split("|")[1:]
    ]
    return [(int(piece.split(";")[0]), int(piece.split(";")[1])) for piece in pieces]


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Changes all entries of a file."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key.startswith("prepacked_"):
                entry.value = change(entry.value)
    onnx.save(proto, path)


def same_answers(one: Path, other: Path, hidden: int = SHAPE.hidden, name: str = "x") -> None:
    first, second = (sessions.create_session(path, threads=1) for path in (one, other))
    for tokens in (0, 1, 7, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, hidden)).astype(np.float32)
        expected, actual = (sessions.run(session, {name: x})[0] for session in (first, second))
        np.testing.assert_array_equal(actual, expected)


def chain(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], path: Path, size: int) -> Path:
    """x [T, size] -> y, with all weights in a file."""
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=64)
    return path


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def integers(inputs: int, outputs: int, bits: int, block: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    blocks = inputs // block
    return {
        "B": rng.integers(0, 256, (outputs, blocks, block * bits // 8), dtype=np.uint8),
        "S": (rng.uniform(0.5, 1.5, outputs * blocks) / (1 << bits)).astype(np.float32),
    }


def n_bits(path: Path, bits: int = 4, accuracy: int = 4, inputs: int = 128, outputs: int = 83) -> Path:
    node = helper.make_node(
        "MatMulNBits", ["x", "B", "S"], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=32, accuracy_level=accuracy,
    )  # fmt: skip
    return chain([node], integers(inputs, outputs, bits), path, inputs)


def test_every_matrix_of_an_expert_is_packed(grouped: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed.onnx"
    written = save_prepacked(io.load(grouped), out)
    names = set(entries(out))
    assert {
        f"layers.{layer}.{role}.{expert}"
        for layer in (0, 1)
        for role in ("gate", "up", "down")
        for expert in range(4)
    } < names
    assert written.weights == len(names) and written.packed_bytes == sum(length for _, length in ranges(out))
    assert written.files.path == out and written.files.data_path == tmp_path / "packed.data"
    assert sorted(contents(tmp_path)) == ["grouped.data", "grouped.onnx", "packed.data", "packed.onnx"]
    same_answers(grouped, out)


def test_the_graph_stays_ours(grouped: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "packed.onnx", tmp_path / "plain.onnx"
    save_prepacked(io.load(grouped), out)
    io.save(io.load(grouped), plain, weights="copy")
    found, expected = (onnx.load(path, load_external_data=False) for path in (out, plain))
    assert any(node.metadata_props for node in found.graph.node)
    for tensor in found.graph.initializer:
        kept = [entry for entry in tensor.external_data if not entry.key.startswith("prepacked_")]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "plain.data"
    assert found == expected
    assert (tmp_path / "packed.data").read_bytes().startswith((tmp_path / "plain.data").read_bytes())


def test_packed_bytes_lie_on_the_lines_of_weights(tmp_path: Path) -> None:
    """ORT up to 1.31 puts them anywhere itself: a kernel that aligns its pointers then crashes or computes another
    thing. Weights of odd sizes come first here, and matrices that are not whole lines."""
    weights = {f"odd{number}": np.arange(1029 + number, dtype=np.uint8) for number in range(3)}
    nodes = [helper.make_node("Cast", [name], [f"{name}.y"], to=TensorProto.FLOAT) for name in weights]
    nodes += [
        helper.make_node("ReduceSum", [f"{name}.y"], [f"{name}.s"], keepdims=0) for name in list(weights)
    ]
    last = "x"
    for number in range(3):
        weights[f"w{number}"] = matrix(75, 75, number)
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Add", [f"m{number}", f"odd{number}.s"], [f"a{number}"]))
        last = f"a{number}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    source = chain(nodes, weights, tmp_path / "in.onnx", 75)
    out = tmp_path / "out.onnx"
    save_prepacked(io.load(source), out, part_bytes=30_000)
    found = ranges(out)
    assert len(found) == 3 and all(first % 64 == 0 for first, _ in found)
    same_answers(source, out, 75)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        Shape(experts=3, hidden=40, inner=72, biases=True),
        Shape(experts=9, hidden=32, inner=64, weight_layout=1),
        Shape(experts=4, hidden=48, inner=96, activation=3, gate_layout=0, biases=True),
    ],
    ids=["separate", "interleaved with biases", "in_out, two groups", "not gated"],
)
def test_blocks_of_all_kinds(shape: Shape, tmp_path: Path) -> None:
    source = save_external(layered_model(shape), tmp_path / "in.onnx")
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    sparse_onnx.optimize(source, plain, form="grouped", verify="none")
    report = sparse_onnx.optimize(source, out, form="grouped", weights="prepacked")
    assert report.verify is not None and report.verify.passed
    assert len(entries(out)) >= 2 * shape.experts
    same_answers(plain, out, shape.hidden)


def test_operators_that_ort_fuses_are_packed_as_they_run(tmp_path: Path) -> None:
    """The key names the operator that a session has after its optimizations."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    source = chain(nodes, {"w": matrix(64, 64), "b": matrix(1, 64)[0]}, tmp_path / "in.onnx", 64)
    save_prepacked(io.load(source), tmp_path / "out.onnx")
    assert [value.split("+")[0] for value in entries(tmp_path / "out.onnx")["w"]] == ["FusedGemm"]
    same_answers(source, tmp_path / "out.onnx", 64)


@pytest.mark.parametrize(("bits", "accuracy"), [(4, 0), (4, 1), (4, 4), (8, 4), (2, 4), (8, 0)])
def test_n_bit_weights(bits: int, accuracy: int, tmp_path: Path) -> None:
    source = n_bits(tmp_path / "in.onnx", bits, accuracy)
    save_prepacked(io.load(source), tmp_path / "out.onnx")
    same_answers(source, tmp_path / "out.onnx", 128)


def test_weights_read_in_branches(tmp_path: Path) -> None:
    out = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"])], "then", [], [out("a", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["c"])], "else", [], [out("c", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["cond"]),
        helper.make_node("If", ["cond"], ["y"], then_branch=body, else_branch=other),
    ]
    weights = {"w": matrix(64, 64), "v": matrix(64, 64, 1), "zero": np.float32(1.5)}
    source = chain(nodes, weights, tmp_path / "in.onnx", 64)
    save_prepacked(io.load(source), tmp_path / "out.onnx", part_bytes=1)
    assert set(entries(tmp_path / "out.onnx")) == {"w", "v"}
    first, second = (sessions.create_session(tmp_path / f"{name}.onnx") for name in ("in", "out"))
    for tokens in (1, 30):
        x = np.random.default_rng(0).standard_normal((tokens, 64)).astype(np.float32)
        np.testing.assert_array_equal(*(sessions.run(session, {"x": x})[0] for session in (first, second)))


def test_parts_give_what_the_whole_gives(grouped: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    save_prepacked(io.load(grouped), tmp_path / "whole.onnx")
    save_prepacked(io.load(grouped), tmp_path / "parts.onnx", part_bytes=40_000, progress=lines.append)
    keys = [
        {name: [value.split("|")[0] for value in values] for name, values in entries(tmp_path / path).items()}
        for path in ("whole.onnx", "parts.onnx")
    ]
    assert keys[0] == keys[1]
    assert sum("packing weights: part" in line for line in lines) > 5
    same_answers(grouped, tmp_path / "parts.onnx")


def test_what_is_stored_is_what_ort_looks_for(tmp_path: Path) -> None:
    """ORT packs a matrix in another way when its scales are not constant: they belong to the same part."""
    source = n_bits(tmp_path / "in.onnx", outputs=96)
    whole = tmp_path / "whole.onnx"
    settings = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": "whole.data",
    }
    sessions.create_session(source, entries=settings, optimized_to=whole)
    save_prepacked(io.load(source), tmp_path / "parts.onnx", part_bytes=1)
    found, expected = (
        {name: [value.split("|")[0] for value in values] for name, values in entries(path).items()}
        for path in (tmp_path / "parts.onnx", whole)
    )
    assert found == expected
    assert bool(found) == (VERSION >= (1, 26)), "which versions store what MatMulNBits packs"


def test_the_output_may_be_the_input(grouped: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    io.save(io.load(grouped), reference / "m.onnx", weights="copy")
    save_prepacked(io.load(grouped), grouped)
    assert sorted(contents(tmp_path)) == ["grouped.1.data", "grouped.onnx"]
    same_answers(reference / "m.onnx", grouped)
    before = contents(tmp_path)
    save_prepacked(io.load(grouped), grouped)
    assert sorted(contents(tmp_path)) == ["grouped.data", "grouped.onnx"]
    assert contents(tmp_path)["grouped.data"] == before["grouped.1.data"], "the same bytes again"


def test_small_models_have_nothing_to_pack(tmp_path: Path) -> None:
    source = chain([helper.make_node("Relu", ["x"], ["y"])], {}, tmp_path / "in.onnx", 4)
    written = save_prepacked(io.load(source), tmp_path / "out.onnx")
    assert written.weights == 0 and written.files.data_path is None
    assert sorted(contents(tmp_path)) == ["in.onnx", "out.onnx"]


def test_what_another_processor_packed_is_passed_over(grouped: Path, tmp_path: Path) -> None:
    """Its bytes are others, hence their hash; they are never looked at."""
    out = tmp_path / "out.onnx"
    save_prepacked(io.load(grouped), out)

    def foreign(value: str) -> str:
        key, rest = value.split("|", 1)
        operator, digits = key.split("+")
        return f"{operator}+{int(digits) ^ 1}|{rest}"

    rewrite(out, foreign)
    with open(tmp_path / "out.data", "r+b") as file:
        for first, length in ranges(out):
            file.seek(first)
            file.write(b"\x7f" * length)
    same_answers(grouped, out)


def test_what_another_kernel_packed_is_passed_over(tmp_path: Path) -> None:
    source, out = n_bits(tmp_path / "in.onnx", accuracy=0), tmp_path / "out.onnx"
    save_prepacked(io.load(n_bits(tmp_path / "other.onnx", accuracy=4)), out)
    proto = onnx.load(out, load_external_data=False)
    [level] = [item for item in proto.graph.node[0].attribute if item.name == "accuracy_level"]
    level.i = 0
    onnx.save(proto, out)
    same_answers(source, out, 128)


@pytest.mark.skipif(VERSION < (1, 32), reason="older versions do not look at the bytes")
def test_damaged_bytes_are_told_in_one_line(grouped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    save_prepacked(io.load(grouped), out)
    first, length = ranges(out)[-1]
    with open(tmp_path / "out.data", "r+b") as file:
        file.seek(first + length // 2)
        file.write(b"\x7f\x01\x02\x03")
    with pytest.raises(ModelError, match="pre-packed weights") as caught:
        sessions.create_session(out)
    assert "\n" not in str(caught.value)
    weights = io.load(out)  # are whole: nothing of ours reads the packed bytes
    sessions.create_session(weights)


@pytest.mark.parametrize("lost", [1, 5000])
def test_a_cut_off_file_is_told_when_it_is_loaded(lost: int, grouped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    save_prepacked(io.load(grouped), out)
    data = tmp_path / "out.data"
    os.truncate(data, data.stat().st_size - lost)
    with pytest.raises(ModelError, match="truncated"):
        io.load(out)


@pytest.mark.parametrize("number", ["-64", "x", "9" * 25, ""])
def test_damaged_places_are_told_when_it_is_loaded(number: str, grouped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    save_prepacked(io.load(grouped), out)
    rewrite(out, lambda value: value.split("|")[0] + f"|{number};64;0")
    with pytest.raises(ModelError, match="is no size"):
        io.load(out)


def test_a_packed_model_is_a_model(grouped: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    save_prepacked(io.load(grouped), out)
    onnx.checker.check_model(out)
    io.save(io.load(out), again, weights="copy")
    assert (tmp_path / "again.data").read_bytes() == (tmp_path / "grouped.data").read_bytes()
    ir.load(out)


def test_the_report_says_what_stays_in_the_file(tmp_path: Path) -> None:
    shape = Shape(experts=4, hidden=128, inner=512, separate=True)
    source = save_external(layered_model(shape), tmp_path / "in.onnx")
    plain = sparse_onnx.optimize(source, tmp_path / "plain.onnx", form="grouped", verify="none")
    [line] = [note for note in plain.notes if note.startswith("resident")]
    assert "6.3 MB of packed weights, copied at creation" in line and "--weights prepacked" in line
    out = tmp_path / "out.onnx"
    report = sparse_onnx.optimize(source, out, form="grouped", weights="prepacked", verify="none")
    [line] = [note for note in report.notes if note.startswith("resident")]
    assert "only weights that are used; 6.3 MB of packed weights stay in the file" in line
    assert report.output is not None and report.output.weight_bytes == plain.output.weight_bytes
    again = sparse_onnx.optimize(out, tmp_path / "again.onnx")
    assert any("packed weights of the input are left out" in note for note in again.notes)
    assert not any("left out" in note for note in report.notes)


def test_another_value_is_refused(tmp_path: Path) -> None:
    source = save_external(layered_model(SHAPE), tmp_path / "in.onnx")
    with pytest.raises(UsageError, match="folder that does not exist"):
        save_prepacked(io.load(source), tmp_path / "nowhere" / "out.onnx")


def failures() -> dict[str, tuple[Callable[[pytest.MonkeyPatch], None], type[Exception], str]]:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    def refused(*_: object, **__: object) -> None:
        raise ModelError("onnxruntime cannot load the model: no")

    return {
        "no space for weights": (
            lambda patch: patch.setattr(datafile, "write", full), OutsideError, "No space left"
        ),
        "no space for the graph": (
            lambda patch: patch.setattr(prepacked.files, "stage", full), OutsideError, "No space left"
        ),
        "interrupted": (
            lambda patch: patch.setattr(prepacked._Packing, "_append", interrupted), KeyboardInterrupt, ""
        ),
        "too many pieces": (
            lambda patch: patch.setattr(prepacked, "_MOST_MAPPINGS", 10), ImpossibleError, "65,530"
        ),
        "does not load": (
            lambda patch: patch.setattr(prepacked, "_require_loading", refused), ModelError, "cannot load"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", failures())
@pytest.mark.parametrize("inplace", [False, True], ids=["OUT", "OUT is IN"])
def test_a_failure_leaves_nothing(
    name: str, inplace: bool, grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, kind, text = failures()[name]
    model = io.load(grouped)
    before = contents(tmp_path)
    fail(monkeypatch)
    with pytest.raises(kind, match=text) as caught:
        save_prepacked(model, grouped if inplace else tmp_path / "out.onnx")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_model_that_ort_cannot_load(tmp_path: Path) -> None:
    node = helper.make_node("NoSuchOperator", ["x", "w"], ["y"])
    source = chain([node], {"w": matrix(64, 64)}, tmp_path / "in.onnx", 64)
    before = contents(tmp_path)
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        save_prepacked(io.load(source), tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def test_bytes_that_ort_does_not_take_back_are_our_fault(
    grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sessions.create_session

    def refusing(*args: object, **options: object) -> object:
        if "optimized_to" not in options:
            raise ModelError("onnxruntime cannot load the model: they do not match")
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sessions, "create_session", refusing)
    with pytest.raises(VerificationError, match="the packed model does not load"):
        save_prepacked(io.load(grouped), tmp_path / "out.onnx")


LIMITED = """
    import resource, signal, sys
    from sparse_onnx.core.errors import OutsideError
    from sparse_onnx.graph import io
    from sparse_onnx.optimize.prepacked import save_prepacked

    model = io.load(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    try:
        save_prepacked(model, sys.argv[2])
    except OutsideError as error:
        print(error)
"""


@linux
@pytest.mark.parametrize("limit", [100_000, 320_000, 598_000], ids=["weights", "ORT's file", "packed bytes"])
def test_a_file_that_cannot_grow(limit: int, grouped: Path, tmp_path: Path) -> None:
    """The weights are 297 kB, ORT's file and ours about 600 kB."""
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), grouped, tmp_path / "out.onnx", str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "could not be written" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert contents(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]


@linux
def test_experts_that_are_never_used_stay_in_the_file(tmp_path: Path) -> None:
    """Of 32 experts 3 are used: the process holds packed copies of all, or little more than it uses."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sparse_onnx.bench import resident

    paths = resident.write(resident.layers(hidden=256, experts=32, inner=512, layers=1), tmp_path)
    weights = 32 * 3 * 256 * 512 * 4 / 2**20
    plain, packed = (
        resident.run(name, paths[name], 1, runs=20) for name in (resident.ORDINARY, resident.PREPACKED)
    )
    assert plain.ran["own"] is not None and plain.ran["own"] > 0.9 * weights
    assert packed.released["own"] is not None and packed.released["own"] < 0.2 * weights

    def saved(state: str) -> float:
        """Of all memory, in which ORT's own code counts too: how much of it lies there is the system's choice."""
        ours, theirs = (getattr(process, state)["all"] for process in (packed, plain))
        return float(theirs - ours)

    assert saved("released") > 0.7 * weights
    if VERSION < (1, 32):
        assert saved("ran") > 0.7 * weights
    table = resident.as_text([plain, packed], [])
    assert len(table.splitlines()) == 4 and resident.PREPACKED in table

"""Traps of memory: which weights ORT packs, holds twice, maps, and reads.

Weights are packed into the layout of MLAS when a session is made, in anonymous memory; the file that they were mapped
from is then let go. Where they are not packed, every product packs them anew, and is up to twice as slow in float32 and
thirty times as slow as MatMulNBits. No test here looks at time: what is not packed is told by its memory.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from ort.graphs import VERSION, session, since

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
HIDDEN, INNER, EXPERTS = 2048, 4096, 8
#: Columns where size does not matter.
NARROW = 64
MEGABYTES = HIDDEN * INNER * 4 / 2**20  # of the weights of each model here: 32
node, info = helper.make_node, helper.make_tensor_value_info

PLAIN: dict[str, Any] = {"session.disable_prepacking": "1"}
ONE_ROW: dict[str, Any] = {"x": [1, HIDDEN], "flag": True}
NO_ROWS = ONE_ROW | {"x": [0, HIDDEN]}


def values(columns: int = INNER) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((HIDDEN, columns)).astype(np.float32)


def weight(folder: Path, columns: int = INNER) -> TensorProto:
    """``[HIDDEN, columns]``, in one file for all models."""
    data = folder / f"weight_{columns}.data"
    if not data.exists():
        values(columns).tofile(data)
    tensor = TensorProto(
        name="w", data_type=FLOAT, dims=[HIDDEN, columns], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=data.name)
    return tensor


def product(output: str) -> NodeProto:
    return node("MatMul", ["x", "w"], [output])


def chosen(
    result: str, inner: NodeProto, own: Sequence[TensorProto] = (), constant: bool = False
) -> NodeProto:
    """`flag ? inner : no rows`."""
    last = inner.output[0]
    other = f"{result}_none"
    nothing = node("Identity", ["nothing"], [other])
    if constant:
        nothing = node(
            "Constant", [], [other], value=numpy_helper.from_array(np.zeros((0, INNER), np.float32))
        )
    rows = [None, None]
    return node(
        "If",
        ["flag"],
        [result],
        then_branch=helper.make_graph([inner], f"{result}_then", [], [info(last, FLOAT, rows)], list(own)),
        else_branch=helper.make_graph([nothing], f"{result}_else", [], [info(other, FLOAT, rows)]),
    )


def looped(result: str, inner: NodeProto) -> NodeProto:
    """The inner node once, as a row of a scan output."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), inner],
        "body",
        [info("i", INT64, []), info("go", BOOL, [])],
        [info("go_on", BOOL, []), info(inner.output[0], FLOAT, [None, None])],
    )
    return node("Loop", ["one", "flag"], [result], body=body)


def stored(folder: Path, name: str, graph: Sequence[NodeProto], *weights: TensorProto) -> Path:
    """x, flag -> y."""
    small = [
        numpy_helper.from_array(np.asarray(1), "one"),
        numpy_helper.from_array(np.zeros((0, INNER), np.float32), "nothing"),
    ]
    made = helper.make_graph(
        list(graph),
        "g",
        [info("x", FLOAT, [None, HIDDEN]), info("flag", BOOL, [])],
        [info("y", FLOAT, None)],
        [*small, *weights],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(made, opset_imports=imports, ir_version=10), path)
    return path


def packed(path: Path) -> Path:
    """The model as ORT saves it with its packed weights."""
    saved = path.with_stem(f"{path.stem}_packed")
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{saved.stem}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
    }
    session(path, saved=saved, entries=entries)
    return saved


def experts(folder: Path) -> Path:
    """One `com.microsoft::MoE`, whose router sends everything to expert 0."""
    inner = HIDDEN * INNER // (EXPERTS * 2 * HIDDEN)
    weights = []
    for name, shape, half in (("fc1", [EXPERTS, inner, HIDDEN], 0), ("fc2", [EXPERTS, HIDDEN, inner], 1)):
        tensor = weight(folder)
        tensor.name = name
        tensor.dims[:] = shape
        tensor.external_data.add(key="offset", value=str(half * HIDDEN * INNER * 2))
        weights.append(tensor)
    logits = numpy_helper.from_array(np.eye(1, EXPERTS, dtype=np.float32) * 9, "logits")
    operator = node("MoE", ["x", "logits", "fc1", "", "fc2"], ["y"], domain="com.microsoft", k=1)
    return stored(folder, "moe", [operator], *weights, logits)


@dataclasses.dataclass(frozen=True)
class Grown:
    """Weights in memory after each step: how many times all of them."""

    anonymous: float
    file: float


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory() as name
    ):  # not tmp_path, which keeps some hundred megabytes for a while
        yield Path(name)


@pytest.fixture(scope="module")
def grown(folder: Path) -> dict[str, list[Grown]]:
    """Of every model here, in one process."""
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, path: Path, *feeds: dict[str, Any], **options: Any) -> None:
        jobs[name] = {"model": str(path), "feeds": feeds or (ONE_ROW,), **options}

    w = weight(folder)
    plain = stored(folder, "plain", [product("y")], w)
    branch = stored(folder, "branch", [chosen("y", product("a"))], w)
    add("plain", plain)
    add("branch", branch)
    add("loop", stored(folder, "loop", [looped("y", product("a"))], w))
    add("if in if", stored(folder, "if_if", [chosen("y", chosen("a", product("b")))], w))
    add("if in loop", stored(folder, "if_loop", [looped("y", chosen("a", product("b")))], w))
    add("inside", stored(folder, "inside", [chosen("y", product("a"), [w])]))
    add("inside inside", stored(folder, "inside2", [chosen("y", chosen("a", product("b"), [w]))]))
    sum_of = node("Add", ["y1", "y2"], ["y"])
    turned = node("Neg", ["x"], ["n"])
    two = [product("y1"), turned, node("MatMul", ["n", "w"], ["y2"]), sum_of]
    add("two products", stored(folder, "two", two, w))
    two[2] = node("Gemm", ["n", "w"], ["y2"])
    add("product and Gemm", stored(folder, "both", two, w))
    add("mapped", plain, NO_ROWS, ONE_ROW, entries=PLAIN)
    add("mapped branch", branch, ONE_ROW | {"flag": False}, ONE_ROW, entries=PLAIN)
    add("operator", experts(folder), {"x": [1, HIDDEN], "flag": True})
    add("plain packed", packed(plain))
    if VERSION >= (1, 31):  # older ones save a branch that ends in an outer constant broken
        add("branch packed", packed(branch))

    listed = folder / "jobs.json"
    listed.write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, str(Path(__file__).with_name("resident.py")), str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [[Grown(*(mb / MEGABYTES for mb in step)) for step in job] for job in json.loads(done.stdout)]
    return dict(zip(jobs, steps, strict=True))


def near(value: float, times: float) -> bool:
    return abs(value - times) < 0.3


@pytest.mark.parametrize("place", ["plain", "branch", "loop"])
def test_weights_of_the_main_graph_are_packed_for_it_and_one_level_below(
    place: str, grown: dict[str, list[Grown]]
) -> None:
    """What `fuse_gating` and one-level branches count on: packed once, and the file is let go."""
    made, ran = grown[place]
    for step in (made, ran):
        assert near(step.anonymous, 1) and near(step.file, 0), (
            f"{place}: weights of the main graph are no longer packed at load, and let go: {grown[place]}. "
            "Forms with weights outside of their branches have lost their speed, or their memory; measure them anew"
        )


@pytest.mark.parametrize("place", ["if in if", "if in loop"])
def test_weights_of_the_main_graph_are_not_packed_two_levels_below(
    place: str, grown: dict[str, list[Grown]]
) -> None:
    """Why branches are one level deep: below, the weights stay as they are in the file."""
    made, ran = grown[place]
    assert near(made.anonymous, 0) and near(made.file, 0) and near(ran.anonymous, 0) and near(ran.file, 1), (
        f"{place}: ORT now packs outer weights at depth two: {grown[place]}. Nested branches are no longer slow: let "
        "the branched form nest (groups of experts, a Loop of branches), and measure it"
    )


@since(1, 31)
@pytest.mark.parametrize("place", ["inside", "inside inside"])
def test_weights_inside_of_a_branch_are_held_twice(place: str, grown: dict[str, list[Grown]]) -> None:
    """Why branches take their weights from the main graph: those of their own are packed, at any depth, and the file
    that they came from is read and kept too."""
    made = grown[place][0]
    assert near(made.anonymous, 1) and near(made.file, 1), (
        f"{place}: ORT now lets go of a branch's own weights once they are packed: {made}. Branches may hold their "
        "weights, and then nest"
    )


def test_a_weight_is_packed_once_for_all_products_of_a_kind(grown: dict[str, list[Grown]]) -> None:
    """One weight may be read by two branches, or by decode and prefill, but by the same operator in both."""
    assert near(grown["two products"][0].anonymous, 1), (
        "a weight is packed once a node: forms that read one weight in two places cost its memory twice"
    )
    assert near(grown["product and Gemm"][0].anonymous, 2), (
        "MatMul and Gemm now share packed weights: a form may mix them on one weight"
    )


def test_no_rows_read_no_weights(grown: dict[str, list[Grown]]) -> None:
    """Why `fuse_gating` needs no If: the product of a cold expert's 0 rows does not touch its weights. And why
    `verify` maps its blocks (`disable_prepacking`): no weight is in memory before an expert runs on it."""
    for name in ("mapped", "mapped branch"):
        made, cold, hot = grown[name]
        assert near(made.anonymous, 0) and near(made.file, 0), f"{name}: weights are read at load: {made}"
        assert near(cold.anonymous, 0) and near(cold.file, 0), f"{name}: 0 rows, or no branch, read: {cold}"
        assert near(hot.anonymous, 0) and near(hot.file, 1), f"{name}: the weights are copied: {hot}"


def test_the_moe_operator_reads_only_the_experts_that_it_runs(grown: dict[str, list[Grown]]) -> None:
    """What the fused form brings in memory: `MoE` packs nothing, and cold experts stay on disk."""
    made, ran = grown["operator"]
    assert near(made.anonymous, 0) and made.file < 0.2, (
        f"com.microsoft::MoE now packs or reads its weights at load: {made}. It may be faster, and holds them all"
    )
    assert near(ran.anonymous, 0) and 0.05 < ran.file < 0.5, f"cold experts are read: {ran}"


@since(1, 32)
@pytest.mark.parametrize("place", ["plain packed", "branch packed"])
def test_packed_weights_from_a_file_are_used_from_it_and_read_whole(
    place: str, grown: dict[str, list[Grown]]
) -> None:
    """What `--weights prepacked` costs: nothing stays packed in anonymous memory, one level down neither. But since ORT
    1.32 all of them are compared with what this processor packs, so that cold experts are in memory too after load
    until `targets.session.release_memory` gives their pages back; ORT 1.31 did not read them, and believed a damaged
    file."""
    made = grown[place][0]
    assert near(made.anonymous, 0), f"{place}: packed weights that were saved are packed again: {made}"
    assert near(made.file, 1), (
        f"{place}: ORT no longer reads all packed weights at load: {made}. release_memory need not page out any more - "
        "if the test of a damaged file below still holds"
    )


@since(1, 32)
def test_a_damaged_file_of_packed_weights_is_refused(folder: Path) -> None:
    """`--weights prepacked` needs no check of its own: bytes that are not what this processor and version packs are
    told at load. (ORT 1.31 computed with them.) The weights themselves are beside them, whole."""
    saved = packed(stored(folder, "damaged", [product("y")], weight(folder, NARROW)))
    spoil(saved)
    with pytest.raises(Exception, match="do not match the buffers generated by the current kernel"):
        session(saved)
    actual = session(saved, entries=PLAIN).run(None, rows())[0]
    np.testing.assert_allclose(actual, rows()["x"] @ values(NARROW), atol=1e-3)


def test_weights_packed_by_another_processor_are_packed_again(folder: Path) -> None:
    """Their key names the operator and a hash of the packed bytes. One that this processor does not make is passed
    over in silence: right, without the gain, and its bytes are not looked at."""
    saved = packed(stored(folder, "foreign", [product("y")], weight(folder, NARROW)))
    proto = onnx.load(saved, load_external_data=False)
    entries = [e for w in proto.graph.initializer for e in w.external_data if e.key == "prepacked_0"]
    assert entries, "packed weights are told in another way; graph/check.py knows the keys prepacked_N"
    for entry in entries:
        operator, rest = entry.value.split("+", 1)
        digits, blobs = rest.split("|", 1)
        entry.value = f"{operator}+{int(digits) ^ 1}|{blobs}"
    onnx.save(proto, saved)
    spoil(saved)
    actual = session(saved).run(None, rows())[0]
    np.testing.assert_allclose(actual, rows()["x"] @ values(NARROW), atol=1e-3)


@since(1, 31)
def test_nested_branches_that_end_in_a_constant_are_saved_broken(folder: Path) -> None:
    """What a save by ORT with external weights (`--weights prepacked`) trips over: a Constant becomes an initializer of
    its branch that is an output too, and two levels down its name is there twice. An Identity of an outer constant,
    which the lowerings write, is saved right."""

    def saved(constant: bool) -> Path:
        inner = chosen("a", product("b"), constant=constant)
        graph = [chosen("y", inner, constant=constant)]
        return packed(stored(folder, f"nested_{constant}", graph, weight(folder, NARROW)))

    with pytest.raises(Exception, match="single static assignment"):
        session(saved(constant=True))
    session(saved(constant=False))


def spoil(saved: Path) -> None:
    """Overwrites the end of the packed weights, which are behind all others."""
    with open(saved.with_suffix(".data"), "r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(range(256)) * 4)


def rows() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((3, HIDDEN)).astype(np.float32)
    return {"x": x, "flag": np.asarray(True)}

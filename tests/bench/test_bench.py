"""`bench` on small models: every row, comparable inputs, no assertion about time itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Shape, layered_model, save_external
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.bench.api import bench
from sparse_onnx.cli import main
from sparse_onnx.core.errors import ModelError, UsageError
from sparse_onnx.core.report import BenchModel


@pytest.fixture(autouse=True)
def no_subprocess(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Memory has its own test; a process a model and test would take most of the time."""
    monkeypatch.setattr("sparse_onnx.bench.memory.measure", lambda path, *_: BenchModel(str(path), 0.5, 1.0))


def chain(
    path: Path,
    length: int,
    *,
    name: str = "x",
    dims: tuple = ("T", 16),
    dtype: int = TensorProto.FLOAT,
    scale: int = 1,
) -> Path:
    """`length` matrix products in a row, each by `scale`."""
    weight = scale * np.eye(16, dtype=helper.tensor_dtype_to_np_dtype(dtype))
    nodes = [helper.make_node("MatMul", [f"h{n}" if n else name, "w"], [f"h{n + 1}"]) for n in range(length)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, dtype, dims)],
        [helper.make_tensor_value_info(f"h{length}", dtype, dims)],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_every_model_and_token_count_has_a_row(tmp_path: Path) -> None:
    paths = [chain(tmp_path / f"{length}.onnx", length) for length in (1, 3, 2)]
    lines: list[str] = []
    report = bench(paths, tokens=(1, 8), threads=1, rounds=5, progress=lines.append)
    record = report.bench
    assert record is not None and (record.threads, record.rounds) == (1, 5)
    assert [(row.tokens, row.model) for row in record.rows] == [
        (n, str(path)) for n in (1, 8) for path in paths
    ]
    for row in record.rows:
        assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms and math.isfinite(row.ratio_to_first)
        assert row.model != str(paths[0]) or row.ratio_to_first == 1
    assert [model.model for model in record.models] == [str(path) for path in paths]
    assert report.model is not None and report.model.path == str(paths[0]) and lines[-1] == "8 tokens"


def test_a_model_of_blocks(tmp_path: Path) -> None:
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    record = bench([path], tokens=[4], rounds=2).bench
    assert record is not None and len(record.rows) == 1


def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collects the shapes that the sessions are fed."""
    from sparse_onnx.targets import session

    seen: list[tuple[int, ...]] = []
    run: Callable = session.run

    def watch(created: object, feeds: dict[str, np.ndarray], name: str = "") -> list[np.ndarray]:
        seen.extend(array.shape for array in feeds.values())
        return run(created, feeds, name)

    monkeypatch.setattr(session, "run", watch)
    return seen


@pytest.mark.parametrize(
    ("dims", "fed"), [(("T", 16), (9, 16)), (("batch", "sequence", 16), (1, 9, 16)), ((2, 5, 16), (2, 5, 16))]
)
def test_a_token_count_is_rows_or_one_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: tuple, fed: tuple[int, ...]
) -> None:
    path = chain(tmp_path / "m.onnx", 1, dims=dims)
    seen = sizes(monkeypatch)
    report = bench([path], tokens=[9], rounds=1)
    assert set(seen) == {fed}
    assert bool(report.notes) == all(isinstance(size, int) for size in dims)


def test_inputs_of_other_names_are_matched_by_order(tmp_path: Path) -> None:
    paths = [chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 1, name="tokens")]
    record = bench(paths, tokens=[2], rounds=1).bench
    assert record is not None and len(record.rows) == 2


@pytest.mark.parametrize("other", [{"dims": ("B", "S", 16)}, {"dtype": TensorProto.DOUBLE}])
def test_inputs_that_do_not_match_are_a_usage_error(tmp_path: Path, other: dict) -> None:
    paths = [chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 1, name="tokens", **other)]
    with pytest.raises(UsageError, match="takes other inputs"):
        bench(paths, tokens=[2], rounds=1)
    result = CliRunner().invoke(main, ["bench", *map(str, paths), "--tokens", "2", "--rounds", "1", "-q"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_another_number_of_inputs_is_a_usage_error(tmp_path: Path) -> None:
    first = chain(tmp_path / "a.onnx", 1)
    graph = helper.make_graph(
        [helper.make_node("Sum", ["p", "q", "r"], ["y"])],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", 16]) for name in "pqr"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(UsageError, match="3 instead of 1"):
        bench([first, tmp_path / "b.onnx"], tokens=[2], rounds=1)


def test_models_of_other_answers_are_timed_with_a_note(tmp_path: Path) -> None:
    same, other = chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 1, scale=2)
    report = bench([same, chain(tmp_path / "c.onnx", 2), other], tokens=[2, 3], rounds=1)
    assert report.bench is not None and len(report.bench.rows) == 6
    [note] = report.notes
    assert note.startswith(f"{other} differs from {same}: relative error")


def test_nothing_to_measure() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        bench([])


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 1)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(ModelError):
        bench([path], tokens=[1], rounds=1)


def test_the_command(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 1)
    result = CliRunner().invoke(main, ["bench", str(path), str(path), "--tokens", "1,3", "--rounds", "2"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(str(path)) == 1 + 2 * 2 + 2 and "ratio to first" in result.stdout


def test_the_package_is_the_function(tmp_path: Path) -> None:
    assert sparse_onnx.bench([chain(tmp_path / "m.onnx", 1)], tokens=[1], rounds=1).command == "bench"

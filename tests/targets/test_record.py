from __future__ import annotations

import dataclasses

import onnxruntime
import pytest

from sparse_onnx import targets
from sparse_onnx.core.errors import OutsideError
from sparse_onnx.targets import probe
from sparse_onnx.targets import profile as profiles
from sparse_onnx.targets.profile import FormResult, Operator
from sparse_onnx.targets.record import Record, drift


def record(**changes: object) -> Record:
    operators = {"TopK": Operator(("float32",), "probe"), "If": Operator((), "probe", 'bool fails: "no"\\')}
    results = {"gathered:index=int32": FormResult(True, True, False, ("MatMul",))}
    return dataclasses.replace(Record("webgpu", "onnxruntime 1", operators, results), **changes)


def test_what_is_written_is_read() -> None:
    base = 'name="w"\nprovider="W"\nsummary=""\nonnxruntime=""\nforms=["dense"]\ndtypes=[]\n[provenance]\n'
    read = profiles.read(base, record().text())
    assert read.operators == record().operators and read.results == record().results
    assert "onnxruntime 1" in read.sources["probe"] and drift(read, record()) == []


def test_drift_is_told() -> None:
    base = 'name="w"\nprovider="W"\nsummary=""\nonnxruntime=""\nforms=["dense"]\ndtypes=[]\n[provenance]\n'
    read = profiles.read(base, record().text())
    changed = record(
        operators={"TopK": Operator(("float32", "int64"), "probe"), "Loop": Operator((), "probe")},
        results={"gathered:index=int32": FormResult(True, True, True)},
    )
    assert drift(read, changed) == [
        "TopK: the profile says float32, the probe float32, int64",
        "Loop: the profile says nothing, the probe no type",
        "form gathered:index=int32: the profile says runs, right, not whole: MatMul, the probe runs, right, whole",
    ]


def test_a_record_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError, match="cannot be written"):
        record().write(tmp_path / "file" / "webgpu.toml")


def test_probes_run_here_and_ask_about_one_node() -> None:
    """Each on the CPU provider, without rewrites; `probe` names the node of that operator."""
    asked = {}
    for key, dtype, model in probe.models():
        asked.setdefault(key, []).append(dtype)
        (node,) = (node for node in model.graph.node if node.name == probe.PROBE)
        assert node.op_type == key.partition("(")[0].rpartition(".")[2]
    assert {"TopK", "ScatterND(add)", "Split(runtime)", "If", "com.microsoft.MoE"} <= set(asked)
    found = probe.operators([probe.Found("TopK", "float32", True), probe.Found("TopK", "int64", False, "no")])
    assert found == {"TopK": Operator(("float32",), "probe", "int64 no")}


def test_the_cpu_is_probed_as_its_profile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if onnxruntime.__version__ not in targets.get("cpu").sources["probe"]:
        pytest.skip(f"the profile is of another onnxruntime than {onnxruntime.__version__}")
    few = [each for each in probe.models() if each[0] in ("TopK", "Reshape", "If", "Where", "ScatterND(add)")]
    monkeypatch.setattr(probe, "models", lambda: iter(few))
    found = probe.operators(probe.probe(targets.get("cpu")))
    profile = targets.get("cpu").operators
    assert {key: entry.types for key, entry in found.items()} == {key: profile[key].types for key in found}

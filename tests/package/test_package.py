from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper

import sparse_onnx
from sparse_onnx.cli import main
from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, UsageError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.package import manifest, smoke
from sparse_onnx.targets import places

SHAPE = Shape(experts=6, hidden=32, inner=48, biases=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    return save_external(layered_model(SHAPE), tmp_path / "from" / "in.onnx")


def read(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def plain_model(*nodes: object, inputs: int = 4) -> ir.Model:
    """`x` [T, inputs] -> `y`."""
    graph = helper.make_graph(
        list(nodes),
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_the_folder_is_whole_and_says_what_is_in_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = sparse_onnx.package(source, out)
    assert report.verify is not None and report.verify.passed and report.blocks[0].form == "grouped"
    found = read(out)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(found["files"]) == files - {"manifest.json", "run.py", "run.mjs", "run.cc"}
    for name, known in found["files"].items():
        content = (out / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (known["bytes"], known["sha256"])
    assert found["onnxruntime"]["minimum"] == "1.24" and found["target"] == "cpu"
    assert found["inputs"] == [{"name": "x", "type": "float32", "shape": ["T", 32]}]
    weights = ir.load(out / "model.onnx").graph.initializers
    assert found["memory"]["weight_bytes"] == report.output.weight_bytes and weights
    assert 0 < found["memory"]["packed_bytes"] < found["memory"]["weight_bytes"]
    assert [each["name"] for each in found["variants"]] == ["default"]
    assert left_in(tmp_path) == ["from", "out"]


def test_the_raw_arrays_are_those_of_the_npz_and_of_the_original(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparse_onnx.package(source, out)
    kept = read(out)["smoke"]
    with np.load(out / kept["arrays"]) as arrays:
        for kind in ("input", "output"):
            for at, item in enumerate(kept[f"{kind}s"]):
                raw = np.fromfile(out / item["file"], np.dtype(item["type"]).newbyteorder("<"))
                np.testing.assert_array_equal(raw.reshape(item["shape"]), arrays[f"{kind}_{at}"])
        expected = smoke.outputs_of(source, {"x": arrays["input_0"]})
        assert smoke.error(arrays["output_0"], expected[0]) < 1e-5
    lines = [line for line in (out / "manifest.txt").read_text().splitlines() if line.startswith("input ")]
    assert lines == ["input float32 2 4 32 smoke/input_0.bin x"]


def test_variants_share_the_weights(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparse_onnx.package(source, out, forms=["grouped", "branched", "gathered"])
    variants = read(out)["variants"]
    assert [(each["name"], each["forms"]) for each in variants] == [
        ("grouped", ["grouped"]),  # which the profile takes anyway: one file
        ("branched", ["branched"]),
        ("gathered", ["gathered"]),
    ]
    assert [each["data"] for each in variants] == [["model.data"]] * 3
    assert left_in(out).count("model.data") == 1 and not list(out.glob("model.*.data"))
    assert [each["tokens"] for each in read(out)["smoke"]["timing"]] == [1, 64]


def test_all_variants_leave_out_what_the_model_cannot_have(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sparse_onnx.package(source, out, all_forms=True)
    assert {form for each in read(out)["variants"] for form in each["forms"]} == {
        *("grouped", "fused", "branched", "gathered", "dense")
    }
    model = plain_model(helper.make_node("Relu", ["x"], ["y"]))
    io.save(model, tmp_path / "plain.onnx")
    report = sparse_onnx.package(tmp_path / "plain.onnx", tmp_path / "plain", all_forms=True)
    assert len(read(tmp_path / "plain")["variants"]) == 1
    assert any("no block of the model can have the form 'fused'" in note for note in report.notes)
    with pytest.raises(ImpossibleError, match="no block of the model can have the form 'dense'"):
        sparse_onnx.package(tmp_path / "plain.onnx", tmp_path / "other", forms=["dense"])
    assert not (tmp_path / "other").exists()


def test_a_lowered_model_is_shipped_as_it_is(source: Path, tmp_path: Path) -> None:
    sparse_onnx.optimize(source, source.parent / "dense.onnx", form="dense")
    report = sparse_onnx.package(source.parent / "dense.onnx", tmp_path / "out")
    assert [block.form for block in report.blocks] == ["dense", "dense"]
    assert not any("lowered" in note for note in report.notes)


def test_packed_weights_are_kept(source: Path, tmp_path: Path) -> None:
    packed = source.parent / "packed.onnx"
    sparse_onnx.optimize(source, packed, weights="prepacked")
    sparse_onnx.package(packed, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == packed.read_bytes()
    assert b"prepacked_0" in packed.read_bytes()


@pytest.mark.parametrize("target", ["cpu", "ort-mobile"])
def test_what_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    real = smoke.outputs_of
    monkeypatch.setattr(smoke, "outputs_of", lambda *a, **k: [array + 0.1 for array in real(*a, **k)])
    with pytest.raises(VerificationError, match=r"output 'y' is off by 0\.\d+, and 0.001 is allowed"):
        sparse_onnx.package(source, tmp_path / "out", target=target)
    assert left_in(tmp_path) == ["from"]


def test_the_folder_must_be_free(source: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    sparse_onnx.package(source, taken)  # an empty one is
    before = left_in(taken)
    with pytest.raises(UsageError, match="not empty"):
        sparse_onnx.package(source, taken)
    with pytest.raises(UsageError, match="is a file"):
        sparse_onnx.package(source, source)
    with pytest.raises(UsageError, match="does not exist"):
        sparse_onnx.package(source, tmp_path / "no" / "where")
    assert left_in(taken) == before


def test_a_folder_that_is_filled_meanwhile_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", manifest.write

    def write(*arguments: object) -> None:
        real(*arguments)
        out.mkdir()
        (out / "mine").write_text("kept")

    monkeypatch.setattr(manifest, "write", write)
    with pytest.raises(OutsideError, match="cannot be written"):
        sparse_onnx.package(source, out)
    assert left_in(out) == ["mine"] and left_in(tmp_path) == ["from", "out"]


def test_wrong_requests(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown target"):
        sparse_onnx.package(source, out, target="toaster")
    with pytest.raises(UsageError, match="form"):
        sparse_onnx.package(source, out, forms=["round"])
    with pytest.raises(ModelError):
        sparse_onnx.package(tmp_path / "none.onnx", out)
    with pytest.raises(ImpossibleError, match="runs graphs of fixed sizes alone, and 'T' is open") as caught:
        sparse_onnx.package(source, out, target="qnn-htp")
    assert "--static T=1" in caught.value.hint and left_in(tmp_path) == ["from"]


def test_a_model_without_determined_outputs_is_refused(tmp_path: Path) -> None:
    noise = helper.make_node("RandomNormalLike", ["x"], ["noise"])
    io.save(plain_model(noise, helper.make_node("Add", ["x", "noise"], ["y"])), tmp_path / "in.onnx")
    with pytest.raises(ImpossibleError, match="no smoke input"):
        sparse_onnx.package(tmp_path / "in.onnx", tmp_path / "out")


def test_tokenizer_and_configuration_come_along(source: Path, tmp_path: Path) -> None:
    (source.parent / "tokenizer.json").write_text("{}")
    config = {"model": {"decoder": {"filename": "in.onnx"}}}
    (source.parent / "genai_config.json").write_text(json.dumps(config))
    sparse_onnx.package(source, tmp_path / "one")
    kept = json.loads((tmp_path / "one" / "genai_config.json").read_text())
    assert kept["model"]["decoder"]["filename"] == "model.onnx"
    assert {"tokenizer.json", "genai_config.json"} <= set(read(tmp_path / "one")["files"])
    config["model"]["vision"] = {"filename": "vision.onnx"}
    (source.parent / "genai_config.json").write_text(json.dumps(config))
    report = sparse_onnx.package(source, tmp_path / "two")
    assert not (tmp_path / "two" / "genai_config.json").exists()
    assert any("it names vision.onnx too" in note for note in report.notes)


def test_ort_files_and_the_operators_that_a_build_needs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = sparse_onnx.package(source, out, target="ort-mobile", forms=["branched"])
    assert not list(out.glob("*.onnx")) and not list(out.glob("*.data"))
    assert [each["model"] for each in read(out)["variants"]] == ["model.ort", "model.branched.ort"]
    assert report.output is not None and report.output.path == str(out / "model.ort")
    operators = (out / "required_operators.config").read_text()
    assert re.search(r"^ai\.onnx;\d+;.*TopK", operators, re.MULTILINE) and str(tmp_path) not in operators


def test_without_kernels_it_says_so(
    thresholded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_ONNX_KERNELS", str(tmp_path / "none.so"))
    report = sparse_onnx.package(thresholded, tmp_path / "out")
    assert read(tmp_path / "out")["kernels"] is None
    assert any("without the native kernels" in note for note in report.notes)


def test_the_least_version_is_the_strictest() -> None:
    assert manifest.minimum([">=1.24", "onnxruntime>=1.31"]) == "1.31"
    assert manifest.minimum([">=1.9", ""]) == "1.9" and manifest.minimum([">=1.9", ">=1.10"]) == "1.10"
    with pytest.raises(ImpossibleError, match="no range"):
        manifest.minimum([">=1.24", "<2"])


def test_what_the_model_needs_is_in_the_manifest(source: Path, tmp_path: Path) -> None:
    model = io.load(source)
    model.metadata_props["sparse_onnx.requires"] = "onnxruntime>=1.31"
    io.save(model, source.parent / "newer.onnx")
    sparse_onnx.package(source.parent / "newer.onnx", tmp_path / "out")
    assert read(tmp_path / "out")["onnxruntime"]["minimum"] == "1.31"


@pytest.mark.parametrize(
    ("got", "want", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1.0, np.inf], [2.0, np.inf], 0.5),
        ([1.0, np.nan], [2.0, np.inf], np.inf),
        ([1.0, np.nan], [1.0, 1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_error(got: list[float], want: list[float], expected: float) -> None:
    assert smoke.error(np.array(got, np.float32), np.array(want, np.float32)) == expected
    assert smoke.error(np.array([1, 2]), np.array([1, 3])) == np.inf


def test_a_target_that_is_not_here_is_told(source: Path, tmp_path: Path) -> None:
    if places.place(sparse_onnx.targets.get("cuda")) is not None:
        pytest.skip("CUDA is here")
    report = sparse_onnx.package(source, tmp_path / "out", target="cuda")
    assert read(tmp_path / "out")["providers"]["python"] == ["CUDAExecutionProvider"]
    assert any("CUDAExecutionProvider is not on this machine" in note for note in report.notes)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["package", str(source), str(out), "--variant", "branched", "-q", "--json", "-"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["output"]["path"] == str(out / "model.onnx")
    with pytest.raises(SystemExit) as ended:
        main(["package", str(source), str(out), "-q"])
    assert ended.value.code == 2 and "is a folder that is not empty" in capsys.readouterr().err

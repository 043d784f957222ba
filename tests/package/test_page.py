"""The page of a package: what it is written for, and what it does in a real browser, where one is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper

import sparse_onnx
from sparse_onnx.bench.page import browse
from sparse_onnx.cli import main
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.graph import io
from sparse_onnx.package import page as pages
from sparse_onnx.targets import runtimes
from sparse_onnx.targets.session import create_session, run

PROMPT = 'The "with" statement – '


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "byte.onnx"
    sparse_onnx.export("zoo:byte-moe", path)
    return path


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    out = source.parent / "out"
    sparse_onnx.package(source, out, target="wasm")
    return out


@pytest.fixture(scope="module")
def lowered(made: Path) -> Path:
    """It is packaged as it is, which is quicker."""
    folder = made.parent / "lowered"
    folder.mkdir()
    for name in ("model.onnx", "model.data"):
        shutil.copyfile(made / name, folder / name)
    return folder / "model.onnx"


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "package"))


@pytest.fixture
def browser() -> None:
    for name in ("chromium", "wasm"):
        runtime = runtimes.get(name)
        if not runtime.installed:
            pytest.skip(
                f"{runtime.versions} is not installed: python -m sparse_onnx.targets.runtimes install {name}"
            )


def read(package: Path) -> dict[str, Any]:
    return json.loads((package / "manifest.json").read_text())


def greedy(path: Path, prompt: bytes, length: int) -> tuple[bytes, list[np.ndarray]]:
    """The text, and of a run over all of it the choices of each layer, from a model that gives them too."""
    session = create_session(path)
    ids = list(prompt)
    while True:
        scores, *chosen = run(session, {"input_ids": np.array([ids], np.int64)})
        if len(ids) == len(prompt) + length:
            return bytes(ids[len(prompt) :]), chosen
        ids.append(int(np.argmax(scores[0, -1])))


def with_choices(source: Path, path: Path) -> Path:
    """The model as it was exported, in no form, with the inputs of its blocks among the outputs."""
    model = io.load(source)
    blocks = [node for node in model.graph if node.op_type in ("MoE", "GatedMoE")]
    model.graph.outputs.extend(node.inputs[1] for node in blocks)
    io.save(model, path)
    return path


def test_the_pages_graph_is_the_packaged_one_with_more_outputs(made: Path) -> None:
    model, page = ir.load(made / "model.onnx"), ir.load(made / "page.onnx")
    count = len(model.graph.outputs)
    assert [value.name for value in page.graph.outputs][:count] == [v.name for v in model.graph.outputs]
    added = page.graph.outputs[count:]
    assert [value.name for value in added] == [each["output"] for each in read(made)["page"]["experts"]]
    for graph in (model.graph, page.graph):
        del graph.outputs[count:]
    one, two = (ir.to_proto(each).graph for each in (model, page))
    assert one.node == two.node and one.initializer == two.initializer and one.output == two.output
    assert read(made)["page"]["data"] == read(made)["variants"][0]["data"] == ["model.data"]


def test_the_other_outputs_do_not_change_and_the_choices_are_those_of_the_export(
    made: Path, source: Path, tmp_path: Path
) -> None:
    feeds = {"input_ids": np.random.default_rng(0).integers(0, 256, (1, 50))}
    plain = run(create_session(made / "model.onnx"), feeds)
    paged = run(create_session(made / "page.onnx"), feeds)
    np.testing.assert_array_equal(paged[0], plain[0])
    exported = run(create_session(with_choices(source, tmp_path / "choices.onnx")), feeds)[1:]
    assert len(exported) == len(paged) - 1 == 4
    for one, two in zip(paged[1:], exported, strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(two))


def test_the_manifest_names_blocks_and_the_runtime(made: Path) -> None:
    found = read(made)
    assert [(each["block"], each["experts"], each["top_k"]) for each in found["page"]["experts"]] == [
        (f"layers.{layer}.moe.experts", 8, 2) for layer in range(4)
    ]
    assert found["page"]["runtime"]["version"] in runtimes.get("wasm").versions
    assert all((made / name).is_file() and name not in found["files"] for name in pages.FILES)
    shipped = {name for name in found["files"] if name.startswith("onnxruntime-web/")}
    named = {found["page"]["runtime"][kind] for kind in ("module", "wasm")}
    assert shipped == (named if runtimes.get("wasm").installed else set())


def test_without_onnxruntime_web_it_says_which_files_are_missing(
    lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runtimes.FOLDER_VARIABLE, str(tmp_path / "none"))
    report = sparse_onnx.package(lowered, tmp_path / "out", target="wasm")
    note = next(note for note in report.notes if note.startswith("onnxruntime-web"))
    assert "ort.wasm.bundle.min.mjs and ort-wasm-simd-threaded.wasm" in note
    assert (tmp_path / "out" / "index.html").is_file() and not (tmp_path / "out" / "onnxruntime-web").exists()


def test_only_a_browsers_target_has_one_and_only_if_it_is_not_refused(lowered: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="target 'cpu' does not") as caught:
        sparse_onnx.package(lowered, tmp_path / "out", page=True)
    assert caught.value.hint == "--target wasm or webgpu"
    sparse_onnx.package(lowered, tmp_path / "cpu")
    sparse_onnx.package(lowered, tmp_path / "out", target="wasm", page=False)
    for folder in ("cpu", "out"):
        assert not (tmp_path / folder / "index.html").exists() and read(tmp_path / folder)["page"] is None


def reason(source: Path, folder: Path) -> str:
    """Why there is no page, said alike in a note and as an error."""
    report = sparse_onnx.package(source, folder / "without", target="wasm")
    assert (
        not (folder / "without" / "index.html").exists() and not (folder / "without" / "page.onnx").exists()
    )
    with pytest.raises(ImpossibleError) as caught:
        sparse_onnx.package(source, folder / "with", target="wasm", page=True)
    assert not (folder / "with").exists()
    notes = [note for note in report.notes if note.startswith("without a page")]
    assert notes and notes[0].partition(": ")[2] == caught.value.message.partition(": ")[2]
    return notes[0].partition(": ")[2]


def language_model(words: int, *sizes: object, ids: int = TensorProto.INT64) -> ir.Model:
    """Scores out of a table, no block."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [words, words], np.eye(words).ravel())
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["scores"])],
        "table",
        [helper.make_tensor_value_info("ids", ids, list(sizes))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [*sizes, words])],
        [table],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (language_model(256, "batch", "sequence"), "no block tells which experts each token takes: "),
        (language_model(300, "batch", "sequence"), "vocabulary of 300"),
        (language_model(256, "batch", 8), "fixed size"),
        (language_model(256, 2, "sequence"), "fixed size"),
        (language_model(256, "tokens"), "does not take token ids [batch, sequence]"),
    ],
)
def test_models_that_it_cannot_run(model: ir.Model, expected: str, tmp_path: Path) -> None:
    io.save(model, tmp_path / "in.onnx")
    assert expected in reason(tmp_path / "in.onnx", tmp_path)


def test_layers_alone_have_none(tmp_path: Path) -> None:
    source = save_external(layered_model(Shape(experts=6, hidden=32, inner=48)), tmp_path / "in.onnx")
    assert reason(source, tmp_path) == "'x' does not take token ids [batch, sequence]"


def test_a_tokenizer_is_not_ignored(lowered: Path, tmp_path: Path) -> None:
    for path in lowered.parent.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "it has a tokenizer.json" in reason(tmp_path / lowered.name, tmp_path)


def test_what_is_not_the_choice_of_experts_is_not_shown(
    lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names come from the model's metadata, which other tools can make wrong; and blocks may run on some tokens."""
    right, seen = pages._in_range, []
    monkeypatch.setattr(
        pages, "_in_range", lambda *given: seen.append(given) or (len(seen) > 1 and right(*given))
    )
    report = sparse_onnx.package(lowered, tmp_path / "some", target="wasm")
    assert (
        "does not show the experts of layers.0.moe.experts: what it chooses is not for each token"
        in "".join(report.notes)
    )
    shown = json.loads((tmp_path / "some" / "manifest.json").read_text())["page"]["experts"]
    assert [each["block"] for each in shown] == [f"layers.{at}.moe.experts" for at in (1, 2, 3)]
    monkeypatch.setattr(pages, "_in_range", lambda chosen, experts: False)
    report = sparse_onnx.package(lowered, tmp_path / "none", target="wasm")
    assert "no block tells which experts each token takes" in "".join(report.notes)
    assert not (tmp_path / "none" / "page.onnx").exists() and not (tmp_path / "none" / "index.html").exists()
    with pytest.raises(ImpossibleError, match="no block tells"):
        sparse_onnx.package(lowered, tmp_path / "asked", target="wasm", page=True)
    assert not (tmp_path / "asked").exists()


def test_the_command(lowered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["package", str(lowered), str(tmp_path / "out"), "--page", "-q"])
    assert ended.value.code == 2 and "--target wasm or webgpu" in capsys.readouterr().err


def test_it_generates_what_python_generates_and_shows_pythons_experts(
    package: Path, source: Path, tmp_path: Path, browser: None
) -> None:
    told = browse(package, prompt=PROMPT, length=40, keys=["End"])
    text, chosen = greedy(with_choices(source, tmp_path / "choices.onnx"), PROMPT.encode(), 40)
    assert (
        told["console"] == [] and not told["wrong"] and told["loaded"].startswith("Ready: 7.9 MB of weights")
    )
    assert (
        told["text"] == PROMPT + text.decode("utf-8", "replace") and told["status"] == "Done after 40 bytes."
    )
    total = len(PROMPT.encode()) + 40
    want = [[sorted(layer[token].tolist()) for layer in chosen] for token in range(total)]
    assert [[sorted(cells) for cells in row] for row in told["experts"]] == want
    assert told["speed"].startswith("40 bytes, ") and told["spoken"][3][0] == "space"
    assert told["detail"].startswith(f"Byte {total}, ") and str(chosen[0][-1][0]) in told["detail"]
    assert len({address.split("/")[2] for address in told["requests"]}) == 1, "something from elsewhere"


def test_it_can_be_stopped_and_fits_a_phone(package: Path, browser: None) -> None:
    told = browse(package, prompt="def ", length=1000, stop=3, width=360, height=740, scheme="dark")
    made = len(told["experts"]) - 4
    assert 3 <= made < 1000 and told["status"] == f"Stopped after {made} bytes." and told["console"] == []
    assert all(len(row) == 4 and all(row) for row in told["experts"]) and told["overflow"] <= 0


def flip(path: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_one_line_on_the_page(package: Path, browser: None) -> None:
    flip(package / "model.data")
    told = browse(package, prompt="a")
    damaged = "model.data is damaged: its sha256 is not that of manifest.json; copy it again"
    assert told["wrong"] and told["status"] == damaged and "text" not in told
    assert told["console"] == []


@pytest.mark.slow
def test_other_damage(package: Path, browser: None) -> None:
    def status() -> str:
        told = browse(package)
        assert told["wrong"]
        return told["status"]

    (package / "page.onnx").write_bytes(b"")
    assert status().startswith("page.onnx has 0 bytes instead of ")
    (package / "page.onnx").unlink()
    assert status() == "page.onnx is missing: copy the package again"
    shutil.rmtree(package / "onnxruntime-web")
    assert status().startswith("onnxruntime-web is not here: put ort.wasm.bundle.min.mjs and ")
    (package / "manifest.json").write_text("{")
    assert status().startswith("manifest.json cannot be read: ")
    (package / "manifest.json").unlink()
    assert status() == "manifest.json is missing: copy the package again"


@pytest.mark.slow
def test_on_webgpu(lowered: Path, tmp_path: Path, browser: None) -> None:
    """The browser's own software renderer. The form is the CPU's: the other one takes minutes there."""
    sparse_onnx.package(lowered, tmp_path / "out", target="webgpu")
    told = browse(tmp_path / "out", prompt="def ", length=4)
    assert told["console"] == [] and not told["wrong"], told["status"]
    assert " on webgpu; " in told["loaded"] and told["status"] == "Done after 4 bytes."
    assert len(told["experts"]) == 8 and all(len(layer) == 2 for row in told["experts"] for layer in row)

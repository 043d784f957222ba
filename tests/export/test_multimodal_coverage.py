"""What comes of every multimodal architecture with experts. A new transformers release shows here."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import multimodal

#: Why no file is written.
REFUSED = {
    "diffusion_gemma": "does not take embeddings",
}
#: Those whose decoder has no cache that the runtimes take.
WITHOUT_PAST = {"unlimited_ocr", "qwen4_exp"}
#: Those that take sound.
SOUND = {
    "dots3_note",
    "gemma4",
    "inkling_mm_model",
    "muse_spark",
    "nemo_speechlm",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
}
EACH = {each.name: each for each in multimodal.architectures()}


def test_the_list_is_that_of_the_registry() -> None:
    assert {"qwen3_vl_moe", "gemma4", "llama4", "nemo_speechlm"} <= EACH.keys()
    assert "mixtral" not in EACH and REFUSED.keys() | WITHOUT_PAST <= EACH.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_outcome(name: str) -> None:
    outcome = multimodal.measure(EACH[name])
    if name in REFUSED:
        assert not outcome.files and REFUSED[name] in "; ".join(outcome.remarks)
        return
    assert {"embedding", "text"} <= set(outcome.files), outcome.remarks
    assert ("audio" in outcome.files) is (name in SOUND), outcome.remarks
    assert ("vision" in outcome.files) is (name != "nemo_speechlm"), outcome.remarks
    assert outcome.past is (name not in WITHOUT_PAST), outcome.remarks
    assert outcome.chained and outcome.error is not None and outcome.error < 1e-4, outcome.remarks

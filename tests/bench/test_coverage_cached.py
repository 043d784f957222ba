"""The inputs of the table with a cache, and which models have none."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import cached, cached_exporters, cases, exporters, measure  # noqa: E402
from sparse_onnx.export.past import source as past_source  # noqa: E402

ALL = {case.name: case for case in cases.with_cache()}


def test_pasts_are_what_torch_made_of_the_text_before(tmp_path: Path) -> None:
    source = exporters.load(ALL["gpt_oss"].make(tmp_path))
    runs = measure.untraced(source)
    assert len(runs) == 7 and len({run.name for run in runs}) == 7
    compared = {tuple(sizes) for *sizes, _ in past_source._RUNS} | {(2, 7, 5)}
    assert not compared & {tuple(run.sizes.values()) for run in runs}
    assert any(run.sizes["past_sequence"] == 0 for run in runs)
    assert any(run.sizes["sequence"] == 1 < run.sizes["past_sequence"] for run in runs)
    padded = [run for run in runs if not run.inputs["attention_mask"].all()]
    assert {run.sizes["past_sequence"] > 0 for run in padded} == {True, False}
    run = next(run for run in runs if run.sizes["past_sequence"] == 12)
    text = source.interface.draw({"batch": 1, "sequence": 13, "past_sequence": 0}, "random", 2001)
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        whole = source.module(**{name: text[name] for name in names}).logits[:, -1:]
    torch.testing.assert_close(source.forward(run.inputs)[0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vitpose", "openai_privacy_filter"])
def test_models_that_do_not_generate_are_no_failures(name: str) -> None:
    cell = measure.measure(ALL[name], "ours")
    assert cell.outcome == measure.INAPPLICABLE and "does not generate text" in cell.reason


def test_generators_have_a_cache(tmp_path: Path) -> None:
    made = ALL["mixtral"].make(tmp_path)
    assert made.cached and cached.inapplicable(exporters.load_plain(made)) == ""


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_other_exporters_get_what_transformers_takes(name: str, tmp_path: Path) -> None:
    """The sample with a cache object is one that the model answers like our inputs."""
    source = exporters.load(ALL[name].make(tmp_path))
    run = next(run for run in measure.untraced(source) if run.sizes["past_sequence"] == 12)
    with torch.no_grad():
        logits = source.module(**cached_exporters._sample(source, run.inputs)).logits
    torch.testing.assert_close(logits, source.forward(run.inputs)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_file_with_names_of_its_own_is_fed_and_compared() -> None:
    cell = measure.measure(ALL["mixtral"], "transformers")
    assert cell.outcome == measure.FALLBACK and cell.error is not None and cell.error <= measure.EXACT


def test_encoder_decoders_begin_with_a_text(tmp_path: Path) -> None:
    """Every past is that of the same text's first tokens, after torch's own encoder."""
    source = exporters.load(ALL["switch_transformers"].make(tmp_path))
    runs = measure.untraced(source)
    assert len(runs) == 7 and {run.sizes["past_sequence"] > 0 for run in runs} == {True, False}
    for run in runs:
        lengths = {name: value.shape[2] for name, value in run.inputs.items() if name.endswith(".key")}
        sizes = run.sizes
        known = sizes["encoder_sequence"] if sizes["past_sequence"] else 0
        assert lengths["past_key_values.0.decoder.key"] == sizes["past_sequence"]
        assert lengths["past_key_values.0.encoder.key"] == known
    assert any(not run.inputs["encoder_attention_mask"].all() for run in runs)

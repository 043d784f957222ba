"""The inputs of the table with a cache, and which models have none."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench.coverage import cached, cases, exporters, measure  # noqa: E402
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

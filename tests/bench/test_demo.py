"""What the demo says; that it runs is `make demo`'s own affair."""

from __future__ import annotations

from sparse_onnx.bench import demo
from sparse_onnx.core.report import BenchRow


def test_the_summary_has_everybody_with_time_memory_and_quality() -> None:
    rows = [
        BenchRow(name, tokens, 1, 1, 1, ratio)
        for tokens in demo.TOKENS
        for name, ratio in ((demo.OURS, 1.0), (demo.EAGER, 3.5))
    ]
    model = demo.Measured("a model", rows, {demo.OURS: 12.0}, {"exported": 2.5, demo.OURS: 2.5})
    lines = demo.summary(model).splitlines()
    assert lines[0] == "a model"
    assert [line.split("|")[1].strip() for line in lines[4:]] == [demo.OURS, demo.EAGER, "exported"]
    assert lines[5].count("3.50") == 3 and "12" in lines[4] and lines[6].rstrip(" |").endswith("2.50000")


def test_quality_has_no_column_where_there_is_none() -> None:
    model = demo.Measured("a model", [BenchRow(demo.OURS, 1, 1, 1, 1, 1.0)], {}, {})
    assert "bits per byte" not in demo.summary(model)

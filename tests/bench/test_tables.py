from __future__ import annotations

from sparse_onnx.bench.tables import markdown, number


def test_columns_are_aligned() -> None:
    text = markdown(["", "1", "create s"], [["sparse-onnx", "1.00", "0.1"], ["b", "10.25", ""]])
    assert text.splitlines() == [
        "|             |     1 | create s |",
        "| ----------- | ----: | -------: |",
        "| sparse-onnx |  1.00 |      0.1 |",
        "| b           | 10.25 |          |",
    ]


def test_none_is_nothing() -> None:
    assert (number(None, ".2f"), number(1.234, ".2f")) == ("", "1.23")

from __future__ import annotations

import pytest

from sparse_onnx.cli.text import count, one_line, plain, size


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layers.0/mlp.experts [x] é 模", "layers.0/mlp.experts [x] é 模"),
        ("\x1b[31m\x07\x9b", "\\x1b[31m\\x07\\x9b"),
        ("a\u202eb\u2066c\u200bd", "a\\u202eb\\u2066c\\u200bd"),
        ("\ud800 \u2028 \U000e0001", "\\ud800 \\u2028 \\U000e0001"),
        (7, "7"),
    ],
)
def test_what_is_not_plainly_visible_is_escaped(text: object, shown: str) -> None:
    assert plain(text) == shown


def test_one_line_is_one_line() -> None:
    assert one_line("a\n  b\r\nc\td\x1b") == "a b c d\\x1b"


def test_numbers_for_people() -> None:
    assert [count(value) for value in (None, 7, 999, 1000, 46_700_000_000)] == [
        "",
        "7",
        "999",
        "1 K",
        "46.7 B",
    ]
    assert [size(value) for value in (None, 0, 1023, 1536, 3 * 2**30)] == [
        "",
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3 GiB",
    ]

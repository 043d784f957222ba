"""Text from a model file, made safe to print: a name may hold terminal escapes."""

from __future__ import annotations

import re

#: The hint where a file breaks the format.
DAMAGED = "the file is damaged, or made to do harm: get it again from its author"

_LONGEST = 160
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # C0, DEL, C1: newline, escape, bell ...


def printable(text: str | bytes) -> str:
    """`text` on one line, with control and other invisible characters escaped, cut when very long."""
    if isinstance(text, bytes):  # what protobuf gives for a string that is not UTF-8
        text = text.decode("utf-8", "backslashreplace")
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(name: str | bytes) -> str:
    return f"'{printable(name)}'"


def has_control_characters(name: str) -> bool:
    return _CONTROL.search(name) is not None


def root_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

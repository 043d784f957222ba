"""Text from files and exceptions, made safe for a terminal."""

from __future__ import annotations

import unicodedata

# Cc: control characters, terminal escapes among them. Cf: bidirectional overrides and other invisible ones.
# Cs: lone surrogates, which no encoding can print. Zl, Zp: separators that some take for line ends.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def plain(text: object) -> str:
    """The text with everything that is not plainly visible as `\\x..`, `\\u....` or `\\U........`."""
    return "".join(_escape(char) if unicodedata.category(char) in _UNSAFE else char for char in str(text))


def one_line(text: object) -> str:
    """The text on one line: line ends become spaces, other unsafe characters are escaped."""
    return plain(" ".join(str(text).split()))


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def count(number: int | None) -> str:
    """1234567 -> '1.23 M'; empty for None."""
    return "" if number is None else _scaled(number, 1000, ["", " K", " M", " B", " T"])


def size(number: int | None) -> str:
    """Bytes for people, in binary units; empty for None."""
    return "" if number is None else _scaled(number, 1024, [" B", " KiB", " MiB", " GiB", " TiB"])


def _scaled(number: float, base: int, units: list[str]) -> str:
    unit = 0
    while abs(number) >= base and unit < len(units) - 1:
        number /= base
        unit += 1
    return f"{number:.0f}{units[unit]}" if unit == 0 else f"{number:.3g}{units[unit]}"

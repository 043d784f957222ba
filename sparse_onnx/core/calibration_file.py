"""Reads CALIB.json without trusting it: every key, type, length and number is checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from sparse_onnx.core.calibration import (
    CENTRES,
    COMMAND,
    MOST_COACTIVATION,
    POINTS,
    SCHEMA,
    SPARSITIES,
    BlockRecord,
    Calibration,
    DataRecord,
    GatedRecord,
    SiteRecord,
    ZerosRecord,
)
from sparse_onnx.core.errors import ModelError
from sparse_onnx.core.report import Refusal

_HINT = "`sparse-onnx calibrate MODEL --data FILES -o CALIB.json` writes such a file"
#: Bytes of the largest file that is read. Statistics of 1,000 sites of 16,384 channels are 200 MB.
_MOST_BYTES = 1 << 30
_NAMED = 80

Made = TypeVar("Made")


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """The statistics in a file.

    Raises:
        ModelError: it cannot be read, is no such file, or holds what no calibration writes; names the file and the key.
    """
    where = os.fspath(path)
    try:
        return _calibration(_parsed(where))
    except _Wrong as wrong:
        raise ModelError(f"these are no calibration statistics: {wrong}", _HINT, where) from None


class _Wrong(Exception):
    """What is wrong, and at which key."""


def _parsed(path: str) -> _Fields:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise _Wrong("this is no regular file")
        if os.path.getsize(path) > _MOST_BYTES:
            raise _Wrong(f"more than {_MOST_BYTES} bytes")
        with open(path, encoding="utf-8") as file:
            data = json.load(file, parse_constant=_no_number)
    except OSError as error:
        raise _Wrong(error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _Wrong(
            f"not JSON: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return _Fields(data, "")


def _no_number(text: str) -> Any:
    raise _Wrong(f"'{text}' is not a number")


class _Fields:
    """An object of the file. Each question names the key in its answer."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, dict):
            raise _Wrong(f"{path or 'the whole'} is no object")
        self.data, self.path = data, path

    def get(self, key: str) -> Any:
        if key not in self.data:
            raise _Wrong(f"'{self.name(key)}' is missing")
        return self.data[key]

    def name(self, key: str) -> str:
        return f"{self.path}.{key[:_NAMED]}" if self.path else key[:_NAMED]

    def wrong(self, key: str, what: str) -> _Wrong:
        return _Wrong(f"'{self.name(key)}' {what}")

    def object(self, key: str) -> _Fields:
        return _Fields(self.get(key), self.name(key))

    def objects(self, key: str, optional: bool = False) -> list[_Fields]:
        found = self.data.get(key, []) if optional else self.get(key)
        if not isinstance(found, list):
            raise self.wrong(key, "is no list")
        return [_Fields(item, f"{self.name(key)}[{at}]") for at, item in enumerate(found)]

    def text(self, key: str) -> str:
        return self._each(key, self.get(key), _is_text, "is no text")

    def texts(self, key: str) -> tuple[str, ...]:
        return self._all(key, self.get(key), None, _is_text, "has an entry that is no text")

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self._each(key, self.get(key), _is_number, "is no finite number")
        if not low <= value <= high:
            raise self.wrong(key, f"is {value}, not from {low:g} to {high:g}")
        return float(value)

    def numbers(self, key: str, count: int, low: float = -math.inf) -> tuple[float, ...]:
        found = self._all(key, self.get(key), count, _is_number, "has an entry that is no finite number")
        if any(value < low for value in found):
            raise self.wrong(key, f"has an entry below {low:g}")
        return tuple(map(float, found))

    def rising(self, key: str, count: int, low: float = -math.inf) -> tuple[float, ...]:
        found = self.numbers(key, count, low)
        if list(found) != sorted(found):
            raise self.wrong(key, "falls, and quantiles never do")
        return found

    def whole(self, key: str, low: int = 0) -> int:
        value: int = self._each(key, self.get(key), _is_whole, "is no whole number")
        if value < low:
            raise self.wrong(key, f"is {value}, below {low}")
        return value

    def wholes(self, key: str, count: int | None, low: int = 0) -> tuple[int, ...]:
        found: tuple[int, ...] = self._all(
            key, self.get(key), count, _is_whole, "has an entry that is no whole number"
        )
        if any(value < low for value in found):
            raise self.wrong(key, f"has an entry below {low}")
        return found

    def _each(self, key: str, value: Any, allowed: Callable[[Any], bool], problem: str) -> Any:
        if not allowed(value):
            raise self.wrong(key, problem)
        return value

    def _all(
        self, key: str, values: Any, count: int | None, allowed: Callable[[Any], bool], problem: str
    ) -> tuple[Any, ...]:
        if not isinstance(values, list):
            raise self.wrong(key, "is no list")
        if count is not None and len(values) != count:
            raise self.wrong(key, f"has {len(values)} entries, not {count}")
        return tuple(self._each(key, value, allowed, problem) for value in values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 3.5e38


def _calibration(fields: _Fields) -> Calibration:
    schema = fields.get("schema")
    if isinstance(schema, bool) or schema != SCHEMA or fields.get("command") != COMMAND:
        raise _Wrong(f"schema {schema!r} of {fields.get('command')!r}, not {SCHEMA} of {COMMAND!r}")
    model, data = fields.object("model"), fields.object("data")
    layers = tuple(map(_site, fields.objects("layers")))
    blocks = tuple(map(_block, fields.objects("blocks")))
    gated = tuple(map(_gated, fields.objects("gated")))
    for kind, names in (
        ("layers", [item.name for item in layers]),
        ("gated", [item.name for item in gated]),
        ("blocks", [item.name for item in blocks]),
    ):
        if len(set(names)) < len(names):
            raise _Wrong(f"'{kind}' has a name twice")
    if unknown := {name for block in blocks for name in block.layers} - {layer.name for layer in layers}:
        raise _Wrong(f"'blocks' names a layer that is not there: '{min(unknown)[:_NAMED]}'")
    if unknown := {layer.block for layer in gated} - {"", *(block.name for block in blocks)}:
        raise _Wrong(f"'gated' names a block that is not there: '{min(unknown)[:_NAMED]}'")
    return Calibration(
        path=model.text("path"),
        fingerprint=model.text("fingerprint"),
        data=DataRecord(
            data.texts("files"),
            data.whole("runs"),
            data.whole("tokens"),
            data.whole("held_out_tokens"),
            data.texts("digests") if "digests" in data.data else (),
        ),
        layers=layers,
        blocks=blocks,
        activations=tuple(map(_zeros, fields.objects("activations", optional=True))),
        refusals=tuple(map(_refusal, fields.objects("refusals", optional=True))),
        notes=fields.texts("notes") if "notes" in fields.data else (),
        gated=gated,
    )


def _site(fields: _Fields) -> SiteRecord:
    rows = fields.whole("rows", 1)
    weights, columns = fields.texts("weights"), fields.wholes("columns", None, 1)
    if not weights or len(weights) != len(columns):
        raise fields.wrong("columns", f"has {len(columns)} entries for {len(weights)} matrices")
    quantiles, errors = fields.object("quantiles"), fields.object("errors")
    return SiteRecord(
        name=fields.text("name"),
        weights=weights,
        input=None if fields.get("input") is None else fields.text("input"),
        rows=rows,
        columns=columns,
        bytes=fields.whole("bytes"),
        tokens=fields.whole("tokens", 1),
        zeros=fields.number("zeros", 0, 1),
        mean=fields.number("mean"),
        median=fields.number("median"),
        mode=fields.number("mode"),
        channel_median=fields.numbers("channel_median", rows),
        quantiles={centre: quantiles.rising(centre, POINTS, 0) for centre in CENTRES},
        errors={centre: errors.numbers(centre, len(SPARSITIES), 0) for centre in CENTRES},
    )


def _gated(fields: _Fields) -> GatedRecord:
    weights = fields.texts("weights")
    if not weights:
        raise fields.wrong("weights", "is empty")
    return GatedRecord(
        name=fields.text("name"),
        block=fields.text("block"),
        weights=weights,
        activation=None if fields.get("activation") is None else fields.text("activation"),
        rows=fields.whole("rows", 1),
        bytes=fields.whole("bytes"),
        tokens=fields.whole("tokens", 1),
        zeros=fields.number("zeros", 0, 1),
        quantiles={"zero": fields.object("quantiles").rising("zero", POINTS, 0)},
        errors={"zero": fields.object("errors").numbers("zero", len(SPARSITIES), 0)},
    )


def _block(fields: _Fields) -> BlockRecord:
    experts = fields.whole("experts", 1)
    unused = fields.wholes("unused", None)
    if any(expert >= experts for expert in unused):
        raise fields.wrong("unused", f"has an entry above {experts - 1}")
    together = None
    if fields.get("coactivation") is not None:
        rows = fields.get("coactivation")
        if not isinstance(rows, list) or len(rows) != experts or experts > MOST_COACTIVATION:
            raise fields.wrong("coactivation", f"is no list of {experts} rows")
        named = _Fields({str(at): row for at, row in enumerate(rows)}, fields.name("coactivation"))
        together = tuple(named.wholes(str(at), experts) for at in range(experts))
    return BlockRecord(
        name=fields.text("name"),
        experts=experts,
        top_k=fields.whole("top_k", 1),
        tokens=fields.whole("tokens"),
        loads=fields.wholes("loads", experts),
        dropped=fields.whole("dropped"),
        unused=unused,
        coactivation=together,
        weight_quantiles=fields.rising("weight_quantiles", POINTS),
        layers=fields.texts("layers"),
    )


def _zeros(fields: _Fields) -> ZerosRecord:
    return ZerosRecord(
        fields.text("name"), fields.text("operator"), fields.whole("values"), fields.number("zeros", 0, 1)
    )


def _refusal(fields: _Fields) -> Refusal:
    return Refusal(fields.text("reason"), fields.text("node"), fields.text("hint"), fields.text("pass"))

"""CALIB.json: what is written is read again, and nothing else is."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.core.calibration import (
    CENTRES,
    BlockRecord,
    Calibration,
    DataRecord,
    GatedRecord,
    SiteRecord,
    ZerosRecord,
)
from sparse_onnx.core.calibration_file import read_calibration
from sparse_onnx.core.errors import ModelError, UsageError
from sparse_onnx.core.report import Refusal

SITE = SiteRecord(
    name="layers.0.mlp.down",
    weights=("w", "v"),
    input="x",
    rows=3,
    columns=(4, 5),
    bytes=108,
    tokens=7,
    zeros=0.25,
    mean=-0.125,
    median=0.0,
    mode=-0.1669921875,
    channel_median=(0.0, -1.5, 1e-30),
    quantiles={centre: tuple(at / 100 for at in range(101)) for centre in CENTRES},
    errors={centre: tuple(at / 20 for at in range(20)) for centre in CENTRES},
)
GATED = GatedRecord(
    name="layers.0.mlp.gated",
    block="layers.0.mlp",
    weights=("fc1", "fc2"),
    activation=None,
    rows=6,
    bytes=216,
    tokens=7,
    zeros=0.5,
    quantiles={"zero": tuple(at / 50 for at in range(101))},
    errors={"zero": tuple(at / 10 for at in range(20))},
)
BLOCK = BlockRecord(
    name="layers.0.mlp",
    experts=2,
    top_k=1,
    tokens=7,
    loads=(7, 0),
    dropped=0,
    unused=(1,),
    coactivation=((7, 0), (0, 0)),
    weight_quantiles=tuple(at / 100 for at in range(101)),
    layers=("layers.0.mlp.down",),
)
WHOLE = Calibration(
    path="m.onnx",
    fingerprint="0123456789abcdef",
    data=DataRecord(("a.txt",), 2, 7, 3),
    layers=(SITE,),
    blocks=(BLOCK,),
    activations=(ZerosRecord("relu", "Relu", 100, 0.5),),
    refusals=(Refusal("an output head", "lm_head", "", "sites"),),
    notes=("a note",),
    gated=(GATED, dataclasses.replace(GATED, name="mlp", block="", activation="silu")),
)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "calib.json"
    path.write_text(text)
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert read_calibration(written(tmp_path, WHOLE.dumps())) == WHOLE
    assert json.loads(WHOLE.dumps())["layers"][0]["rows"] == 3
    assert WHOLE.dumps() == WHOLE.dumps() and len(WHOLE.dumps().splitlines()) < 30


def test_a_gate_has_one_centre() -> None:
    assert GATED.centre("zero") == 0.0
    with pytest.raises(ValueError, match="no centre 'median'"):
        GATED.centre("median")


def test_a_centre_is_a_number_or_one_a_channel() -> None:
    assert [SITE.centre(name) for name in CENTRES] == [0.0, 0.0, -0.1669921875, (0.0, -1.5, 1e-30)]


def test_another_model_is_refused() -> None:
    WHOLE.require_model(WHOLE.fingerprint)
    with pytest.raises(UsageError, match=r"of another model: m\.onnx"):
        WHOLE.require_model("fedcba9876543210", "calib.json")


def test_a_number_that_is_not_finite_is_not_written() -> None:
    broken = dataclasses.replace(WHOLE, layers=(dataclasses.replace(SITE, mean=float("nan")),))
    with pytest.raises(ValueError):
        broken.dumps()


TEXTS = {
    "nothing": ("", "not JSON"),
    "half": (WHOLE.dumps()[:500], "not JSON"),
    "a list": ("[]", "no object"),
    "nested": ("[" * 100_000, "not JSON"),
    "a NaN": (WHOLE.dumps().replace("-0.125", "NaN"), "'NaN' is not a number"),
    "infinity": (WHOLE.dumps().replace("-0.125", "-Infinity"), "'-Infinity' is not a number"),
    "too large a number": (WHOLE.dumps().replace("-0.125", "1e400"), "layers[0].mean' is no finite number"),
    "a report": ('{"schema": 1, "command": "inspect"}', "schema 1 of 'inspect'"),
    "another schema": (WHOLE.dumps().replace('"schema": 1', '"schema": 2'), "schema 2"),
    "a truth for a schema": (WHOLE.dumps().replace('"schema": 1', '"schema": true'), "schema True"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    text, reason = TEXTS[name]
    with pytest.raises(ModelError) as error:
        read_calibration(written(tmp_path, text))
    assert reason in error.value.message and error.value.where.endswith("calib.json")
    assert "\n" not in str(error.value)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no layers": (lambda d: d.pop("layers"), "'layers' is missing"),
    "no fingerprint": (lambda d: d["model"].pop("fingerprint"), "'model.fingerprint' is missing"),
    "a name twice": (lambda d: d["layers"].append(d["layers"][0]), "'layers' has a name twice"),
    "too few medians": (lambda d: d["layers"][0]["channel_median"].pop(), "has 2 entries, not 3"),
    "too many quantiles": (
        lambda d: d["layers"][0]["quantiles"]["mode"].append(1.0),
        "has 102 entries, not 101",
    ),
    "a centre less": (lambda d: d["layers"][0]["errors"].pop("zero"), "'layers[0].errors.zero' is missing"),
    "falling quantiles": (lambda d: d["layers"][0]["quantiles"]["zero"].reverse(), "falls"),
    "a negative distance": (lambda d: d["layers"][0]["quantiles"]["zero"].__setitem__(0, -1), "below 0"),
    "a negative error": (lambda d: d["layers"][0]["errors"]["zero"].__setitem__(0, -1), "below 0"),
    "text for a number": (lambda d: d["layers"][0].__setitem__("mean", "0"), "is no finite number"),
    "a truth for a number": (lambda d: d["layers"][0].__setitem__("tokens", True), "is no whole number"),
    "null for a number": (
        lambda d: d["layers"][0]["channel_median"].__setitem__(0, None),
        "no finite number",
    ),
    "more than all are zero": (lambda d: d["layers"][0].__setitem__("zeros", 1.5), "is 1.5, not from 0 to 1"),
    "columns of no matrix": (lambda d: d["layers"][0]["weights"].pop(), "has 2 entries for 1 matrices"),
    "no rows": (lambda d: d["layers"][0].__setitem__("rows", 0), "is 0, below 1"),
    "loads of other experts": (lambda d: d["blocks"][0]["loads"].append(1), "has 3 entries, not 2"),
    "an unused expert that is none": (lambda d: d["blocks"][0].__setitem__("unused", [2]), "above 1"),
    "a ragged matrix": (lambda d: d["blocks"][0]["coactivation"][1].pop(), "has 1 entries, not 2"),
    "no gated layers": (lambda d: d.pop("gated"), "'gated' is missing"),
    "a gated layer twice": (lambda d: d["gated"].append(d["gated"][0]), "'gated' has a name twice"),
    "a gate's quantiles fall": (lambda d: d["gated"][0]["quantiles"]["zero"].reverse(), "falls"),
    "a gate's sizes below zero": (
        lambda d: d["gated"][0]["quantiles"]["zero"].__setitem__(0, -1),
        "gated[0].quantiles.zero' has an entry below 0",
    ),
    "a gate's errors are few": (lambda d: d["gated"][1]["errors"]["zero"].pop(), "19 entries, not 20"),
    "a gate of no matrices": (lambda d: d["gated"][0].__setitem__("weights", []), "is empty"),
    "a gate of no units": (lambda d: d["gated"][0].__setitem__("rows", 0), "is 0, below 1"),
    "a gate of another block": (lambda d: d["gated"][0].__setitem__("block", "x"), "not there: 'x'"),
    "a layer that is not there": (lambda d: d["blocks"][0].__setitem__("layers", ["x"]), "not there: 'x'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_statistics_are_refused(name: str, tmp_path: Path) -> None:
    change, reason = CHANGES[name]
    data = copy.deepcopy(json.loads(WHOLE.dumps()))
    change(data)
    with pytest.raises(ModelError) as error:
        read_calibration(written(tmp_path, json.dumps(data)))
    assert reason in error.value.message


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_what_cannot_be_read_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read_calibration(tmp_path / path)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += leaves(value, (*path, key))
    return found


PLACES = leaves(json.loads(WHOLE.dumps()))
JUNK = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.integers(), st.floats(), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(place=st.sampled_from(PLACES), junk=JUNK)
def test_junk_anywhere_is_read_or_refused_in_one_line(tmp_path_factory: Any, place: Any, junk: Any) -> None:
    data = json.loads(WHOLE.dumps())
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = junk
    path = written(tmp_path_factory.mktemp("junk"), json.dumps(data))
    try:
        found = read_calibration(path)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert read_calibration(written(path.parent, found.dumps())) == found

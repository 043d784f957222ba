"""Tuning: which form is taken for what times, what is kept in the file, and what is read from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx import targets
from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph import io
from sparse_onnx.optimize import tune as tuner
from sparse_onnx.optimize.candidates import NotBuilt, build, kinds
from sparse_onnx.optimize.runner import plan
from sparse_onnx.optimize.watched import values_of
from sparse_onnx.sparsify.record import acting
from sparse_onnx.targets import session

SHAPE = Shape(experts=6, hidden=32, inner=48)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_external(layered_model(SHAPE), tmp_path / "in.onnx")


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_MOST_CACHE", 1 << 16)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, small_caches: None) -> Callable[..., list[str]]:
    """Sets the time of each candidate relative to the default form, in the order in which they are measured."""

    def set_times(candidates: list[str], *ratios: float) -> list[str]:
        profile = targets.get("cpu")
        monkeypatch.setitem(profile.candidates, "0", tuple(candidates))
        left = list(ratios)
        measured: list[str] = []

        def interleave(runs, inputs, **_):
            for run in runs:
                run.run(0)
            measured.append(str(inputs))
            ratio = left.pop(0)
            return np.full((4, 2), [1e-3, 1e-3 * ratio])

        monkeypatch.setattr(tuner, "interleave", interleave)
        return measured

    return set_times


def test_blocks_that_differ_by_weights_alone_are_one_kind() -> None:
    model = layered_model(SHAPE, layers=3)
    [kind] = kinds(model)
    assert len(kind.names) == 3 and kind.facts["experts"] == 6 and not kind.facts["dropped"]
    [other] = kinds(layered_model(Shape(experts=6, hidden=32, inner=49)))
    assert kind.key != other.key and kind.key == kinds(layered_model(SHAPE, seed=5))[0].key


def test_the_fastest_is_taken_if_it_is_so_twice(source: Path, tmp_path: Path, timed) -> None:
    # two candidates at two token counts, then the better one again
    timed(["branched:style=expert", "branched:style=group,group=4"], 0.9, 0.8, 0.5, 0.6, 0.5, 0.6)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(1, 5))
    assert [block.form for block in report.blocks] == ["branched", "branched"]
    assert report.tuning is not None
    rows = {(row.form, row.tokens): row for row in report.tuning.rows}
    assert rows["branched:style=group,group=4", 5].ratio_to_default == 0.6
    assert [row.form for row in report.tuning.rows if row.chosen and row.tokens == 1] == [
        "branched:style=group,group=4"
    ]
    assert {row.blocks for row in report.tuning.rows} == {2}
    assert report.verify is not None and report.verify.passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.data", "in.onnx", "out.onnx"]


@pytest.mark.parametrize("again", [1.2, 0.99])
def test_a_gain_that_does_not_repeat_is_noise(source: Path, tmp_path: Path, timed, again: float) -> None:
    timed(["branched:style=expert"], 0.5, again)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(1,))
    assert [block.form for block in report.blocks] == ["grouped", "grouped"]


def test_one_count_does_not_outweigh_another(source: Path, tmp_path: Path, timed) -> None:
    timed(["branched:style=expert"], 0.5, 2.1)  # half the time at one token, twice at the other
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(1, 5))
    assert [block.form for block in report.blocks] == ["grouped", "grouped"]


def test_forms_that_refuse_are_told(source: Path, tmp_path: Path, timed) -> None:
    timed(["none_such", "fused"], 2.0)
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(1,))
    assert report.tuning is not None
    assert [text.split(": ")[1:] for text in report.tuning.left_out] == [
        ["none_such", "no pass makes this form of it"]
    ]


def test_forms_that_would_need_too_much_memory_are_not_run(
    source: Path, tmp_path: Path, timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(["gathered", "dense"], 2.0)
    monkeypatch.setattr(
        tuner, "_LARGEST_WORK", 4 * 9 * 2 * 3 * 48 * 32 - 1
    )  # what 9 tokens gather, less a byte
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(9,), verify="none")
    assert report.tuning is not None
    [text] = report.tuning.left_out
    assert "gathered: would work on" in text and {row.form for row in report.tuning.rows} == {
        "grouped",
        "dense",
    }


def test_measurements_are_kept_and_decide(source: Path, tmp_path: Path, timed) -> None:
    file = tmp_path / "t.json"
    measured = timed(["branched:style=expert"], 0.5, 0.5)
    sparse_onnx.optimize(source, tmp_path / "a.onnx", tune=True, tokens=(1,), tuning=file)
    assert len(measured) == 2
    report = sparse_onnx.optimize(source, tmp_path / "b.onnx", tuning=file)
    assert len(measured) == 2, "nothing is measured again"
    assert [block.form for block in report.blocks] == ["branched", "branched"]
    assert report.tuning is not None and report.tuning.source == str(file) and report.tuning.tokens == [1]
    sparse_onnx.optimize(source, tmp_path / "c.onnx", tune=True, tokens=(1,), tuning=file)
    assert len(measured) == 2, "known measurements of this machine are used again"
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_measurements_of_another_machine_or_count_are_made_anew(source: Path, tmp_path: Path, timed) -> None:
    file = tmp_path / "t.json"
    measured = timed(["branched:style=expert"], 2.0, 2.0, 2.0)
    settings = {"tune": True, "tuning": file, "verify": "none"}
    sparse_onnx.optimize(source, tmp_path / "a.onnx", tokens=(1,), **settings)
    sparse_onnx.optimize(source, tmp_path / "a.onnx", tokens=(3,), **settings)
    assert len(measured) == 2
    data = json.loads(file.read_text())
    data["environment"]["processor"] = "another"
    file.write_text(json.dumps(data))
    sparse_onnx.optimize(source, tmp_path / "a.onnx", tokens=(3,), **settings)
    assert len(measured) == 3
    assert json.loads(file.read_text())["environment"]["processor"] != "another"


def test_files_that_do_not_do(source: Path, tmp_path: Path, timed) -> None:
    timed(["branched:style=expert"], 2.0)
    file = tmp_path / "t.json"
    out = tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="does not exist"):
        sparse_onnx.optimize(source, out, tuning=file)
    for text in (
        "",
        "{}",
        "[1]",
        '{"schema": 1, "command": "tuning", "entries": [{"key": 1}], "environment": {}}',
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match="no tuning file") as caught:
            sparse_onnx.optimize(source, out, tuning=file)
        assert "\n" not in str(caught.value)
    file.unlink()
    other = save_external(layered_model(Shape(experts=5, hidden=32, inner=48)), tmp_path / "other.onnx")
    sparse_onnx.optimize(other, out, tune=True, tokens=(1,), tuning=file, verify="none")
    with pytest.raises(UsageError, match="no measurement of blocks such as"):
        sparse_onnx.optimize(source, tmp_path / "new.onnx", tuning=file)
    with pytest.raises(UsageError, match="leaves nothing to tune"):
        sparse_onnx.optimize(source, tmp_path / "new.onnx", form="grouped", tune=True)
    assert not (tmp_path / "new.onnx").exists()


def test_a_block_alone_gives_what_it_gives_in_the_model(source: Path, tmp_path: Path) -> None:
    from sparse_onnx.blocks.reference import reference

    model = io.load(source)
    planned = plan(targets.get("cpu").forms)
    [kind] = kinds(model)
    alone = build(model, kind.names[1], Form("grouped"), planned, tmp_path / "alone.onnx")
    rng = np.random.default_rng(0)
    feeds = tuner.draw_feeds(kind, 9, alone.row, 1)
    actual = session.run(session.create_session(alone.path), dict(zip(alone.inputs, feeds, strict=True)))[0]
    from sparse_onnx.blocks import blocks

    block = blocks(model)[1]
    weights = {role: value.const_value.numpy() for role, value in block.weights.items()}
    np.testing.assert_allclose(actual, reference(block.spec, *feeds, **weights), rtol=0, atol=1e-5)
    assert len({tuple(row) for row in feeds[1]}) > 1 and rng is not None
    with pytest.raises(NotBuilt, match="no pass makes this form"):
        build(model, kind.names[0], Form("none_such"), planned, tmp_path / "x.onnx")


def test_really_measured(source: Path, tmp_path: Path, small_caches: None) -> None:
    """No time is asserted: every candidate is timed or says why not."""
    report = sparse_onnx.optimize(source, tmp_path / "out.onnx", tune=True, tokens=(1, 9), threads=2)
    assert report.tuning is not None and report.tuning.threads == 2
    told = {row.form for row in report.tuning.rows} | {text.split(": ")[1] for text in report.tuning.left_out}
    assert told >= set(targets.get("cpu").candidates["0"])
    assert all(row.ratio_to_default > 0 for row in report.tuning.rows)
    assert report.verify is not None and report.verify.passed


def test_with_thresholds_all_experts_by_one_operator_compete(
    tmp_path: Path, timed, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(experts=6, hidden=32, inner=48, biases=True)
    source = save_external(layered_model(shape), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    sparse_onnx.calibrate(source, tmp_path / "train.npz", tmp_path / "calib.json", threads=1)
    created = []
    real = tuner.contestants.create
    monkeypatch.setattr(tuner.contestants, "create", lambda *given: created.append(given[2]) or real(*given))
    monkeypatch.setattr(tuner, "_LARGEST_WORK", 4 * 9 * 2 * 3 * 48 * 32 - 1)  # it gathers no weights
    timed(["fused", "dense"], 0.6, 0.7)
    file = tmp_path / "t.json"
    options = {"thresholds": tmp_path / "calib.json", "sparsity": 0.4}
    report = sparse_onnx.optimize(
        source, tmp_path / "out.onnx", tune=True, tokens=(9,), tuning=file, **options
    )
    assert {block.form for block in report.blocks} == {"gathered"} and created and all(created)
    assert report.tuning is not None and {row.form for row in report.tuning.rows} == {"grouped", "gathered"}
    assert report.thresholds is not None and report.thresholds.level == 40
    again = sparse_onnx.optimize(source, tmp_path / "out.onnx", tuning=file, **options)
    assert {block.form for block in again.blocks} == {"gathered"}
    with pytest.raises(UsageError, match="no measurement of blocks"):  # without thresholds it is another kind
        sparse_onnx.optimize(source, tmp_path / "out.onnx", tuning=file)


def test_forms_are_measured_at_the_level_that_the_model_will_run_at(
    tmp_path: Path, timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_external(layered_model(dataclasses.replace(SHAPE, biases=True)), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    sparse_onnx.calibrate(source, tmp_path / "train.npz", tmp_path / "calib.json", threads=1)
    levels = []
    real = tuner.build

    def watched(model, *given):
        levels.append(int(model.graph.initializers["sparsity_level"].const_value.numpy()))
        return real(model, *given)

    monkeypatch.setattr(tuner, "build", watched)
    timed([], 2.0)
    report = sparse_onnx.optimize(
        source,
        tmp_path / "out.onnx",
        tune=True,
        tokens=(1,),
        thresholds=tmp_path / "calib.json",
        sparsity=0.3,
    )
    assert report.verify is not None and report.verify.passed, "at level 0 it is what it was"
    assert report.thresholds is not None and set(levels) == {report.thresholds.level}


@pytest.mark.parametrize("scale", [0.05, 1, 20])
def test_blocks_are_measured_skipping_what_the_plan_skips(
    tmp_path: Path, timed, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the units of the activations are: calibrated data is not standard normal."""
    shape = Shape(experts=6, hidden=64, inner=48)
    source = save_external(layered_model(shape, layers=1), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((1000, 64)) * scale + scale * np.linspace(-1, 1, 64)
    np.savez(tmp_path / "train.npz", x=x.astype(np.float32))
    sparse_onnx.calibrate(source, tmp_path / "train.npz", tmp_path / "calib.json", threads=1)
    built: list[tuple[ir.Model, tuple[str, ...]]] = []
    drawn: list[tuple[np.ndarray, ...]] = []
    real_build, real_draw = tuner.build, tuner.draw_feeds

    def build(*given):
        alone = real_build(*given)
        model = io.load(alone.path)
        for value in model.graph.initializers.values():  # the file is removed
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        built.append((model, alone.inputs))
        return alone

    def draw(*given):
        drawn.append(real_draw(*given))
        return drawn[-1]

    monkeypatch.setattr(tuner, "build", build)
    monkeypatch.setattr(tuner, "draw_feeds", draw)
    timed([], 2.0)
    report = sparse_onnx.optimize(
        source,
        tmp_path / "out.onnx",
        tune=True,
        tokens=(200,),
        thresholds=tmp_path / "calib.json",
        sparsity=0.45,
    )
    [model, inputs] = built[0]
    shares = skipped(model, dict(zip(inputs, drawn[0], strict=True)))
    assert report.thresholds is not None and len(shares) == len(report.thresholds.sites) == 2
    for site in report.thresholds.sites:
        assert shares[site.name] == pytest.approx(site.expected, abs=0.05), site.name


def skipped(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of its inputs that each site skips in the model of a block alone."""
    items, values = acting(model), values_of(model)
    bounds = {item.bound: values[item.bound] for item in items}
    read = {item.input: values[item.input] for item in items} | bounds
    computed = [value for value in read.values() if not value.is_initializer()]
    model.graph.outputs.extend(value for value in computed if not value.is_graph_input())
    run = session.create_session(model)
    seen = (
        dict(zip([value.name for value in run.get_outputs()], session.run(run, feeds), strict=True)) | feeds
    )
    seen |= {name: value.const_value.numpy() for name, value in read.items() if value.is_initializer()}
    found: dict[str, list[np.ndarray]] = {}
    for item in items:
        distance = np.abs(seen[item.input] - values[item.centre].const_value.numpy())
        found.setdefault(item.site, []).append((distance <= seen[item.bound]).ravel())
    return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}


def test_another_sparsity_or_kernels_are_measured_anew(
    tmp_path: Path, timed, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_external(layered_model(SHAPE), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    sparse_onnx.calibrate(source, tmp_path / "train.npz", tmp_path / "calib.json", threads=1)
    built = [False]
    monkeypatch.setattr("sparse_onnx.optimize.candidates.is_built", lambda: built[0])
    monkeypatch.setattr(tuner, "is_built", lambda: False)  # timed without them all the same
    measured = timed([], 2.0, 2.0, 2.0)
    file = tmp_path / "t.json"

    def run(sparsity: float, tune: bool = True) -> int:
        sparse_onnx.optimize(
            source,
            tmp_path / "out.onnx",
            tune=tune,
            tokens=(1,),
            tuning=file,
            thresholds=tmp_path / "calib.json",
            sparsity=sparsity,
            verify="none",
        )
        return len(measured)

    assert [run(0.3), run(0.3), run(0.3, tune=False)] == [1, 1, 1]
    with pytest.raises(UsageError, match="no measurement of blocks"):
        run(0.6, tune=False)
    assert [run(0.6), run(0.6)] == [2, 2]
    built[0] = True
    assert [run(0.3), run(0.3)] == [3, 3]

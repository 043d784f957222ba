"""`optimize --thresholds` from end to end: budgets that are kept and missed, what is refused, what is reported."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from dense_layers import Net, calibrated, dense_model, plan_for, prepared, rows, save

import sparse_onnx
from sparse_onnx.cli import main
from sparse_onnx.core.calibration import Calibration
from sparse_onnx.core.errors import (
    ImpossibleError,
    ModelError,
    SparseOnnxError,
    UsageError,
    VerificationError,
)
from sparse_onnx.graph import io
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify import layers
from sparse_onnx.sparsify.record import acting, thresholds_of
from sparse_onnx.targets import session as sessions

NET = Net()
LEVEL = "sparsity_level"


@dataclasses.dataclass(frozen=True)
class Case:
    folder: Path
    model: Path
    calibration: Calibration

    @property
    def file(self) -> Path:
        return self.folder / "calib.json"

    def optimize(self, out: str = "out.onnx", **options: Any) -> Any:
        return sparse_onnx.optimize(self.model, self.folder / out, thresholds=self.file, threads=2, **options)


def made(folder: Path, net: Net = NET) -> Case:
    model = save(dense_model(net), folder / "in.onnx")
    calibration = calibrated(model, [rows(net, 300, seed) for seed in range(2)])
    (folder / "calib.json").write_text(calibration.dumps())
    np.savez(folder / "eval.npz", x=np.concatenate([rows(net, 2048, seed)["x"] for seed in (70, 71, 72, 73)]))
    return Case(folder, model, calibration)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(tmp_path_factory.mktemp("thresholds"))


@pytest.mark.parametrize("mode", ["native", "simulate"])
def test_a_sparsity_is_what_is_skipped(case: Case, mode: str) -> None:
    report = case.optimize(sparsity=0.4, eval_data=[case.folder / "eval.npz"], threshold_mode=mode)
    found = report.thresholds
    assert found.mode == mode and found.measured and found.bytes == 4 * 48 * 96 * 4
    assert found.share_skipped == pytest.approx(0.4, abs=0.02)
    assert found.bytes_skipped == sum(site.bytes_skipped for site in found.sites)
    for site in found.sites:
        assert site.measured == pytest.approx(site.expected, abs=0.03) and site.layers == 1
    assert report.verify.method == "whole" and report.verify.passed and report.verify.max_rel_error < 1e-6
    assert [quality.metric for quality in found.quality] == ["top1", "cosine"]
    assert 0.9 < found.quality[1].value < 1 and found.quality[1].dense == 1
    assert any("4 thresholded layers agree with numpy" in note for note in report.notes)
    assert ("simulated" in " ".join(report.notes)) == (mode == "simulate")
    record = thresholds_of(io.load(case.folder / "out.onnx"))
    assert record is not None and record.level_input == LEVEL and record.mode == mode


def test_without_evaluation_data_it_says_that_nothing_was_measured(case: Case) -> None:
    found = case.optimize(sparsity=0.3).thresholds
    assert not found.measured and not found.quality and all(site.measured is None for site in found.sites)
    assert found.share_skipped == pytest.approx(0.3, abs=0.02)


def test_the_level_is_set_and_can_be_turned(case: Case) -> None:
    report = case.optimize(sparsity=0.5)
    session = sessions.create_session(case.folder / "out.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"], "the level is optional"
    [dial] = session.get_overridable_initializers()
    assert (dial.name, dial.type, dial.shape) == (LEVEL, "tensor(int64)", [])
    feeds = rows(NET, 9, 3)
    dense = sessions.run(sessions.create_session(case.model), feeds)[0]
    result = {level: sessions.run(session, feeds | {LEVEL: np.array(level)})[0] for level in (0, 20, 50, 90)}
    assert np.array_equal(
        sessions.run(session, feeds)[0],
        sessions.run(session, feeds | {LEVEL: np.array(report.thresholds.level)})[0],
    )
    scale = np.abs(dense).max()
    errors = [float(np.abs(result[level] - dense).max() / scale) for level in (0, 20, 50, 90)]
    assert errors[0] < 1e-6 and errors == sorted(errors) and errors[1] > 1e-3


def test_a_budget_is_kept_on_data_that_was_not_searched_on(case: Case) -> None:
    lines: list[str] = []
    report = case.optimize(budget="cosine>=0.97", eval_data=[case.folder / "eval.npz"], progress=lines.append)
    [cosine, _] = report.thresholds.quality
    assert cosine.budget == "cosine >= 0.97" and cosine.kept and cosine.value >= 0.97
    assert cosine.tokens == 4096, "half of the data"
    tried = [line for line in lines if line.startswith("level ")]
    assert 5 <= len(tried) <= 8 and report.thresholds.level > 20
    # Reported is measured: the same from the file.
    session = sessions.create_session(case.folder / "out.onnx")
    pieces = [
        rows(NET, 2048, seed)["x"][at : at + 512] for seed in (70, 71, 72, 73) for at in range(0, 2048, 512)
    ]
    held = [{"x": piece} for piece in pieces[1::2]]
    total = 0.0
    for feeds in held:
        left = sessions.run(session, feeds)[0].astype(np.float64)
        right = sessions.run(session, feeds | {LEVEL: np.array(0)})[0].astype(np.float64)
        norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
        total += float(((left * right).sum(-1) / norms).mean()) / len(held)
    assert total == pytest.approx(cosine.value, abs=1e-6)


METRIC = """
import numpy as np
def closeness(run, feeds):
    gaps = [np.abs(run(feed)["y"] - run(feed)["y"]).max() for feed in feeds]
    assert not any(gaps) and len(feeds) == 8 and feeds[0]["x"].shape == (512, 48)
    return float(np.mean([np.square(run(feed)["y"]).mean() for feed in feeds]))
def broken(run, feeds):
    raise KeyError("no such thing")
def nothing(run, feeds):
    return float("nan")
"""


def test_a_metric_of_the_users(case: Case) -> None:
    path = case.folder / "metric.py"
    path.write_text(METRIC)
    data = [case.folder / "eval.npz"]
    dense = case.optimize(budget=f"{path}:closeness>=0", eval_data=data).thresholds.quality[0].dense
    report = case.optimize(budget=f"{path}:closeness>={0.97 * dense}", eval_data=data)
    assert report.thresholds.quality[0].kept and report.thresholds.quality[0].metric.endswith("closeness")
    for name, message in (
        ("broken", "raised KeyError"),
        ("nothing", "no finite number"),
        ("missing", "no 'missing'"),
    ):
        with pytest.raises(SparseOnnxError, match=message):
            case.optimize(budget=f"{path}:{name}>=0", eval_data=data)


def test_a_budget_that_cannot_be_kept_writes_nothing(case: Case) -> None:
    with pytest.raises(VerificationError, match=r"no level keeps cosine >= 1: 0.99\d+ at level 1,") as caught:
        case.optimize("never.onnx", budget="cosine>=1", eval_data=[case.folder / "eval.npz"])
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert not (case.folder / "never.onnx").exists()


def test_a_budget_that_is_missed_on_the_other_half_writes_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_onnx.optimize.thresholds._safely", lambda budget, found: found.value > 0.6)
    with pytest.raises(VerificationError, match=r"is missed on the half .*: 0\.\d+ at level \d+") as caught:
        case.optimize("never.onnx", budget="cosine>=0.99", eval_data=[case.folder / "eval.npz"])
    assert caught.value.exit_code == 4 and not (case.folder / "never.onnx").exists()


def test_another_models_calibration_is_refused(case: Case, tmp_path: Path) -> None:
    other = save(dense_model(Net(seed=1)), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="of another model"):
        sparse_onnx.optimize(other, tmp_path / "out.onnx", thresholds=case.file, sparsity=0.3)
    assert not (tmp_path / "out.onnx").exists()


def test_data_that_calibration_has_seen_are_refused_under_any_name(case: Case, tmp_path: Path) -> None:
    data = tmp_path / "train.npz"
    np.savez(data, x=rows(NET, 600, 5)["x"])
    sparse_onnx.calibrate(case.model, data, tmp_path / "c.json")
    copied = tmp_path / "test.npz"
    copied.write_bytes(data.read_bytes())
    with pytest.raises(UsageError, match="calibration has seen this file") as caught:
        sparse_onnx.optimize(
            case.model, tmp_path / "o.onnx", thresholds=tmp_path / "c.json", sparsity=0.3, eval_data=[copied]
        )
    assert caught.value.where == str(copied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing says how much"),
        ({"sparsity": 0.3, "budget": "top1>=0.9"}, "two ways"),
        ({"budget": "top1>=0.9"}, "measured on data"),
        ({"sparsity": 1.5}, "no share between 0 and 1"),
        ({"sparsity": 0.0}, "no share between 0 and 1"),
        ({"sparsity": float("nan")}, "no share between 0 and 1"),
        ({"sparsity": 0.3, "method": "magic"}, "unknown method 'magic'"),
        ({"sparsity": 0.3, "allocation": "best"}, "unknown allocation"),
        ({"sparsity": 0.3, "threshold_mode": "fast"}, "unknown threshold mode"),
        ({"sparsity": 0.3, "dense_first": -1}, "-1 first positions"),
        ({"sparsity": 0.3, "method": "relu"}, "skips the exact zeros"),
        ({"budget": "speed<=2", "eval_data": ["e.npz"]}, "unknown metric 'speed'"),
        ({"budget": "top1<=0.9", "eval_data": ["e.npz"]}, "better the higher"),
        ({"budget": "top1>=95", "eval_data": ["e.npz"]}, "top1 is never 95"),
        ({"budget": "good", "eval_data": ["e.npz"]}, "'good' is no budget"),
        ({"sparsity": 0.3, "eval_data": ["nowhere.npz"]}, "no such file"),
    ],
)
def test_what_is_no_request(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        case.optimize("never.onnx", **options)
    assert caught.value.exit_code == 2 and not (case.folder / "never.onnx").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.3},
        {"budget": "top1>=0.9"},
        {"eval_data": ["x"]},
        {"dense_first": 2},
        {"method": "cats"},
        {"allocation": "greedy"},
        {"threshold_mode": "gather"},
        {"prefill": "copy"},
        {"tokenizer": "tokenizer.json"},
    ],
)
def test_options_of_thresholds_need_a_calibration(case: Case, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="thresholds come from a calibration"):
        sparse_onnx.optimize(case.model, case.folder / "never.onnx", **options)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x00\x01", b'{"schema": 1, "command": "calibrate"}', b"[" * 5000]
)
def test_files_that_are_no_calibration(case: Case, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="no calibration statistics") as caught:
        sparse_onnx.optimize(case.model, tmp_path / "out.onnx", thresholds=path, sparsity=0.3)
    assert caught.value.exit_code == 3


def test_a_calibration_whose_sites_are_not_in_the_model_is_refused(case: Case, tmp_path: Path) -> None:
    layers = tuple(dataclasses.replace(layer, name=f"{layer.name}.x") for layer in case.calibration.layers)
    (tmp_path / "c.json").write_text(dataclasses.replace(case.calibration, layers=layers).dumps())
    with pytest.raises(ImpossibleError, match="no layer can skip inputs"):
        sparse_onnx.optimize(case.model, tmp_path / "out.onnx", thresholds=tmp_path / "c.json", sparsity=0.3)


def test_first_positions_of_a_model_without_a_cache(case: Case) -> None:
    with pytest.raises(ImpossibleError, match="no key/value cache"):
        case.optimize("never.onnx", sparsity=0.3, dense_first=4)


def test_gathering_is_for_layers_that_are_sparse_enough(case: Case) -> None:
    with pytest.raises(ImpossibleError, match="cannot be skipped"):
        case.optimize("never.onnx", sparsity=0.97, threshold_mode="gather")
    report = case.optimize(sparsity=0.6, threshold_mode="gather", eval_data=[case.folder / "eval.npz"])
    assert all(site.expected >= 0.7 for site in report.thresholds.sites)
    kinds = {node.op_type for node in io.load(case.folder / "out.onnx").graph}
    assert "If" in kinds and "ThresholdedLinear" not in kinds
    onnx.checker.check_model(str(case.folder / "out.onnx"), full_check=True)


def test_exact_zeros_cost_nothing(tmp_path: Path) -> None:
    """A network with ReLU: what is zero is skipped, and the answers are the same."""
    case = made(tmp_path, Net(activation="Relu"))
    report = case.optimize(method="relu", eval_data=[case.folder / "eval.npz"])
    found = report.thresholds
    assert {site.name for site in found.sites} == {"layers.0.down", "layers.1.down"}
    assert all(0.3 < site.measured < 0.7 for site in found.sites if site.measured is not None)
    assert found.quality[1].value == pytest.approx(1, abs=1e-9) and found.quality[0].value == 1
    with pytest.raises(ImpossibleError, match="exact zeros"):
        (tmp_path / "gelu").mkdir()
        made(tmp_path / "gelu").optimize(method="relu")


def test_above_the_zeros_of_relu_thresholds_are_fatrelu(tmp_path: Path) -> None:
    case = made(tmp_path, Net(activation="Relu"))
    found = case.optimize(sparsity=0.6, method="teal", eval_data=[case.folder / "eval.npz"]).thresholds
    downs = [site for site in found.sites if site.name.endswith("down")]
    assert all((site.measured or 0) > 0.6 and site.centre == "zero" for site in downs)


@pytest.mark.parametrize("method", ["teal", "topk"])
def test_methods(case: Case, method: str) -> None:
    found = case.optimize(sparsity=0.4, method=method, eval_data=[case.folder / "eval.npz"]).thresholds
    assert found.method == method and {site.centre for site in found.sites} == {"zero"}
    assert found.share_skipped == pytest.approx(0.4, abs=0.02)


def test_centres_are_chosen_by_error(case: Case) -> None:
    """Behind GELU another centre than 0 is better, and it is taken."""
    scap = case.optimize(sparsity=0.4, eval_data=[case.folder / "eval.npz"]).thresholds
    teal = case.optimize(sparsity=0.4, method="teal", eval_data=[case.folder / "eval.npz"]).thresholds
    assert scap.quality[1].value > teal.quality[1].value
    assert any(site.centre != "zero" for site in scap.sites)


def test_quality_is_better_by_error_for_bytes_than_uniform(case: Case) -> None:
    data = [case.folder / "eval.npz"]
    greedy = case.optimize(sparsity=0.4, method="teal", eval_data=data).thresholds
    uniform = case.optimize(sparsity=0.4, method="teal", allocation="uniform", eval_data=data).thresholds
    assert greedy.quality[1].value >= uniform.quality[1].value


def test_the_command_its_report_and_its_exit_codes(case: Case) -> None:
    def invoke(*arguments: object) -> tuple[int, str, str]:
        texts = [str(each) for each in arguments]
        result = CliRunner().invoke(main, ["optimize", *texts, "--thresholds", str(case.file)])
        return result.exit_code, result.stdout, result.stderr

    data = case.folder / "eval.npz"
    code, out, errors = invoke(
        case.model, case.folder / "cli.onnx", "--sparsity", 0.4, "--eval-data", data, "--json", "-"
    )
    record = json.loads(out)["thresholds"]
    assert code == 0 and record["level"] > 30 and record["measured"] is True
    keys = ["calibration", "method", "mode", "level", "level_input", "dense_first", "prefill"]
    assert list(record) == [*keys, "bytes", "bytes_skipped", "share_skipped", "measured", "quality", "sites"]
    assert list(record["quality"][0]) == ["metric", "value", "dense", "tokens", "budget", "kept"]
    site = ["name", "layers", "centre", "expected", "measured", "bytes", "bytes_skipped"]
    assert list(record["sites"][0]) == site
    assert "of linear weights skipped for one token, measured" in errors and "layers.*.down x 2" in errors
    never = case.folder / "never.onnx"
    assert invoke(case.model, never, "--budget", "cosine>=1", "--eval-data", data, "-q")[0] == 4
    assert invoke(case.model, never, "--sparsity", 0.99, "-q")[0] == 5
    assert invoke(case.model, never, "-q")[0] == 2 and not never.exists()


def test_a_dry_run_writes_nothing(case: Case) -> None:
    report = sparse_onnx.optimize(case.model, None, thresholds=case.file, sparsity=0.3, dry_run=True)
    assert report.thresholds.level > 20 and report.output is None


def test_native_kernels_at_a_real_size_on_several_threads_again_and_again(kernels: Path) -> None:
    net = Net(width=1024, inner=4096, layers=1)
    model = prepared(ir.from_proto(dense_model(net)))
    assert InsertThresholds(plan_for(model, "native"))(model).rewritten == 2
    body = sessions.create_session(model, threads=2)
    native = sessions.create_session(model, threads=2, kernels=True)
    for tokens in (1, 16):
        feeds = [rows(net, tokens, seed) for seed in range(2)]
        expected = [sessions.run(body, each)[0] for each in feeds]
        first = [sessions.run(native, each)[0] for each in feeds]
        for left, right in zip(expected, first, strict=True):
            assert np.abs(left - right).max() < 1e-5 * np.abs(left).max()
        failures: list[int] = []

        def work(
            at: int, session: Any = native, feeds: Any = feeds, first: Any = first, failures: Any = failures
        ) -> None:
            for level in (None, 0, None, 90, None):
                turned = {} if level is None else {LEVEL: np.array(level)}
                result = sessions.run(session, feeds[at] | turned)[0]
                if level is None and not np.array_equal(result, first[at]):
                    failures.append(at)

        threads = [threading.Thread(target=work, args=(at,)) for at in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_what_acts_can_be_read_from_the_file(case: Case) -> None:
    case.optimize(sparsity=0.4)
    found = acting(io.load(case.folder / "out.onnx"))
    assert [item.site for item in found] == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert all(item.nbytes == 48 * 96 * 4 and not item.inner for item in found)


def test_models_too_large_to_run_whole_are_compared_layer_by_layer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_onnx.verify.lowering.WHOLE_BYTES", 0)
    monkeypatch.setattr("sparse_onnx.optimize.checks._fits", lambda model: False)
    report = case.optimize(sparsity=0.4)
    assert report.verify.method == "blocks"
    assert any(
        "4 thresholded layers have the weights and biases that they had" in note for note in report.notes
    )
    right = layers.operands

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        weight = found.tensors["W"]
        found.tensors["W"] = (
            ir.Tensor(weight.numpy() * np.float32(1.001), name="W") if arguments[2] else weight
        )
        return found

    monkeypatch.setattr(layers, "operands", wrong)
    with pytest.raises(VerificationError, match="has other weights than before"):
        case.optimize("never.onnx", sparsity=0.4)


@pytest.mark.parametrize("what", ["weights", "bias"])
def test_a_wrong_rewrite_is_not_written(case: Case, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right = getattr(layers, "operands" if what == "weights" else "folded")

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        if what == "bias":
            return found + 0.01
        weight = found.tensors["W"]
        found.tensors["W"] = ir.Tensor(weight.numpy()[::-1].copy(), name="W") if arguments[2] else weight
        return found

    monkeypatch.setattr(layers, what.replace("weights", "operands").replace("bias", "folded"), wrong)
    with pytest.raises(VerificationError, match="differs from its original"):
        case.optimize("never.onnx", sparsity=0.4)


def test_a_result_is_optimized_again_as_any_model_is(case: Case) -> None:
    case.optimize(sparsity=0.4)
    before = (case.folder / "out.onnx").read_bytes()
    report = sparse_onnx.optimize(case.folder / "out.onnx", case.folder / "again.onnx")
    assert "nothing to do" in report.notes[0] and (case.folder / "again.onnx").read_bytes() == before
    with pytest.raises(UsageError, match="of another model"):
        sparse_onnx.optimize(
            case.folder / "out.onnx", case.folder / "never.onnx", thresholds=case.file, sparsity=0.4
        )


def test_every_step_can_be_verified_and_none(case: Case) -> None:
    report = case.optimize(sparsity=0.4, verify="each")
    assert report.verify.passed and report.thresholds.level > 30
    report = case.optimize("unverified.onnx", sparsity=0.4, verify="none")
    assert report.verify.passed is None
    assert (case.folder / "unverified.onnx").read_bytes() != (case.folder / "in.onnx").read_bytes()

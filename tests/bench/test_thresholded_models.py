"""The bench of thresholds in whole models: its recipes, its measures and its tables, on a model of three layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from text_graphs import graph

from sparse_onnx.bench.thresholded import models as bench
from sparse_onnx.bench.thresholded import speed, tables
from sparse_onnx.bench.thresholded.cases import Amounts, Base, Case
from sparse_onnx.bench.thresholded.quality import Examiner, order_of_pairs, same_neighbour
from sparse_onnx.bench.thresholded.variants import Variant, only, plan_of, recipes, role, variants
from sparse_onnx.calibrate import calibrate
from sparse_onnx.core.calibration import CENTRES, SPARSITIES, Calibration, DataRecord, SiteRecord
from sparse_onnx.core.errors import ImpossibleError, UsageError, VerificationError
from sparse_onnx.kernels import path as kernel_path

WIDTH = 48


def site(name: str, nbytes: int = 1000, steep: float = 1.0, **centres: float) -> SiteRecord:
    """Errors grow with the square of the sparsity; centres that are named have them so many times as large."""
    steps = np.array(SPARSITIES)
    errors = {each: tuple((steep * centres.get(each, 1.0) * steps**2).tolist()) for each in CENTRES}
    quantiles = dict.fromkeys(CENTRES, tuple(np.linspace(0, 2, 101).tolist()))
    return SiteRecord(
        name, (name,), name, 8, (4,), nbytes, 100, 0.0, 0.1, 0.2, 0.3, tuple(np.arange(8.0)), quantiles, errors
    )  # fmt: skip


def decoder(blocks: int = 2) -> Calibration:
    parts = {
        "self_attn.q_proj+k_proj+v_proj": 1,
        "self_attn.o_proj": 1,
        "mlp.gate_proj+up_proj": 4,
        "mlp.down_proj": 2,
    }
    layers = [
        site(f"model.layers.{at}.{name}", 1000 * size, steep=1 + at)
        for at in range(blocks)
        for name, size in parts.items()
    ]
    return Calibration("m.onnx", "00", DataRecord(("d",), 1, 1, 1), tuple(layers), ())


def test_sites_are_what_their_names_say() -> None:
    said = {
        "model.layers.3.mlp.down_proj": "down",
        "encoder.layer.0.output.dense": "down",
        "encoder.layer.0.attention.output.dense": "out",
        "model.layers.0.self_attn.o_proj": "out",
        "encoder.layer.0.intermediate.dense": "up",
        "model.layers.0.mlp.gate_proj+up_proj": "up",
        "model.layers.0.self_attn.q_proj+k_proj+v_proj": "query",
        "layers.1.attention.qkv": "query",
        "val_86": "",
    }
    assert {name: role(name) for name in said} == said


@pytest.mark.parametrize("encoder", [False, True])
def test_every_variant_has_a_name_of_its_own(encoder: bool) -> None:
    found = variants(encoder, ["float32", "int8", "int8-dynamic", "int4"])
    keys = [each.key for each in found]
    assert len(set(keys)) == len(keys) and keys[0] == "float32 dense"
    assert {each.kind for each in found} >= {"dense", "best", *CENTRES, "NNCF", "SCAP", "TEAL"}
    assert not any(each.weights == "int8-dynamic" for each in found if each.kind != "dense")
    timed = speed.timed(found)
    assert timed[0].key == "float32 dense" and all(each in timed for each in recipes(encoder))


def test_fixed_recipes_leave_all_else_dense() -> None:
    plan = plan_of(Variant("float32", "SCAP", shares={"up": 0.35, "down": 0.55}), decoder())
    assert set(plan.sites) == {
        f"model.layers.{at}.mlp.{name}" for at in (0, 1) for name in ("gate_proj+up_proj", "down_proj")
    }
    down = plan.sites["model.layers.1.mlp.down_proj"]
    assert down.sparsity[plan.level] == 0.55 and down.table[plan.level] == pytest.approx(1.1)
    assert down.table[0] == -1 and not down.centre.any()
    mode = plan_of(Variant("float32", "SCAP", shares={"down": 0.5}, centre="mode"), decoder())
    assert {float(each.centre[0]) for each in mode.sites.values()} == {np.float32(0.3)}
    with pytest.raises(ImpossibleError):
        plan_of(
            Variant("float32", "NNCF", shares={"up": 0.3}),
            dataclasses.replace(decoder(), layers=(site("a"),)),
        )


def test_teal_gives_every_block_the_same() -> None:
    calibration = decoder()
    plan = plan_of(Variant("float32", "TEAL", 0.4), calibration)
    sizes = {each.name: each.bytes for each in calibration.layers}
    for at in (0, 1):
        members = [name for name in plan.sites if f"layers.{at}." in name]
        skipped = sum(sizes[name] * plan.sites[name].sparsity[plan.level] for name in members)
        assert skipped == pytest.approx(0.4 * sum(sizes[name] for name in members))
    ours = plan_of(Variant("float32", "zero", 0.4), calibration)
    kept = {name: each.sparsity[ours.level] for name, each in ours.sites.items()}
    assert kept["model.layers.0.mlp.down_proj"] > kept["model.layers.1.mlp.down_proj"], (
        "the whole model together"
    )


def test_a_centre_that_is_asked_for_is_taken_where_it_is_worst() -> None:
    worst = dataclasses.replace(
        decoder(), layers=tuple(site(f"layers.{at}.down", median=9.0) for at in range(3))
    )
    for centre in CENTRES:
        plan = plan_of(Variant("float32", centre, 0.3), worst)
        assert {each.centring for each in plan.sites.values()} == {centre}
    assert only(worst, "median").layers[0].errors["median"] == worst.layers[0].errors["median"]
    best = plan_of(Variant("float32", "best", 0.3), worst)
    assert "median" not in {each.centring for each in best.sites.values()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Embedding, two linear layers with a ReLU, and a head over 256 bytes."""
    place = tmp_path_factory.mktemp("case")
    rng = np.random.default_rng(0)
    held = {
        "table": rng.standard_normal((256, WIDTH)),
        "w1": rng.standard_normal((WIDTH, 64)) / 6,
        "w2": rng.standard_normal((64, WIDTH)) / 6,
        "head": rng.standard_normal((WIDTH, 256)) / 6,
    }
    body = "h = Gather (table, input_ids) a = MatMul (h, w1) r = Relu (a) b = MatMul (r, w2) y = MatMul (b, head)"
    model = graph(
        body, "y", {name: array.astype(np.float32) for name, array in held.items()}, "int64[B, S] input_ids"
    )  # fmt: skip
    onnx.save(model, place / "in.onnx")
    (place / "train.txt").write_bytes(bytes(rng.integers(32, 127, 4000, dtype=np.uint8)))
    calibrate(place / "in.onnx", place / "train.txt", place / "in.calib.json", length=32, threads=1)
    held_out = [{"input_ids": rng.integers(32, 127, (1, 32))} for _ in range(6)]
    base = Base(place / "in.onnx", place / "in.calib.json")
    return Case("smollm2", place, {"float32": base}, held_out, Amounts(prefill=16, context=8))


def built() -> bool:
    try:
        kernel_path()
    except UsageError:
        return False
    return True


@pytest.mark.skipif(not built(), reason="the native kernels are not built")
def test_quality_and_speed_of_a_model_as_it_is_deployed(case: Case, tmp_path: Path) -> None:
    examine = Examiner(case)
    dense, ours = Variant("float32", "dense"), Variant("float32", "best", 0.5)
    plain = examine(dense)
    assert plain.metrics["top1"][0] == 1 and plain.skipped == 0 and plain.metrics["perplexity"][0] > 1
    found = examine(ours)
    assert found.skipped == pytest.approx(0.5, abs=0.08) and found.bytes == 2 * WIDTH * 64 * 4
    assert found.metrics["top1"][0] < 1 and found.metrics["perplexity"][0] != plain.metrics["perplexity"][0]

    store = bench.Store(tmp_path / "found.json", case.amounts)
    said: list[str] = []
    bench.measure_quality(case, [dense, ours, Variant("float32", "best", 0.99)], store, 1, said.append)
    assert len(said) == 3 and "refused" in store.quality("smollm2")["float32 best 99%"]
    bench.measure_speed(case, [dense, ours], store, 1, 2, said.append)
    rows = store.speed("smollm2")["1"]["decode"]
    assert [row["key"] for row in rows] == ["float32 dense", "float32 best 50%"] and rows[0]["ratio"] == 1
    assert len(store.speed("smollm2")["1"]["prefill"]) == 2

    again = bench.Store(tmp_path / "found.json", case.amounts)
    before = len(said)
    bench.measure_quality(case, [dense, ours], again, 1, said.append)
    bench.measure_speed(case, [dense, ours], again, 1, 2, said.append)
    assert len(said) == before, "what is there is not measured again"
    text = tables.section(again.found)
    assert "SmolLM2-135M" in text and "Decoding one token" in text and f"{found.skipped:.0%}" in text
    with pytest.raises(UsageError, match="other amounts"):
        bench.Store(tmp_path / "found.json", dataclasses.replace(case.amounts, windows=9))


@pytest.mark.skipif(not built(), reason="the native kernels are not built")
def test_a_file_that_is_not_the_model_is_found_out(case: Case) -> None:
    variant = Variant("float32", "best", 0.4)
    path = case.file(variant)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.dims == [64, WIDTH]:
            tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * 1.1).astype(np.float32).tobytes()
    onnx.save(model, path)
    try:
        with pytest.raises(VerificationError):
            Examiner(case)(variant)
    finally:
        case.remove(variant)
    assert not path.exists()


def test_a_decoded_token_reads_the_keys_of_those_before_it() -> None:
    feeds: dict[str, np.ndarray] = {
        "input_ids": np.arange(10)[None],
        "attention_mask": np.ones((1, 10), np.int64),
        "position_ids": np.arange(10)[None],
        "past_key_values.0.key": np.zeros((1, 2, 0, 4), np.float32),
    }

    def run(fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        length = fed["input_ids"].shape[1]
        return {"present.0.key": np.full((1, 2, length, 4), float(fed["input_ids"].sum()), np.float32)}

    found = speed.decoded(feeds, 6, run)
    assert found["input_ids"].tolist() == [[6]] and found["position_ids"].tolist() == [[6]]
    assert found["attention_mask"].shape == (1, 7) and (found["past_key_values.0.key"] == 15).all()
    assert found["past_key_values.0.key"].shape == (1, 2, 6, 4)
    assert {name: array.shape for name, array in speed.cut_to(feeds, 3).items()} == {
        "input_ids": (1, 3), "attention_mask": (1, 3), "position_ids": (1, 3), "past_key_values.0.key": (1, 2, 0, 4),
    }  # fmt: skip


def test_embeddings_are_compared_by_order_and_neighbour() -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((20, 8))
    assert order_of_pairs(dense, dense * 3) == pytest.approx(1) and same_neighbour(dense, dense * 3) == 1
    other = rng.standard_normal((20, 8))
    assert abs(order_of_pairs(dense, other)) < 0.4 and same_neighbour(dense, other) < 0.5
    noisy = dense + 0.1 * other
    assert 0.9 < order_of_pairs(dense, noisy) < 1


def quality(key: str, value: float, skipped: float) -> dict[str, object]:
    return {
        "key": key,
        "metrics": {"perplexity": [value, 0.1], "top1": [1 - skipped / 2, None]},
        "skipped": skipped,
    }


def test_between_two_shares_a_loss_is_interpolated() -> None:
    rows = {
        "float32 dense": quality("float32 dense", 20.0, 0.0),
        "float32 best 20%": quality("float32 best 20%", 21.0, 0.2),
        "float32 best 30%": quality("float32 best 30%", 23.0, 0.3),
    }
    dense = rows["float32 dense"]
    found = tables.at_bytes(rows, 0.25, dense)
    assert found is not None and found["metrics"]["perplexity"][0] == pytest.approx(22)
    found = tables.at_bytes(rows, 0.1, dense)
    assert found is not None and found["metrics"]["perplexity"][0] == pytest.approx(20.5)
    assert tables.at_bytes(rows, 0.4, dense) is None
    assert tables.loss("perplexity", 21.0, 20.0) == "+5.0%" and tables.loss("cosine", 0.98, 1.0) == "0.980"


def test_the_fastest_within_a_loss_is_named() -> None:
    keys = {"float32 dense": (20.0, 0.0, 50), "int8 dense": (20.1, 0.0, 30), "int8 best 30%": (20.5, 0.3, 24)}
    rows = [{"key": key, "ms": ms, "ratio": 50 / ms, "to_dense": 1.0} for key, (*_, ms) in keys.items()]
    found = {
        "processor": "a processor",
        "quality": {
            "smollm2": {key: quality(key, value, skipped) for key, (value, skipped, _) in keys.items()}
        },
        "speed": {"smollm2": {"1": {"decode": rows}}},
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.section(found).splitlines()]
    assert ["1%", "int8", "30", "int8", "30"] in lines
    assert ["3%", "int8", "30", "int8, best, 30% skipped", "24"] in lines
    assert ["int8", "30%", "+2.5%", "0.850", "24", "1.00", "2.08"] in lines


def test_tables_go_between_their_markers() -> None:
    page = f"before\n{tables.BEGIN}\nstale\n{tables.END}\nafter\n"
    once = tables.placed(page, "new")
    assert "stale" not in once and once.startswith("before\n") and once.endswith("\nafter\n")
    assert tables.placed(once, "new") == once
    for wrong in ("nothing", page + page, f"{tables.END}{tables.BEGIN}"):
        with pytest.raises(UsageError):
            tables.placed(wrong, "new")


def test_amounts_are_read_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    assert bench.parse_amounts("windows=2,sentences=40") == Amounts(windows=2, sentences=40)
    assert bench.parse_amounts(None) == Amounts()
    for wrong in ("window=2", "windows=x", "windows=0", "windows"):
        with pytest.raises(UsageError):
            bench.parse_amounts(wrong)
    for number, content in enumerate(("[]", "{", json.dumps({"schema": 7}))):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        with pytest.raises(UsageError):
            bench.Store(path, Amounts())

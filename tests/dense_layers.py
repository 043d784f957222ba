"""Small dense models, and calibrations of them made here: no code shared with `sparse_onnx.calibrate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.core.calibration import CENTRES, SPARSITIES, Calibration, DataRecord, SiteRecord
from sparse_onnx.graph import io, stats
from sparse_onnx.matching.sites import Site, sites
from sparse_onnx.optimize import runner
from sparse_onnx.sparsify.plan import Mode, Plan, SitePlan
from sparse_onnx.targets import session as sessions

F32 = np.float32


@dataclasses.dataclass(frozen=True)
class Net:
    """Layers x + act(norm(x) A + a) B + b. `spelling` of their products: matmul, gemm, transposed."""

    width: int = 48
    inner: int = 96
    layers: int = 2
    activation: str = "Gelu"
    spelling: str = "matmul"
    dtype: str = "float32"
    seed: int = 0


def _type(net: Net) -> int:
    return int(getattr(TensorProto, {"float32": "FLOAT", "float16": "FLOAT16"}[net.dtype]))


def dense_model(net: Net = Net()) -> onnx.ModelProto:
    """x `[T, width]` -> y `[T, width]`."""
    rng = np.random.default_rng(net.seed)
    nodes, stored, x = [], {}, "x"
    for at in range(net.layers):
        p = f"layers.{at}."
        sizes = {"up": (net.width, net.inner), "down": (net.inner, net.width)}
        stored[p + "scale"] = np.ones(net.width)
        nodes.append(
            helper.make_node("LayerNormalization", [x, p + "scale"], [p + "norm"], name=p + "norm", axis=-1)
        )
        value = p + "norm"
        for role, (k, n) in sizes.items():
            weight = rng.standard_normal((k, n)) / np.sqrt(k)
            stored[p + role + ".bias"] = rng.standard_normal(n) * 0.2
            stored[p + role + ".weight"] = weight if net.spelling == "matmul" else weight.T
            inputs = [value, p + role + ".weight", p + role + ".bias"]
            if net.spelling == "gemm":
                nodes.append(helper.make_node("Gemm", inputs, [p + role], name=p + role, transB=1))
            else:
                matrix = inputs[1]
                if net.spelling == "transposed":
                    matrix = p + role + ".turned"
                    nodes.append(
                        helper.make_node("Transpose", [inputs[1]], [matrix], name=matrix, perm=[1, 0])
                    )
                product = p + role + ".product"
                nodes.append(helper.make_node("MatMul", [value, matrix], [product], name=product))
                nodes.append(helper.make_node("Add", [product, inputs[2]], [p + role], name=p + role))
            value = p + role
            if role == "up":
                nodes.append(helper.make_node(net.activation, [value], [p + "act"], name=p + "act"))
                value = p + "act"
        nodes.append(helper.make_node("Add", [x, value], [p + "out"], name=p + "out"))
        x = p + "out"
    nodes.append(helper.make_node("Identity", [x], ["y"], name="y"))
    return _finish(net, nodes, stored)


def _finish(net: Net, nodes: list[onnx.NodeProto], stored: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", _type(net), ["T", net.width])],
        [helper.make_tensor_value_info("y", _type(net), ["T", net.width])],
        [numpy_helper.from_array(array.astype(net.dtype), name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=64)
    return path


def prepared(model: ir.Model) -> ir.Model:
    """As it is when thresholds come."""
    steps = [item for item in runner.plan(["grouped"]) if item.step.phase in ("prepare", "recognise")]
    runner.run(model, steps)
    return model


def calibrated(path: Path, runs: Sequence[dict[str, np.ndarray]]) -> Calibration:
    """Statistics of the layers' inputs on `runs`; every other row is held out for errors."""
    model = prepared(io.load(path))
    found = [site for site in sites(model) if site.input is not None and site.layers]
    wanted = {site.input.name: site.input for site in found if site.input is not None}
    watched = model.clone()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    watched.graph.outputs.extend(values[name] for name in wanted if name in values)
    session = sessions.create_session(watched)
    names = [value.name for value in session.get_outputs()]
    rows: dict[str, list[np.ndarray]] = {name or "": [] for name in wanted}
    for feeds in runs:
        seen = {**feeds, **dict(zip(names, sessions.run(session, feeds), strict=True))}
        for name in rows:
            rows[name].append(seen[name].astype(np.float64).reshape(-1, seen[name].shape[-1]))
    records = tuple(record(site, np.concatenate(rows[site.input.name or ""])) for site in found if site.input)
    fingerprint = stats.fingerprint(io.load(path))
    return Calibration(str(path), fingerprint, DataRecord(("here",), len(runs), 1, 1), records)


def record(site: Site, x: np.ndarray) -> SiteRecord:
    seen, held = x[::2], x[1::2]
    weight = np.concatenate([layer.weight.numbers() for layer in site.layers], axis=1).astype(np.float64)
    counts, edges = np.histogram(seen, 200)
    peak = int(counts.argmax())
    centres = {
        "zero": np.zeros(1),
        "median": np.array([np.median(seen)]),
        "mode": np.array([(edges[peak] + edges[peak + 1]) / 2]),
        "channel_median": np.median(seen, axis=0),
    }
    quantiles, errors = {}, {}
    dense = held @ weight
    for name in CENTRES:
        distance = np.abs(seen - centres[name])
        quantiles[name] = tuple(np.quantile(distance, np.linspace(0, 1, 101)))
        each = []
        for share in SPARSITIES:
            tau = np.quantile(distance, share) if share else -1
            kept = np.where(np.abs(held - centres[name]) <= tau, centres[name], held)
            each.append(float(np.linalg.norm(kept @ weight - dense) / np.linalg.norm(dense)))
        errors[name] = tuple(each)
    return SiteRecord(
        site.name,
        site.weights,
        site.input.name if site.input else None,
        site.rows,
        site.columns,
        site.nbytes,
        len(seen),
        float((seen == 0).mean()),
        float(seen.mean()),
        float(centres["median"][0]),
        float(centres["mode"][0]),
        tuple(centres["channel_median"].tolist()),
        quantiles,
        errors,
    )


def plan_for(
    model: ir.Model,
    mode: Mode,
    *,
    top_k: bool = False,
    centre: str = "one",
    least: float = 0.0,
    level: int = 50,
) -> Plan:
    """Thresholds from 0 to 2, or that many kept inputs fewer, for every site."""
    share = np.linspace(0, 1, 101)
    found = {}
    for at, site in enumerate(sites(model)):
        table = np.concatenate([[-1.0], np.linspace(0, 2, 100)])
        if top_k:
            table = np.maximum(1, np.rint((1 - share) * site.rows))
        size = site.rows if centre == "each" else 1
        value = np.random.default_rng(at).normal(0, 0.2, size).astype(np.float32)
        found[site.name] = SitePlan(site.name, value * (centre != "zero"), table, share)
    return Plan(found, level, mode, top_k, least)


def rows(net: Net, tokens: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((tokens, net.width)).astype(net.dtype)}

"""Optimizes a model of any size, made of sparse files; prints what that took. Run as a script, so that it is alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))


def write_sparse(folder: Path, experts: int, top_k: int, hidden: int, inner: int, layers: int) -> Path:
    """A model whose expert weights are a hole of the right size: no time and no disk, whatever the size."""
    from builders import Shape, finish, neutral_node, onnx_save

    shape = Shape(experts=experts, top_k=top_k, hidden=hidden, inner=inner)
    rng = np.random.default_rng(0)
    nodes, initializers, offset = [], [numpy_helper.from_array(np.asarray([top_k]), "k")], 0

    def external(name: str, dims: list[int]) -> str:
        nonlocal offset
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * int(np.prod(dims))
        for key, value in (("location", "weights.bin"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        offset += length
        initializers.append(tensor)
        return name

    x = "x"
    for layer in range(layers):
        p = f"layers.{layer}."
        router = rng.standard_normal((hidden, experts)).astype(np.float32)
        initializers.append(numpy_helper.from_array(router, p + "router"))
        weights = [
            external(p + "fc1", [experts, 2 * inner, hidden]),
            external(p + "fc1_bias", [experts, 2 * inner]),
            external(p + "fc2", [experts, hidden, inner]),
            external(p + "fc2_bias", [experts, hidden]),
        ]
        nodes += [
            helper.make_node("MatMul", [x, p + "router"], [p + "logits"], name=p + "logits"),
            helper.make_node("Softmax", [p + "logits"], [p + "scores"], name=p + "scores", axis=-1),
            helper.make_node(
                "TopK", [p + "scores", "k"], [p + "weight", p + "index"], name=p + "topk", axis=-1
            ),
            neutral_node(shape, p + "experts", [x, p + "index", p + "weight", *weights], p + "moe"),
            helper.make_node("Add", [x, p + "moe"], [p + "out"], name=p + "out"),
        ]
        x = p + "out"
    value_info = [
        helper.make_tensor_value_info(f"layers.{layer}.index", TensorProto.INT64, ["T", top_k])
        for layer in range(layers)
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", hidden])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["T", hidden])],
        initializers,
        value_info=value_info,
    )
    with open(folder / "weights.bin", "wb") as file:
        file.truncate(offset)
    path = folder / "in.onnx"
    onnx_save(finish(graph), path)
    return path


def peak_kb() -> int:
    """Of this program alone: getrusage's figure begins with the memory of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    import sparse_onnx

    folder, out, *sizes = sys.argv[1:]
    source = write_sparse(Path(folder), *(int(size) for size in sizes))
    baseline = peak_kb()
    report = sparse_onnx.optimize(source, Path(folder) / out)
    peak = peak_kb()
    assert report.model is not None and report.verify is not None
    print(
        json.dumps(
            {
                "weight_bytes": report.model.weight_bytes,
                "baseline_mb": baseline // 1024,
                "peak_mb": peak // 1024,
                "method": report.verify.method,
                "passed": report.verify.passed,
                "rewritten": next(p.rewritten for p in report.passes if p.name == "fuse_gating"),
            }
        )
    )


if __name__ == "__main__":
    main()

"""What a 20 GB model costs: `python large.py FOLDER` prints the peak of its memory in MB."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.io import load, save
from sparse_onnx.graph.stats import record

EXPERTS, ROWS, COLUMNS, LAYERS = 64, 4096, 4096, 5
LAYER = EXPERTS * ROWS * COLUMNS * 4


def build(folder: Path) -> Path:
    """5 packed tensors of 4 GiB each. The last bytes of the file are not 0."""
    with open(folder / "in.bin", "wb") as file:
        file.truncate(LAYERS * LAYER)
        file.seek(LAYERS * LAYER - 8)
        file.write(np.asarray([5, 7], np.float32).tobytes())
    values = [
        ir.Value(
            name=f"w{layer}",
            const_value=ir.ExternalTensor(
                "in.bin",
                layer * LAYER,
                LAYER,
                ir.DataType.FLOAT,
                shape=ir.Shape([EXPERTS, ROWS, COLUMNS]),
                name=f"w{layer}",
            ),
        )
        for layer in range(LAYERS)
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="large")
    (folder / "in.onnx").write_bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    return folder / "in.onnx"


def main(folder: Path) -> None:
    model = load(build(folder))
    before = record(model, "in.onnx")
    assert before.weight_bytes == LAYERS * LAYER > 20e9
    for name, value in list(model.graph.initializers.items()):
        packed = value.const_value
        assert packed is not None
        del model.graph.initializers[name]
        for expert in range(EXPERTS):
            piece = slice_first_axis(packed, expert, f"{name}.{expert}")
            model.graph.register_initializer(ir.Value(name=piece.name, const_value=piece))
    linked = save(model, folder / "out.onnx", weights="link")
    assert (linked.mode, linked.bytes_copied, linked.data_path) == ("link", 0, None)
    (folder / "copy").mkdir()
    copied = save(model, folder / "copy" / "out.onnx")
    assert copied.data_path is not None and copied.bytes_copied == LAYERS * LAYER
    assert copied.data_path.stat().st_blocks * 512 < 1 << 20
    for path in (linked.path, copied.path):
        again = load(path)
        assert record(again, path).weight_bytes == before.weight_bytes
        total = 0.0
        for expert in range(EXPERTS - 6, EXPERTS):
            tensor = again.graph.initializers[f"w{LAYERS - 1}.{expert}"].const_value
            assert tensor is not None
            total += float(read_array(tensor).sum())
        assert total == 12
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) // 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What writing a stack of a few GB costs: `python stack_sparse.py FOLDER` prints the peaks of its memory in MB.

The parts lie apart in a sparse file: no time and no disk. A second stack, of a few of them, is transposed; the parts of
a third one are computed, each from two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.io import save
from sparse_onnx.graph.stacked import interleave, stack

EXPERTS, ROWS, COLUMNS = 48, 4096, 4096
PART = ROWS * COLUMNS * 4
GAP = PART + 4096


def parts(folder: Path, count: int) -> list[ir.TensorProtocol]:
    return [
        ir.ExternalTensor(
            "in.bin",
            expert * GAP,
            PART,
            ir.DataType.FLOAT,
            shape=ir.Shape([ROWS, COLUMNS]),
            name=f"w{expert}",
            base_dir=str(folder),
        )
        for expert in range(count)
    ]


def model_of(*tensors: ir.TensorProtocol) -> ir.Model:
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def peak_mb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def main(folder: Path) -> None:
    with open(folder / "in.bin", "wb") as file:
        file.truncate(EXPERTS * GAP)
        for expert in range(EXPERTS):
            file.seek(expert * GAP + 4)
            file.write(np.asarray([expert + 1], np.float32).tobytes())
    whole = stack(parts(folder, EXPERTS), "whole")
    swapped = stack(parts(folder, 8), "swapped", transposed=True)
    stored = parts(folder, 8)
    pairs = zip(stored[::2], stored[1::2], strict=True)
    turns = stack([interleave(first, second, "pair") for first, second in pairs], "turns")
    model = model_of(whole, swapped, turns)
    before = peak_mb()
    saved = save(model, folder / "out.onnx")
    after = peak_mb()
    assert saved.bytes_copied == whole.nbytes + swapped.nbytes + turns.nbytes
    ir.save(model_of(swapped, turns), folder / "library.onnx", external_data="library.data")
    print(json.dumps({"bytes": whole.nbytes, "before": before, "ours": after, "library": peak_mb()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

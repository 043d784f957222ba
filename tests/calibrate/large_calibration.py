"""Calibrates a model of any size, made of sparse files; prints what that took. Run as a script, so that it is alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "optimize")]


def main(folder: Path, *sizes: int) -> None:
    from large import peak_kb, write_sparse  # type: ignore[import-not-found]

    from sparse_onnx import calibrate

    model = write_sparse(folder, *sizes)
    rows = np.random.default_rng(0).standard_normal((3, sizes[2])).astype(np.float32)
    np.savez(folder / "data.npz", x=rows)
    found = calibrate(model, folder / "data.npz", rows=16)
    peak = peak_kb() // 1024
    weights = sum(layer.bytes for layer in found.layers)
    loads = sum(found.blocks[0].loads)
    print(json.dumps({"peak_mb": peak, "weight_bytes": weights, "sites": len(found.layers), "loads": loads}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Quantizes a model made of a sparse file; prints what that took. Run as a script, so that it is alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "optimize"))

from large import peak_kb, write_sparse


def main() -> None:
    import sparse_onnx

    folder = Path(sys.argv[1])
    source = write_sparse(folder, *map(int, sys.argv[2:]))
    baseline = peak_kb()
    report = sparse_onnx.optimize(source, folder / "out.onnx", form="grouped", quantize="int4")
    assert report.model is not None and report.output is not None and report.verify is not None
    print(
        json.dumps(
            {
                "weight_bytes": report.model.weight_bytes,
                "output_bytes": report.output.weight_bytes,
                "baseline_mb": baseline // 1024,
                "peak_mb": peak_kb() // 1024,
                "method": report.verify.method,
                "passed": report.verify.passed,
            }
        )
    )


if __name__ == "__main__":
    main()

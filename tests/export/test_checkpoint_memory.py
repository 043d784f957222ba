"""Memory: what is left of it, and that an export's does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_onnx.export.checkpoint import memory


def test_available_memory_counts_control_groups(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("800\n")
    (tmp_path / "memory.stat").write_text(
        "anon 500\ninactive_file 200\nactive_file 100\ntotal_active_file 50\n"
    )
    assert memory.left_in(tmp_path) == [500]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.left_in(tmp_path) == [] == memory.left_in(tmp_path / "none")
    (tmp_path / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory.usage_in_bytes").write_text("700\n")
    assert memory.left_in_first_version(tmp_path) == [350]
    (tmp_path / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert memory.left_in_first_version(tmp_path) == [] == memory.left_in_first_version(tmp_path / "none")
    assert (memory.available_memory() or 0) > 1 << 20


def export_sparse(folder: Path, *sizes: int) -> dict[str, Any]:
    script = Path(__file__).with_name("large_checkpoint.py")
    command = [sys.executable, str(script), str(folder), *map(str, sizes)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("sizes", "gigabytes", "anonymous"),
    [
        pytest.param((1, 2048, 2816, 64), 2.0, 1000, id="2GB"),
        pytest.param((14, 4096, 14336, 8), 40.0, 4000, id="40GB", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, sizes: tuple[int, ...], gigabytes: float, anonymous: int
) -> None:
    result = export_sparse(tmp_path, *sizes)
    assert result["weight_bytes"] > gigabytes * 1e9 and result["exported_bytes"] >= result["weight_bytes"]
    assert result["peak_mb"]["RssAnon"] < anonymous
    assert result["passed"] and result["method"] == "whole"
    assert result["disk_bytes"] < gigabytes * 1e9 / 10, "holes were kept"

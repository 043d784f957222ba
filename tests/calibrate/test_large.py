"""Memory does not grow with the weights; the run is alone in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("large_calibration.py")


def test_weights_of_more_than_two_gigabytes_are_neither_copied_nor_held(tmp_path: Path) -> None:
    """128 experts, of which 3 tokens reach 24: what is read of them is mapped."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), *map(str, (128, 8, 2048, 768, 1))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weight_bytes"] > 2.4e9 and found["sites"] == 2 and found["loads"] == 24
    assert found["peak_mb"] < 1200
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "weights.bin") < 64e6

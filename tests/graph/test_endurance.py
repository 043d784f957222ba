"""Saves that are killed, and models larger than memory: both need processes of their own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _run(script: str, folder: Path) -> str:
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_killed_save_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    outcomes = ast.literal_eval(_run("killed.py", tmp_path))
    assert outcomes["random: old"] + outcomes["random: new"] == 20
    # Every call that changes files was hit, before the renaming and after it.
    assert outcomes["step: old"] >= 10 and outcomes["step: new"] >= 2


def test_20_gigabytes(tmp_path: Path) -> None:
    with open(tmp_path / "probe", "wb") as file:
        file.truncate(1 << 30)
    if os.stat(tmp_path / "probe").st_blocks > 2048:
        pytest.skip("this file system has no holes")
    assert int(_run("large.py", tmp_path)) < 400

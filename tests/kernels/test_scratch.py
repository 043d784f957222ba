"""No product writes behind the scratch that it asks for: each level against memory that is marked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sparse_onnx import kernels

#: What a processor must have for the levels above the one that runs everywhere.
_V3 = ("-mavx2", "-mfma", "-mf16c")
_V4 = (*_V3, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


def _processor() -> set[str]:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.parametrize(
    ("level", "flags"),
    [
        ("base", ()),
        pytest.param("v3", _V3, marks=pytest.mark.slow),
        pytest.param("v4", _V4, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_written_behind_the_scratch(level: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    if not {flag.removeprefix("-m") for flag in flags} <= {name.replace("_", "") for name in _processor()}:
        pytest.skip("the processor has not this level")
    native = Path(kernels.__file__).parent / "native"
    program = tmp_path / "guard"
    sources = [str(native / "linear.cc"), str(Path(__file__).parent / "scratch_guard.cc")]
    command = [compiler, "-O1", "-std=c++17", "-w", f"-DLEVEL={level}", *flags, f"-I{native}", *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[:2000]

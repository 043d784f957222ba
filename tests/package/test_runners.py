"""The runners that lie in a package, in processes of their own: with this onnxruntime and in the other runtimes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx.targets import runtimes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = save_external(
        layered_model(Shape(experts=6, hidden=32, inner=48, biases=True)), folder / "in.onnx"
    )
    sparse_onnx.package(source, folder / "out", forms=["branched", "fused"])
    return folder / "out"


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy of it"))


def ran(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ran(sys.executable, package / "run.py", *arguments)


def node(package: Path, runtime: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = runtimes.get(runtime)
    if not found.installed:
        pytest.skip(
            f"{found.versions} is not installed: python -m sparse_onnx.targets.runtimes install {runtime}"
        )
    return ran("node", package / "run.mjs", *arguments, NODE_PATH=str(found.folder / "node_modules"))


def fails(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert result.returncode == code, result
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def change(package: Path, **entries: object) -> None:
    found = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps({**found, **entries}))


def flip(path: Path) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wrong_outputs(package: Path) -> None:
    """As if another processor computed something else: files are as the manifest says."""
    import numpy as np

    from sparse_onnx.package.contents import digest

    found = json.loads((package / "manifest.json").read_text())
    for item in found["smoke"]["outputs"]:
        values = np.fromfile(package / item["file"], np.float32)
        values[0] += 0.1 * np.abs(values).max()
        values.tofile(package / item["file"])
    with np.load(package / "smoke/smoke.npz") as arrays:
        kept = dict(arrays)
    kept["output_0"] = values.reshape(found["smoke"]["outputs"][0]["shape"])
    np.savez(package / "smoke/smoke.npz", **kept)
    for name in found["files"]:
        path = package / name
        found["files"][name] = {"sha256": digest(path), "bytes": path.stat().st_size}
    change(package, files=found["files"])


def test_python(package: Path) -> None:
    result = python(package)
    assert result.returncode == 0 and result.stdout.startswith("ok: default (model.onnx), error ")
    assert "model.branched.onnx" in python(package, "--variant", "branched").stdout
    fails(python(package, "--variant", "round"), 2, "there is no variant 'round': default, branched, fused")


def test_python_needs_nothing_of_ours(package: Path) -> None:
    code = "import sys, runpy; sys.modules['sparse_onnx'] = sys.modules['onnx'] = None; "
    code += f"sys.argv = ['run.py']; runpy.run_path({str(package / 'run.py')!r}, run_name='__main__')"
    assert ran(sys.executable, "-c", code).returncode == 0


def test_python_as_a_module(package: Path) -> None:
    code = (
        "import numpy, run; s = run.session(); print(s.run(None, {'x': numpy.zeros((2, 32), 'f')})[0].shape)"
    )
    assert ran(sys.executable, "-c", code, PYTHONPATH=str(package)).stdout == "(2, 32)\n"


def test_damage_is_one_line(package: Path) -> None:
    flip(package / "model.data")
    fails(python(package), 3, "model.data is damaged: its sha256 is not that of manifest.json")
    os.truncate(package / "model.data", 100)
    fails(python(package), 3, "model.data has 100 bytes instead of ")
    (package / "model.data").unlink()
    fails(python(package), 3, "model.data is missing")
    (package / "manifest.json").write_text("{")
    fails(python(package), 3, "manifest.json cannot be read")


def test_other_outputs_are_one_line(package: Path) -> None:
    wrong_outputs(package)
    fails(python(package), 4, "output 'y' is off by 0.1")


def test_another_runtime_than_needed_is_one_line(package: Path) -> None:
    change(package, onnxruntime={"minimum": "99.1"})
    fails(python(package), 5, "is too old: 99.1 or newer is needed")
    change(package, onnxruntime={"minimum": "1.24"}, providers={"python": ["RocketExecutionProvider"]})
    fails(python(package), 5, "this onnxruntime has no RocketExecutionProvider")
    assert python(package, "--provider", "CPUExecutionProvider").returncode == 0


def test_a_provider_that_comes_as_a_plugin(package: Path, tmp_path: Path) -> None:
    change(package, plugin="no_such_plugin", providers={"python": ["RocketExecutionProvider"]})
    fails(python(package), 5, "RocketExecutionProvider comes with no_such_plugin, which is not installed")
    assert python(package, "--provider", "CPUExecutionProvider").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "webgpu", "qnn-htp"])
def test_other_providers(tmp_path: Path, target: str) -> None:
    runtime = runtimes.get(target)
    if not runtime.installed:
        pytest.skip(f"{runtime.versions} is not installed")
    source = save_external(
        layered_model(Shape(experts=6, hidden=32, inner=48, biases=True)), tmp_path / "in.onnx"
    )
    sparse_onnx.optimize(source, tmp_path / "static.onnx", target=target, static=[{"T": 4}])
    report = sparse_onnx.package(tmp_path / "static.onnx", tmp_path / "out", target=target)
    assert report.verify is not None and report.verify.on == runtime.versions
    result = ran(runtime.folder / "bin" / "python", tmp_path / "out" / "run.py", **runtime.variables())
    assert result.returncode == 0, result.stderr


def test_the_fastest_is_remembered_while_it_is_the_same_machine(package: Path) -> None:
    result = python(package, "--tune", "--rounds", "2")
    assert result.returncode == 0, result.stderr
    best = result.stdout.splitlines()[-1].removeprefix("fastest here: ")
    kept = json.loads((package / "tuned.json").read_text())
    assert kept["variant"] == best and result.stdout.count("tokens") == 6
    kept["variant"] = "branched"
    (package / "tuned.json").write_text(json.dumps(kept))
    assert python(package).stdout.startswith("ok: branched ")
    kept["here"]["onnxruntime"] = "1.0.0"
    (package / "tuned.json").write_text(json.dumps(kept))
    assert python(package).stdout.startswith("ok: default ")


def test_the_native_kernels(thresholded: Path, tmp_path: Path, kernels: Path) -> None:
    package = tmp_path / "out"
    sparse_onnx.package(thresholded, package)
    library = json.loads((package / "manifest.json").read_text())["kernels"]
    assert (package / library["file"]).read_bytes() == kernels.read_bytes()
    result = python(package)
    assert result.returncode == 0 and not result.stderr
    change(package, kernels={**library, "machine": "abacus"})
    result = python(package)
    assert result.returncode == 0 and "the native kernels are not for" in result.stderr
    change(package, kernels=library)
    (package / library["file"]).unlink()
    fails(python(package), 3, f"{library['file']} is missing")


def test_integer_weights_are_multiplied_as_they_are(
    thresholded_integers: Path, tmp_path: Path, kernels: Path
) -> None:
    package = tmp_path / "out"
    sparse_onnx.package(thresholded_integers, package)
    config = json.loads((package / "manifest.json").read_text())["config"]
    assert config == {"session.qdq_matmulnbits_accuracy_level": "1"}
    assert python(package).returncode == 0
    assert node(package, "node").returncode == 0


def test_the_oldest_onnxruntime(package: Path) -> None:
    oldest = runtimes.get("cpu-oldest")
    if not oldest.installed:
        pytest.skip(f"{oldest.versions} is not installed")
    result = ran(oldest.folder / "bin" / "python", package / "run.py")
    assert result.returncode == 0 and "on 1.24.1" in result.stdout


@pytest.mark.parametrize("runtime", ["node", "wasm"])
def test_javascript(package: Path, runtime: str) -> None:
    for variant in ("default", "branched"):
        result = node(package, runtime, "--variant", variant)
        assert result.returncode == 0 and result.stdout.startswith(f"ok: {variant} "), result.stderr
    change(package, onnxruntime={"minimum": "99.1"})
    fails(node(package, runtime), 5, "is too old: 99.1 or newer is needed")
    change(package, onnxruntime={"minimum": "1.24"})
    wrong_outputs(package)
    fails(node(package, runtime), 4, "output 'y' is off by 0.1")
    flip(package / "model.data")
    fails(node(package, runtime), 3, "model.data is damaged")


def test_javascript_without_a_runtime(package: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    fails(ran("node", package / "run.mjs", NODE_PATH=""), 5, "npm install onnxruntime-node")


def test_cpp(package: Path, tmp_path: Path) -> None:
    headers = os.environ.get("ONNXRUNTIME_INCLUDE", "")
    if not (Path(headers) / "onnxruntime_cxx_api.h").is_file():
        pytest.skip("ONNXRUNTIME_INCLUDE names no folder with onnxruntime_cxx_api.h")
    import onnxruntime

    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found or shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler, or no libonnxruntime.so in this onnxruntime")
    (tmp_path / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / "lib" / name).symlink_to(found[0])
    runner, place = tmp_path / "run", f"-L{tmp_path / 'lib'}"
    flags = ["-std=c++17", "-Wall", "-Werror", "-isystem", headers]
    built = ran("c++", *flags, package / "run.cc", "-o", runner, place, "-lonnxruntime", "-ldl")
    assert built.returncode == 0, built.stderr
    library = str(tmp_path / "lib")
    result = ran(runner, package, LD_LIBRARY_PATH=library)
    assert result.returncode == 0 and result.stdout.startswith("ok: model.onnx, error "), result.stderr
    os.truncate(package / "model.data", 100)
    fails(ran(runner, package, LD_LIBRARY_PATH=library), 3, "model.data has another size")
    text = (package / "manifest.txt").read_text()
    (package / "manifest.txt").write_text(
        text.replace("minimum 1.24", "minimum 99.1").replace("file ", "was ")
    )
    fails(ran(runner, package, LD_LIBRARY_PATH=library), 5, "is too old: 99.1")

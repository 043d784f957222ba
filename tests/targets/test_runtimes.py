from __future__ import annotations

import json
import subprocess

import pytest

from sparse_onnx import targets
from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError
from sparse_onnx.targets import places, runtimes


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtimes.FOLDER_VARIABLE, str(tmp_path))


def test_every_profiles_runtime_is_known_and_pinned() -> None:
    named = {targets.get(name).runtime for name in targets.names()} - {None}
    assert named <= set(runtimes.known())
    for runtime in runtimes.known().values():
        assert all("==" in package for package in runtime.packages)
        assert all("@" in package for package in runtime.npm) and (runtime.packages or runtime.npm)


def test_without_the_runtime_there_is_no_place() -> None:
    assert places.place(targets.get("webgpu")) is None
    with pytest.raises(UsageError, match="cannot be run on this machine") as caught:
        places.require(targets.get("webgpu"))
    assert caught.value.hint == "python -m sparse_onnx.targets.runtimes install webgpu"
    assert places.place(targets.get("cpu")) == places.CPU


def test_an_installation_that_was_cut_off_or_is_of_other_versions_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(runtimes, "_run", lambda command, folder=None: calls.append(list(command)))
    runtime = runtimes.get("wasm")
    assert not runtime.installed
    runtimes.install("wasm", lambda line: None)
    assert runtime.installed and any("onnxruntime-web@1.30.0" in call for call in calls)
    count = len(calls)
    runtimes.install("wasm", lambda line: None)
    assert len(calls) == count, "installed twice"
    (runtime.folder / "installed.json").write_text(json.dumps({"npm": ["onnxruntime-web@1.0.0"]}))
    assert not runtime.installed


def test_what_fails_is_told() -> None:
    with pytest.raises(UsageError, match="unknown runtime 'nothing'"):
        runtimes.install("nothing")
    with pytest.raises(ImpossibleError, match="there is no no-such-program"):
        runtimes._run(["no-such-program"])
    with pytest.raises(OutsideError, match="failed: it says so"):
        runtimes._run(["sh", "-c", "echo it says so >&2; exit 1"])


def test_importing_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran a program"))
    assert not runtimes.get("openvino").installed and places.place(targets.get("openvino")) is None


def test_what_is_simulated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name in runtimes.known() if places.simulated(f"runtime:{name}")} == {"webgpu", "qnn-htp"}
    assert not places.simulated(places.CPU) and not places.simulated("WebGpuExecutionProvider")


def test_the_browser_is_unpacked_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(runtimes, "_run", lambda command, folder=None: calls.append(list(command)))
    runtime = runtimes.get("chromium")
    runtimes.install("chromium", lambda line: None)
    assert [call[0] for call in calls] == ["npm", "node"] and runtime.finish in calls[-1]
    assert runtime.versions == "puppeteer-core 24.43.1, @sparticuz/chromium 153.0.0"
    assert runtime.variables()["LD_LIBRARY_PATH"].startswith(str(runtime.folder))

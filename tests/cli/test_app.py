"""The program as a whole: what it imports, how it fails, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import layered_model, save_external
from click.testing import CliRunner

from sparse_onnx.cli import app, main
from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError, UsageError, VerificationError

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")


def python(code: str, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **settings)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("from sparse_onnx.cli import main; main(prog_name='sparse-onnx')", *arguments)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["optimize", "--help"], ["export", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from sparse_onnx.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    result = python(code, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == "[]"
    assert "sparse-onnx" in result.stdout


def test_torch_is_not_needed_to_work_on_a_model(tmp_path: Path) -> None:
    path = save_external(layered_model(layers=1), tmp_path / "m.onnx")
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from sparse_onnx.cli import main\n"
        "model, out = sys.argv[1:]\n"
        "for line in (['inspect', model], ['optimize', model, out], ['verify', model, out], ['diff', model, out],\n"
        "             ['bench', model, out, '--tokens', '2', '--rounds', '1'], ['passes'], ['targets']):\n"
        "    try: main([*line, '-q'])\n"
        "    except SystemExit as stop: assert not stop.code, line\n"
    )
    result = python(code, str(path), str(tmp_path / "out.onnx"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_every_command_has_help_and_is_listed() -> None:
    listing = CliRunner().invoke(main, ["--help"]).stdout
    for name in app.COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0 and "--json" in result.stdout and "--debug" in result.stdout
        assert f"\n  {name} " in listing


def test_export_says_that_it_runs_code() -> None:
    text = " ".join(CliRunner().invoke(main, ["export", "--help"]).stdout.split())
    assert "FILE.py:NAME and package.module:NAME, as SOURCE and as --adapter, RUN THE USER'S CODE" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "a.onnx", "--nonsense"], "No such option"),
        (["optimize", "a", "b", "--form", "x"], "unknown form 'x'"),
        (["optimize", "a", "b", "--verify", "maybe"], "'maybe' is not one of"),
        (["optimize", "a", "b", "--pass", "fuse_gating:x"], "is not NAME:option=value"),
        (["bench", "a.onnx", "--tokens", "1,two"], "'1,two' is not a list of positive numbers"),
        (["bench", "a.onnx", "--tokens", "0"], "is not a list of positive numbers"),
        (["verify", "a", "b", "--threads", "0"], "0 is not in the range"),
        (["passes", "show"], "'show' needs a NAME"),
        (["passes", "list"], "'list' is not 'show'"),
        (["inspect", "a.onnx", "--json", "/no/such/folder/report.json"], "no folder for"),
        (["inspect", "a.onnx", "--json", ""], "'' is no file name"),
        (["inspect", "a.onnx", "--json", "/"], "'/' is a folder"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutsideError("disk"), 1),
        (UsageError("wrong"), 2),
        (ModelError("bad"), 3),
        (VerificationError("differs"), 4),
        (ImpossibleError("cannot"), 5),
        (OSError(28, "No space left on device", "out.onnx"), 1),
        (MemoryError(), 1),
        (ValueError("two\nlines \x1b[31m"), 1),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(path: object) -> None:
        raise error

    monkeypatch.setattr("sparse_onnx.inspect.api.inspect", fail)
    result = CliRunner().invoke(main, ["inspect", "x.onnx", "-q"])
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr and "Traceback" not in result.stderr


def test_an_error_has_place_hint_and_on_request_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object) -> None:
        raise ModelError("is cut short", "download it again", "a.onnx")

    monkeypatch.setattr("sparse_onnx.inspect.api.inspect", fail)
    quiet = CliRunner().invoke(main, ["inspect", "a.onnx", "-q"])
    assert quiet.stderr == "error: a.onnx: is cut short; download it again\n"
    loud = CliRunner().invoke(main, ["inspect", "a.onnx", "--debug", "-q"])
    assert "Traceback" in loud.stderr and loud.stderr.endswith(quiet.stderr) and loud.exit_code == 3


@pytest.mark.parametrize("command", ["inspect", "optimize", "verify", "bench", "diff"])
def test_a_missing_file_is_a_model_error(command: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.onnx")
    more = {"optimize": [str(tmp_path / "out.onnx")], "verify": [missing], "diff": [missing]}.get(command, [])
    result = CliRunner().invoke(main, [command, missing, *more, "-q"])
    assert result.exit_code == 3
    assert "missing.onnx" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--target", "quantum"], "unknown target 'quantum'"),
        (["--skip", "fuse_gatin"], "unknown pass 'fuse_gatin'"),
        (["--pass", "no_such_pass"], "unknown pass 'no_such_pass'"),
        (["--pass", "fuse_gating:speed=11"], "has no option 'speed'"),
    ],
)
def test_unknown_names_exit_2(options: list[str], name: str, tmp_path: Path) -> None:
    path = save_external(layered_model(layers=1), tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["optimize", str(path), str(tmp_path / "out.onnx"), "-q", *options])
    assert result.exit_code == 2 and name in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_onnx.inspect.api.inspect", interrupted)
    result = CliRunner().invoke(main, ["inspect", "a.onnx", "-q"])
    assert result.exit_code == 130 and "error: interrupted\n" in result.stderr


def test_a_signal_exits_130_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "import sparse_onnx.inspect.api as api\n"
        "def wait(path):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "api.inspect = wait\n"
        "from sparse_onnx.cli import main\n"
        "main(['inspect', 'a.onnx', '-q'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--help"], ["targets"], ["targets", "--json", "-", "-q"]])
def test_a_closed_pipe_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from sparse_onnx.cli import main; main(prog_name='sparse-onnx')"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["both", "stderr"])
def test_work_goes_on_when_nobody_reads_its_words(tmp_path: Path, closed: str) -> None:
    path = save_external(layered_model(layers=1), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sparse_onnx.cli", "optimize", str(path), str(out)]
    stdout = writer if closed == "both" else subprocess.PIPE
    try:
        result = subprocess.run(command, stdout=stdout, stderr=writer, check=False, timeout=120)
    finally:
        os.close(writer)
    assert result.returncode == 0 and out.exists()
    assert closed == "both" or b"verified: same answers" in result.stdout


def test_the_exit_code_is_the_works_though_nobody_reads(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sparse_onnx.cli", "inspect", str(tmp_path / "missing.onnx"), "--debug"]
    try:
        result = subprocess.run(command, stdout=writer, stderr=writer, check=False, timeout=120)
    finally:
        os.close(writer)
    assert result.returncode == 3


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path: Path, redirection: str) -> None:
    path = save_external(layered_model(layers=1), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    words = [sys.executable, "-m", "sparse_onnx.cli", "optimize", str(path), str(out)]
    result = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0 and out.exists()
    assert "Error" not in result.stderr and "Traceback" not in result.stderr


def test_a_full_disk_under_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sparse_onnx.cli", "targets"]
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    assert result.returncode == 1 and result.stderr.count("\n") == 1


def test_a_report_without_permission_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may write everywhere
    result = CliRunner().invoke(main, ["inspect", "a.onnx", "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 2 and "no permission to write" in result.stderr


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "sparse_onnx.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0 and result.stdout.startswith("sparse-onnx, version ")


def test_the_program_prints_the_same_as_the_function() -> None:
    result = program("targets")
    assert result.returncode == 0 and "CPUExecutionProvider" in result.stdout

from __future__ import annotations

import pytest

from sparse_onnx.targets import machine


def test_this_machine() -> None:
    assert machine.processor() and machine.cores() >= 1 and machine.cache_bytes() >= 1 << 15


def test_sizes_of_caches(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, text in enumerate(("32K", "2M", "x", "", "4096")):
        (tmp_path / f"size{number}").write_text(text)
    monkeypatch.setattr(machine.glob, "glob", lambda _: sorted(map(str, tmp_path.iterdir())))
    assert machine.cache_bytes() == 2 << 20
    monkeypatch.setattr(machine.glob, "glob", lambda _: [str(tmp_path / "none")])
    assert machine.cache_bytes() == 64 << 20

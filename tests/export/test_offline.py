"""Only a hub id may reach for the network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers
from architectures import write_config

import sparse_onnx
from sparse_onnx.core.errors import OutsideError


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts that were looked up or connected to; none is reached."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hosts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        hosts.append(str(args[:2]))
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return hosts


def test_a_folder_is_exported_without_network(tmp_path: Path, tried: list[str]) -> None:
    folder = write_config("mixtral", tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    sparse_onnx.export(folder, tmp_path / "out.onnx")
    assert tried == []


def test_a_hub_id_asks_for_it(tmp_path: Path, tried: list[str]) -> None:
    with pytest.raises(OutsideError, match="not on the hub"):
        sparse_onnx.export("nobody/nothing-of-this-name", tmp_path / "out.onnx")
    assert tried

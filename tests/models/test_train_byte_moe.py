"""models/train_byte_moe.py: the script that made the weights."""

import math
import subprocess
import sys

import pytest
import torch

from sparse_onnx.models import byte_moe, train_byte_moe
from sparse_onnx.models.byte_moe import ByteMoEConfig
from sparse_onnx.models.corpus import corpus_sha256, held_out_text

SMALL = ByteMoEConfig(hidden=16, layers=1, heads=2, experts=4, top_k=2, inner=12)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sparse_onnx.models.train_byte_moe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_steps_write_a_loadable_file_and_again_the_same(tmp_path):
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path in paths:
        done = run("--out", path, "--steps", 2, "--threads", 1)
        assert done.returncode == 0, done.stderr
        assert "expert load" in done.stdout and "bits per byte" in done.stdout

    model, metadata = byte_moe.read(paths[0])
    assert metadata["steps"] == 2 and metadata["corpus_sha256"] == corpus_sha256()
    found = train_byte_moe.evaluate(model, held_out_text())
    assert found == pytest.approx(metadata["held_out_bits_per_byte"], abs=1e-3) and found > 4
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths, "nothing else is left"


def test_a_folder_that_does_not_exist_is_refused_before_training(tmp_path):
    done = run("--out", tmp_path / "nowhere" / "x.safetensors")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_training_learns():
    text = b"the quick brown fox jumps over the lazy dog. " * 40
    model = train_byte_moe.train(text, steps=200, seed=0, config=SMALL)
    assert not model.training
    assert train_byte_moe.evaluate(model, text) < 3 < train_byte_moe.evaluate(byte_moe.ByteMoE(SMALL), text)


def test_the_seed_decides():
    text = held_out_text()
    weights = [
        train_byte_moe.train(text, steps=2, seed=seed, config=SMALL).state_dict()["embedding.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_windows_come_from_all_of_the_text_and_end_in_it():
    text = bytes(i // 4 for i in range(1024))
    batches = train_byte_moe.windows(text, torch.Generator().manual_seed(0))
    starts = set()
    for _ in range(200):
        for window in next(batches).tolist():
            assert len(window) == train_byte_moe.WINDOW + 1
            assert bytes(window) in text
            starts.add(window[0])
    assert min(starts) < 3 and max(starts) > 188


def test_the_learning_rate_warms_up_and_falls():
    rates = [train_byte_moe.learning_rate(step, 100) for step in range(100)]
    assert max(rates) == 1.0 and rates.index(1.0) == 4
    assert rates[0] == pytest.approx(0.2) and 0 < rates[-1] < 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert all(math.isfinite(train_byte_moe.learning_rate(step, 1)) for step in range(2))

"""Greedy generation in three ways, for tests to compare: torch, plain onnxruntime, onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[batch, longest]`, padding (0) on the left."""
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def by_torch(module: torch.nn.Module, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    ids, mask = padded(prompts)
    with torch.no_grad():
        tokens = module.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            do_sample=False,
            max_new_tokens=count,
            use_cache=True,
        )
    return tokens[:, ids.shape[1] :].tolist()


def by_onnxruntime(path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Knows nothing but the names and shapes of the model's inputs."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids, mask = padded(prompts)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    past = {
        value.name: np.zeros(
            [len(ids) if size == "batch" else size if isinstance(size, int) else 0 for size in value.shape],
            types[value.type],
        )
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    names = {value.name for value in session.get_inputs()}
    chosen: list[np.ndarray] = []
    while len(chosen) < count:
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past
        logits, *presents = session.run(None, {key: value for key, value in feeds.items() if key in names})
        chosen.append(logits[:, -1].argmax(axis=-1))
        ids = chosen[-1][:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        past = dict(zip(past, presents, strict=True))
    return np.stack(chosen, axis=1).tolist()


def by_genai(folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Batches with padding on the right, where onnxruntime-genai wants it."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    longest = max(map(len, prompts))
    pad = json.loads((folder / "genai_config.json").read_text())["model"].get("pad_token_id", 0)
    ids = np.array([list(prompt) + [pad] * (longest - len(prompt)) for prompt in prompts], np.int32)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=longest + count, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids if len(prompts) > 1 else ids[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]

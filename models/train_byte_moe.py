"""Trains the byte-level mixture of experts on CPython's documentation topics and writes it as safetensors.

``python -m sparse_onnx.models.train_byte_moe --out byte_moe.safetensors``: four minutes on two cores.
The same seed, threads, machine and versions give the same file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from sparse_onnx.core.errors import OutsideError, SparseOnnxError, UsageError
from sparse_onnx.models import routing
from sparse_onnx.models.byte_moe import METADATA_KEY, ByteMoE, ByteMoEConfig
from sparse_onnx.models.corpus import corpus_sha256, held_out_text, training_text
from sparse_onnx.models.quality import bits_per_byte

STEPS = 2600
# Few windows a step: at this model's size many small steps learn more in the same time than few large ones.
BATCH = 4
WINDOW = 256
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
WARM_UP = 0.05
GRADIENT_NORM = 1.0
BALANCE = 0.01


def windows(text: bytes, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches ``[BATCH, WINDOW + 1]`` from random places in the text."""
    ids = to_ids(text)
    while True:
        start = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
        yield ids[start[:, None] + torch.arange(WINDOW + 1)]


def to_ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak rate at a step: linear warm-up, then half a cosine down to almost zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(text: bytes, *, steps: int, seed: int, config: ByteMoEConfig) -> ByteMoE:
    """A model trained on random windows of `text`."""
    torch.manual_seed(seed)
    model = ByteMoE(config)
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    started, smooth = time.process_time(), 0.0
    batches = windows(text, torch.Generator().manual_seed(seed))
    for step in range(1, steps + 1):
        ids = next(batches)
        logits, router_logits = model.with_routing(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        balance = torch.stack([routing.load_balancing_loss(x, config.top_k) for x in router_logits]).sum()
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 250 == 0 or step == steps:
            seconds = time.process_time() - started
            click.echo(
                f"step {step}/{steps}: {smooth / math.log(2):.3f} bits per byte, {seconds:.0f} s of CPU"
            )
    return model.eval()


def _optimizer(model: ByteMoE) -> torch.optim.Optimizer:
    """AdamW which decays matrices, not the gains of the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


@torch.no_grad()
def evaluate(model: ByteMoE, text: bytes) -> float:
    """Bits per byte on the text."""
    return bits_per_byte(lambda ids: model(torch.from_numpy(ids)).numpy(), text)


@torch.no_grad()
def routing_on(model: ByteMoE, text: bytes) -> list[routing.RoutingStatistics]:
    """What each layer's router does on the text, in windows of the size of training."""
    ids = to_ids(text)
    whole = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return routing.statistics(model.with_routing(whole)[1], model.config.top_k)


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="safetensors file to write"
)
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
def main(out: Path, steps: int, seed: int, threads: int) -> None:
    """Train the byte-level mixture of experts on pydoc_data.topics and write its weights."""
    if not out.parent.is_dir():  # now, not after the training
        raise UsageError("its folder does not exist", "make it first", str(out))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    config = ByteMoEConfig()
    model = train(training_text(), steps=steps, seed=seed, config=config)
    held_out = evaluate(model, held_out_text())
    for layer, statistics in enumerate(routing_on(model, held_out_text())):
        load = " ".join(f"{share:.3f}" for share in statistics.load)
        click.echo(
            f"layer {layer}: expert load {load}; "
            f"top-k margin p1 {statistics.margin_p1:.4f}, p10 {statistics.margin_p10:.4f}"
        )
    click.echo(f"held out: {held_out:.4f} bits per byte")
    metadata = {
        "config": vars(config),
        "seed": seed,
        "steps": steps,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "corpus_sha256": corpus_sha256(),
        "held_out_bits_per_byte": round(held_out, 6),
    }
    _write(out, save(model.state_dict(), {METADATA_KEY: json.dumps(metadata)}))


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a killed or failed write leaves an old file whole."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutsideError(f"cannot write: {error.strerror}", where=str(path)) from error


if __name__ == "__main__":
    try:
        main()
    except SparseOnnxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

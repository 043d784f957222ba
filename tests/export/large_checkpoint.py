"""Exports a checkpoint of sparse files, of any size, and prints what that took. Run as a script, so that it is alone:

python large_checkpoint.py FOLDER LAYERS HIDDEN INNER EXPERTS [DTYPE]
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def config_of(
    layers: int, hidden: int, inner: int, experts: int, dtype: str
) -> transformers.PreTrainedConfig:
    return transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype=dtype,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_local_experts=experts,
        num_experts_per_tok=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=2048,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def write_sparse(folder: Path, config: transformers.PreTrainedConfig, shard_bytes: int) -> int:
    """A checkpoint as the model's authors publish it, one tensor an expert matrix, most of them a hole of the right
    size: no time and no disk. Norms are ones; routers, embeddings, the first layer's attention and two experts are
    random.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(config.dtype)
    stored: Mapping[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in stored.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map = {}
    last = f"layers.{config.num_hidden_layers - 1}."
    experts = (f"experts.{config.num_local_experts - 1}.", "layers.0", "experts.0.")
    generator = torch.Generator().manual_seed(0)
    for at, names in enumerate(shards):
        file = f"model-{at + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        offset, header = 0, {}
        for name in names:
            tensor = stored[name]
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = stored[name]
                if "norm" in name:
                    values = torch.ones(tensor.shape, dtype=tensor.dtype)
                elif (
                    any(word in name for word in ("gate.weight", "embed", "lm_head", "layers.0.self_attn"))
                    or (experts[1] in name and experts[2] in name)
                    or (last in name and experts[0] in name)
                ):
                    values = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
                else:
                    continue
                out.seek(8 + len(text) + header[name]["data_offsets"][0])
                out.write(values.to(tensor.dtype).view(torch.uint8).numpy().tobytes())
            out.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Peaks(threading.Thread):
    """Largest values of this process's memory, seen every few milliseconds: in kB, anonymous and of files apart."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.running = True

    def look(self) -> None:
        found = re.findall(r"(RssAnon|RssFile|VmHWM):\s+(\d+)", Path("/proc/self/status").read_text())
        for name, size in found:
            self.peaks[name] = max(self.peaks.get(name, 0), int(size))

    def run(self) -> None:
        while self.running:
            self.look()
            time.sleep(0.01)


def main() -> None:
    import sparse_onnx

    folder, *sizes = sys.argv[1:6]
    dtype = sys.argv[6] if len(sys.argv) > 6 else "bfloat16"
    root = Path(folder)
    sizes_of = [int(size) for size in sizes]
    total = write_sparse(root / "model", config_of(*sizes_of, dtype), 5 << 30)
    peaks = Peaks()
    peaks.look()
    before = dict(peaks.peaks)
    peaks.start()
    start = time.perf_counter()
    report = sparse_onnx.export(
        root / "model",
        root / "out.onnx",
        stream=True,
        progress=lambda text: print(
            f"{time.perf_counter() - start:7.1f} {text}", file=sys.stderr, flush=True
        ),
    )
    seconds = time.perf_counter() - start
    peaks.running = False
    assert report.model is not None and report.verify is not None
    data = root / "out.data"
    print(
        json.dumps(
            {
                "weight_bytes": total,
                "exported_bytes": report.model.weight_bytes,
                "disk_bytes": data.stat().st_blocks * 512,
                "before_mb": {name: size // 1024 for name, size in before.items()},
                "peak_mb": {name: size // 1024 for name, size in peaks.peaks.items()},
                "seconds": round(seconds, 1),
                "method": report.verify.method,
                "passed": report.verify.passed,
                "inputs": report.verify.inputs,
                "notes": report.notes,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Models that only look their tokens up, and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from text_graphs import graph

from sparse_onnx.graph.infer import infer

WORDS = ("the", "cat", "sat", "on", "mat", "[UNK]", "[CLS]", "[SEP]")


def lookup(rows: int = 8, inputs: str = "int64[batch, seq] input_ids", extra: str = "") -> ir.Model:
    """Rows of a table, and whatever the other inputs are for."""
    body = f"x = Gather (table, input_ids) {extra} y = Relu (x)"
    return inferred(graph(body, "y", {"table": np.zeros((rows, 4)), "types": np.zeros((2, 4))}, inputs))


def rows(inputs: str = "float[batch, 4] x") -> ir.Model:
    return inferred(graph("y = Relu (x)", "y", {}, inputs))


def inferred(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    infer(model)
    return model


def word_tokenizer(folder: Path, special: bool) -> Path:
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {word: at for at, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 7), ("[CLS]", 6))
        tokenizer.enable_padding(length=32)
        tokenizer.enable_truncation(3)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path

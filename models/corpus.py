"""The text that the zoo's language models learn from: `pydoc_data.topics`, which comes with CPython.

A topic is held out by a hash of its name alone, so that the choice is the same on every Python version, whose
texts differ. Many topics repeat each other (``if`` is a part of ``compound``, ``customization`` of
``specialnames``): a fifth of the text. So a paragraph counts once in the whole corpus, and belongs to the
held-out side if any topic that has it does: what is held out was never trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from sparse_onnx.core.errors import UsageError

# Of eleven salts, the one whose held-out side is close to a tenth of the text and has the most topics. Chosen
# before any model was trained.
_SALT = "5:"
_HELD_OUT_ONE_IN = 10


def is_held_out(topic: str) -> bool:
    """Whether the topic of that name is for evaluation, not for training."""
    digest = hashlib.sha256((_SALT + topic).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def split(topics: dict[str, str]) -> tuple[bytes, bytes]:
    """Training and held-out text (UTF-8), topics in the order of their names, no paragraph twice."""
    seen: set[str] = set()
    held_out = _unseen_paragraphs((topics[name] for name in sorted(topics) if is_held_out(name)), seen)
    training = _unseen_paragraphs((topics[name] for name in sorted(topics) if not is_held_out(name)), seen)
    return training, held_out


def training_text() -> bytes:
    """What models are trained on (about 340 KB)."""
    return split(_topics())[0]


def held_out_text() -> bytes:
    """What models are measured on (about 37 KB)."""
    return split(_topics())[1]


def corpus_sha256() -> str:
    """Identifies the text of both sides: measurements compare only where this is equal."""
    training, held_out = split(_topics())
    return hashlib.sha256(hashlib.sha256(training).digest() + hashlib.sha256(held_out).digest()).hexdigest()


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError(
            "this Python comes without pydoc_data.topics", "install its whole standard library"
        ) from error
    return topics


def _unseen_paragraphs(texts: Iterable[str], seen: set[str]) -> bytes:
    """The paragraphs that are not in `seen` (compared without regard to white space), which gains them."""
    kept = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return ("\n\n".join(kept) + "\n").encode()

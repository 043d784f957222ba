"""Text for the bench of real models: what is calibrated on, and what is measured on, which share no document.

Editorials of the New York Times, reviews of films and of products, rated by people (Hutto and Gilbert, ICWSM 2014, in
the sdist of vaderSentiment), and the topics of CPython's own documentation. A document belongs to one side by a hash of
its number; the topics by `models.corpus`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from sparse_onnx.bench.real_models import unpacked
from sparse_onnx.models import corpus

_FILES = {"nyt": "nytEditorialSnippets", "films": "movieReviewSnippets", "products": "amazonReviewSnippets"}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One that people rated from -4 to 4. `document` is what it was taken from."""

    source: str
    document: str
    rating: float
    text: str

    @property
    def held_out(self) -> bool:
        """Whether its document is measured on, not calibrated on."""
        digest = hashlib.sha256(f"{self.source} {self.document}".encode()).digest()
        return digest[0] % 2 == 1


@dataclasses.dataclass(frozen=True)
class Texts:
    """Files: `calibration` of running text and of sentences a line; `evaluation` of running text, one a kind."""

    calibration: Path
    sentences: Path
    evaluation: tuple[Path, ...]


def sentences(cache: Path | None = None) -> list[Sentence]:
    """All of them, in the order of the files.

    Raises:
        OutsideError: pip cannot download them.
    """
    folder = unpacked("text", cache)
    found = []
    for source, name in _FILES.items():
        [path] = folder.rglob(f"{name}_GroundTruth.txt")
        for line in path.read_text(encoding="utf-8").splitlines():
            number, rating, text = line.split("\t", 2)
            found.append(Sentence(source, number.split("_")[0], float(rating), text.strip()))
    return found


def write_texts(folder: Path, cache: Path | None = None) -> Texts:
    """Writes the files; the same on every machine with the same Python version.

    `calibration.txt`: half of the editorials and the training side of the topics. `nyt.txt` and `pydoc.txt`: the other
    halves. `sentences.txt`: reviews of the calibration side; those of the other side are for `sentences`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = sentences(cache)
    training, held_out = corpus.training_text(), corpus.held_out_text()
    kept = [each for each in every if not each.held_out]
    contents = {
        "calibration": _documents([each for each in kept if each.source == "nyt"]).encode() + training,
        "sentences": "\n".join(each.text for each in kept if each.source != "nyt").encode(),
        "nyt": _documents([each for each in every if each.held_out and each.source == "nyt"]).encode(),
        "pydoc": held_out,
    }
    paths = {name: folder / f"{name}.txt" for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    return Texts(paths["calibration"], paths["sentences"], (paths["nyt"], paths["pydoc"]))


def _documents(found: list[Sentence]) -> str:
    """Sentences of a document behind each other, a document a line."""
    documents: dict[str, list[str]] = {}
    for each in found:
        documents.setdefault(each.document, []).append(each.text)
    return "".join(" ".join(texts) + "\n" for texts in documents.values())

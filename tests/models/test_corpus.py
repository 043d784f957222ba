"""models/corpus.py: what is trained on and what is held out."""

import re

import pytest

from sparse_onnx.models import corpus


def paragraphs(text: bytes) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.decode())]


def test_a_tenth_is_held_out():
    training, held_out = corpus.training_text(), corpus.held_out_text()
    assert 0.03 < len(held_out) / (len(training) + len(held_out)) < 0.3  # 0.098 on Python 3.11
    assert len(training) > 200_000


def test_no_paragraph_occurs_twice_or_on_both_sides():
    everything = paragraphs(corpus.training_text()) + paragraphs(corpus.held_out_text())
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize(
    ("topic", "held_out"),
    [("attribute-access", True), ("exceptions", True), ("if", False), ("lambda", False)],
)
def test_the_split_is_by_name_and_never_changes(topic, held_out):
    assert corpus.is_held_out(topic) is held_out


def test_a_shared_paragraph_is_held_out_wherever_it_stands():
    topics = {
        "attribute-access": "only here\n\n   shared  by both",  # held out
        "aaa": "first\n\nshared\nby both\n\nlast\n\nfirst",
    }
    training, held_out = corpus.split(topics)
    assert held_out == b"only here\n\n   shared  by both\n"
    assert training == b"first\n\nlast\n"


def test_the_split_keeps_its_sides_when_a_topic_is_added():
    topics = {"attribute-access": "a", "if": "b"}
    training, held_out = corpus.split(topics)
    more_training, more_held_out = corpus.split({**topics, "lambda": "c"})
    assert more_held_out == held_out and more_training.startswith(training.rstrip())


def test_the_hash_tells_the_sides_apart(monkeypatch):
    monkeypatch.setattr(corpus, "_topics", lambda: {"attribute-access": "a", "if": "b"})
    first = corpus.corpus_sha256()
    monkeypatch.setattr(corpus, "_topics", lambda: {"attribute-access": "b", "if": "a"})
    assert corpus.corpus_sha256() != first

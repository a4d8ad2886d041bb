"""How alike two words or phrases are: the cosine of their vectors, as AMBER's script takes it from spaCy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from eah.eval.files import read_text

Similarity = Callable[[str, str], float]


def similarity_of(name: str) -> Similarity:
    """name: none (equal words only), spacy:MODEL, or a file with a word and its numbers a line.

    Raises:
        ImportError: spaCy or its model is not installed.
        ValueError: the file is not of that form.
    """
    if name == "none":
        return lambda one, other: float(one == other)
    if name.startswith("spacy:"):
        return _of_spacy(name.removeprefix("spacy:"))
    vectors = _read(name)

    @cache
    def vector(phrase: str):
        found = [vectors[word] for word in phrase.split() if word in vectors]
        return sum(found) if found else None

    @cache
    def similarity(one: str, other: str) -> float:
        a, b = vector(one), vector(other)
        if one == other:
            return 1.0
        norm = 0.0 if a is None or b is None else float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / norm if norm else 0.0

    return similarity


def _of_spacy(model: str) -> Similarity:
    try:
        import spacy
    except ModuleNotFoundError as missing:
        raise ImportError('the similarity of words needs spaCy: pip install "eah-kernels[eval]"') from missing
    try:
        parse = lru_cache(maxsize=None)(spacy.load(model))
    except OSError as missing:
        raise ImportError(f"spaCy has no model {model}: python -m spacy download {model}") from missing
    return lru_cache(maxsize=None)(lambda one, other: float(parse(one).similarity(parse(other))))


def _read(path: str) -> dict[str, np.ndarray]:
    vectors = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        word, *numbers = line.split()
        try:
            vectors[word] = np.array([float(text) for text in numbers])
        except ValueError:
            vectors[word] = np.array([np.nan])
        if not np.isfinite(vectors[word]).all():
            raise ValueError(f"{path}, line {number} must be a word and finite numbers, got {line.strip()[:60]!r}")
        if len(numbers) != len(next(iter(vectors.values()))) or not numbers:
            raise ValueError(f"{path}, line {number} has {len(numbers)} numbers, the first has another count, or none")
    if not vectors:
        raise ValueError(f"{path} is empty")
    return vectors

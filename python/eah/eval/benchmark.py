"""What the benchmarks have in common: items, how one answer is judged, and metrics that are ratios of sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Item:
    """One question about one picture. image: the name of its file, which is also the unit of the bootstrap."""

    id: int | str
    image: str
    prompt: str
    label: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said. stopped and heads are None where an answer file does not tell."""

    text: str
    stopped: str | None = None
    heads: Mapping[str, int | None] | None = None


class Judged(NamedTuple):
    """detail: the line of details/*.jsonl; counts: what it adds to the benchmark's sums, absent ones 0."""

    detail: dict
    counts: dict[str, int]
    unparsed: bool = False


class Benchmark(Protocol):
    name: str
    max_new_tokens: int
    parts: Mapping[str, list[Item]]
    files: list[Path]  # all that was read
    answer_keys: tuple[tuple[str, str], ...]  # of answer files: the names of the id and of the answer
    complete: bool  # an answer file has to answer every item
    counted: tuple[str, ...]  # the names of all sums

    def judge(self, item: Item, answer: str) -> Judged: ...

    def metrics(self, sums: Mapping[str, int | np.ndarray]) -> dict[str, np.ndarray]:
        """Every metric from the sums over answers, elementwise; NaN where it is undefined."""

    def official(self, sums: Mapping[str, float]) -> dict | None:
        """What the official script prints, where that is something else."""
        return None

    def where(self, part: str) -> str:
        """What holds a part's items, for messages."""


def ratio(part, whole) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Undefined where either is, and where both are 0."""
    return ratio(2 * precision * recall, precision + recall)

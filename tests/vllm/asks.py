"""What the engines of the tests are asked: requests as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

THRESHOLD = 0.02


class Ask(NamedTuple):
    """A letter of `text` is a token, I a picture: those of `seeds` in their order. `eah`: None does not say."""

    text: str
    seeds: tuple[int, ...] = ()
    eah: Any = None
    tokens: int = 8
    options: Mapping[str, Any] = MappingProxyType({})  # of SamplingParams
    priority: int = 0
    lora: bool = False  # with the adapter that is saved beside the model

    @property
    def enhanced(self) -> bool:
        return bool(self.seeds) and self.eah != "off"


def letters(count: int, start: int = 0) -> str:
    """Text without a period that a model could fall into."""
    return "".join(chr(ord("a") + (start + i * i) % 26) for i in range(count))


LONG = letters(140)  # more than a block of 128 tokens
MIXED = [
    Ask("abIcdefgh", (0,)),
    Ask("abIcdefgh", (0,), "off"),
    Ask("xyzImnoIq", (1, 2)),
    Ask("hello"),
    Ask("I" + letters(40), (3,)),
    Ask("Iab", (4,), "off"),
    Ask("kIlI", (5, 5)),
    Ask(letters(30) + "I", (6,), "on"),
]
TWICE = [Ask(LONG + "I" + "abc", (7,)), Ask(LONG + "I" + "abc", (7,), "off"), Ask(LONG + "uvw")]

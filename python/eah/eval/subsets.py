"""Which items are asked: subsets of images, drawn at random or listed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from eah.eval.benchmark import Item
from eah.eval.files import read_text

Parts = Mapping[str, Sequence[Item]]


def images_of(parts: Parts) -> set[str]:
    return {item.image for items in parts.values() for item in items}


def sliced(parts: Parts, limit: int | None, count: int, seed: int) -> dict[str, list[Item]]:
    """The items of `count` disjoint subsets of `limit` images; several are parts of their own, by number from 1 on.

    The images' names are sorted, shuffled once by random.Random(seed), and cut into slices.

    Raises:
        ValueError: there are fewer images.
    """
    if limit is None:
        return {part: list(items) for part, items in parts.items()}
    images = sorted(images_of(parts))
    if limit * count > len(images):
        raise ValueError(f"--limit {limit} x --subsets {count} are {limit * count} images, and there are {len(images)}")
    random.Random(seed).shuffle(images)
    found = {}
    for number in range(count):
        chosen = set(images[number * limit : (number + 1) * limit])
        for part, items in parts.items():
            name = part if count == 1 else f"{number + 1}" if len(parts) == 1 else f"{part}-{number + 1}"
            found[name] = [item for item in items if item.image in chosen]
    return found


def listed(parts: Parts, path: str) -> dict[str, list[Item]]:
    """The items whose image the file lists, one a line: the name of its file or, for CHAIR, its number.

    Raises:
        ValueError: a line that is of no item, or twice.
    """
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    images = images_of(parts)
    asked = [item for items in parts.values() for item in items]
    by_id = {str(item.id): item.image for item in asked} if len(asked) == len(images) else {}
    chosen = {}
    for number, line in enumerate(lines, 1):
        image = line if line in images else by_id.get(line.lstrip("0"), by_id.get(line))
        if image is None:
            raise ValueError(f"{path}, line {number}: {line!r} is an image without annotations")
        if image in chosen:
            raise ValueError(f"{path}, line {number}: {line!r} was there before")
        chosen[image] = number
    return {part: [item for item in items if item.image in chosen] for part, items in parts.items()}


def with_files(parts: Parts, folder: str) -> dict[str, list[Item]]:
    """The items whose image lies in the folder."""
    return {part: [item for item in items if (Path(folder) / item.image).is_file()] for part, items in parts.items()}

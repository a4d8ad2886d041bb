"""Pictures of a few glyphs with the names of COCO's objects, and the files that benchmarks are made of."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOMS = (
    ("dog", "cat", "horse", "cow"),
    ("car", "bus", "truck", "bicycle"),
    ("bed", "chair", "couch", "clock"),
    ("pizza", "apple", "banana", "cake"),
)
OBJECTS = tuple(name for room in ROOMS for name in room)
COLOURS = ((214, 40, 40), (30, 136, 70), (37, 83, 204), (232, 182, 26))
GRID, CELL = 3, 16  # cells a side, pixels a cell
SIDE = GRID * CELL
GROUND = (128, 128, 128)
OF_THE_ROOM = 0.75  # share of a scene's objects
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Scene:
    """The cell of each object, in reading order."""

    cells: dict[int, str]

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(self.cells.values())

    def pixels(self) -> np.ndarray:
        """(SIDE, SIDE, 3) uint8."""
        picture = np.empty((SIDE, SIDE, 3), np.uint8)
        picture[:] = GROUND
        for cell, name in self.cells.items():
            top, left = CELL * (cell // GRID), CELL * (cell % GRID)
            picture[top : top + CELL, left : left + CELL] = GLYPHS[name]
        return picture

    def caption(self) -> str:
        *some, last = (f"a {name}" for name in self.objects)
        return f"{' , '.join(some)} and {last} ."


def scene(chance: random.Random) -> Scene:
    """Two to four objects, most of them of one room."""
    room = chance.choice(ROOMS)
    others = [name for name in OBJECTS if name not in room]
    chosen: set[str] = set()
    number = chance.randint(2, 4)
    while len(chosen) < number:
        chosen.add(chance.choice(room if chance.random() < OF_THE_ROOM else others))
    cells = chance.sample(range(GRID * GRID), number)
    names = sorted(chosen, key=OBJECTS.index)
    chance.shuffle(names)
    return Scene(dict(sorted(zip(cells, names, strict=True))))


def glyph(number: int) -> np.ndarray:
    picture = Image.new("RGB", (CELL, CELL), GROUND)
    draw, colour = ImageDraw.Draw(picture), COLOURS[(number + number // 4) % 4]
    low, high, middle = 2, CELL - 3, CELL // 2
    if number % 4 == 0:
        draw.ellipse((low, low, high, high), fill=colour)
    elif number % 4 == 1:
        draw.rectangle((low, low, high, high), fill=colour)
    elif number % 4 == 2:
        draw.polygon(((middle, low), (high, high), (low, high)), fill=colour)
    else:
        draw.rectangle((middle - 2, low, middle + 1, high), fill=colour)
        draw.rectangle((low, middle - 2, high, middle + 1), fill=colour)
    if number >= 8:  # two glyphs of a form and colour differ by a white hole
        draw.rectangle((middle - 2, middle - 2, middle + 1, middle + 1), fill=(255, 255, 255))
    return np.asarray(picture)


GLYPHS = {name: glyph(number) for number, name in enumerate(OBJECTS)}


def write(folder: Path, scenes: list[Scene], noise: float, seed: int) -> None:
    """Pictures with Gaussian pixel noise, POPE's three question files, COCO's instances and captions, synonyms."""
    chance, noisy = random.Random(seed), np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"scene_{number:04}.png" for number in range(1, len(scenes) + 1)]
    for name, one in zip(names, scenes, strict=True):
        pixels = one.pixels() + noisy.normal(0, noise, (SIDE, SIDE, 3))
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    instances = [
        {"image_id": number, "category_id": OBJECTS.index(name)}
        for number, one in enumerate(scenes, 1)
        for name in one.objects
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(OBJECTS)]
    captions = [{"image_id": number, "caption": one.caption()} for number, one in enumerate(scenes, 1)]
    _write(folder / "instances_val2014.json", {"images": images, "categories": categories, "annotations": instances})
    _write(folder / "captions_val2014.json", {"images": images, "annotations": captions})
    (folder / "synonyms.txt").write_text("\n".join(OBJECTS))
    for part, absent in absentees(scenes, chance).items():
        lines = []
        for name, one, missing in zip(names, scenes, absent, strict=True):
            asked = [(there, "yes") for there in one.objects[: len(missing)]] + [(gone, "no") for gone in missing]
            lines += [
                {"question_id": len(lines) + n, "image": name, "text": f"Is there a {what}?", "label": label}
                for n, (what, label) in enumerate(asked, 1)
            ]
        (folder / f"scenes_pope_{part}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def absentees(scenes: list[Scene], chance: random.Random) -> dict[str, list[list[str]]]:
    """Objects that are not there, as many as are asked of those that are: any, the most frequent, the usual company."""
    frequent = Counter(name for one in scenes for name in one.objects)
    together = Counter(pair for one in scenes for pair in combinations(sorted(one.objects), 2))

    def company(one: Scene, name: str) -> int:
        return sum(together[tuple(sorted((name, there)))] for there in one.objects)

    found: dict[str, list[list[str]]] = {"random": [], "popular": [], "adversarial": []}
    for one in scenes:
        absent = [name for name in OBJECTS if name not in one.objects]
        number = min(3, len(one.objects))
        found["random"].append(chance.sample(absent, number))
        found["popular"].append(sorted(absent, key=lambda name: -frequent[name])[:number])
        found["adversarial"].append(sorted(absent, key=lambda name, one=one: -company(one, name))[:number])
    return found


def _write(path: Path, content) -> None:
    path.write_text(json.dumps(content))

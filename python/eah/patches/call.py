"""What a layout is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from eah.patches.geometry import Box, Drawn, Size


class NoOverlayError(Exception):
    """Where the image tokens come from cannot be said; the message is the reason."""


class Cell(NamedTuple):
    """One image token."""

    box: Box | None  # of the picture as it is stored
    kind: str  # as in `Grid.kinds`
    tile: int = 0


@dataclass(frozen=True)
class Call:
    """What a processor made of some pictures, and for which model."""

    processor: Any
    inputs: Mapping[str, Any]
    config: Any
    pictures: list[Any]
    sizes: list[Size]  # of each picture as it is stored
    image_mask: Tensor  # (B, S) bool, the image tokens of the pictures

    @property
    def image_processor(self):
        return self.processor.image_processor

    def pixels(self) -> Any:
        """All that the vision encoder gets, in the processor's form."""
        pixels = self.inputs.get("pixel_values")
        if pixels is None:
            raise NoOverlayError("inputs have no pixel_values")
        return pixels

    def input(self, name: str, index: int) -> Any:
        """Of an input that the processor makes with one entry a picture, that of picture `index`."""
        values = self.inputs.get(name)
        if values is None or len(values) != len(self.sizes):
            entries = "no" if values is None else f"{len(values)} of"
            raise NoOverlayError(f"inputs have {entries} {name}, images are {len(self.sizes)}")
        return values[index]


def patches(drawn: Drawn, rows: int, columns: int, area: Box, kind: str = "patch", tile: int = 0) -> list[Cell]:
    """Rows x columns equal cells of a rectangle of the canvas, row by row; "padding" where one shows no picture."""
    x, y, width, height = area[0], area[1], (area[2] - area[0]) / columns, (area[3] - area[1]) / rows
    return [
        patch(
            drawn, (x + column * width, y + row * height, x + (column + 1) * width, y + (row + 1) * height), kind, tile
        )
        for row in range(rows)
        for column in range(columns)
    ]


def patch(drawn: Drawn, cell: Box, kind: str = "patch", tile: int = 0) -> Cell:
    box = drawn.shown_by(cell)
    return Cell(box, kind if box else "padding", tile)


def kind_of(image_processor) -> str:
    """The name of its class, whichever library resizes."""
    return type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")


def expect(image_processor, *names: str) -> None:
    """
    Raises:
        NoOverlayError: an image processor of another kind.
    """
    if kind_of(image_processor) not in names:
        raise NoOverlayError(f"what {type(image_processor).__name__} does to a picture is not known")


def resized(image_processor, old: Size) -> Size:
    """The width and height that the image processors of CLIP and SigLIP resize to."""
    size = image_processor.size
    given = {name: size.get(name) for name in ("height", "width", "shortest_edge", "longest_edge") if size.get(name)}
    if set(given) == {"height", "width"}:
        return given["width"], given["height"]
    if set(given) == {"shortest_edge"}:
        new_short, short, long = given["shortest_edge"], min(old), max(old)
        new_long = int(new_short * long / short)
        return (new_short, new_long) if old[0] <= old[1] else (new_long, new_short)
    raise NoOverlayError(f"how {kind_of(image_processor)} resizes to {given} is not known")

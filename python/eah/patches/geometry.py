"""Rectangles: of a picture, of the canvas that it is drawn on for a vision encoder, and of that canvas's cells."""

from __future__ import annotations

from typing import NamedTuple

Box = tuple[float, float, float, float]  # x0, y0, x1, y1; x to the right, y down, the upper left corner is (0, 0)
Size = tuple[int, int]  # width, height
EXIF_ORIENTATION = 0x0112


class Drawn(NamedTuple):
    """`part` of a picture, in its pixels, fills the rectangle `at` of a canvas, in the canvas's pixels.

    `at` may reach over the edge of the canvas: what is there was cropped.
    """

    part: Box
    at: Box

    def shown_by(self, cell: Box) -> Box | None:
        """The rectangle of the picture that a cell of the canvas shows; None where it shows none of it (padding)."""
        left, right = _back(cell[0], cell[2], (self.at[0], self.at[2]), (self.part[0], self.part[2]))
        top, bottom = _back(cell[1], cell[3], (self.at[1], self.at[3]), (self.part[1], self.part[3]))
        return (left, top, right, bottom) if left < right and top < bottom else None


def _back(low: float, high: float, at: tuple[float, float], part: tuple[float, float]) -> tuple[float, float]:
    """An interval of the canvas, cut to what is drawn, in the picture's pixels."""
    scale = (part[1] - part[0]) / (at[1] - at[0])
    low, high = (part[0] + (min(max(end, at[0]), at[1]) - at[0]) * scale for end in (low, high))
    return low, high


def whole(size: tuple[float, float]) -> Box:
    """The rectangle of this width and height in the corner."""
    return 0, 0, *size


def squared(size: Size) -> Box:
    """Where a picture is when it is padded to a square."""
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def upright(box: Box, size: Size, orientation: int) -> Box:
    """A rectangle of a picture as it is stored, size (width, height), in the picture as EXIF says that it is seen."""
    width, height = size
    x0, y0, x1, y1 = box
    if orientation in (2, 3, 7, 8):  # columns are stored from right to left
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):  # rows are stored from bottom to top
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)

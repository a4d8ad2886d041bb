"""Where in a picture each of a model's image tokens comes from, for pictures of what attention does.

>>> from eah.patches import grids
>>> inputs = processor(images=picture, text=prompt, return_tensors="pt")
>>> (grid,) = grids(processor, inputs, [picture], model.config)
>>> grid.boxes[0], inputs["input_ids"][grid.row, grid.positions[0]]

A vision encoder mixes its patches: a box is where a token comes from, not all that it has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eah.patches.call import Call, NoOverlayError
from eah.patches.geometry import EXIF_ORIENTATION, Box, upright
from eah.patches.layouts import layout_of
from eah.transformers.families import FAMILIES, Differs, Works
from eah.transformers.find import UnsupportedModelError, placeholder_ids

__all__ = ["Box", "Grid", "grids"]


@dataclass(frozen=True)
class Grid:
    """The image tokens of one picture; or, with a `reason`, those of one row that could not be laid over pictures.

    `positions`, `boxes`, `kinds` and `tiles` have an entry a token, in the order of the row. With a `reason`, every box
    is None, every kind "unplaced" and every tile 0: the tokens can only be shown in reading order.
    """

    row: int  # of inputs["input_ids"]
    image: int | None  # the picture's index in `images`; None where the tokens may be of several pictures or of none
    size: tuple[int, int] | None  # the picture's width and height in pixels, upright; None as `image` is
    positions: tuple[int, ...]  # in the row
    boxes: tuple[Box | None, ...]  # x0, y0, x1, y1 in the upright picture's pixels; None for a token without a place
    kinds: tuple[str, ...]  # "patch", "global" (of a view of the whole picture), "newline", "padding", "unplaced"
    tiles: tuple[int, ...]  # which of the picture's views the token is of, in the order in which the encoder gets them
    reason: str | None = None


def grids(processor, inputs: Mapping[str, Any], images, config) -> list[Grid]:
    """Where each image token comes from, picture by picture.

    Args:
        processor: the model's processor, of transformers.
        inputs: what it made of the prompts and `images`, as tensors: input_ids (B, S) and the rest.
        images: the PIL picture, or the pictures in the order of the prompts; lists of lists are taken one after the
            other. They are those that the processor was given: one with an EXIF orientation was seen by the model as
            it is stored, and its boxes are in the upright picture.
        config: the model's config.

    Returns:
        Row by row, a `Grid` for each picture. The positions of a row's grids together are the image tokens of EAH's
        own mask. Nothing is guessed: where the family or the image processor is not known, or where the tokens that
        the family has for these pictures are not as many as the row has, there is one `Grid` a row, with the reason.
        So there is for the tokens of videos.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        UnsupportedModelError: a config without image tokens.
    """
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise TypeError(
            "processor must be a processor of transformers, with an image_processor and a tokenizer, "
            f"got {type(processor).__name__}"
        )
    if not hasattr(config, "model_type"):
        raise TypeError(f"config must be a model's config, got {type(config).__name__}")
    pictures = list(_flat(images))
    image_mask, video_mask = _masks(inputs, config)
    stored = [picture.size for picture in pictures]
    turns = [picture.getexif().get(EXIF_ORIENTATION, 1) for picture in pictures]
    sizes = [size[::-1] if turn >= 5 else size for size, turn in zip(stored, turns, strict=True)]
    try:
        layout = layout_of(config.model_type)
        call = Call(processor, inputs, config, pictures, stored, image_mask)
        cells = [layout(call, index) for index in range(len(pictures))]
        owners = _owners(image_mask, [len(tokens) for tokens in cells])
    except NoOverlayError as why:
        alone = 0 if len(pictures) == 1 and image_mask.any(1).sum() == 1 else None
        found = [_unplaced(row, mask, alone, sizes, str(why)) for row, mask in enumerate(image_mask)]
    else:
        found = []
        for index, (row, positions) in enumerate(owners):
            boxes = [cell.box and upright(cell.box, stored[index], turns[index]) for cell in cells[index]]
            kinds, tiles = (tuple(getattr(cell, name) for cell in cells[index]) for name in ("kind", "tile"))
            found.append(Grid(row, index, sizes[index], positions, tuple(boxes), kinds, tiles))
    videos = [_unplaced(row, mask, None, sizes, "they are of a video") for row, mask in enumerate(video_mask)]
    return sorted((grid for grid in found + videos if grid.positions), key=lambda grid: grid.row)


def _flat(images) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flat(image)
    elif hasattr(images, "getexif") and hasattr(images, "load"):
        images.load()  # of a TIFF this changes what EXIF says: PIL turns its pixels upright
        yield images
    else:
        raise TypeError(f"images must be PIL pictures, as PIL.Image.open gives them, got {type(images).__name__}")


def _masks(inputs, config) -> tuple[Tensor, Tensor]:
    """The image tokens of EAH's own mask, (B, S) bool: those of pictures and those of videos."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError('inputs must be what the processor returns, with return_tensors="pt": input_ids are missing')
    family = FAMILIES.get(config.model_type)
    differs = family.differs if isinstance(family, Works) else Differs()
    if differs.position_mask:
        mask = inputs.get(differs.position_mask)
        image = torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return image.cpu(), torch.zeros_like(image).cpu()
    image_ids = placeholder_ids(config, video=False)
    if not image_ids:
        raise UnsupportedModelError(f"config (model_type {config.model_type!r}) has no image token")
    every = torch.isin(ids, torch.tensor(placeholder_ids(config, video=True), device=ids.device))
    image = torch.isin(ids, torch.tensor(image_ids, device=ids.device))
    return image.cpu(), (every & ~image).cpu()


def _owners(mask: Tensor, counts: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Of each picture, its row and positions: the rows' image tokens, dealt out in order.

    Raises:
        NoOverlayError: a picture's tokens do not end where they have to.
    """
    owners, left = [], list(counts)
    for row, places in enumerate(mask):
        positions = tuple(places.nonzero().flatten().tolist())
        while positions and left and 0 < left[0] <= len(positions):
            count = left.pop(0)
            owners.append((row, positions[:count]))
            positions = positions[count:]
        if positions:
            break
    if positions or left:
        have, want = (" + ".join(map(str, numbers)) or "no" for numbers in (counts, mask.sum(1).tolist()))
        raise NoOverlayError(f"the pictures have {have} tokens, the rows of the prompts {want}")
    return owners


def _unplaced(row: int, mask: Tensor, image: int | None, sizes, reason: str) -> Grid:
    positions = tuple(mask.nonzero().flatten().tolist())
    count = len(positions)
    size = None if image is None else sizes[image]
    return Grid(row, image, size, positions, (None,) * count, ("unplaced",) * count, (0,) * count, reason)

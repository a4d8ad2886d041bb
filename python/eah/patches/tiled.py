"""The families that cut a picture into tiles, each of which is a picture to the vision encoder."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator

from eah.patches.call import Call, Cell, NoOverlayError, expect, patch, patches, resized
from eah.patches.geometry import Box, Drawn, Size, squared, whole

PAN_AND_SCAN = {"min_crop_size": 256, "max_num_crops": 4, "min_ratio_to_activate": 1.2}  # what Gemma3Processor asks for
TAG = re.compile(r"<row_(\d+)_col_(\d+)>|<global-img>")


def llava_next(call: Call, index: int) -> list[Cell]:
    expect(call.image_processor, "LlavaNextImageProcessor")
    return _any_resolution(call, index, None)


def llava_onevision(call: Call, index: int) -> list[Cell]:
    """A picture that is not alone in its prompt is padded to a square, and not cut."""
    expect(call.image_processor, "LlavaOnevisionImageProcessor")
    together = call.inputs.get("batch_num_images")
    alone = [True] * len(call.sizes) if together is None else [n == 1 for n in map(int, together) for _ in range(n)]
    if len(alone) != len(call.sizes):
        raise NoOverlayError(f"inputs have batch_num_images for {len(alone)} pictures, images are {len(call.sizes)}")
    if alone[index]:
        return _any_resolution(call, index, int(call.config.vision_aspect_ratio.removeprefix("anyres_max_")))
    size = call.sizes[index]
    side, count = _tile(call, index)
    scale = side / max(size)
    left, top, right, bottom = squared(size)
    drawn = Drawn(whole(size), (left * scale, top * scale, right * scale, bottom * scale))
    return [*patches(drawn, count, count, whole(_covered(call, count))), Cell(None, "newline")]


def _any_resolution(call: Call, index: int, most: int | None) -> list[Cell]:
    """First the whole picture on one tile. Then the picture on the canvas of tiles that suits it best, without the rows
    or columns of padding, each row ended by a newline; shrunk where it has more tokens than those of `most` tiles.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size = call.sizes[index]
    seen = tuple(int(length) for length in call.input("image_sizes", index))
    if seen != (height, width):
        raise NoOverlayError(f"picture {index} is {width} x {height}, inputs are of one of {seen[1]} x {seen[0]}")
    pinpoints = [list(map(int, pair)) for pair in call.config.image_grid_pinpoints]
    if pinpoints != [list(map(int, pair)) for pair in call.image_processor.image_grid_pinpoints]:
        raise NoOverlayError("image_grid_pinpoints of the config are not those of the image processor")
    side, count = _tile(call, index)
    canvas_height, canvas_width = select_best_resolution((height, width), pinpoints)
    cells = patches(Drawn(whole(size), whole((side, side))), count, count, whole(_covered(call, count)), "global")

    scale_x, scale_y = canvas_width / width, canvas_height / height
    new_width = canvas_width if scale_x < scale_y else min(math.ceil(width * scale_y), canvas_width)
    new_height = min(math.ceil(height * scale_x), canvas_height) if scale_x < scale_y else canvas_height
    left, top = (canvas_width - new_width) // 2, (canvas_height - new_height) // 2
    drawn = Drawn(whole(size), (left, top, left + new_width, top + new_height))

    rows, columns = canvas_height // side * count, canvas_width // side * count
    first_row = first_column = 0
    if width / height > columns / rows:
        first_row = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        first_column = (columns - int(round(width * (rows / height), 7))) // 2
    last_row, last_column = rows - first_row, columns - first_column
    shown_rows, shown_columns = last_row - first_row, last_column - first_column
    if most is not None and (ratio := math.sqrt(shown_rows * shown_columns / (most * count**2))) > 1.1:
        shown_rows, shown_columns = int(shown_rows // ratio), int(shown_columns // ratio)
    down = list(_spans(first_row, last_row, shown_rows))
    across = list(_spans(first_column, last_column, shown_columns))
    pixels = call.config.vision_config.patch_size
    for upper, lower in down:
        y0, y1 = _edges(upper, lower, count, side, pixels)
        tile = tile_row = 1 + int((upper + lower) / 2 / count) * (columns // count)
        for first, last in across:
            x0, x1 = _edges(first, last, count, side, pixels)
            tile = tile_row + int((first + last) / 2 / count)
            cells.append(patch(drawn, (x0, y0, x1, y1), tile=tile))
        cells.append(Cell(None, "newline", tile))
    return cells


def _spans(start: int, end: int, count: int) -> Iterator[tuple[float, float]]:
    """`count` equal parts of start..end."""
    for part in range(count):
        yield start + (end - start) * part / count, start + (end - start) * (part + 1) / count


def _edges(start: float, end: float, count: int, side: int, pixels: int) -> tuple[float, float]:
    """A span of patches in the canvas's pixels; between two tiles there are pixels that no patch has."""
    first, last = math.floor(start), math.ceil(end) - 1
    low = first // count * side + (first % count + start - first) * pixels
    return low, last // count * side + (last % count + end - last) * pixels


def _tile(call: Call, index: int) -> tuple[int, int]:
    """A tile's side in pixels and in patches, where all are square, resized once and cut without a rest."""
    height, side = call.input("pixel_values", index).shape[-2:]
    size = resized(call.image_processor, (side, side))
    if getattr(call.image_processor, "do_center_crop", False):
        crop = call.image_processor.crop_size
        size = size if size == (crop["width"], crop["height"]) else (crop["width"], 0)
    if height != side or size != (side, side):
        raise NoOverlayError(f"tiles of {side} x {height} pixels do not fit the image processor's size or crop_size")
    return side, side // call.config.vision_config.patch_size


def _covered(call: Call, count: int) -> tuple[int, int]:
    """What the patches of a tile cover of it, in pixels."""
    return (count * call.config.vision_config.patch_size,) * 2


def internvl(call: Call, index: int) -> list[Cell]:
    """The tiles of a canvas that the picture is squashed on, then the whole picture on one tile."""
    expect(call.image_processor, "GotOcr2ImageProcessor")
    size, side = call.sizes[index], call.pixels().shape[-1]
    if resized(call.image_processor, size) != (side, side):
        raise NoOverlayError(f"tiles of {side} pixels are not of the image processor's size")
    canvases = [_canvas(call, other, side) for other in call.sizes]
    if len(call.pixels()) == len(call.sizes):  # nothing was cut
        canvases = [(1, 1)] * len(call.sizes)
    tiles = sum(columns * rows + (columns * rows > 1) for columns, rows in canvases)
    if tiles != len(call.pixels()):
        raise NoOverlayError(f"the pictures make {tiles} tiles, inputs have {len(call.pixels())}")
    columns, rows = canvases[index]
    ratio = call.config.downsample_ratio
    count = int(side // _side(call.config.vision_config.patch_size) * ratio)
    one = whole((side, side))
    if columns * rows == 1:
        return patches(Drawn(whole(size), one), count, count, one)
    cells = _tiles(size, columns, rows, side, count)
    return cells + patches(Drawn(whole(size), one), count, count, one, "global", columns * rows)


def _canvas(call: Call, size: Size, side: int) -> tuple[int, int]:
    """The columns and rows of tiles, by the image processor's own rule."""
    images = call.image_processor
    choose = sys.modules[type(images).__module__].get_optimal_tiled_canvas
    return choose(size[::-1], (side, side), images.min_patches, images.max_patches)


def _tiles(size: Size, columns: int, rows: int, side: int, count: int) -> list[Cell]:
    """The picture squashed on rows x columns tiles, tile by tile, each of count x count tokens."""
    drawn = Drawn(whole(size), whole((columns * side, rows * side)))
    cells = []
    for tile in range(rows * columns):
        y, x = tile // columns * side, tile % columns * side
        cells += patches(drawn, count, count, (x, y, x + side, y + side), tile=tile)
    return cells


def gemma3(call: Call, index: int) -> list[Cell]:
    """The whole picture on one tile; of a long one, crops after it, which are pictures of their own to the model."""
    expect(call.image_processor, "Gemma3ImageProcessor")
    width, height = size = call.sizes[index]
    total = len(call.pixels())
    if len(call.sizes) == 1:
        crops = [total - 1]
    elif total == len(call.sizes):
        crops = [0] * total
    else:
        crops = [_crops(call, other) for other in call.sizes]
    if total != len(crops) + sum(crops):
        raise NoOverlayError(f"the pictures make {len(crops) + sum(crops)} tiles, inputs have {total}")
    vision = call.config.vision_config
    pooled = vision.image_size // vision.patch_size // int(call.config.mm_tokens_per_image**0.5)
    count = vision.image_size // vision.patch_size // pooled
    covered = whole((count * pooled * vision.patch_size,) * 2)
    tile = whole((vision.image_size,) * 2)
    parts: list[Box] = [whole(size)]
    for start, end in _cut(max(size), crops[index]):
        parts.append((start, 0, end, height) if width >= height else (0, start, width, end))
    cells = []
    for number, part in enumerate(parts):
        kind = "global" if number == 0 and crops[index] else "patch"
        cells += patches(Drawn(part, tile), count, count, covered, kind, number)
    return cells


def _crops(call: Call, size: Size) -> int:
    """How many crops pan and scan makes of a picture when the processor is called with nothing but do_pan_and_scan."""
    given = getattr(call.processor, "images_kwargs", {})
    asked = {name: given.get(f"pan_and_scan_{name}", value) for name, value in PAN_AND_SCAN.items()}
    long, short = max(size), min(size)
    if long / short < asked["min_ratio_to_activate"]:
        return 0
    count = min(math.floor(long / asked["min_crop_size"]), math.floor(long / short + 0.5))
    count = int(min(max(count, 2), asked["max_num_crops"]))
    return 0 if min(math.ceil(long / count), short) < asked["min_crop_size"] else count


def _cut(length: int, count: int) -> Iterator[tuple[int, int]]:
    for number in range(count):
        step = math.ceil(length / count)
        yield number * step, min((number + 1) * step, length)


def idefics3(call: Call, index: int) -> list[Cell]:
    """Tiles of a canvas that the picture is squashed on, then the whole picture on one tile: as the text between them
    says.
    """
    expect(call.image_processor, "Idefics3ImageProcessor", "SmolVLMImageProcessor")
    size, side = call.sizes[index], call.pixels().shape[-1]
    if call.image_processor.max_image_size["longest_edge"] != side:
        raise NoOverlayError(f"tiles of {side} pixels are not of the image processor's max_image_size")
    count = side // call.config.vision_config.patch_size // call.config.scale_factor
    pictures = list(_tagged(call, count**2))
    if len(pictures) != len(call.sizes):
        raise NoOverlayError(f"the prompt has {len(pictures)} pictures, images are {len(call.sizes)}")
    rows, columns = pictures[index]
    one = whole((side, side))
    if not rows:
        return patches(Drawn(whole(size), one), count, count, one)
    cells = _tiles(size, columns, rows, side, count)
    return cells + patches(Drawn(whole(size), one), count, count, one, "global", columns * rows)


def _tagged(call: Call, tokens: int) -> Iterator[tuple[int, int]]:
    """Of each picture, how many rows and columns of tiles the prompt says that it has; 0, 0 where it is not cut.

    Raises:
        NoOverlayError: tiles that are not in reading order, or of another number of tokens.
    """
    tags: list[tuple[int, int]] = []
    for ids, mask in zip(call.inputs["input_ids"].tolist(), call.image_mask.tolist(), strict=True):
        text: list[int] = []
        run = 0
        for token, is_image, goes_on in zip(ids, mask, [*mask[1:], False], strict=True):
            if not is_image:
                text.append(token)
                continue
            run += 1
            if goes_on:
                continue
            before = "".join(call.processor.tokenizer.decode(text).split())
            found = list(TAG.finditer(before))
            if not found or run != tokens:
                raise NoOverlayError(f"{run} image tokens, where a tile has {tokens}, after the text {before[-40:]!r}")
            row, column = found[-1].groups()
            text, run = [], 0
            if row is not None:
                tags.append((int(row), int(column)))
                continue
            rows, columns = tags[-1] if tags else (0, 0)
            if tags != [(row + 1, column + 1) for row in range(rows) for column in range(columns)]:
                raise NoOverlayError(f"tiles in the order {tags}")
            yield rows, columns
            tags = []


def _side(size) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size

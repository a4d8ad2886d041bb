"""One function a family: the image tokens of one picture, in the order in which the model has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from eah.patches.geometry import Box, Drawn, whole


class NoOverlayError(Exception):
    """Where the image tokens come from cannot be said; the message is the reason."""


class Cell(NamedTuple):
    """One image token."""

    box: Box | None  # of the picture as it is stored
    kind: str  # as in `Grid.kinds`
    tile: int


@dataclass(frozen=True)
class Call:
    """What a processor made of some pictures, and for which model."""

    processor: Any
    inputs: Mapping[str, Any]
    config: Any
    sizes: list[tuple[int, int]]  # width, height of each picture as it is stored

    @property
    def image_processor(self):
        return self.processor.image_processor

    def input(self, name: str, index: int) -> Any:
        """Of an input that the processor makes with one entry a picture, that of picture `index`."""
        values = self.inputs.get(name)
        if values is None or len(values) != len(self.sizes):
            entries = "no" if values is None else len(values)
            raise NoOverlayError(f"inputs have {entries} {name} for {len(self.sizes)} pictures")
        return values[index]


def llava(call: Call, index: int) -> list[Cell]:
    canvas_height, canvas_width = call.input("pixel_values", index).shape[-2:]
    drawn = _cropped_or_padded(call.image_processor, call.sizes[index], (canvas_width, canvas_height))
    patch = call.config.vision_config.patch_size
    rows, columns = canvas_height // patch, canvas_width // patch
    ahead = getattr(call.processor, "num_additional_image_tokens", 0)  # such as CLIP's class token
    ahead -= getattr(call.config, "vision_feature_select_strategy", "default") == "default"
    return [Cell(None, "global", 0)] * ahead + patches(drawn, rows, columns, (0, 0, columns * patch, rows * patch))


def qwen2_vl(call: Call, index: int) -> list[Cell]:
    """Also of its successors: windows of attention are undone before the tokens leave the vision encoder."""
    time, height, width = call.input("image_grid_thw", index).tolist()
    if time != 1:
        raise NoOverlayError(f"picture {index} has {time} frames")
    merge = call.config.vision_config.spatial_merge_size
    rows, columns = height // merge, width // merge
    canvas = whole((columns, rows))
    return patches(Drawn(whole(call.sizes[index]), canvas), rows, columns, canvas)


LAYOUTS: dict[str, Callable[[Call, int], list[Cell]]] = {
    "llava": llava,
    "vipllava": llava,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"), qwen2_vl),
}


def patches(drawn: Drawn, rows: int, columns: int, area: Box, kind: str = "patch", tile: int = 0) -> list[Cell]:
    """The cells of one tile, row by row; "padding" where a cell shows nothing of the picture."""
    return [Cell(box, kind if box else "padding", tile) for box in drawn.cells(rows, columns, area)]


CROPPED_OR_PADDED = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")


def _cropped_or_padded(image_processor, size: tuple[int, int], canvas: tuple[int, int]) -> Drawn:
    """What the image processors of CLIP do, in their order: pad to a square, resize, crop the centre."""
    name = kind_of(image_processor)
    if name not in CROPPED_OR_PADDED:
        raise NoOverlayError(f"what {type(image_processor).__name__} does to a picture is not known")
    width, height = size
    left = top = 0.0
    made = [width, height]  # the canvas so far; the picture is at left, top in it
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        made = [max(size)] * 2
        left, top = (made[0] - width) // 2, (made[1] - height) // 2
    scale = [1.0, 1.0]
    if image_processor.do_resize:
        resized = _resized(image_processor.size, made)
        scale = [new / old for new, old in zip(resized, made, strict=True)]
        made = list(resized)
    at = [left * scale[0], top * scale[1], (left + width) * scale[0], (top + height) * scale[1]]
    if getattr(image_processor, "do_center_crop", False):
        crop = (image_processor.crop_size["width"], image_processor.crop_size["height"])
        if _by_torchvision(image_processor):
            starts = [int((old - new) / 2) for old, new in zip(made, crop, strict=True)]
        else:
            starts = [(old - new) // 2 for old, new in zip(made, crop, strict=True)]
        at = [end - start for end, start in zip(at, starts * 2, strict=True)]
        made = list(crop)
    if tuple(made) != canvas:
        seen, expected = ("{} x {}".format(*pair) for pair in (canvas, made))
        raise NoOverlayError(f"the pixels are {seen}, but {name} with its settings makes {expected} of this picture")
    return Drawn(whole(size), (at[0], at[1], at[2], at[3]))


def _resized(size, old: list[int]) -> tuple[int, int]:
    given = {name: size.get(name) for name in ("height", "width", "shortest_edge", "longest_edge") if size.get(name)}
    if set(given) == {"height", "width"}:
        return given["width"], given["height"]
    if set(given) == {"shortest_edge"}:
        new_short, short, long = given["shortest_edge"], min(old), max(old)
        new_long = int(new_short * long / short)
        return (new_short, new_long) if old[0] <= old[1] else (new_long, new_short)
    raise NoOverlayError(f"how the image processor resizes to {given} is not known")


def kind_of(image_processor) -> str:
    """The name of its class, whichever library resizes."""
    name = type(image_processor).__name__
    return name.removesuffix("Fast").removesuffix("Pil")


def _by_torchvision(image_processor) -> bool:
    fast = type(image_processor).__name__.endswith("Fast")
    return fast or getattr(image_processor, "backend", None) == "torchvision"

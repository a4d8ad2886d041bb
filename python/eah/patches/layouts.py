"""The families: of one picture, the image tokens in the order in which the model has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eah.patches.call import Call, Cell, NoOverlayError, expect, kind_of, patches, resized
from eah.patches.geometry import Drawn, Size, squared, whole
from eah.patches.tiled import gemma3, idefics3, internvl, llava_next, llava_onevision


def llava(call: Call, index: int) -> list[Cell]:
    if kind_of(call.image_processor) == "PixtralImageProcessor":
        return mistral3(call, index)
    height, width = call.input("pixel_values", index).shape[-2:]
    drawn = cropped_or_padded(call.image_processor, call.sizes[index], (width, height))
    expect_pixels(call, index)
    patch = call.config.vision_config.patch_size
    rows, columns = height // patch, width // patch
    ahead = getattr(call.processor, "num_additional_image_tokens", 0)  # such as CLIP's class token
    ahead -= getattr(call.config, "vision_feature_select_strategy", "default") == "default"
    return [Cell(None, "global")] * ahead + patches(drawn, rows, columns, (0, 0, columns * patch, rows * patch))


def qwen2_vl(call: Call, index: int) -> list[Cell]:
    """Also of its successors: windows of attention are undone before the tokens leave the vision encoder."""
    expect(call.image_processor, "Qwen2VLImageProcessor", "Glm4vImageProcessor", "Glm46VImageProcessor")
    time, height, width = call.input("image_grid_thw", index).tolist()
    if time != 1:
        raise NoOverlayError(f"picture {index} has {time} frames")
    merge = call.config.vision_config.spatial_merge_size
    return squashed(call.sizes[index], height // merge, width // merge)


def mistral3(call: Call, index: int) -> list[Cell]:
    """The tokens that end its rows have an id of their own: they are no image tokens."""
    expect(call.image_processor, "PixtralImageProcessor")
    if getattr(call.image_processor, "do_center_crop", False):
        raise NoOverlayError("the image processor crops, where the image processors of this family do not")
    height, width = (int(side) for side in call.input("image_sizes", index))
    token = call.config.vision_config.patch_size * getattr(call.config, "spatial_merge_size", 1)
    return squashed(call.sizes[index], height // token, width // token)


LAYOUTS: dict[str, Callable[[Call, int], list[Cell]]] = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "lighton_ocr": mistral3,
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_video": llava_next,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "paligemma": llava,
    "qianfan_ocr": internvl,
    "smolvlm": idefics3,
    "vipllava": llava,
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker"),
            *("qwen3_5", "qwen3_5_moe", "exaone4_5", "glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
        ),
        qwen2_vl,
    ),
}

QUERIES = "its image tokens are learned queries, each of which looks at the whole picture: they have no place in it"
WITHOUT: dict[str, str] = dict.fromkeys(
    ("aria", "blip-2", "idefics2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"), QUERIES
)


def layout_of(model_type: str) -> Callable[[Call, int], list[Cell]]:
    """
    Raises:
        NoOverlayError: a family without one.
    """
    if model_type not in LAYOUTS:
        why = WITHOUT.get(model_type, "where its image tokens come from is not known")
        raise NoOverlayError(f"family {model_type}: {why}")
    return LAYOUTS[model_type]


def squashed(size: Size, rows: int, columns: int) -> list[Cell]:
    """The whole picture on a grid of tokens, whatever its aspect ratio."""
    canvas = whole((columns, rows))
    return patches(Drawn(whole(size), canvas), rows, columns, canvas)


def cropped_or_padded(image_processor, size: Size, canvas: Size) -> Drawn:
    """What the image processors of CLIP do, in their order: pad to a square, resize, crop the centre."""
    expect(image_processor, "CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
    at, made = whole(size), size  # where the picture is on the canvas so far, and the size of that
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        at, made = squared(size), (max(size), max(size))
    if image_processor.do_resize:
        new = resized(image_processor, made)
        x, y = new[0] / made[0], new[1] / made[1]
        at, made = (at[0] * x, at[1] * y, at[2] * x, at[3] * y), new
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size["width"], image_processor.crop_size["height"]
        left, top = (_start(image_processor, old, new) for old, new in zip(made, crop, strict=True))
        at, made = (at[0] - left, at[1] - top, at[2] - left, at[3] - top), crop
    if made != canvas:
        seen, expected = ("{} x {}".format(*pair) for pair in (canvas, made))
        name = kind_of(image_processor)
        raise NoOverlayError(f"the pixels are {seen}, but {name} with its settings makes {expected} of this picture")
    return Drawn(whole(size), at)


def expect_pixels(call: Call, index: int) -> None:
    """That the processor was called with this picture, and with nothing that changes what its image processor does:
    nothing else in the inputs of these families tells.

    Raises:
        NoOverlayError: the pixels differ by more than a half-precision number or another device makes them.
    """
    got = call.input("pixel_values", index).float().cpu()
    made = call.image_processor(call.pictures[index], return_tensors="pt")["pixel_values"][0].float().cpu()
    if got.shape != made.shape or not torch.allclose(got, made, rtol=0, atol=0.02 * float(made.abs().max())):
        name = kind_of(call.image_processor)
        raise NoOverlayError(f"the pixels of picture {index} are not those that {name} with its settings makes of it")


def _start(image_processor, old: int, new: int) -> int:
    """Where a crop begins; before the picture, where that is smaller: there torchvision rounds the other way."""
    fast = type(image_processor).__name__.endswith("Fast")
    if fast or getattr(image_processor, "backend", None) == "torchvision":
        return int((old - new) / 2)
    return (old - new) // 2

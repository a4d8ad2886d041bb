"""Processors, pictures and tiny models of the families whose image tokens `eah.patches` places."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace

import torch
import transformers
from PIL import Image

from ..support.processors import PROCESSORS, image_processor_of, processor_of, tokenizer

BILINEAR, BICUBIC, LANCZOS = 1, 2, 3  # pixels to each side that a resize's kernel reaches, of the coarser picture


@dataclass(frozen=True)
class Case:
    family: str
    images: dict  # settings of the image processor
    vision: dict = field(default_factory=lambda: {"image_size": 42, "patch_size": 14})
    settings: dict = field(default_factory=dict)  # of the processor
    top: dict = field(default_factory=dict)  # of the model's config
    token: int = 14  # pixels of a token's side
    reach: int = BICUBIC
    like: str = ""  # the row of PROCESSORS, where it is another family's
    smear: int = 0  # pixels that a token of a shrunk grid sees of its neighbours'
    call: dict = field(default_factory=dict)  # what the processor is asked for
    sizes: tuple = ((150, 90), (64, 111), (400, 50), (42, 42), (39, 170))


SIDE = {"height": 42, "width": 42}
CLIP = {"patch_size": 14}
QWEN = {"patch_size": 14, "size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}}
GLM = {"patch_size": 14, "size": {"shortest_edge": 28 * 28 * 8, "longest_edge": 28 * 28 * 40}}
GRID = [[42, 42], [42, 84], [84, 42], [84, 84], [42, 126], [126, 42]]
NEXT = {"size": {"shortest_edge": 42}, "crop_size": SIDE, "image_grid_pinpoints": GRID}
REST = {"height": 52, "width": 52}  # three patches and 10 pixels
REST_GRID = [[side // 42 * 52 for side in pair] for pair in GRID]
IDEFICS = {"size": {"longest_edge": 250}, "max_image_size": {"longest_edge": 84}, "do_image_splitting": True}
MERGED = {"image_size": 84, "patch_size": 14}
PIXTRAL = {"patch_size": 28, "size": {"longest_edge": 140}}
TILES = {"size": {"height": 84, "width": 84}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
LONG = ((620, 300), (270, 560), (300, 300), (1300, 270), (310, 330))
CASES = {
    "llava cropped": Case("llava", {"kind": "CLIP", "size": {"shortest_edge": 42}, "crop_size": SIDE}, settings=CLIP),
    "llava padded": Case("llava", {"size": SIDE, "crop_size": SIDE, "do_pad": True}, settings=CLIP),
    "llava squashed": Case("llava", {"kind": "Siglip", "size": SIDE}, settings=CLIP),
    "llava small crop": Case("llava", {"size": {"shortest_edge": 33}, "crop_size": SIDE}, settings=CLIP),
    "llava with its class token": Case(
        "llava",
        {"kind": "CLIP", "size": SIDE, "crop_size": SIDE},
        settings={**CLIP, "vision_feature_select_strategy": "full"},
        top={"vision_feature_select_strategy": "full"},
    ),
    "llava of Pixtral": Case(
        "llava",
        {"patch_size": 14, "size": {"longest_edge": 140}},
        {"model_type": "pixtral", "patch_size": 14, "image_size": 140, "head_dim": 8},
        top={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        like="mistral3",
    ),
    "paligemma": Case("paligemma", {"size": SIDE}),
    "llava_next": Case("llava_next", NEXT, settings=CLIP, top={"image_grid_pinpoints": GRID}),
    "llava_next, a rest": Case(
        "llava_next",
        {"size": {"shortest_edge": 52}, "crop_size": REST, "image_grid_pinpoints": REST_GRID},
        {"image_size": 52, "patch_size": 14},
        CLIP,
        {"image_grid_pinpoints": REST_GRID},
    ),
    "llava_onevision": Case(
        "llava_onevision",
        {"kind": "LlavaOnevision", "size": REST, "crop_size": None, "do_pad": True, "image_grid_pinpoints": REST_GRID},
        {"image_size": 52, "patch_size": 14},
        top={"image_grid_pinpoints": REST_GRID, "vision_aspect_ratio": "anyres_max_2"},
        like="llava",
        smear=14 + 10,
    ),
    "qwen2_vl": Case("qwen2_vl", QWEN, {"patch_size": 14}, token=28),
    "qwen2_5_vl": Case("qwen2_5_vl", QWEN, {"patch_size": 14, "window_size": 56}, token=28),
    "qwen3_vl": Case("qwen3_vl", QWEN, {"patch_size": 14}, token=28),
    "glm4v": Case("glm4v", GLM, {"patch_size": 14, "image_size": 84}, token=28),
    "internvl": Case("internvl", TILES, {"image_size": [84, 84], "patch_size": [14, 14]}, token=28),
    "internvl uncut": Case(
        "internvl", {**TILES, "crop_to_patches": False}, {"image_size": [84, 84], "patch_size": [14, 14]}, token=28
    ),
    "gemma3": Case("gemma3", {"size": {"height": 84, "width": 84}}, MERGED, token=28, reach=BILINEAR),
    "gemma3 pan and scan": Case(
        "gemma3",
        {"size": {"height": 84, "width": 84}},
        MERGED,
        token=28,
        reach=BILINEAR,
        call={"do_pan_and_scan": True},
        sizes=LONG,
    ),
    "idefics3": Case("idefics3", IDEFICS, MERGED, token=28, reach=2 * LANCZOS),
    "idefics3 uncut": Case("idefics3", {**IDEFICS, "do_image_splitting": False}, MERGED, token=28, reach=2 * LANCZOS),
    "smolvlm": Case("smolvlm", IDEFICS, MERGED, token=28, reach=2 * LANCZOS),
    "mistral3": Case("mistral3", PIXTRAL, {"patch_size": 14, "image_size": 140}, token=28),
}
RELATIVES = {
    **dict.fromkeys(("qwen2_5_omni_thinker", "exaone4_5"), CASES["qwen2_5_vl"]),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_omni_moe_thinker", "qwen3_5", "qwen3_5_moe"), CASES["qwen3_vl"]),
    **dict.fromkeys(("glm4v_moe", "glm46v", "glm_ocr"), CASES["glm4v"]),
    "llava_next_video": CASES["llava_next"],
    "lighton_ocr": CASES["mistral3"],
    "qianfan_ocr": CASES["internvl"],
    "vipllava": CASES["llava cropped"],
}
TAGS = {
    f"row_{tag}": (f"<row_{tag}>", 60 + number)
    for number, tag in enumerate(f"{i}_col_{j}" for i in "123" for j in "123")
}


def processed(case, pictures, texts):
    """The processor that `grids` is given, and the model inputs. An I of the texts is an image."""
    row = case.like or case.family
    _, _, _, special, placeholder, _ = PROCESSORS[row]
    images = image_processor_of(row, **case.images)
    expanded = EXPANDED.get(case.family, EXPANDED.get(row))
    if expanded is None:
        processor = processor_of(row, images, TAGS, **case.settings)
        texts = [text.replace("I", placeholder) for text in texts]
        return processor, processor(images=pictures, text=texts, padding=True, return_tensors="pt", **case.call)
    more = {"return_row_col_info": True} if row == "smolvlm" else {}
    outputs = images(pictures, return_tensors="pt", **more)
    counts = iter(expanded(images, outputs))
    texts = ["".join(next(counts) if c == "I" else c for c in text) for text in texts]
    text = tokenizer({**special, **TAGS})
    inputs = text(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return SimpleNamespace(image_processor=images, tokenizer=text), {**inputs, **outputs}


def qwen_text(images, outputs, image="<|image_pad|>"):
    for grid in outputs["image_grid_thw"]:
        yield f"<|vision_start|>{image * int(grid.prod() // images.merge_size**2)}<|vision_end|>"


def glm_text(images, outputs):
    return qwen_text(images, outputs, "<|image|>")


def internvl_text(images, outputs):
    for tiles in outputs["num_patches"]:
        yield f"<img>{'<IMG_CONTEXT>' * int(9 * tiles)}</img>"


def mistral3_text(images, outputs):
    token = images.patch_size["height"] if isinstance(images.patch_size, dict) else images.patch_size  # as in 5.3
    for height, width in outputs["image_sizes"]:
        lines = [int(width) // token * "[IMG]"] * (int(height) // token)
        yield "[IMG_BREAK]".join(lines) + "[IMG_END]"


def onevision_text(images, outputs):
    counter = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    counter.image_processor, counter.num_image_tokens, counter.vision_aspect_ratio = images, 9, "anyres_max_2"
    alone = [count == 1 for count in map(int, outputs["batch_num_images"]) for _ in range(count)]
    for cut, (height, width) in zip(alone, outputs["image_sizes"].tolist(), strict=True):
        yield "<image>" * (counter._get_number_of_features(height, width, 52, 52) if cut else 10)


def smolvlm_text(images, outputs):
    around, tokens = "<fake_token_around_image>", "<image>" * 9
    for rows, columns in zip(chain(*outputs["rows"]), chain(*outputs["cols"]), strict=True):
        tags = [f"<row_{row + 1}_col_{column + 1}>" for row in range(rows) for column in range(columns)]
        yield "".join(f"{around}{tag}{tokens}" for tag in [*tags, "<global-img>"]) + around


EXPANDED = {  # in place of processors that need torchvision
    "llava_onevision": onevision_text,
    "qwen2_vl": qwen_text,
    "qwen2_5_vl": qwen_text,
    "qwen3_vl": qwen_text,
    "glm4v": glm_text,
    "internvl": internvl_text,
    "mistral3": mistral3_text,
    "smolvlm": smolvlm_text,
}


def noise(size, seed):
    """Random blocks, upright."""
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())

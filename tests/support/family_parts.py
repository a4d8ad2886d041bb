"""The parts of which the rows of `family_rows.py` are made: sub-configs, pixels, and the row itself.

An image is 12 x 12 pixels, or 6 x 6 patches of 2 x 2 pixels that are merged 2 x 2: nine image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .tiny_models import IMAGE, VIDEO, VISION_END, VISION_START

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TINY_VIT = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
SQUARE = {**TINY_VIT, "image_size": 12, "patch_size": 4}  # 3 x 3 patches
CLIP = {**SQUARE, "model_type": "clip_vision_model"}
SIGLIP = {**SQUARE, "model_type": "siglip_vision_model"}
PATCHES = {  # the tower of Qwen2.5-VL and its relatives: 6 x 6 patches of 2 x 2 pixels, merged 2 x 2
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "depth": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
    "window_size": 8,
    "fullatt_block_indexes": [1],
}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

AUDIO = 91
DEEPSTACK = {**PATCHES, "deepstack_visual_indexes": [0], "num_position_embeddings": 36}
WINDOWED = {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
TIMM = {**SIGLIP, "model_args": {"embed_dim": 16}, "vocab_size": 8, "vocab_offset": 200, "rms_norm_eps": 1e-6}
JANUS_VQ = {
    "embed_dim": 4,
    "num_embeddings": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "num_patches": 3,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
    "num_hidden_layers": 1,
}
EMU_VQ = {
    "codebook_size": 20,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "hidden_size": 32,
    "num_attention_heads": 1,
    "attn_resolutions": [],
    "temporal_downsample_factor": 1,
}
EMU_MAP = {"<image>": IMAGE, "<|extra_200|>": 91, **{f"<|visual token {i:06}|>": 70 + i for i in range(20)}}
CHAMELEON_VQ = {
    "embed_dim": 4,
    "num_embeddings": 20,
    "latent_channels": 4,
    "resolution": 12,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
}
CHAMELEON_MAP = {"<image>": IMAGE, **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 70 + i for i in range(20)}}
GATED_DELTA = {
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"] * 2,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
}
OPT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
QFORMER = {**TINY_VIT, "encoder_hidden_size": 16, "vocab_size": 96}


def no_inputs(ids: torch.Tensor) -> dict:
    return {}


def mm_token_types(ids: torch.Tensor) -> dict:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def no_pixels(images: int) -> dict:
    return {}


def tiled_pixels(images: int, side: int = 12) -> dict:
    return {"pixel_values": torch.randn(images, 2, 3, side, side), "image_sizes": torch.tensor([[side, side]] * images)}


def merged_pixels(images: int) -> dict:
    return {**patch_pixels(images, 12), "image_merge_sizes": torch.tensor([2] * images)}


def row_pixels(images: int) -> dict:
    return {"pixel_values": torch.randn(images, 1, 3, 12, 12)}


def patch_images(images: int) -> dict:
    return {"pixel_values": torch.randn(images * 36, 3, 2, 2), "image_grid_thw": torch.tensor([[1, 6, 6]] * images)}


def fuyu_patches(images: int) -> dict:
    return {"image_patches": torch.randn(images, 9, 12)}


def gemma4_patches(images: int) -> dict:
    positions = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    return {"pixel_values": torch.rand(images, 36, 12), "image_position_ids": positions.repeat(images, 1, 1)}


def square_pixels(images: int, side: int = 12) -> dict:
    return {"pixel_values": torch.randn(images, 3, side, side)}


def patch_pixels(images: int, width: int = 24) -> dict:
    return {"pixel_values": torch.randn(images * 36, width), "image_grid_thw": torch.tensor([[1, 6, 6]] * images)}


def sized_pixels(images: int) -> dict:
    return {**square_pixels(images), "image_sizes": torch.tensor([[12, 12]] * images)}


@dataclass(frozen=True)
class Tiny:
    """One family. `text` and `vision` fill the sub-configs, `top` the config; the rest makes the prompt."""

    config: str
    model: str
    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)
    pixels: Callable[[int], dict] = square_pixels
    image: tuple[int, ...] = (IMAGE,) * 9  # the tokens of one image
    inputs: Callable[[torch.Tensor], dict] = lambda ids: {}  # more inputs, from input_ids
    layer: int = 1
    flat: bool = False  # the text config is the config itself
    ids: dict = field(default_factory=lambda: IDS)
    attn: str | dict = "sdpa"  # by sub-config where they differ
    seed: int = 0


def like_llava(name: str, decoder: str = "llama", vision: dict = CLIP, **more) -> Tiny:
    text = {"model_type": decoder, **more.pop("text", {})}
    config = more.pop("config", f"{name}Config")
    return Tiny(config, f"{name}ForConditionalGeneration", text=text, vision=vision, **more)


def like_qwen(name: str, **more) -> Tiny:
    more.setdefault("vision", PATCHES)
    more["text"] = {"rope_parameters": MROPE, **more.get("text", {})}
    more.setdefault("image", (VISION_START, *(IMAGE,) * 9, VISION_END))
    config = more.pop("config", f"{name}Config")
    more = {"pixels": patch_pixels, "inputs": mm_token_types, **more}
    return Tiny(config, f"{name}ForConditionalGeneration", **more)

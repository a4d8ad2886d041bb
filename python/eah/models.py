"""What differs from one model family to the next: one row each. Everything else is found by a general rule."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class UnsupportedModelError(ValueError):
    """EAH cannot act in this model, or not in this layer; the message says why and where it could."""


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`; a field is what some family does differently."""

    first_layer: int = 1  # of its released models, the first usable layer from layer 1 on
    video: bool = False  # has a placeholder token for video
    position_mask: str | None = None  # the forward's argument that marks the image tokens, in place of a token id
    inner_generate: str | None = None  # the submodule whose own generate() is called by the model's, with embeddings
    refused: str | None = None
    notes: str = ""


CROSS_ATTENTION = "its images enter by cross-attention: the text's self-attention has no image tokens"
INDICES = "its attention looks at selected keys only (indices)"
LINEAR = "the layers before have linear attention or convolutions, without a map"

FAMILIES = {
    "aria": Family(),
    "aya_vision": Family(),
    "blip-2": Family(inner_generate="language_model", notes="with a decoder-only language model (OPT)"),
    "chameleon": Family(notes="image token from vocabulary_map"),
    "cohere2_vision": Family(),
    "deepseek_vl": Family(),
    "emu3": Family(notes="image token from vocabulary_map"),
    "ernie4_5_vl_moe": Family(video=True),
    "exaone4_5": Family(video=True),
    "fast_vlm": Family(),
    "fuyu": Family(),
    "gemma3": Family(notes="image tokens see each other"),
    "gemma3n": Family(),
    "gemma4": Family(video=True, notes="image tokens see each other"),
    "glm4v": Family(video=True),
    "glm4v_moe": Family(video=True),
    "got_ocr2": Family(notes="eager attention only"),
    "granite4_vision": Family(),
    "hunyuan_vl": Family(),
    "idefics2": Family(),
    "idefics3": Family(),
    "instructblip": Family(inner_generate="language_model", notes="with a decoder-only language model (Vicuna, OPT)"),
    "internvl": Family(),
    "janus": Family(),
    "kimi_k25": Family(video=True, notes="latent attention: values narrower than keys"),
    "kosmos-2": Family(
        position_mask="image_embeds_position_mask",
        inner_generate="text_model",
        notes="image tokens by image_embeds_position_mask",
    ),
    "lfm3_vl": Family(first_layer=2, video=True, notes=LINEAR),
    "llama4": Family(notes="chunked attention"),
    "llava": Family(),
    "llava_next": Family(),
    "llava_next_video": Family(video=True),
    "llava_onevision": Family(video=True),
    "minicpmv4_6": Family(first_layer=3, video=True, notes=LINEAR),
    "minimax_m3_vl": Family(video=True, notes="layers of sparse attention are refused"),
    "mistral3": Family(),
    "molmo2": Family(notes="image tokens see each other; video frames use the image token"),
    "nemotron_h_omni": Family(first_layer=2, video=True, notes=LINEAR),
    "ovis2": Family(),
    "paddleocr_vl": Family(video=True),
    "paligemma": Family(notes="the prompt sees itself in both directions"),
    "perception_lm": Family(video=True),
    "qianfan_ocr": Family(),
    "qwen2_5_omni_thinker": Family(video=True),
    "qwen2_5_vl": Family(video=True),
    "qwen2_vl": Family(video=True),
    "qwen3_5": Family(first_layer=3, video=True, notes=LINEAR),
    "qwen3_vl": Family(video=True),
    "qwen3_vl_moe": Family(video=True),
    "smolvlm": Family(),
    "video_llama_3": Family(video=True),
    "video_llava": Family(video=True),
    "vipllava": Family(),
    # refused
    "blip": Family(refused=CROSS_ATTENTION),
    "florence2": Family(refused="its images enter an encoder: the decoder's self-attention has no image tokens"),
    "git": Family(refused="it puts the image before the prompt by itself: no token of the prompt stands for it"),
    "idefics": Family(refused=CROSS_ATTENTION),
    "inkling_mm_model": Family(refused="its attention adds a position bias"),
    "mistral_large4": Family(refused=INDICES),
    "mllama": Family(refused=CROSS_ATTENTION),
    "qwen2_5_omni": Family(refused="it holds several models; enable the one with images: eah.enable(model.thinker)"),
}

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")

# Text decoders (model_type of the text config) in which a layer without a sliding window sees exactly the earlier real
# keys: their mask can be replaced by causality and the 2-D padding mask, which the kernels read S times faster.
# fmt: off
PLAIN_CAUSAL_DECODERS = frozenset(
    {
        "aria_text", "chameleon", "cohere2", "deepseek_v3", "emu3_text_model", "ernie4_5_vl_moe_text", "exaone4",
        "glm4v_moe_text", "glm4v_text", "granite4_vision_text", "hunyuan_vl_text", "kosmos_2_text_model", "lfm3",
        "llama", "minimax_m3_vl_text", "mistral", "nemotron_h", "opt", "paddleocr_vl_text", "persimmon", "qwen2",
        "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_5_text", "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)
# fmt: on


class FamilyRow(NamedTuple):
    """One line of the table of families, for printing."""

    family: str  # the config's model_type
    status: str  # "works" or "refused"
    first_layer: str  # the first usable layer from layer 1 on, "-" when refused
    notes: str


def family_table() -> list[FamilyRow]:
    """The families that are known, those that work first; each group by name."""
    rows = []
    for name, family in sorted(FAMILIES.items(), key=lambda item: (item[1].refused is not None, item[0])):
        if family.refused:
            rows.append(FamilyRow(name, "refused", "-", family.refused))
            continue
        notes = [family.notes] if family.notes else []
        notes += ["video tokens count as image tokens"] if family.video else []
        rows.append(FamilyRow(name, "works", str(family.first_layer), "; ".join(notes)))
    return rows


def family_of(model) -> Family | None:
    """The model's row, None for a family that is in none.

    Raises:
        UnsupportedModelError: the family is refused, or the model is an encoder-decoder.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.refused:
        raise UnsupportedModelError(f"{named(model)} cannot be enabled: {family.refused}")
    if getattr(model.config.get_text_config(decoder=True), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{named(model)} cannot be enabled: its images enter an encoder, the decoder's self-attention has no "
            "image tokens"
        )
    return family


def image_token_ids(model, family: Family, video: bool) -> tuple[int, ...]:
    """The ids of the placeholder tokens that the image (and video) features replace; () where a mask marks them.

    Raises:
        UnsupportedModelError: the model has no image token.
    """
    if family.position_mask:
        return ()
    image = _first(model.config, IMAGE_TOKEN_NAMES)
    if image is None:
        raise UnsupportedModelError(f"{named(model)} has no image token: EAH needs a vision-language model")
    ids = [image, _first(model.config, VIDEO_TOKEN_NAMES) if video else None]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def attention_modules(model, layers: tuple[int, ...], may_move: bool = False) -> list[nn.Module]:
    """The self-attention module of each of these layers of the text decoder.

    `may_move`: take the first usable layer in place of one that has no map.

    Raises:
        ValueError: a layer that the decoder does not have.
        UnsupportedModelError: a layer without exactly one attention map that can be replaced.
    """
    decoder = model.get_decoder()
    found: dict[int, list[nn.Module]] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "config") and _calls_attention_interface(type(module)):
            found.setdefault(index, []).append(module)
    usable = {index: modules[0] for index, modules in found.items() if len(modules) == 1 and _sees_all_keys(modules[0])}
    if not usable:
        raise UnsupportedModelError(f"no layer of {named(model)} has an attention map that can be replaced")
    first = min((index for index in usable if index >= 1), default=min(usable))
    if may_move:
        layers = tuple(layer if layer in usable else first for layer in layers)
    count = decoder.config.num_hidden_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers must be within 0..{count - 1} for {named(model)}, got {layer}")
        if layer not in usable:
            raise UnsupportedModelError(
                f"layer {layer} of {named(model)} has no attention map to replace; the first usable layer is {first}"
            )
    return [usable[layer] for layer in layers]


def attention_namespace(cls: type) -> dict:
    """The globals of the file that an attention class is written in: its attention functions are looked up there."""
    return inspect.unwrap(cls.forward).__globals__


def named(model) -> str:
    """The model's class and family, for messages."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def _first(config, names: tuple[str, ...]) -> int | None:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _calls_attention_interface(cls: type) -> bool:
    names = inspect.unwrap(cls.forward).__code__.co_names
    return "get_interface" in names and "eager_attention_forward" in attention_namespace(cls)


def _sees_all_keys(module: nn.Module) -> bool:
    """False for sparse attention: an indexer chooses the keys of each query, or an earlier layer's did."""
    return getattr(module, "indexer", None) is None and not getattr(module, "skip_topk", False)

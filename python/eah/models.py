"""What differs from one model family to the next: one row each. Everything else is found by a general rule."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from eah_kernels import MAX_HEAD_DIM


class UnsupportedModelError(ValueError):
    """EAH cannot act in this model, or not in this layer; the message says why and where it could."""


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`; a field is what some family does differently."""

    first_layer: int = 1  # of its released models, the first usable layer from layer 1 on
    video: bool = False  # has a placeholder token for video
    position_mask: str | None = None  # the forward's argument that marks the image tokens, in place of a token id
    inner_generate: str | None = None  # the submodule whose own generate() is called by the model's, with embeddings
    inner_forward: str | None = None  # the submodule below, where the outermost forward keeps arguments to itself
    refused: str | None = None
    notes: str = ""


CROSS_ATTENTION = "its images enter by cross-attention: the text's self-attention has no image tokens"
ENCODER = "its images enter an encoder: the decoder's self-attention has no image tokens"
INDICES = "its attention looks at selected keys only (indices)"
POSITION_BIAS = "its attention adds a position bias"
SEVERAL = "it holds several models; enable the one with images: eah.enable(model.thinker)"
SPEECH = "its audio has placeholder tokens, but no image has"
LINEAR = "the layers before have linear attention or convolutions, without a map"

FAMILIES = {
    "apertus1p5": Family(),
    "aria": Family(),
    "aya_vision": Family(),
    "blip-2": Family(inner_generate="language_model", notes="with a decoder-only language model (OPT)"),
    "chameleon": Family(notes="image token from vocabulary_map"),
    "cohere2_vision": Family(),
    "cohere_compass": Family(video=True),
    "cosmos3_edge": Family(video=True),
    "cosmos3_omni": Family(video=True),
    "deepseek_ocr2": Family(),
    "deepseek_vl": Family(),
    "deepseek_vl_hybrid": Family(),
    "dots3_note": Family(first_layer=2, video=True, notes="layers of sparse attention are refused"),
    "emu3": Family(notes="image token from vocabulary_map"),
    "ernie4_5_vl_moe": Family(video=True),
    "exaone4_5": Family(video=True),
    "fast_vlm": Family(),
    "fuyu": Family(inner_forward="model"),  # on transformers 5.3
    "gemma3": Family(notes="image tokens see each other"),
    "gemma3n": Family(),
    "gemma4": Family(video=True, notes="image tokens see each other"),
    "gemma4_unified": Family(video=True, notes="image tokens see each other"),
    "glm46v": Family(video=True),
    "glm4v": Family(video=True),
    "glm4v_moe": Family(video=True),
    "glm_ocr": Family(video=True),
    "glmga": Family(video=True),
    "got_ocr2": Family(notes="eager attention only"),
    "granite4_vision": Family(),
    "granite_docling": Family(),
    "hunyuan_vl": Family(),
    "hyperclovax_vision_v2": Family(video=True),
    "idefics2": Family(),
    "idefics3": Family(),
    "instructblip": Family(inner_generate="language_model", notes="with a decoder-only language model (Vicuna, OPT)"),
    "instructblipvideo": Family(
        inner_generate="language_model",
        notes="with a decoder-only language model (Vicuna, OPT); the token of videos is its image token",
    ),
    "internvl": Family(),
    "janus": Family(),
    "kimi_k25": Family(video=True, notes="latent attention: values narrower than keys"),
    "kosmos-2": Family(
        position_mask="image_embeds_position_mask",
        inner_generate="text_model",
        notes="image tokens by image_embeds_position_mask",
    ),
    "kosmos-2.5": Family(
        position_mask="image_embeds_position_mask", notes="image tokens by image_embeds_position_mask"
    ),
    "lfm2_vl": Family(first_layer=2, notes=LINEAR),
    "lfm3_vl": Family(first_layer=2, video=True, notes=LINEAR),
    "lighton_ocr": Family(),
    "llama4": Family(notes="chunked attention"),
    "llava": Family(),
    "llava_next": Family(),
    "llava_next_video": Family(video=True),
    "llava_onevision": Family(video=True),
    "minicpm_ocr": Family(first_layer=3, video=True, notes=LINEAR),
    "minicpmv4_6": Family(first_layer=3, video=True, notes=LINEAR),
    "minicpmv4_7": Family(first_layer=3, video=True, notes=LINEAR),
    "minimax_m3_vl": Family(video=True, notes="layers of sparse attention are refused"),
    "mistral3": Family(),
    "molmo2": Family(notes="image tokens see each other; video frames use the image token"),
    "muse_glimmer": Family(video=True),
    "muse_spark": Family(video=True),
    "nemotron_h_omni": Family(first_layer=2, video=True, notes=LINEAR),
    "ovis2": Family(),
    "paddleocr_vl": Family(video=True),
    "paligemma": Family(notes="the prompt sees itself in both directions"),
    "perception_lm": Family(video=True),
    "phi4_multimodal": Family(),
    "pp_chart2table": Family(notes="eager attention only"),
    "qianfan_ocr": Family(),
    "qwen2_5_omni_thinker": Family(video=True),
    "qwen2_5_vl": Family(video=True),
    "qwen2_vl": Family(video=True),
    "qwen3_5": Family(first_layer=3, video=True, notes=LINEAR),
    "qwen3_5_moe": Family(first_layer=3, video=True, notes=LINEAR),
    "qwen3_omni_moe_thinker": Family(video=True),
    "qwen3_vl": Family(video=True),
    "qwen3_vl_moe": Family(video=True),
    "shieldgemma2": Family(notes="image tokens see each other"),
    "smolvlm": Family(),
    "step3p7": Family(),
    "unlimited_ocr": Family(),
    "video_llama_3": Family(video=True),
    "video_llava": Family(video=True),
    "vipllava": Family(),
    # refused
    "blip": Family(refused=CROSS_ATTENTION),
    "diffusion_gemma": Family(
        refused="it generates by diffusion: the prompt passes through an encoder, whose keys its decoder takes over"
    ),
    "evolla": Family(refused="it reads proteins: no image"),
    "florence2": Family(refused=ENCODER),
    "fun_asr_nano": Family(refused=SPEECH),
    "git": Family(refused="it puts the image before the prompt by itself: no token of the prompt stands for it"),
    "glm5_next": Family(refused=INDICES),
    "glmasr": Family(refused=SPEECH),
    "granite_speech": Family(refused=SPEECH),
    "granite_speech_plus": Family(refused=SPEECH),
    "hy_v4_vl": Family(refused=INDICES),
    "idefics": Family(refused=CROSS_ATTENTION),
    "inkling2": Family(refused=POSITION_BIAS),
    "inkling2_loop": Family(refused=POSITION_BIAS),
    "inkling_mm_model": Family(refused=POSITION_BIAS),
    "kyutai_speech_to_text": Family(refused=SPEECH),
    "mistral4": Family(refused="it is a text model: no image"),
    "mistral_large4": Family(refused=INDICES),
    "mllama": Family(refused=CROSS_ATTENTION),
    "moss_transcribe_diarize": Family(refused=SPEECH),
    "nemo_speechlm": Family(refused=SPEECH),
    "omniasr": Family(refused=SPEECH),
    "pi0": Family(refused="it gives robot actions: its language model receives embeddings with the images merged in"),
    "pix2struct": Family(refused=ENCODER),
    "pixtral": Family(refused="it is a vision tower: no text"),
    "pp_formulanet": Family(refused=ENCODER),
    "qwen2_5_omni": Family(refused=SEVERAL),
    "qwen2_audio": Family(refused=SPEECH),
    "qwen3_asr": Family(refused=SPEECH),
    "qwen3_omni_moe": Family(refused=SEVERAL),
    "qwen4_exp": Family(refused=INDICES),
    "t5gemma2": Family(refused=ENCODER),
    "udop": Family(refused=ENCODER),
    "vibevoice_asr": Family(refused=SPEECH),
    "vision-encoder-decoder": Family(refused=ENCODER),
    "voxtral": Family(refused=SPEECH),
    "voxtral_realtime": Family(refused=SPEECH),
}

IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")
VIDEO_TOKEN_NAMES = ("video_token_id", "video_token_index")

# Text decoders (model_type of the text config) in which a layer without a sliding window sees exactly the earlier real
# keys: their mask can be replaced by causality and the 2-D padding mask, which the kernels read S times faster.
# fmt: off
PLAIN_CAUSAL_DECODERS = frozenset(
    {
        "apertus1p5_text", "aria_text", "chameleon", "cohere2", "cohere_compass_text", "cosmos3_edge_text",
        "deepseek_ocr2_text", "deepseek_v3", "emu3_text_model", "ernie4_5_vl_moe_text", "exaone4", "glm4v_moe_text",
        "glm4v_text", "glm_ocr_text", "granite4_vision_text", "granite_docling_text", "hunyuan_vl_text",
        "hyperclovax", "kosmos_2_5_text_model", "kosmos_2_text_model", "lfm2", "lfm3", "llama", "minimax_m3_vl_text",
        "mistral", "muse_glimmer_text", "muse_spark_text", "nemotron_h", "opt", "paddleocr_vl_text", "persimmon",
        "phi4_multimodal", "qwen2", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen3_vl_text", "step3p5",
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
    configs = (model.config, model.config.get_text_config(decoder=True))
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        raise UnsupportedModelError(f"{named(model)} cannot be enabled: {ENCODER}")
    return family


def image_token_ids(model, family: Family, video: bool) -> tuple[int, ...]:
    """The ids of the placeholder tokens that the image (and video) features replace; () where a mask marks them.

    Raises:
        UnsupportedModelError: the model has no image token.
    """
    if family.position_mask:
        return ()
    configs = [model.config, getattr(model.config, "vision_config", None)]
    video_token = _first(configs, VIDEO_TOKEN_NAMES)
    image_token = _first(configs, IMAGE_TOKEN_NAMES)
    ids = [video_token if image_token is None else image_token, video_token if video else None]
    ids = tuple(dict.fromkeys(token for token in ids if token is not None))
    if not ids:
        raise UnsupportedModelError(f"{named(model)} has no image token: EAH needs a vision-language model")
    return ids


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
    single = {index: modules[0] for index, modules in found.items() if len(modules) == 1}
    reasons = {index: why for index, module in single.items() if (why := _why_not_usable(module))}
    usable = {index: module for index, module in single.items() if index not in reasons}
    if not usable:
        why = "".join(f": {reason}" for reason in sorted(set(reasons.values())))
        raise UnsupportedModelError(f"no layer of {named(model)} has an attention map that can be replaced{why}")
    first = min((index for index in usable if index >= 1), default=min(usable))
    if may_move:
        layers = tuple(layer if layer in usable else first for layer in layers)
    count = decoder.config.get_text_config(decoder=True).num_hidden_layers
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers must be within 0..{count - 1} for {named(model)}, got {layer}")
        if layer not in usable:
            why = f" ({reasons[layer]})" if layer in reasons else ""
            raise UnsupportedModelError(
                f"layer {layer} of {named(model)} has no attention map to replace{why}; "
                f"the first usable layer is {first}"
            )
    return [usable[layer] for layer in layers]


def query_heads(module: nn.Module) -> int:
    """The query heads of an attention module, those that other processes compute included."""
    return getattr(module, "num_heads", None) or _layer_config(module).num_attention_heads


def head_dims(module: nn.Module) -> tuple[int, int]:
    """The head dims of an attention module's keys and of its values."""
    config = _layer_config(module)
    key = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    key = key or config.hidden_size // config.num_attention_heads
    return key, getattr(module, "v_head_dim", None) or key


def attention_namespace(cls: type) -> dict:
    """The globals of the file that an attention class is written in: its attention functions are looked up there."""
    return inspect.unwrap(cls.forward).__globals__


def named(model) -> str:
    """The model's class and family, for messages."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def _first(configs, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for config in configs for name in names)
    return next((value for value in values if value is not None), None)


def _calls_attention_interface(cls: type) -> bool:
    names = inspect.unwrap(cls.forward).__code__.co_names
    return "get_interface" in names and "eager_attention_forward" in attention_namespace(cls)


def _layer_config(module: nn.Module):
    """The config of the module's layer, in models whose layers differ."""
    per_layer = getattr(module.config, "per_layer_config", None)
    return module.config if per_layer is None else per_layer[module.layer_idx]


def _why_not_usable(module: nn.Module) -> str | None:
    if getattr(module, "indexer", None) is not None or getattr(module, "skip_topk", False):
        return INDICES
    if getattr(module, "is_kv_shared_layer", False):
        return "it has no keys of its own: it reuses those of an earlier layer"
    if getattr(module, "sinks", None) is not None:
        return "its attention has sinks of its own"
    if _names_argument(type(module), "position_bias"):
        return POSITION_BIAS
    if max(head_dims(module)) > MAX_HEAD_DIM:
        return f"its head dim is {max(head_dims(module))}, the largest possible is {MAX_HEAD_DIM}"
    return None


def _names_argument(cls: type, name: str) -> bool:
    """Whether the forward passes a keyword argument of this name on: such names are among its constants."""
    constants = inspect.unwrap(cls.forward).__code__.co_consts
    return any(name == constant or (isinstance(constant, tuple) and name in constant) for constant in constants)

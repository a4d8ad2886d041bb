"""What differs from one model family to the next: one row each. Everything else is found by a general rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Differs:
    """What the code does differently in a family; the other fields of its row are for the table."""

    position_mask: str | None = None  # the forward's argument that marks the image tokens, in place of a token id
    inner_generate: str | None = None  # the submodule whose own generate() is called by the model's, with embeddings
    inner_forward: str | None = None  # the submodule below, where the outermost forward keeps arguments to itself


@dataclass(frozen=True)
class Works:
    """A row of `FAMILIES`: a family that was tested."""

    differs: Differs = Differs()
    first_layer: int = 1  # of its released models, the first usable layer from layer 1 on
    video: bool = False  # has a placeholder token for video
    notes: str = ""


@dataclass(frozen=True)
class Refused:
    """A row of `FAMILIES`: a family in which EAH cannot act."""

    why: str


CROSS_ATTENTION = "its images enter by cross-attention: the text's self-attention has no image tokens"
ENCODER = "its images enter an encoder: the decoder's self-attention has no image tokens"
INDICES = "its attention looks at selected keys only (indices)"
POSITION_BIAS = "its attention adds a position bias"
SEVERAL = "it holds several models; enable the one with images: eah.enable(model.thinker)"
SPEECH = "its audio has placeholder tokens, but no image has"
LINEAR = "the layers before have linear attention or convolutions, without a map"

FAMILIES: dict[str, Works | Refused] = {
    "apertus1p5": Works(),
    "aria": Works(),
    "aya_vision": Works(),
    "blip-2": Works(Differs(inner_generate="language_model"), notes="with a decoder-only language model (OPT)"),
    "chameleon": Works(notes="image token from vocabulary_map"),
    "cohere2_vision": Works(),
    "cohere_compass": Works(video=True),
    "cosmos3_edge": Works(video=True),
    "cosmos3_omni": Works(video=True),
    "deepseek_ocr2": Works(),
    "deepseek_vl": Works(),
    "deepseek_vl_hybrid": Works(),
    "dots3_note": Works(first_layer=2, video=True, notes="layers of sparse attention are refused"),
    "emu3": Works(notes="image token from vocabulary_map"),
    "ernie4_5_vl_moe": Works(video=True),
    "exaone4_5": Works(video=True),
    "fast_vlm": Works(),
    "fuyu": Works(Differs(inner_forward="model")),  # on transformers 5.3
    "gemma3": Works(notes="image tokens see each other"),
    "gemma3n": Works(),
    "gemma4": Works(video=True, notes="image tokens see each other"),
    "gemma4_unified": Works(video=True, notes="image tokens see each other"),
    "glm46v": Works(video=True),
    "glm4v": Works(video=True),
    "glm4v_moe": Works(video=True),
    "glm_ocr": Works(video=True),
    "glmga": Works(video=True),
    "got_ocr2": Works(notes="eager attention only"),
    "granite4_vision": Works(),
    "granite_docling": Works(),
    "hunyuan_vl": Works(),
    "hyperclovax_vision_v2": Works(video=True),
    "idefics2": Works(),
    "idefics3": Works(),
    "instructblip": Works(
        Differs(inner_generate="language_model"), notes="with a decoder-only language model (Vicuna, OPT)"
    ),
    "instructblipvideo": Works(
        Differs(inner_generate="language_model"),
        notes="with a decoder-only language model (Vicuna, OPT); the token of videos is its image token",
    ),
    "internvl": Works(),
    "janus": Works(),
    "kimi_k25": Works(video=True, notes="latent attention: values narrower than keys"),
    "kosmos-2": Works(
        Differs(position_mask="image_embeds_position_mask", inner_generate="text_model"),
        notes="image tokens by image_embeds_position_mask",
    ),
    "kosmos-2.5": Works(
        Differs(position_mask="image_embeds_position_mask"), notes="image tokens by image_embeds_position_mask"
    ),
    "lfm2_vl": Works(first_layer=2, notes=LINEAR),
    "lfm3_vl": Works(first_layer=2, video=True, notes=LINEAR),
    "lighton_ocr": Works(),
    "llama4": Works(notes="chunked attention"),
    "llava": Works(),
    "llava_next": Works(),
    "llava_next_video": Works(video=True),
    "llava_onevision": Works(video=True),
    "minicpm_ocr": Works(first_layer=3, video=True, notes=LINEAR),
    "minicpmv4_6": Works(first_layer=3, video=True, notes=LINEAR),
    "minicpmv4_7": Works(first_layer=3, video=True, notes=LINEAR),
    "minimax_m3_vl": Works(video=True, notes="layers of sparse attention are refused"),
    "mistral3": Works(),
    "molmo2": Works(notes="image tokens see each other; video frames use the image token"),
    "muse_glimmer": Works(video=True),
    "muse_spark": Works(video=True),
    "nemotron_h_omni": Works(first_layer=2, video=True, notes=LINEAR),
    "ovis2": Works(),
    "paddleocr_vl": Works(video=True),
    "paligemma": Works(notes="the prompt sees itself in both directions"),
    "perception_lm": Works(video=True),
    "phi4_multimodal": Works(),
    "pp_chart2table": Works(notes="eager attention only"),
    "qianfan_ocr": Works(),
    "qwen2_5_omni_thinker": Works(video=True),
    "qwen2_5_vl": Works(video=True),
    "qwen2_vl": Works(video=True),
    "qwen3_5": Works(first_layer=3, video=True, notes=LINEAR),
    "qwen3_5_moe": Works(first_layer=3, video=True, notes=LINEAR),
    "qwen3_omni_moe_thinker": Works(video=True),
    "qwen3_vl": Works(video=True),
    "qwen3_vl_moe": Works(video=True),
    "shieldgemma2": Works(notes="image tokens see each other"),
    "smolvlm": Works(),
    "step3p7": Works(),
    "unlimited_ocr": Works(),
    "video_llama_3": Works(video=True),
    "video_llava": Works(video=True),
    "vipllava": Works(),
    # refused
    "blip": Refused(CROSS_ATTENTION),
    "diffusion_gemma": Refused(
        "it generates by diffusion: the prompt passes through an encoder, whose keys its decoder takes over"
    ),
    "evolla": Refused("it reads proteins: no image"),
    "florence2": Refused(ENCODER),
    "fun_asr_nano": Refused(SPEECH),
    "git": Refused("it puts the image before the prompt by itself: no token of the prompt stands for it"),
    "glm5_next": Refused(INDICES),
    "glmasr": Refused(SPEECH),
    "granite_speech": Refused(SPEECH),
    "granite_speech_plus": Refused(SPEECH),
    "hy_v4_vl": Refused(INDICES),
    "idefics": Refused(CROSS_ATTENTION),
    "inkling2": Refused(POSITION_BIAS),
    "inkling2_loop": Refused(POSITION_BIAS),
    "inkling_mm_model": Refused(POSITION_BIAS),
    "kyutai_speech_to_text": Refused(SPEECH),
    "mistral4": Refused("it is a text model: no image"),
    "mistral_large4": Refused(INDICES),
    "mllama": Refused(CROSS_ATTENTION),
    "moss_transcribe_diarize": Refused(SPEECH),
    "nemo_speechlm": Refused(SPEECH),
    "omniasr": Refused(SPEECH),
    "pi0": Refused("it gives robot actions: its language model receives embeddings with the images merged in"),
    "pix2struct": Refused(ENCODER),
    "pixtral": Refused("it is a vision tower: no text"),
    "pp_formulanet": Refused(ENCODER),
    "qwen2_5_omni": Refused(SEVERAL),
    "qwen2_audio": Refused(SPEECH),
    "qwen3_asr": Refused(SPEECH),
    "qwen3_omni_moe": Refused(SEVERAL),
    "qwen4_exp": Refused(INDICES),
    "t5gemma2": Refused(ENCODER),
    "udop": Refused(ENCODER),
    "vibevoice_asr": Refused(SPEECH),
    "vision-encoder-decoder": Refused(ENCODER),
    "voxtral": Refused(SPEECH),
    "voxtral_realtime": Refused(SPEECH),
}

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
    for name, family in sorted(FAMILIES.items(), key=lambda item: (isinstance(item[1], Refused), item[0])):
        if isinstance(family, Refused):
            rows.append(FamilyRow(name, "refused", "-", family.why))
            continue
        notes = [family.notes] if family.notes else []
        notes += ["video tokens count as image tokens"] if family.video else []
        rows.append(FamilyRow(name, "works", str(family.first_layer), "; ".join(notes)))
    return rows

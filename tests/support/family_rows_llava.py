"""The rows of the families whose config has a text and a vision config of free choice, as LLaVA's has."""

from __future__ import annotations

import torch

from .family_parts import (
    CLIP,
    GATED_DELTA,
    JANUS_VQ,
    QFORMER,
    SIGLIP,
    SQUARE,
    TIMM,
    TINY_VIT,
    WINDOWED,
    gemma4_patches,
    like_llava,
    merged_pixels,
    mm_token_types,
    no_pixels,
    patch_pixels,
    row_pixels,
    sized_pixels,
    square_pixels,
    tiled_pixels,
)
from .tiny_models import IMAGE, PAD, VOCAB

LIKE_LLAVA = {
    "llava": like_llava("Llava"),
    "llava_next": like_llava(
        "LlavaNext", top={"image_grid_pinpoints": [[12, 12]]}, pixels=tiled_pixels, image=(IMAGE,) * 21
    ),
    "llava_next_video": like_llava(
        "LlavaNextVideo", top={"image_grid_pinpoints": [[12, 12]]}, pixels=tiled_pixels, image=(IMAGE,) * 21
    ),
    "llava_onevision": like_llava(
        "LlavaOnevision",
        "qwen2",
        SIGLIP,
        top={"image_grid_pinpoints": [[12, 12]]},
        pixels=tiled_pixels,
        image=(IMAGE,) * 21,
    ),
    "vipllava": like_llava("VipLlava", top={"vision_feature_layers": [-2, -1]}),
    "internvl": like_llava("InternVL", "qwen2", {**SQUARE, "image_size": [12, 12], "patch_size": [2, 2]}),
    "qianfan_ocr": like_llava(
        "QianfanOCR", "qwen3", {**SQUARE, "image_size": [12, 12], "patch_size": [2, 2]}, text={"head_dim": 8}
    ),
    "ovis2": like_llava(
        "Ovis2",
        "qwen2",
        {**SQUARE, "vocab_size": 24, "hidden_stride": 1},
        top={"vocab_size": VOCAB, "hidden_size": 32, "visual_indicator_token_ids": [86, 87, 88, 89, 90]},
    ),
    "video_llava": like_llava("VideoLlava", pixels=lambda n: {"pixel_values_images": torch.randn(n, 3, 12, 12)}),
    "video_llama_3": like_llava("VideoLlama3", "qwen2", {**TINY_VIT, "patch_size": 2}, pixels=merged_pixels),
    "janus": like_llava(
        "Janus",
        "llama",
        {**SQUARE, "num_image_tokens": 9, "projection_dim": 32, "mlp_ratio": 1.0},
        top={"vq_config": JANUS_VQ},
    ),
    "deepseek_vl": like_llava("DeepseekVL", "llama", SIGLIP),
    "aria": like_llava(
        "Aria",
        "aria_text",
        {**SQUARE, "model_type": "idefics3_vision"},
        text={"moe_num_experts": 2, "moe_num_shared_experts": 1},
        top={"projector_patch_to_query_dict": {9: 9}},
    ),
    "granite4_vision": like_llava(
        "Granite4Vision",
        "granite4_vision_text",
        {**CLIP, "hidden_size": 64, "image_size": 16},
        top={
            "image_grid_pinpoints": [[16, 16]],
            "spatial_target_layers": [0],
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "qformer_config": {
                **QFORMER,
                "hidden_size": 64,
                "encoder_hidden_size": 64,
                "model_type": "blip_2_qformer",
                "cross_attention_frequency": 1,
            },
        },
        pixels=lambda n: tiled_pixels(n, 16),
        image=(IMAGE,) * 10,
    ),
    "perception_lm": like_llava("PerceptionLM", "llama", TIMM, pixels=no_pixels),
    "fast_vlm": like_llava("FastVlm", "qwen2", TIMM, pixels=no_pixels),
    "mistral3": like_llava(
        "Mistral3",
        "mistral",
        {**SQUARE, "model_type": "pixtral", "patch_size": 2, "head_dim": 8},
        text={"sliding_window": None},
        pixels=sized_pixels,
    ),
    "cohere2_vision": like_llava(
        "Cohere2Vision", "cohere2", {**SIGLIP, "patch_size": 2}, text=WINDOWED, top={"alignment_intermediate_size": 16}
    ),
    "aya_vision": like_llava("AyaVision", "cohere2", {**SIGLIP, "patch_size": 2}, text=WINDOWED),
    "got_ocr2": like_llava(
        "GotOcr2",
        "qwen2",
        {
            **SQUARE,
            "image_size": 96,
            "patch_size": 4,
            "output_channels": 8,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        pixels=lambda n: square_pixels(n, 96),
        image=(IMAGE,) * 36,
        attn="eager",
    ),
    "idefics3": like_llava(
        "Idefics3", "llama", {**SQUARE, "patch_size": 2}, pixels=row_pixels, top={"pad_token_id": PAD}
    ),
    "smolvlm": like_llava(
        "SmolVLM", "llama", {**SQUARE, "patch_size": 2}, pixels=row_pixels, top={"pad_token_id": PAD}
    ),
    "gemma3": like_llava(
        "Gemma3",
        "gemma3_text",
        SIGLIP,
        text={**WINDOWED, "head_dim": 8},
        top={"mm_tokens_per_image": 9},
        inputs=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "paligemma": like_llava(
        "PaliGemma",
        "gemma",
        SIGLIP,
        text={"head_dim": 8},
        top={"projection_dim": 32},
        inputs=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
    "gemma3n": like_llava(
        "Gemma3n",
        "gemma3n_text",
        TIMM,
        text={
            **WINDOWED,
            "head_dim": 8,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 3,
            "intermediate_size": [48] * 3,
        },
        pixels=no_pixels,
        top={
            "audio_config": {
                "hidden_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [4, 4],
                "input_feat_size": 16,
            }
        },
    ),
    "gemma4": like_llava(
        "Gemma4",
        "gemma4_text",
        {**TINY_VIT, "patch_size": 2, "head_dim": 8, "num_key_value_heads": 2, "pooling_kernel_size": 2},
        text={
            **WINDOWED,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        top={"audio_config": None},
        pixels=gemma4_patches,
        inputs=mm_token_types,
    ),
    "llama4": like_llava(
        "Llama4",
        "llama4_text",
        {
            **SQUARE,
            "intermediate_size": 64,
            "patch_size": 2,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        text={
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "moe_layers": [2],
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 0],
        },
        seed=1,
    ),
    "minicpmv4_6": like_llava(
        "MiniCPMV4_6",
        "qwen3_5_text",
        {**TINY_VIT, "patch_size": 2, "image_size": 12, "insert_layer_id": 0},
        text=GATED_DELTA,
        layer=3,
        pixels=no_pixels,
    ),
    "lfm3_vl": like_llava(
        "Lfm3Vl",
        "lfm3",
        {**TINY_VIT, "num_key_value_heads": 2, "patch_size": 2, "layer_types": ["conv", "full_attention"]},
        text={"layer_types": ["conv", "conv", "full_attention"]},
        layer=2,
        pixels=patch_pixels,
        top={"projector_hidden_size": 16},
    ),
}

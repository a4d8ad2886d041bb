"""Tiny vision-language models with random weights, and prompts for them."""

from __future__ import annotations

import sys

import torch

FAMILIES = ("llava", "qwen2_5_vl", "internvl")
PAD, VISION_START, VISION_END, VIDEO, IMAGE, VOCAB = 0, 92, 93, 94, 95, 96
IMAGE_TOKENS = 9
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(family: str, attn: str = "sdpa", layers: tuple[int, ...] = (1,), seed: int = 0, decoder: str = "", **text):
    """A model of 3 layers with 4 query and 2 KV heads; the heads of `layers` are made peaked and unlike each other.

    `decoder` names another text config for LLaVA, such as "Gemma2Config"; `text` changes `TEXT`.
    """
    import transformers as hf

    text = {**TEXT, **text}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if family == "llava":
        vision_config = hf.CLIPVisionConfig(**vision, num_hidden_layers=2, image_size=12, patch_size=4)
        config = hf.LlavaConfig(
            vision_config=vision_config,
            text_config=getattr(hf, decoder or "LlamaConfig")(**text),
            image_token_index=IMAGE,
        )
        cls = hf.LlavaForConditionalGeneration
    elif family == "internvl":
        vision_config = hf.InternVLVisionConfig(
            **vision, num_hidden_layers=1, image_size=(12, 12), patch_size=(2, 2), norm_type="layer_norm"
        )
        config = hf.InternVLConfig(
            vision_config=vision_config,
            text_config=hf.Qwen2Config(**text),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
        cls = hf.InternVLForConditionalGeneration
    else:
        vision_config = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "depth": 2, "patch_size": 2}
        vision_config |= {"out_hidden_size": 32, "window_size": 8, "fullatt_block_indexes": [1]}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config = hf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=vision_config,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        cls = hf.Qwen2_5_VLForConditionalGeneration
    config._attn_implementation = attn
    torch.manual_seed(seed)
    model = cls(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        for layer in layers:
            attention = attention_of(model, layer)
            for projection in (attention.q_proj, attention.k_proj):
                heads = projection.weight.view(-1, 8, 32)
                heads *= torch.linspace(1.5, 4, len(heads))[:, None, None]
    return model


def attention_of(model, layer: int):
    return model.get_decoder().layers[layer].self_attn


def prompt(family: str, rows: list[str], padding: str = "left") -> dict:
    """Model inputs from rows such as "abIcd": a letter is a text token, I an image. Padded to the longest row."""
    generator = torch.Generator().manual_seed(1)
    image = [IMAGE] * IMAGE_TOKENS
    image = [VISION_START, *image, VISION_END] if family == "qwen2_5_vl" else image
    ids = [[token for c in row for token in (image if c == "I" else [ord(c) % 64 + 1])] for row in rows]
    longest = max(map(len, ids))
    fill = [[PAD] * (longest - len(row)) for row in ids]
    ids_and_fill = [f + row if padding == "left" else row + f for row, f in zip(ids, fill, strict=True)]
    real = torch.tensor([[1] * len(row) + [0] * len(f) for row, f in zip(ids, fill, strict=True)])
    real = real.flip(-1) if padding == "left" else real
    inputs = {"input_ids": torch.tensor(ids_and_fill), "attention_mask": real}
    images = sum(row.count("I") for row in rows)
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if images and family == "qwen2_5_vl":
        inputs["pixel_values"] = torch.randn(images * 36, 24, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 6, 6]] * images)
    elif images:
        inputs["pixel_values"] = torch.randn(images, 3, 12, 12, generator=generator)
    return inputs


def cache_in(kwargs):
    """The cache that an attention module is given: `past_key_values` until transformers 5.23, then `cache`."""
    return kwargs.get("past_key_values", kwargs.get("cache"))


def rotated(attention, query, key, position_embeddings):
    modeling = sys.modules[type(attention).__module__]
    if hasattr(modeling, "apply_rotary_pos_emb"):
        return modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
    sections = attention.config.rope_parameters["mrope_section"]  # Qwen2.5-VL until transformers 5.4 or so
    return modeling.apply_multimodal_rotary_pos_emb(query, key, *position_embeddings, sections)

"""Tiny models with random weights in folders from which vLLM serves them, and pictures for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from ..support.family_models import build
from ..support.processors import PROCESSORS, image_processor_of, tokenizer

# vLLM's kernels on CPUs want a head dim of 32 at least; its 4 query heads share 2 KV heads
TEXT = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32, "max_position_embeddings": 512}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
RANK = 4
VIDEO = {
    "internvl": "InternVLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}


def save(family: str, folder: Path, **changes) -> Path:
    """Saves a tiny model of a family and its processor; `changes` are made to its text config."""
    rope = {**MROPE, "mrope_interleaved": family == "qwen3_vl"}
    text = {**TEXT, **({"rope_parameters": rope} if "qwen" in family else {}), **changes}
    vision = {"out_hidden_size": text["hidden_size"]} if "qwen" in family else None
    model = build(family, vision=vision, **text)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family == "llava":  # transformers leaves a level out that vLLM looks for
        weights = load_file(folder / "model.safetensors")
        weights = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor, _, _, special, placeholder, more = PROCESSORS[family]
    if family in VIDEO:
        more = {**more, "video_processor": getattr(transformers, VIDEO[family])()}
    words = tokenizer(special)
    words.chat_template = TEMPLATE.replace("PLACEHOLDER", placeholder)
    cls = getattr(transformers, f"{processor}Processor")
    cls(image_processor_of(family), words, **more).save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}PLACEHOLDER{% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_adapter(folder: Path) -> Path:
    """A LoRA adapter, of random weights, for the query and key projections of every layer of LLaVA's decoder."""
    generator, weights = torch.Generator().manual_seed(3), {}
    for layer in range(3):
        for name, out in ("q_proj", 128), ("k_proj", 64):
            key = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, 128, generator=generator) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.3
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "k_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapt(model, folder: Path) -> None:
    """Adds an adapter to a model's weights."""
    weights = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key in (key for key in weights if key.endswith("lora_A.weight")):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = weights[key.replace("lora_A", "lora_B")] @ weights[key]
            model.get_submodule(name).weight += delta


def picture(seed: int, side: int = 12) -> Image.Image:
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


if __name__ == "__main__":  # python -m tests.vllm.models FOLDER: a tiny LLaVA to try a server with
    save("llava", Path(sys.argv[1]))

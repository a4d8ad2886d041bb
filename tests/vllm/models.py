"""Tiny models with random weights in folders from which vLLM serves them, and pictures for them."""

from __future__ import annotations

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
LETTERS = 34  # the token of "a", see support.processors


def save(family: str, folder: Path, **changes) -> Path:
    """Saves a tiny model of a family and its processor; `changes` are made to its text config."""
    text = {**TEXT, **({"rope_parameters": MROPE} if "qwen" in family else {}), **changes}
    model = build(family, **text)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if family == "llava":  # transformers leaves a level out that vLLM looks for
        weights = load_file(folder / "model.safetensors")
        weights = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor, _, _, special, placeholder, more = PROCESSORS[family]
    if "qwen" in family:
        more = {**more, "video_processor": transformers.Qwen2VLVideoProcessor()}
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


def picture(seed: int, side: int = 12) -> Image.Image:
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


if __name__ == "__main__":  # python -m tests.vllm.models FOLDER: a tiny LLaVA to try a server with
    save("llava", Path(sys.argv[1]))

"""`eah generate`: a user's own model answers a prompt about a picture, with EAH, without, or both."""

from __future__ import annotations

import sys

import torch

import eah
from eah.demo import load_picture, progress


def generate(
    model_id: str,
    image_file: str,
    prompt: str,
    *,
    answers: tuple[str, ...],
    knobs: dict,
    max_new_tokens: int,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Streams each of `answers` ("plain", "eah") to stdout, then EAH's report. Weights are read from safetensors only.

    Raises:
        ImportError, OSError, ValueError, RuntimeError: as loading the model and `eah.enable` do.
    """
    picture, _ = load_picture(image_file)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
        from transformers.utils import logging
    except ModuleNotFoundError as missing:
        raise ImportError("eah generate needs transformers: pip install 'eah-kernels[demo]'") from missing
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    progress(f"loading {model_id}")
    processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=trust_remote_code)
    model = AutoModelForImageTextToText.from_pretrained(
        model_id, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    ).to(device)
    inputs = prepare(processor, picture, prompt).to(device, model.dtype)
    for answer in answers:
        if len(answers) > 1:
            print(f"--- {'with' if answer == 'eah' else 'without'} EAH")
        progress("generating")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = dict(max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        if answer == "plain":
            model.generate(**inputs, **options)
            continue
        with eah.enable(model, **knobs) as handle:
            model.generate(**inputs, **options)
            print(f"\n{handle.report()}")


def prepare(processor, picture, prompt: str):
    """Model inputs for one picture and a prompt: by the chat template, or, without one, picture first."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    return processor(images=picture, text=f"{processor.image_token}\n{prompt}", return_tensors="pt")

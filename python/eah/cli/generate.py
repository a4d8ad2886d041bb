"""`eah generate`: a user's own model answers a prompt about a picture, with EAH, without, or both."""

from __future__ import annotations

import dataclasses

import torch

import eah
from eah.cli.doctor import why_no_enable
from eah.cli.messages import progress
from eah.cli.samples import load_picture
from eah.transformers.inputs import prepare
from eah.transformers.pretrained import check_model, device_of, load_pretrained, no_bars_in_files
from eah_kernels import eah_attention


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
    stream: bool,
) -> dict:
    """Each of `answers` ("without", "with" EAH) and EAH's report, as plain data; printed as they come if `stream`.

    Whatever can be refused without the weights is refused before they are read. They are read from safetensors only.

    Raises:
        ImportError, OSError, ValueError, RuntimeError: as loading the picture and the model and `eah.enable` do.
    """
    place = device_of(device)
    check_knobs(knobs, max_new_tokens, place)
    picture, _ = load_picture(image_file)
    problem = why_no_enable()
    if problem:
        raise ImportError(problem)
    from huggingface_hub.utils import logging as hub_logging
    from transformers import TextStreamer

    no_bars_in_files()
    hub_logging.set_verbosity_error()  # or every retry without a network is a line
    progress(f"looking at {model_id}")
    # check_knobs knows the device, and so the backend
    check_model(model_id, [{**knobs, "backend": "auto"}] if "with" in answers else [], trust_remote_code)
    progress(f"loading {model_id}")
    processor, model = load_pretrained(model_id, "auto", place, trust_remote_code)
    inputs = prepare(processor, picture, prompt).to(place, model.dtype)

    class Answer(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            if stream:
                super().on_finalized_text(text, stream_end)

    results = {"model": model_id, "device": str(place), "prompt_tokens": inputs["input_ids"].shape[1], "answers": {}}
    for answer in answers:
        if len(answers) > 1 and stream:
            print(f"--- {answer} EAH")
        progress("generating")
        streamer = Answer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = dict(max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        if answer == "without":
            model.generate(**inputs, **options)
        else:
            with eah.enable(model, **knobs) as handle:
                model.generate(**inputs, **options)
                report = handle.report()
            results["report"] = dataclasses.asdict(report)
            if stream:
                print(f"\n{report}")
        results["answers"][answer] = streamer.text
    return results


def check_knobs(knobs: dict, max_new_tokens: int, device: torch.device) -> None:
    """Raises ValueError for what is wrong whatever the model is."""
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be an int >= 1, got {max_new_tokens}")
    empty = torch.empty(0, 1, 1, 1, device=device)
    image_mask = torch.empty(0, 1, dtype=torch.bool, device=device)
    options = {name: knobs[name] for name in ("threshold", "min_density", "backend")}
    eah_attention(empty, empty, empty, image_mask, **options)

"""A whole model: time to first token, decoding speed and peak memory with plain SDPA, with EAH, and as published.

    python -m bench.model          LLaVA-1.5-7B's and Qwen2.5-VL-7B's shapes on a GPU; a LLaVA cut down to size on a CPU

Random weights. "As published": eager attention in every layer, EAH by the eager reference. Writes model.json into
--out after each model. A way that fails is listed with the reason; the others go on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import eah

from .machine import ROOT, Results
from .timing import Deadline, reason

IMAGE = 9  # the placeholder's token id


def llava(scale: int) -> transformers.PreTrainedConfig:
    """LLaVA-1.5-7B's language model behind CLIP at 336 pixels, its widths and depths divided by scale."""
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024 // scale,
            intermediate_size=4096 // scale,
            num_hidden_layers=max(2, 24 // scale),
            num_attention_heads=16 // min(scale, 8),
            image_size=336,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=32064 // scale,
            hidden_size=4096 // scale,
            intermediate_size=11008 // scale,
            num_hidden_layers=max(4, 32 // scale),
            num_attention_heads=32 // min(scale, 8),
            num_key_value_heads=32 // min(scale, 8),
            pad_token_id=0,
        ),
        image_token_index=IMAGE,
    )


def qwen() -> transformers.PreTrainedConfig:
    """Qwen2.5-VL-7B's shape."""
    return transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        ),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
        image_token_id=IMAGE,
        video_token_id=10,
        vision_start_token_id=11,
        vision_end_token_id=12,
    )


def llava_inputs(device: str, dtype: torch.dtype) -> dict:
    """648 tokens, 576 of them the image's."""
    ids = [20] * 35 + [IMAGE] * 576 + [21] * 37
    pixels = torch.randn(1, 3, 336, 336, dtype=dtype, device=device)
    return {"input_ids": torch.tensor([ids], device=device), "pixel_values": pixels}


def qwen_inputs(device: str, dtype: torch.dtype) -> dict:
    """2,932 tokens, 2,860 of them the image's: 110 x 104 patches, merged two by two."""
    ids = torch.tensor([[20] * 34 + [11] + [IMAGE] * 2860 + [12] + [21] * 36], device=device)
    pixels = torch.randn(110 * 104, 1176, dtype=dtype, device=device)
    grid = torch.tensor([[1, 110, 104]], device=device)
    types = (ids == IMAGE).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}


MODELS: dict[str, list[tuple[str, Callable, Callable]]] = {
    "cuda": [("LLaVA-1.5-7B", lambda: llava(1), llava_inputs), ("Qwen2.5-VL-7B", qwen, qwen_inputs)],
    "cpu": [("LLaVA-1.5-7B with widths and depths divided by 16", lambda: llava(16), llava_inputs)],
}
WAYS = {"plain SDPA": ("sdpa", None), "EAH": ("sdpa", "auto"), "EAH, as published": ("eager", "reference")}


def measure(
    name: str, config, make_inputs, device: str, rounds: int, new_tokens: int, deadline: Deadline
) -> list[dict]:
    """One row a way, the ways taking turns; as many rounds as the time allows, the warm-up and one at least."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)
    inputs = make_inputs(device, dtype)
    found = {way: {"first": [], "rest": [], "peak": 0.0} for way in WAYS}
    failed: dict[str, str] = {}
    for round_number in range(rounds + 1):
        if round_number > 1 and deadline.passed():
            break
        for way in WAYS:
            if way in failed:
                continue
            try:
                first, all_of_them = first_and_rest(model, inputs, way, new_tokens, device)
            except Exception as error:
                failed[way] = reason(error)
                continue
            if round_number:  # the first round warms up
                found[way]["first"].append(first[0])
                found[way]["rest"].append(all_of_them[0] - first[0])
                found[way]["peak"] = max(found[way]["peak"], first[1])
    plain = found["plain SDPA"]
    rows = []
    for way, each in found.items():
        row = {"model": name, "way": way, "prompt_tokens": inputs["input_ids"].shape[1]}
        rows.append(row)
        if way in failed:
            row["not_timed"] = failed[way]
            continue
        first, rest = statistics.median(each["first"]), statistics.median(each["rest"])
        measured = "plain SDPA" not in failed
        row |= {
            "rounds": len(each["first"]),
            "first_token_ms": 1e3 * first,
            "first_token_spread": max(each["first"]) / min(each["first"]),
            "first_token_ratio": first / statistics.median(plain["first"]) if measured else None,
            "decode_tokens_per_s": new_tokens / rest,
            "decode_ratio": statistics.median(plain["rest"]) / rest if measured else None,
            "peak_extra_mib": each["peak"] if device == "cuda" else None,
        }
    return rows


def first_and_rest(model, inputs: dict, way: str, new_tokens: int, device: str):
    """`generate` of one token, and of new_tokens more."""
    implementation, backend = WAYS[way]
    model.set_attn_implementation({"text_config": implementation})
    handle = eah.enable(model, backend=backend) if backend else None
    try:
        first = generate(model, inputs, 1, device)
        all_of_them = generate(model, inputs, new_tokens + 1, device)
        if handle and any(layer.stood_aside for layer in handle.report().layers):
            raise RuntimeError(f"EAH did not act: {handle.report()}")
    finally:
        if handle:
            handle.disable()
    return first, all_of_them


@torch.no_grad()
def generate(model, inputs: dict, tokens: int, device: str) -> tuple[float, float]:
    """Seconds, and the MiB that were allocated beyond what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if device != "cuda":
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, help="begin no round after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder to write to")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results, deadline = Results(chosen.out / "model.json", device, chosen.commit), Deadline(chosen.seconds)
    for name, config, make_inputs in MODELS[device]:
        if deadline.passed():
            results.leave_out(name, "no time left", failed=False)
            continue
        try:
            results.add(measure(name, config(), make_inputs, device, chosen.rounds, chosen.new_tokens, deadline))
        except Exception as error:
            results.leave_out(name, reason(error))
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {results.file}")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())

"""A second turn under decode="track": the enabled layer's attention call over SDPA's, timed in turns.

    python -m bench.second_turn [--rounds 6] [--kv-heads 32] [--dtype float32] [--threads N]

256 tokens on a cache of 1500, 576 of them image tokens, in a Llama of two layers, 32 heads of 128 and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import eah

HEADS, HEAD_DIM, CACHED, NEW, IMAGE_TOKEN, LAYER = 32, 128, 1500, 256, 5, 1


def wide_llava(kv_heads: int, dtype: torch.dtype, layers: int = 2, intermediate: int = 16):
    torch.manual_seed(0)
    small = dict(intermediate_size=16, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
    )
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, **small)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval().to(dtype)


def timed(name: str, function):
    """Registers `function` as the attention implementation `name`, timed; the seconds of the layer's last call."""
    seconds = {}

    def attention(module, *arguments, **keywords):
        start = time.perf_counter()
        output = function(module, *arguments, **keywords)
        seconds[module.layer_idx] = time.perf_counter() - start
        return output

    AttentionInterface.register(name, attention)
    return seconds


@torch.no_grad()
def two_turns(model, first, second) -> None:
    cache = model.model(input_ids=first, use_cache=True).past_key_values
    model.model(input_ids=second, past_key_values=cache)


def asked_model(about: str, rounds: int):
    """What the command line asks for, and the model of that form; EAH's attention function is then known."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--kv-heads", type=int, default=HEADS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = wide_llava(asked.kv_heads, getattr(torch, asked.dtype))
    eah.enable(model).disable()
    return asked, model


def main() -> None:
    asked, model = asked_model(__doc__, rounds=6)
    first, second = torch.randint(6, 60, (1, CACHED)), torch.randint(6, 60, (1, NEW))
    first[:, 35:611] = IMAGE_TOKEN
    names = AttentionInterface()
    attention = {"SDPA": names["sdpa"], "EAH": names["eah"]}
    times: dict[str, list[float]] = {"SDPA": [], "EAH": []}
    for number in range(asked.rounds + 1):  # the first warms up
        plain = timed("sdpa", attention["SDPA"])
        two_turns(model, first, second)
        with eah.enable(model, layers=(LAYER,), threshold=0.0005, decode="track") as handle:
            tracked = timed("eah", attention["EAH"])
            two_turns(model, first, second)
            (layer,) = handle.report().layers
        if number:
            times["SDPA"].append(plain[LAYER])
            times["EAH"].append(tracked[LAYER])
    assert layer.rows and layer.afterwards is None, layer
    median = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        print(f"{name:5} {1e3 * median[name]:8.2f} ms  ({1e3 * min(each):.2f}-{1e3 * max(each):.2f})")
    heads = f"{HEADS}/{asked.kv_heads} heads"
    print(f"ratio {median['EAH'] / median['SDPA']:.2f}; {asked.dtype}, {heads}, {asked.threads} threads")


if __name__ == "__main__":
    main()

"""A forward that is looked at (`eah.inspect`) over the plain one, in turns.

    python -m bench.observe [--rounds 5] [--dtype float32] [--threads N]

Four layers of LLaVA-1.5-7B's form and random weights, 648 tokens, 576 of them image tokens: looked at without maps, and
with the two maps of each layer that a page shows.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from eah.inspect.look import look_at

from .second_turn import HEADS, IMAGE_TOKEN, wide_llava

LAYERS, MLP, TOKENS = 4, 11008, 648


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = wide_llava(HEADS, getattr(torch, asked.dtype), LAYERS, MLP)
    prompt = torch.randint(6, 60, (1, TOKENS))
    prompt[:, 35:611] = IMAGE_TOKEN
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    contestants = {
        "plain": lambda: model(**inputs),
        "looked at": lambda: look_at(model, inputs, None, "", 0.002, pictured=()),
        "looked at, with maps": lambda: look_at(model, inputs, None, "", 0.002, pictured=None),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(asked.rounds + 1):  # the first warms up
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    print(f"{asked.dtype}, {LAYERS} layers, {TOKENS} tokens, {asked.threads} threads")
    for name, each in times.items():
        ratio = statistics.median(each) / statistics.median(times["plain"])
        spread = f"{1e3 * min(each):.0f}-{1e3 * max(each):.0f}"
        print(f"{name:21} {1e3 * statistics.median(each):7.0f} ms ({spread}), {ratio:.3f} of the plain forward")


if __name__ == "__main__":
    main()

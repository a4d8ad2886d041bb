"""A forward that is looked at (`eah.inspect`) over the plain one, in turns.

    python -m bench.observe [--rounds 5] [--layers 4] [--dtype float32] [--threads N]

Layers of LLaVA-1.5-7B's form and random weights, 648 tokens, 576 of them image tokens: looked at without maps, and
with the two maps of each layer that a page shows.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from eah.inspect.look import look_at

from .second_turn import HEADS, IMAGE_TOKEN, wide_llava

MLP, TOKENS = 11008, 648


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = wide_llava(HEADS, getattr(torch, asked.dtype), asked.layers, MLP)
    prompt = torch.randint(6, 60, (1, TOKENS))
    prompt[:, 35:611] = IMAGE_TOKEN
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    contestants = {
        "plain": lambda: model(**inputs),
        "looked at": lambda: look_at(model, inputs, None, "", 0.002, pictured=()),
        "looked at, with maps": lambda: look_at(model, inputs, None, "", 0.002, pictured=None),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(asked.rounds + 1):  # the first warms up
        for name, run in contestants.items():
            start = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print(f"{asked.dtype}, {asked.layers} layers, {TOKENS} tokens, {asked.threads} threads")
    for clock, what in enumerate(("time", "CPU time, which a busy machine changes less")):
        print(what)
        plain = statistics.median(each[clock] for each in times["plain"])
        for name, each in times.items():
            seconds = [both[clock] for both in each]
            spread = f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}"
            median = statistics.median(seconds)
            print(f"  {name:21} {1e3 * median:7.0f} ms ({spread}), {median / plain:.3f} of the plain forward")


if __name__ == "__main__":
    main()

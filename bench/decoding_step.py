"""A decoding step under decode="hold" and "track": the enabled decoder layer and its attention call, timed in turns.

    python -m bench.decoding_step [--rounds 5] [--kv-heads 32] [--dtype float32] [--threads N]

One token on a cache of 2000 tokens, 576 of them image tokens, in the Llama of `bench.second_turn`: its layer is the
projections of LLaVA-1.5-7B and attention, with an MLP of 16 features.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import AttentionInterface

import eah
from eah.transformers.modes import MODES

from .second_turn import HEADS, IMAGE_TOKEN, LAYER, asked_model, timed

CACHED, STEPS = 2000, 10


@torch.no_grad()
def steps(model, attention, mode: str) -> tuple[list[float], list[float]]:
    """Seconds of the layer and of its attention call at each step."""
    prompt = torch.randint(6, 60, (1, CACHED))
    prompt[:, 35:611] = IMAGE_TOKEN
    layer, begun, whole, call = model.model.language_model.layers[LAYER], [0.0], [], []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())),
        layer.register_forward_hook(lambda *_: whole.append(time.perf_counter() - begun[-1])),
    ]
    with eah.enable(model, layers=(LAYER,), threshold=0.0005, decode=mode) as handle:
        seconds = timed("eah", attention)
        cache = model.model(input_ids=prompt, use_cache=True).past_key_values
        whole.clear()
        for _ in range(STEPS):
            model.model(input_ids=prompt[:, -1:], past_key_values=cache)
            call.append(seconds[LAYER])
        (report,) = handle.report().layers
    for hook in hooks:
        hook.remove()
    assert report.rows and (mode == "off" or report.afterwards is None), report
    return whole[1:], call[1:]


def main() -> None:
    asked, model = asked_model(__doc__, rounds=5)
    attention = AttentionInterface()["eah"]
    times = {mode: ([], []) for mode in MODES}
    for _ in range(asked.rounds):
        for mode in MODES:
            for found, more in zip(times[mode], steps(model, attention, mode), strict=True):
                found += more
    print(f"{asked.dtype}, {HEADS}/{asked.kv_heads} heads, {asked.threads} threads; median (fastest) ms")
    for mode, (whole, call) in times.items():
        layer, inside = (f"{1e3 * statistics.median(each):.2f} ({1e3 * min(each):.2f})" for each in (whole, call))
        print(f"{mode:6} layer {layer}, attention call {inside}")
    for number, what in enumerate(("layer", "attention call")):
        median, fastest = (of(times["track"][number]) / of(times["hold"][number]) for of in (statistics.median, min))
        print(f"track / hold, {what}: {median:.2f} ({fastest:.2f})")


if __name__ == "__main__":
    main()

"""What EAH costs in an engine's throughput: three engines take turns, five rounds of the same distinct prompts each.

    .venv/vllm/bin/python -m tests.vllm.throughput [MODEL_FOLDER]

"without": no plugin; "opted out": the plugin, every request opting out; "enhanced": every request enhanced. Medians of
the rounds' ratios to "without": of requests per second, and per second of the process's CPU time, which a busy machine
disturbs less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from .asks import THRESHOLD, Ask, letters
from .engine import BASE, ENVIRONMENT, MULTIMODAL, answers

KINDS = ("without", "opted out", "enhanced")
ROUNDS, REQUESTS, PROMPT, TOKENS = 5, 4, 480, 8
TEXT = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
TEXT |= dict(head_dim=64, max_position_embeddings=1024)


def asks(number: int, kind: str) -> list[Ask]:
    """The prompts of a round: an image in the middle of text that differs from its first token on."""
    half, eah = PROMPT // 2, "on" if kind == "enhanced" else "off"
    seeds = [REQUESTS * number + n for n in range(REQUESTS)]
    return [Ask(letters(half, seed) + "I" + letters(half, 3 * seed), (seed,), eah, TOKENS) for seed in seeds]


def serve(kind: str, folder: Path) -> None:
    """An engine that runs the rounds whose numbers it reads, and writes how long each took."""
    from vllm import LLM

    from eah.vllm import engine_args

    from ..support.processors import PROCESSORS

    plugin = {} if kind == "without" else engine_args(threshold=THRESHOLD)
    llm = LLM(str(folder), **{**BASE, **MULTIMODAL, "max_model_len": 1024}, **plugin)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        answers(llm, asks(int(line), kind), PROCESSORS["llava"][4], folder)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print("round", json.dumps([wall, cpu]), flush=True)


def measure(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each kind's rounds; a first round warms up and is left out."""
    environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.vllm.throughput", str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    engines = {kind: subprocess.Popen([*command, kind], **pipes) for kind in KINDS}
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    try:
        for number in range(ROUNDS + 1):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                print(number, file=engines[kind].stdin, flush=True)
                line = next((line for line in engines[kind].stdout if line.startswith("round ")), None)
                if line is None:
                    raise RuntimeError(f"the engine {kind!r} ended")
                if number:
                    seconds[kind].append(tuple(json.loads(line.removeprefix("round "))))
    finally:
        for engine in engines.values():
            engine.stdin.close()
            engine.wait()
    return seconds


def main(folder: Path | None) -> None:
    if folder is None:
        from .models import save

        folder = save("llava", Path(tempfile.mkdtemp()) / "model", **TEXT)
    seconds, load = measure(folder), os.getloadavg()[0]
    print(f"{ROUNDS} rounds of {REQUESTS} requests, {PROMPT} tokens and an image, {TOKENS} new tokens; load {load:.1f}")
    for kind in KINDS[1:]:
        ratios = [
            [base[which] / mine[which] for base, mine in zip(seconds["without"], seconds[kind], strict=True)]
            for which in (0, 1)
        ]
        wall, cpu = (f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" for values in ratios)
        print(f"{kind:10} over without: {wall} by the clock, {cpu} by CPU time")


if __name__ == "__main__":
    if sys.argv[2:]:
        serve(sys.argv[2], Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]) if sys.argv[1:] else None)

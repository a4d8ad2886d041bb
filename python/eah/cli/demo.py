"""`eah demo`: EAH inside a small LLaVA on a real picture, the backends against the reference, and their speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import eah
from eah.cli.doctor import why_not
from eah.cli.messages import progress
from eah.cli.samples import layer_inputs, load_picture, small_llava
from eah.eval.journal import alone_in
from eah_kernels import BACKENDS, EAHResult, eah_attention
from eah_kernels.testing import agrees, largest_error

PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
NEW_TOKENS = 12
DRAWN = (0, 1, 2, 3)  # layers
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 5, 25, 5.0  # of the timing; the first rounds are not counted
STEADY = 2.0  # slowest over fastest round beyond which no ratio is told


def demo(image_file: str | None = None, out: str | None = None) -> dict:
    """Runs the demo; plain data. image_file: None for matplotlib's photograph of Grace Hopper. out: the folder for a
    page of pictures, as `eah inspect` makes it; None for no page.

    Raises:
        ImportError: a package is not installed; the message names it.
        ValueError: the file is no readable picture.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    picture, name = load_picture(image_file)
    progress("building a small LLaVA with random weights")
    processor, model = small_llava()
    model.to(device)
    inputs = processor(images=picture, text=PROMPT, return_tensors="pt").to(device)
    progress("generating without and with EAH")
    length = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    plain = model.generate(**inputs, **options)[0, length:]
    with eah.enable(model) as handle:
        enhanced = model.generate(**inputs, **options)[0, length:]
        report = handle.report()
    page = None
    if out is not None:
        progress("drawing")
        with alone_in(Path(out)):
            page = str(draw(model, processor, picture, name, Path(out)))
    progress("comparing the backends with the reference")
    agreement = {backend: compare(backend, device) for backend in BACKENDS if backend not in ("auto", "reference")}
    progress("timing one attention layer of LLaVA-1.5's size")
    usable = [backend for backend, found in agreement.items() if "unavailable" not in found]
    return {
        "image": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "prompt_tokens": length,
        "image_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "layers": [
            {
                "layer": layer.layer,
                "stood_aside": layer.stood_aside,
                "heads": [row.head for row in layer.rows],
                "sinks": [list(row.sinks) for row in layer.rows],
            }
            for layer in report.layers
        ],
        "report": str(report),
        "page": page,
        "new_tokens": {"without": plain.tolist(), "with": enhanced.tolist()},
        "tokens_changed": int((plain != enhanced).sum()),
        "agreement": agreement,
        "timing": time_layer(usable, device),
    }


def draw(model, processor, picture, name: str, out: Path) -> Path:
    """The page of what the demo's model attends to in the picture; its path."""
    from eah.inspect.look import look
    from eah.inspect.one import write

    names = {"model": "a small LLaVA with random weights: where its heads look means nothing", "image": name}
    return write(look(model, processor, picture, PROMPT, pictured=DRAWN), out, names, DRAWN)


def print_demo(results: dict) -> None:
    print(f"picture: {results['image']}; device: {results['device']}; torch {torch.__version__}")
    print(f"prompt: {results['prompt_tokens']} tokens, {results['image_tokens']} of them image tokens\n")
    print(results["report"])
    if results["page"]:
        print(f"\nWhat every head attends to in the picture: {results['page']}")
    print(
        f"\nWith EAH {results['tokens_changed']} of {NEW_TOKENS} generated tokens differ from those without.\n"
        "The weights are random: the text means nothing and is not shown, and nothing here says how well EAH works.\n"
        "It says that the method runs where it should. `eah generate` runs it in a trained model.\n"
    )
    print("backend     head, sinks  output     its largest error, against the float64 reference")
    for backend, found in results["agreement"].items():
        if "unavailable" in found:
            print(f"{backend:10}  unavailable: {found['unavailable']}")
        else:
            choice = "equal" if found["equal"] else "DIFFERENT"
            output = "agrees" if found["agrees"] else "DISAGREES"
            print(f"{backend:10}  {choice:11}  {output:9}  {found['largest_error']:.1e}")
    timing = results["timing"]
    print(f"\none attention layer, {timing['shape']}, {timing['dtype']}; {timing['rounds']} rounds in turns")
    print("                    median ms  fastest-slowest   to plain SDPA")
    for name, row in timing["rows"].items():
        spread = f"{row['fastest_ms']:.2f}-{row['slowest_ms']:.2f}"
        ratio = "  -" if row["ratio"] is None else f"{row['ratio']:5.2f} x"
        print(f"{name:18}  {row['ms']:9.2f}  {spread:>15}  {ratio}")
    if any(row["ratio"] is None for row in timing["rows"].values()):
        print(f"No ratio where rounds differ by more than {STEADY:g}x: the machine is busy, try again when it is not.")


@torch.no_grad()
def compare(backend: str, device: str) -> dict:
    """A backend against the reference on one layer of 200 tokens and 8 heads."""
    query, key, value, image_mask = inputs = layer_inputs(device, torch.float32, 200, 8)
    plain = eah_attention(*inputs, threshold=0.006, backend="reference")
    exact = eah_attention(
        query.double(), key.double(), value.double(), image_mask, threshold=0.006, backend="reference"
    )
    try:
        result = eah_attention(*inputs, threshold=0.006, backend=backend)
    except ValueError as error:
        return {"unavailable": why_not(error, backend)}
    return {
        "equal": torch.equal(result.head, exact.head) and torch.equal(result.sink_counts, exact.sink_counts),
        "agrees": agrees(result.output, exact.output, plain.output),
        "largest_error": largest_error(result.output, exact.output),
    }


@torch.no_grad()
def time_layer(backends: list[str], device: str) -> dict:
    """Milliseconds of one prefill of a LLaVA-1.5 attention layer, every contestant once per round, for some seconds.

    A row's `ratio` to plain SDPA is None where the rounds of either differ by more than `STEADY` times: something else
    was running.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    query, key, value, image_mask = layer_inputs(device, dtype)
    if device == "cpu" and "triton" in backends:
        backends = [name for name in backends if name != "triton"]  # the interpreter's speed says nothing
    contestants: dict[str, Callable] = {
        "plain SDPA": partial(F.scaled_dot_product_attention, query, key, value, is_causal=True),
        "EAH, as published": partial(published, query, key, value, image_mask, 0.002),
    }
    for name in backends:
        contestants[f"EAH, {name}"] = partial(
            eah_attention, query, key, value, image_mask, threshold=0.002, backend=name
        )
    calls = 20 if device == "cuda" else 1  # in a round: the clock is read around many short launches
    times: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for number in range(WARM_UP + MAX_ROUNDS):
        if number >= WARM_UP + MIN_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    times = {name: each[WARM_UP:] for name, each in times.items()}
    return {
        "shape": "1 x 32 heads x 648 tokens x 128",
        "dtype": str(dtype)[6:],
        "rounds": len(times["plain SDPA"]),
        "rows": timing_rows(times),
    }


def timing_rows(times: dict[str, list[float]]) -> dict[str, dict]:
    """Median, fastest and slowest round of every contestant, and the median's ratio to the first one's, or None."""
    base, *_ = times.values()
    steady = {name: max(each) <= STEADY * min(each) for name, each in times.items()}
    return {
        name: {
            "ms": statistics.median(each),
            "fastest_ms": min(each),
            "slowest_ms": max(each),
            "ratio": statistics.median(each) / statistics.median(base)
            if steady[name] and max(base) <= STEADY * min(base)
            else None,
        }
        for name, each in times.items()
    }


def published(query: Tensor, key: Tensor, value: Tensor, image_mask: Tensor, threshold: float) -> EAHResult:
    """EAH in eager PyTorch as its authors wrote it: all maps in full, probabilities in the model's dtype.

    For rows without padding and as many key as query heads: the yardstick of the timing, as in bench/contestants.py.
    """
    length = query.shape[2]
    score = query @ key.mT * query.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    score = score.masked_fill(~visible, torch.finfo(score.dtype).min)
    maps = score.softmax(-1, dtype=torch.float32).to(query.dtype)
    rows = torch.arange(length - 1, -1, -1, device=query.device).clamp(min=1)
    sinks = (maps.tril(-1).sum(-2, dtype=torch.float32) / rows > threshold) & image_mask[:, None]
    counts = sinks.sum(-1, dtype=torch.int32)
    most, head = counts.max(-1)
    for row in range(len(query)):
        if most[row] > 0:
            maps[row] = maps[row, head[row]]
    return EAHResult(maps @ value, torch.where(most > 0, head, -1).int(), counts)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

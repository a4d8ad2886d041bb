"""Measure each Triton kernel alone, beside FlashAttention-2, in CUDA graphs that rotate through copies of the inputs.

    python -m bench.kernel_times                            as shipped: kernels.json in --out
    python -m bench.kernel_times --bounds                   what binds each, one cost taken away: bounds.json
    python -m bench.kernel_times --bounds --exp-as-add      the same with an addition for each exp: bounds-add.json

As shipped, where the Gluon kernels suit, they are measured beside the Triton kernels, in the same call and rounds.

Costs that are taken away: `no L2` gives every token the first one's keys, queries and values by a stride of 0, so that
a tile comes from the nearest cache; `1/8 products` multiplies 16 of the head dim's features, and of the values' (it
reads an eighth as well). The results of such a kernel mean nothing. What binds it is what makes it faster when gone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.triton import attend, few_rows, lse, one_pass, sinks
from eah_kernels.triton.bundles import Choice, Tally
from eah_kernels.triton.launch import Launch, Problem, image_bytes

from .contestants import SDPA, sdpa
from .layers import Inputs, Layer, make_inputs
from .machine import ROOT, Results
from .timing import Deadline, Graph, copies_needed, reason, spread

LAYERS = (
    Layer("LLaVA-NeXT", 32, 32, 2928, image_tokens=2880),
    Layer("Qwen2-VL", 28, 4, 2928, image_tokens=2800),
    Layer("LLaVA-1.5", 32, 32, 648),
    Layer("Qwen2-VL, 8k", 28, 4, 8192, image_tokens=8000),
    Layer("LLaVA-1.5, decoding, 4k", 32, 32, 4096, rows=1),
)
DTYPES = (torch.bfloat16, torch.float16)
FEW = 16  # features of `1/8 products`, for 128


class Variant(NamedTuple):
    name: str
    no_l2: bool = False
    few_products: bool = False


SHIPPED = Variant("as shipped")
BOUNDS = (
    SHIPPED,
    Variant("no L2", no_l2=True),
    Variant("1/8 products", few_products=True),
    Variant("no L2, 1/8 products", no_l2=True, few_products=True),
)


def launches(layer: Layer, inputs: Inputs, variant: Variant = SHIPPED) -> dict[str, list[Launch]]:
    """What runs a layer, kernel by kernel, with outputs of their own. Layers without a mask only.

    A prefill by the kernels for any length, and beside them, where it is short, by those that the backend then takes.
    """
    query, key, value = inputs[:3]
    if variant.no_l2:
        query, key, value = (tensor[:, :, :1].expand_as(tensor) for tensor in (query, key, value))
    problem = Problem(query, key, Scoring(scale=layer.dim**-0.5))
    batch, heads, length, _ = query.shape
    output, head = empty_output(query, value), torch.zeros(batch, dtype=torch.int32, device=query.device)
    if layer.rows:
        split, combined = few_rows.few_rows(problem, value, head, output)
        found = {"decode": [split], "decode, combining": [combined]}
    else:
        minus_lse = query.new_empty(batch, heads, lse.padded_length(length), dtype=torch.float32)
        tally = Tally(*(query.new_zeros(batch, n, dtype=torch.int32) for n in (heads, 2)))
        choice, image = Choice(torch.zeros_like(head), 0.0), image_bytes(inputs.image_mask)
        problem.short_tile = lambda *_: None
        found = {
            "lse": [lse.lse(problem, minus_lse, image=image, tally=tally)],
            "sinks": [sinks.sinks(problem, image, minus_lse, inputs.threshold, tally, choice=choice)],
            "attend, shared map": [attend.attend(problem, value, head, output, minus_lse)],
            "attend, own maps": [attend.attend(problem, value, head - 1, output, minus_lse)],
        }
        if variant == SHIPPED:
            kernels = list(found)[:3]
            found["all of EAH"] = [launch for name in kernels for launch in found[name]]
            fast = Problem(query, key, Scoring(scale=layer.dim**-0.5), fast=True)
            fast.short_tile = lambda *_: None
            if fast.fast_tile("lse") and fast.fast_tile("sinks") and fast.fast_tile("attend", value):
                gluon = [
                    lse.lse(fast, minus_lse, image=image, tally=tally),
                    sinks.sinks(fast, image, minus_lse, inputs.threshold, tally, choice=choice),
                    attend.attend(fast, value, head, output, minus_lse),
                ]
                found |= {f"{name}, Gluon": [launch] for name, launch in zip(kernels, gluon, strict=True)}
                found["attend, own maps, Gluon"] = [attend.attend(fast, value, head - 1, output, minus_lse)]
                found["all of EAH, Gluon"] = gluon
        del problem.short_tile
        if one_pass.takes(problem):
            image_mask, tickets = inputs.image_mask, query.new_zeros(batch * (heads + 1), dtype=torch.int32)
            statistics = minus_lse, tally.counts, tickets, choice
            short = {
                "one pass": [one_pass.one_pass(problem, image_mask, inputs.threshold, *statistics)],
                "attend, shared map, short": [attend.attend(problem, value, head, output, minus_lse)],
            }
            if variant == SHIPPED:
                short["all of EAH, one pass"] = [launch for kernel in short.values() for launch in kernel]
            found |= short
    if variant.few_products:
        found = {name: [with_few_products(launch) for launch in kernel] for name, kernel in found.items()}
    return found


def with_few_products(launch: Launch) -> Launch:
    rules = launch.arguments["R"]._replace(MAIN=FEW, TAIL=0)
    values = {"V": launch.arguments["V"]._replace(DIM=FEW, PAD=FEW)} if "V" in launch.arguments else {}
    return launch._replace(arguments=launch.arguments | {"R": rules} | values)


def measure(layer: Layer, dtype: torch.dtype, variant: Variant, rounds: int, exp: str) -> list[dict]:
    """One row a kernel; FlashAttention-2's among them where nothing is taken away."""
    one = make_inputs(layer, dtype, "cuda")
    needed = copies_needed(layer.read_elements * dtype.itemsize)
    copies = [one, *(make_inputs(layer, dtype, "cuda", seed) for seed in range(1, needed))]
    prepared = [launches(layer, inputs, variant) for inputs in copies]
    for kernels in prepared:  # in order: what a kernel reads, an earlier one has written
        for kernel in kernels.values():
            for launch in kernel:
                launch.run()
    calls = {
        name: [lambda kernel=kernels[name]: [launch.run() for launch in kernel] for kernels in prepared]
        for name in prepared[0]
    }
    if variant == SHIPPED and exp == "exp":
        flash = sdpa(SDPA["SDPA, flash"])
        calls["SDPA, flash"] = [lambda inputs=inputs: flash(inputs) for inputs in copies]
    rows, graphs = [], []
    for name, of_copies in calls.items():
        row = dict(layer=str(layer), dtype=str(dtype)[6:], kernel=name, variant=variant.name, exp=exp)
        rows.append(row)
        try:
            graphs.append((row, Graph(of_copies), []))
        except Exception as error:
            row["not_timed"] = reason(error)
    for _ in range(rounds + 1):
        for _, graph, times in graphs:
            times.append(graph.milliseconds(replays=3))
    for row, _, times in graphs:
        row |= spread(times[1:])
    return rows


def without_exp(folder: Path) -> None:
    """A copy of the package whose Triton kernels add 1 where they take an exp: the rest of their work is the same."""
    for source in sorted((ROOT / "eah_kernels").rglob("*.py")):
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text().replace("tl.exp2(", "(1.0 + "))


def measure_without_exp(arguments: list[str]) -> int:
    """By a process that is started in the copy's folder, which Python puts before this one."""
    with tempfile.TemporaryDirectory() as folder:
        without_exp(Path(folder))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "bench.kernel_times", *arguments, "--exp-is-gone"]
        return subprocess.run(command, cwd=folder, env=environment).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bounds", action="store_true", help="take one cost away after the other")
    parser.add_argument("--exp-as-add", action="store_true", help="replace each exp by an addition")
    parser.add_argument("--exp-is-gone", action="store_true", help=argparse.SUPPRESS)  # this is that process
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder to write to")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    chosen = parser.parse_args(arguments)
    if chosen.exp_as_add and not chosen.exp_is_gone:
        given = sys.argv[1:] if arguments is None else arguments
        return measure_without_exp([*given, "--out", str(chosen.out.resolve())])
    exp, deadline = "add" if chosen.exp_is_gone else "exp", Deadline(chosen.seconds)
    name = "kernels.json" if not chosen.bounds else "bounds-add.json" if chosen.exp_is_gone else "bounds.json"
    results = Results(chosen.out / name, "cuda", chosen.commit, rounds=chosen.rounds)
    for dtype in DTYPES[:1] if chosen.bounds else DTYPES:
        for layer in LAYERS:
            for variant in BOUNDS if chosen.bounds else [SHIPPED]:
                what = f"{layer}, {str(dtype)[6:]}, {variant.name}"
                if deadline.passed():
                    results.leave_out(what, "no time left", failed=False)
                    continue
                try:
                    with torch.no_grad():
                        results.add(measure(layer, dtype, variant, chosen.rounds, exp))
                except Exception as error:
                    results.leave_out(what, reason(error))
                print(what, flush=True)
                torch.cuda.empty_cache()
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())

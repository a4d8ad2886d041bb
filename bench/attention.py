"""Measure attention layers: every contestant of a layer in one run, interleaved.

    python -m bench.attention                 on the GPU if there is one, else a short run on the CPU
    python -m bench.attention --base REV      our own code beside that of another revision, in alternating processes

Writes attention.json into --out after each layer and dtype. A contestant that fails its check against the reference,
or fails later, is listed with the reason and not timed; the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .contestants import check, contestants, published_eager
from .layers import CPU_LAYERS, LATENCY, PREFILL, Layer, make_inputs
from .machine import ROOT, Results
from .timing import Deadline, Graph, copies_needed, reason, spread, timed

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
LAYERS = {"prefill": PREFILL, "latency": LATENCY, "cpu": CPU_LAYERS}


def measure(layer: Layer, dtype: torch.dtype, device: str, rounds: int, only: str | None = None) -> list[dict]:
    """One row a contestant; times in milliseconds. On a GPU the L2 cache is cold before each call."""
    rows, running = [], []
    for contestant in contestants(device, layer, dtype):
        if only and not contestant.name.startswith(only):
            continue
        row = dict(layer=str(layer), dtype=str(dtype)[6:], contestant=contestant.name, computes=contestant.computes)
        problem = check(contestant, layer, dtype, device)
        rows.append(row | ({"not_timed": problem} if problem else {}))
        if not problem:
            running.append((rows[-1], contestant, []))
    short = device == "cuda" and bool(layer.length <= 1024 or layer.rows)
    copies = [make_inputs(layer, dtype, device)]
    if short:
        needed = copies_needed(layer.read_elements * dtype.itemsize)
        copies += [make_inputs(layer, dtype, device, seed) for seed in range(1, needed)]
    for round_number in range(rounds + 1):
        for row, contestant, times in running:
            if "not_timed" not in row:
                inputs = copies[round_number % len(copies)]
                try:
                    times.append(timed(lambda run=contestant.run, inputs=inputs: run(inputs), device))
                except Exception as error:  # out of memory, or a size that a named backend does not take
                    row["not_timed"] = reason(error)
    for row, _, times in running:
        if "not_timed" not in row:
            times = times[1:]  # the first round warms up
            row |= spread([time.device for time in times])
            row["tflops"] = layer.flops / row["median_ms"] / 1e9
            if device == "cuda":
                row["host_ms"] = statistics.median(time.host for time in times)
                row["peak_extra_mib"] = times[-1].extra
            if row["computes"] == "held":
                row["cache_gb_per_s"] = layer.cache_elements * dtype.itemsize / row["median_ms"] / 1e6
    if short:
        add_graph_times([(row, contestant.run) for row, contestant, _ in running if "median_ms" in row], copies, rounds)
    return with_ratios(rows)


def add_graph_times(running: list, copies: list, rounds: int) -> None:
    """graph_ms: a call's share of a CUDA graph that calls on every copy of the inputs: no launches, no warm L2 cache.

    graph_not_timed: why there is none.
    """
    graphs = []
    for row, run in running:
        if run is published_eager:
            row["graph_not_timed"] = "it reads the host"
            continue
        try:
            graphs.append((row, Graph([lambda run=run, inputs=inputs: run(inputs) for inputs in copies]), []))
        except Exception as error:
            row["graph_not_timed"] = reason(error)
    for _ in range(rounds + 1):
        for _, graph, times in graphs:
            times.append(graph.milliseconds())
    for row, _, times in graphs:
        row["graph_ms"] = statistics.median(times[1:])


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each median over that of plain SDPA (row["sdpa"] says which) and of the published form; graphs likewise.

    On a GPU plain SDPA is flash attention, which takes no mask; there it is the faster of cuDNN and efficient.
    """
    medians = {row["contestant"]: row["median_ms"] for row in rows if "median_ms" in row}
    graphs = {row["contestant"]: row["graph_ms"] for row in rows if "graph_ms" in row}
    masked = [name for name in ("SDPA, cuDNN", "SDPA, efficient") if name in medians]
    unmasked = [name for name in ("SDPA, flash", "SDPA") if name in medians]
    plain = min(unmasked or masked, key=medians.get, default=None)
    eager = medians.get("eager EAH, as published")
    for row in rows:
        if "median_ms" in row:
            row["sdpa"] = plain
            row["ratio_to_sdpa"] = row["median_ms"] / medians[plain] if plain else None
            row["ratio_to_eager"] = row["median_ms"] / eager if eager else None
        if "graph_ms" in row and plain in graphs:
            row["graph_ratio_to_sdpa"] = row["graph_ms"] / graphs[plain]
    return rows


def compare(revision: str, rounds: int) -> None:
    """Our own contestants of this tree and of `revision`, each in processes of its own, three times by turns."""
    medians = {"this tree": {}, revision: {}}
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", revision, "eah_kernels"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for _ in range(3):
            for name, tree in (("this tree", ROOT), (revision, folder)):
                environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}
                command = [sys.executable, "-m", "bench.attention", "--rows", "--rounds", str(rounds)]
                out = subprocess.check_output(command, cwd=tree, env=environment, text=True)
                for row in json.loads(out):
                    key = row["layer"], row["dtype"], row["contestant"]
                    medians[name].setdefault(key, []).append(row.get("median_ms"))
    for key, ours in medians["this tree"].items():
        theirs = medians[revision].get(key)
        if theirs and None not in ours + theirs:
            new, old = statistics.median(ours), statistics.median(theirs)
            print(f"{' | '.join(key):90} {new:9.3f} ms  {old:9.3f} ms at {revision}  ratio {new / old:.3f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", metavar="REV", help="compare with another revision")
    parser.add_argument("--layers", choices=LAYERS, help="which; prefill on a GPU and cpu on a CPU unless given")
    parser.add_argument("--rounds", type=int, help="timed rounds per layer")
    parser.add_argument("--seconds", type=float, help="begin no layer after so many")
    parser.add_argument("--rows", action="store_true", help="our own contestants' rows on stdout, no result file")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="folder to write to")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = LAYERS[chosen.layers or {"cuda": "prefill", "cpu": "cpu"}[device]]
    rounds, deadline = chosen.rounds or {"cuda": 20, "cpu": 5}[device], Deadline(chosen.seconds)
    if chosen.base:
        compare(chosen.base, rounds)
        return 0
    if chosen.rows:
        with torch.no_grad():
            each = [measure(layer, dtype, device, rounds, "EAH") for dtype in DTYPES[device] for layer in layers]
        print(json.dumps([row for rows in each for row in rows], indent=1))
        return 0
    results = Results(chosen.out / "attention.json", device, chosen.commit, rounds=rounds)
    for dtype in DTYPES[device]:
        for layer in layers:
            name = f"{layer}, {str(dtype)[6:]}"
            if deadline.passed():
                results.leave_out(name, "no time left", failed=False)
                continue
            try:
                with torch.no_grad():
                    results.add(measure(layer, dtype, device, rounds))
            except Exception as error:
                results.leave_out(name, reason(error))
            print(f"{name}: {len(results.rows)} rows", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"wrote {results.file}")
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())

"""Measure attention layers: every contestant of a layer in one run, interleaved.

    python bench/attention.py                 on the GPU if there is one, else a short run on the CPU
    python bench/attention.py --base REV      our own code beside that of another revision, in alternating processes

Writes bench/results/<device>/attention.json (or under $OUT). A contestant that fails its check against the reference
is listed with the reason and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from contestants import check, contestants, published_eager
from layers import CPU_LAYERS, LAYERS, Layer, make_inputs
from machine import describe, results_folder

ROOT = Path(__file__).parents[1]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


def measure(layer: Layer, dtype: torch.dtype, device: str, rounds: int, only: str | None = None) -> list[dict]:
    """One row a contestant; times in milliseconds."""
    rows, running = [], []
    for contestant in contestants(device, layer):
        if only and not contestant.name.startswith(only):
            continue
        row = dict(layer=str(layer), dtype=str(dtype)[6:], contestant=contestant.name, computes=contestant.computes)
        problem = check(contestant, layer, dtype, device)
        rows.append(row | ({"not_timed": problem} if problem else {}))
        if not problem:
            running.append((rows[-1], contestant, []))
    copies = [make_inputs(layer, dtype, device)]
    if device == "cuda":  # rotate through more than the L2 cache holds
        size = sum(t.nbytes for t in copies[0][:3])
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies += [make_inputs(layer, dtype, device, seed) for seed in range(1, min(8, 1 + 3 * cache // size))]
    for round_number in range(rounds + 1):
        for row, contestant, times in running:
            if "not_timed" in row:
                continue
            try:
                elapsed, extra = timed(contestant, copies[round_number % len(copies)], device)
            except torch.OutOfMemoryError:
                row["not_timed"] = "out of memory"
                torch.cuda.empty_cache()
                continue
            except ValueError as error:  # checked on a small form; a named backend may not take this size
                row["not_timed"] = str(error)
                continue
            row["peak_extra_mib"] = extra
            times.append(elapsed)
    for row, _, times in running:
        if "not_timed" not in row:
            times = sorted(times[1:])  # the first round warms up
            row["median_ms"] = statistics.median(times)
            row["p20_ms"], row["p80_ms"] = times[len(times) // 5], times[len(times) * 4 // 5]
            row["tflops"] = layer.flops / row["median_ms"] / 1e9
        if row["computes"] == "held" and "median_ms" in row:
            row["cache_gb_per_s"] = layer.cache_elements * dtype.itemsize / row["median_ms"] / 1e6
    if device == "cuda" and (layer.length <= 1024 or layer.rows):
        add_graph_times([(row, contestant) for row, contestant, _ in running if "median_ms" in row], copies[0], rounds)
    return with_ratios(rows)


def add_graph_times(running: list, inputs, rounds: int, replays: int = 20) -> None:
    """graph_ms: one replay of a CUDA graph, without launch overhead; the eager form reads the host and has none."""
    graphs = []
    for row, contestant in running:
        if contestant.run is published_eager:
            continue
        contestant.run(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            contestant.run(inputs)
        graphs.append((row, graph, []))
    for _ in range(rounds + 1):
        for _, graph, times in graphs:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / replays)
    for row, _, times in graphs:
        row["graph_ms"] = statistics.median(times[1:])


def timed(contestant, inputs, device: str) -> tuple[float, float | None]:
    """Milliseconds, and on a GPU the MiB allocated beyond inputs and results."""
    if device == "cpu":
        start = time.perf_counter()
        contestant.run(inputs)
        return 1e3 * (time.perf_counter() - start), None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = contestant.run(inputs)
    end.record()
    end.synchronize()
    kept = sum(t.nbytes for t in (result if isinstance(result, tuple) else (result,)))
    return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each median over that of plain SDPA (on a GPU its flash backend) and of the published form; graphs likewise."""
    graph = {row["contestant"]: row["graph_ms"] for row in rows if "graph_ms" in row}
    for row in rows:
        if "graph_ms" in row and "SDPA, flash" in graph:
            row["graph_ratio_to_sdpa"] = row["graph_ms"] / graph["SDPA, flash"]
    medians = {row["contestant"]: row["median_ms"] for row in rows if "median_ms" in row}
    plain = medians.get("SDPA, flash") or medians.get("SDPA")
    eager = medians.get("eager EAH, as published")
    for row in rows:
        if "median_ms" in row:
            row["ratio_to_sdpa"] = row["median_ms"] / plain if plain else None
            row["ratio_to_eager"] = row["median_ms"] / eager if eager else None
    return rows


def compare(revision: str, layers, device: str, rounds: int) -> None:
    """Our own contestants of this tree and of `revision`, each in processes of its own, three times by turns."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-q", "--detach", folder, revision], cwd=ROOT, check=True)
        try:
            medians = {"this tree": {}, revision: {}}
            for _ in range(3):
                for name, tree in (("this tree", ROOT), (revision, folder)):
                    environment = {**os.environ, "PYTHONPATH": f"{tree}"}
                    command = [sys.executable, __file__, "--rows", "--rounds", str(rounds)]
                    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                    for row in json.loads(out):
                        key = row["layer"], row["dtype"], row["contestant"]
                        medians[name].setdefault(key, []).append(row.get("median_ms"))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
    for key, ours in medians["this tree"].items():
        theirs = medians[revision].get(key)
        if theirs and None not in ours + theirs:
            new, old = statistics.median(ours), statistics.median(theirs)
            print(f"{' | '.join(key):90} {new:9.3f} ms  {old:9.3f} ms at {revision}  ratio {new / old:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", metavar="REV", help="compare with another revision")
    parser.add_argument("--rounds", type=int, help="timed rounds per layer")
    parser.add_argument("--dry-run", action="store_true", help="small layers, one round, no result file")
    parser.add_argument("--rows", action="store_true", help="our own contestants' rows on stdout, no result file")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = LAYERS if device == "cuda" else CPU_LAYERS
    rounds = arguments.rounds or (30 if device == "cuda" else 5)
    if arguments.base:
        compare(arguments.base, layers, device, rounds)
        return
    if arguments.dry_run:
        layers, rounds = [layer.small() for layer in layers], 1
    rows = []
    with torch.no_grad():
        for layer in layers:
            for dtype in DTYPES[device]:
                rows += measure(layer, dtype, device, rounds, "EAH" if arguments.rows else None)
                if sys.stderr.isatty():
                    print(f"... {layer} {dtype}", file=sys.stderr)
    if arguments.rows or arguments.dry_run:
        print(json.dumps(rows, indent=1))
        return
    file = results_folder(device) / "attention.json"
    file.write_text(json.dumps({**describe(device, arguments.commit), "rounds": rounds, "rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

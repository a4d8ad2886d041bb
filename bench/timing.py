"""Clocks: one call on the CPU, one call on a GPU whose L2 cache is cold, the replay of a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

CACHES = 3  # how many times over the L2 cache is filled with other things before data is read again


class Times(NamedTuple):
    """Of one call, in milliseconds. host: until it returned. extra: MiB allocated beyond inputs and results."""

    device: float
    host: float | None = None
    extra: float | None = None


class Deadline:
    """Seconds from now; None: never."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    def passed(self) -> bool:
        return self.left() <= 0


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def copies_needed(read_bytes: int, most: int = 16) -> int:
    """How many inputs, of which a call reads read_bytes, to rotate through so that none is still in the L2 cache."""
    return min(most, 1 + CACHES * l2_bytes() // max(read_bytes, 1))


def timed(call: Callable[[], object], device: str) -> Times:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return Times(1e3 * (time.perf_counter() - start))
    other = torch.empty(CACHES * l2_bytes(), dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.zero_()
    start.record()
    called = time.perf_counter()
    result = call()
    returned = time.perf_counter()
    end.record()
    end.synchronize()
    results = result if isinstance(result, tuple) else (result,)
    kept = sum(tensor.nbytes for tensor in results if isinstance(tensor, torch.Tensor))
    extra = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    return Times(start.elapsed_time(end), 1e3 * (returned - called), extra)


class Graph:
    """A CUDA graph of calls, one after the other: give each its own inputs, or the next finds them in the L2 cache."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self.calls = len(calls)
        calls[0]()  # compiles and allocates what a capture must not
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.results = [call() for call in calls]
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            raise

    def milliseconds(self, replays: int = 10) -> float:
        """Of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (replays * self.calls)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    times = sorted(times)
    return {
        "median_ms": statistics.median(times),
        "p20_ms": times[len(times) // 5],
        "p80_ms": times[len(times) * 4 // 5],
    }


def reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0]}"

"""What a call costs the host: Python from the public function to the driver, with a launcher that does nothing.

    python -m bench.host             the minimum and the median of 2,000 calls, in microseconds
    python -m bench.host --profile   and where they go

No GPU is needed: the tensors are on the CPU, Triton compiles for sm_90 and takes each launch up to its last step.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is first imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from eah_kernels import backends, eah_attention, shared_map_attention
from eah_kernels.triton import launch as launching

CALLS = 2000


class IdleDriver:
    """What Triton asks of a driver, for a GPU that is not there and does nothing."""

    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (None, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None


@contextmanager
def idle_gpu():
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),  # what it keeps has no machine code
        mock.patch.object(CUDABackend, "make_cubin", lambda self, source, *rest: source.encode()),
        mock.patch.object(launching, "device_target", lambda device: "sm_90"),
        mock.patch.object(backends, "why_not_triton", lambda call: None),
    ):
        triton.runtime.driver.set_active(IdleDriver())
        yield


def steps() -> dict:
    """Each a function of the number of calls before it; what grows from call to call grows."""

    def rows(batch, heads, length):
        return torch.randn(batch, length, heads, 128, dtype=torch.bfloat16).transpose(1, 2)

    query, key, value = rows(1, 32, 648), rows(1, 32, 648), rows(1, 32, 648)
    longer, many = rows(1, 32, 1500), torch.zeros(1, 1500, dtype=torch.bool)
    image = torch.zeros(1, 648, dtype=torch.bool)
    image[:, 35:611] = True
    padding = torch.ones(1, 648, dtype=torch.bool)
    row, head = rows(1, 32, 1), torch.zeros(1, dtype=torch.int32)
    cache = torch.randn(2, 1, 32, 4096, 128, dtype=torch.bfloat16)

    def growing(n):
        keys, values = cache[:, :, :, : 649 + n % 3000]
        return shared_map_attention(row, keys, values, head, backend="triton")

    return {
        "prefill, 648 tokens": lambda n: eah_attention(query, key, value, image, backend="triton"),
        "prefill, 1500 tokens": lambda n: eah_attention(longer, longer, longer, many, backend="triton"),
        "prefill, 2-D mask": lambda n: eah_attention(
            query, key, value, image, attention_mask=padding, backend="triton"
        ),
        "decoding, same length": lambda n: shared_map_attention(row, key, value, head, backend="triton"),
        "decoding, growing": growing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", action="store_true")
    profile = parser.parse_args().profile
    print(f"torch {torch.__version__}, triton {triton.__version__}, {CALLS} calls: minimum, median in us")
    with idle_gpu(), torch.inference_mode():
        for name, step in steps().items():
            for n in range(40):
                step(n)
            taken = []
            for n in range(CALLS):
                start = time.perf_counter_ns()
                step(n)
                taken.append((time.perf_counter_ns() - start) / 1000)
            print(f"{name:24} {min(taken):7.1f} {statistics.median(taken):7.1f}", flush=True)
            if profile:
                with cProfile.Profile() as found:
                    for n in range(CALLS):
                        step(n)
                pstats.Stats(found).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

"""Compile the native CUDA kernels with nvcc, without a GPU, and print what each costs; exits 1 when one spills or
keeps anything else in local memory.

Columns: registers a thread, bytes spilled, bytes of local memory, shared memory of a block in KiB, and the blocks of
128 threads that a multiprocessor holds at once by those two: a model, not a measurement.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"
KERNELS = ("prefill", "few_rows")
TARGETS = {"sm_80": 164, "sm_90a": 228, "sm_100": 228}  # KiB of shared memory of a multiprocessor
THREADS, REGISTERS = 128, 65536
ENTRY = re.compile(
    r"Compiling entry function '\w*?(prefill|few_rows)_kernelI(?:NS0_\d+(Half|BFloat16)E|f)Li(\d+)E.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
    re.DOTALL,
)
SIZES = """
#include <cstdio>
#include "{kernel}.cu"
using namespace eah::cuda;
int main() {{ printf("%zu %zu", sizeof({small}), sizeof({large})); }}
"""
SHARED = {"prefill": ("Shared<Half, 64>", "Shared<Half, 128>"), "few_rows": ("Shared", "Shared")}


class Cost(NamedTuple):
    kernel: str
    dtype: str
    dim: int
    local_bytes: int
    spill_bytes: int
    registers: int


def costs(said: str) -> list[Cost]:
    """What `ptxas -v` said of each kernel."""
    found = [Cost(m[1], m[2] or "float", int(m[3]), int(m[4]), int(m[5]), int(m[6])) for m in ENTRY.finditer(said)]
    return sorted(found)


def compile_for(job: tuple[str, str]) -> list[Cost]:
    kernel, target = job
    with tempfile.TemporaryDirectory() as folder:
        return costs(nvcc(f"-arch={target}", "-cubin", "-Xptxas", "-v", SOURCES / f"{kernel}.cu", folder=folder).stderr)


def shared_bytes(kernel: str) -> dict[int, int]:
    """Of a block, by head dim; asked of the compiler, as a launch does."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "sizes.cu"
        program.write_text(SIZES.format(kernel=kernel, small=SHARED[kernel][0], large=SHARED[kernel][1]))
        nvcc("-arch=sm_80", "-Xptxas", "-O0", "-o", "sizes", program, folder=folder)
        said = subprocess.run([Path(folder) / "sizes"], capture_output=True, text=True, check=True).stdout
    return dict(zip((64, 128), map(int, said.split()), strict=True))


def nvcc(*arguments, folder: str) -> subprocess.CompletedProcess:
    command = ["nvcc", "-std=c++17", "-O3", f"-I{SOURCES}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done


def main() -> int:
    if shutil.which("nvcc") is None:
        print("native CUDA kernels: not compiled, nvcc is not on the PATH")
        return 0
    jobs = [(kernel, target) for target in TARGETS for kernel in KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shared = dict(zip(KERNELS, pool.map(shared_bytes, KERNELS), strict=True))
        built = list(pool.map(compile_for, jobs))
    print("target  kernel   dtype     dim  registers  spilled  local  shared KiB  blocks at once")
    spilling = 0
    for (kernel, target), found in zip(jobs, built, strict=True):
        if len(found) != (4 if kernel == "prefill" else 6):
            sys.exit(f"{kernel} for {target}: {len(found)} kernels found in what ptxas said")
        for cost in found:
            spilling += cost.local_bytes > 0
            size = shared[kernel][cost.dim]
            blocks = min(REGISTERS // (-(-cost.registers // 8) * 8 * THREADS), TARGETS[target] * 1024 // (size + 1024))
            print(
                f"{target:7} {kernel:8} {cost.dtype:8} {cost.dim:4}  {cost.registers:9}  {cost.spill_bytes:7}  "
                f"{cost.local_bytes:5}  {size / 1024:10.1f}  {blocks:14}  {'local memory' if cost.local_bytes else ''}"
            )
    print(f"{sum(map(len, built))} builds, {spilling} with local memory")
    return min(spilling, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Build the shipped kernels ahead of time, without a GPU, and print what each costs.

    python bench/resources.py          the builds CI makes: sm_90 in full, every other target's primary rows
    python bench/resources.py --all    every row of the tile table

Columns: registers a thread, bytes spilled, shared memory in KiB, and the matrix instruction found in the machine code.
Exits 1 when a build exceeds its target's shared memory, lacks the matrix instruction it should use, or spills without
the tile table (eah_kernels/triton/configs.py) saying why.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from eah_kernels.masks import Scoring
from eah_kernels.ops import empty_output
from eah_kernels.triton import attend, lse, sinks
from eah_kernels.triton.launch import Launch, Problem


class Target(NamedTuple):
    gpu: GPUTarget
    shared_kib: int  # a block may use
    matrix: dict[bool, str]  # is 16-bit -> instruction, as a pattern in the disassembly


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163, {True: "HMMA", False: "HMMA"}),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99, {True: "HMMA", False: "HMMA"}),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227, {True: "HGMMA", False: "HGMMA"}),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227, {True: "UTCHMMA", False: "UTCHMMA"}),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64, {True: "v_mfma", False: "v_mfma"}),
}


class StubDriver:
    """What triton asks of a driver when it only compiles."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.name].gpu


class Cost(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    code: str


def compile_launch(launch: Launch, target: str) -> Cost:
    triton.runtime.driver.set_active(StubDriver(target))
    compiled = launch.kernel.warmup(**launch.arguments, **launch.tile.options(), grid=(launch.programs,))
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spill = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]) * 4
        return Cost(registers, spill, compiled.metadata.shared, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("cuobjdump", "--dump-sass", cubin.name)
    local = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])
    return Cost(int(re.search(r"REG:(\d+)", usage)[1]), local, compiled.metadata.shared, sass)


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def make_launch(
    kernel: str, target: str, head_dim: int, dtype: torch.dtype, mask_form: str, q_len=1024, **rules
) -> Launch:
    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, heads, kv_heads = 2, 32, 32
    query, key, value = (
        empty(batch, heads, q_len, head_dim),
        empty(batch, kv_heads, q_len, head_dim),
        empty(batch, kv_heads, q_len, head_dim),
    )
    mask = {
        "none": None,
        "key": empty(batch, q_len, dtype=torch.bool),
        "bool": empty(batch, 1, q_len, q_len, dtype=torch.bool),
        "bias": empty(batch, 1, q_len, q_len),
    }[mask_form]
    problem = Problem(query, key, Scoring(mask, scale=head_dim**-0.5, **rules), target)
    image, counts = empty(batch, q_len, dtype=torch.bool), empty(batch, heads, dtype=torch.int32)
    row_lse, head = empty(batch, heads, lse.padded_length(q_len), dtype=torch.float32), empty(batch, dtype=torch.int32)
    if kernel == "lse":
        return lse.lse(problem, row_lse, image_mask=image, sink_counts=counts)
    if kernel == "sinks":
        return sinks.sinks(problem, image, row_lse, 0.002, counts)
    return attend.attend(problem, value, head, empty_output(query, value), row_lse if kernel == "shared_map" else None)

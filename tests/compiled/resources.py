"""Build the shipped kernels ahead of time, without a GPU, and print what each costs.

    python -m tests.compiled.resources          the builds CI makes: sm_90 in full, every other target's primary row
                                                and, on sm_100, the same under an additive mask
    python -m tests.compiled.resources --all    every row of the tile table, masked ones under every form of mask

Kind: plain, float32, of 16 bits under a 2-D mask (key), a 4-D boolean (bool) or an additive one (bias); fast: a Gluon
kernel.
Columns: registers a thread, bytes spilled, shared memory in KiB, the matrix instruction found in the machine code.
Then, for NVIDIA, of each steady-state loop (blocks that every row sees whole, whatever the mask): instructions a thread
issues per score; the same of the loop over the other blocks, at edges and where a mask splits them; and the clocks of a
multiprocessor per score that the former's issues, exps and matrix products take alone. That is a model. On sm_90 also,
a product (wgmma): the exps that are taken between it and the wait for it, and the waits.
`attend` has two loops: for the shared map and, with a running maximum, for a head's own map. `pack` and `few_rows` have
none that counts. `one_pass` has no loop: its issues are all its instructions, both ways of each branch, for the scores
that it holds.

Exits 1 when a build exceeds its target's shared memory, lacks the matrix instruction it should use, spills without
the tile table (eah_kernels/triton/tiles.py) saying why, or reads shared memory through the async proxy without a
fence (fences.py; wgmma and tcgen05, so sm_90 and sm_100); in 16 bits, when warps compute the same scores, which shows
as two exps a score; on sm_90 when ptxas notes that it waits for every wgmma at
once (C75xx). On sm_90 in 16 bits, masked or not, also when a statistics loop issues more than 10 % above the floor of
its exps and matrix products, the shared map has no loop without a running maximum, a loop loads scalars from global
memory, or a boolean mask more than doubles what a loop issues.

Of the fast rows it asks more: no spill for any reason, of lse and sinks at most 5.5 instructions a score and at least 5
exps a product beside it, of attend that exps are taken beside P V. The Triton kernels meet none of these: they wait for
a product and then take its exps. The scan for fences knows no addresses, and would name what Gluon hands its groups of
warps through shared memory; test_hopper.py has the fast kernels executed with every access checked.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.triton import attend, few_rows, lse, one_pass, pack, sinks
from eah_kernels.triton.bundles import Choice, Tally
from eah_kernels.triton.launch import Launch, Problem
from eah_kernels.triton.tiles import FAST, HEAD_DIMS, ONCE, SHORT, SHORT_TILES, TILES, FastTile

from .fences import unfenced_reads
from .sass import EXPS_A_CLOCK, ISSUES_A_CLOCK, MATRIX_A_CLOCK, Loop, spills_in_loops, steady_loop, whole_program


class Target(NamedTuple):
    gpu: GPUTarget
    shared_kib: int  # a block may use
    matrix: str  # the matrix instruction of 16-bit kernels, as the disassembly spells it
    matrix_float32: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163, "HMMA", "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99, "HMMA", "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227, "HGMMA", "HGMMA"),  # wgmma
    # tcgen05, and for small float32 tiles mma.sync
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227, "UTCHMMA", "HMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64, "v_mfma", "v_mfma"),
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


class Row(NamedTuple):
    """short: of SHORT_TILES."""

    kernel: str
    target: str
    kind: str
    head_dim: int
    mask: str = "bias"  # of kinds but plain: key, bool, bias (launch.Problem)
    short: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.kind == "float32" else torch.bfloat16

    @property
    def matrix(self) -> str:
        target = TARGETS[self.target]
        if self.kernel == "few_rows" and target.gpu.backend == "cuda":
            return "HMMA"  # 16 rows are too few for the larger instructions
        return target.matrix_float32 if self.kind == "float32" else target.matrix


class Cost(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    code: str  # machine code
    ptx: str = ""
    loops: dict[str, Loop | None] | None = None  # by what they compute


FAST_ISSUES = 5.5  # a score, of the statistics' fast rows at most
FAST_EXPS_BETWEEN = {"lse": 5, "sinks": 5, "attend": 2.5}  # a product, of the fast rows at least; 32 are all for 12
# online? "few_rows" waits for memory, not for its loop
LOOPS = {"lse": {"lse": True}, "sinks": {"sinks": False}, "attend": {"shared map": False, "own map": True}}


def compile_launch(launch: Launch, target: str) -> Cost:
    triton.runtime.driver.set_active(StubDriver(target))
    compiled = launch.kernel.warmup(**launch.arguments, **launch.tile.options, grid=(launch.programs,))
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
    return Cost(int(re.search(r"REG:(\d+)", usage)[1]), local, compiled.metadata.shared, sass, compiled.asm["ptx"])


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_path(name), *arguments], capture_output=True, text=True, check=True).stdout


def _path(tool: str) -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin" / tool


def make_launch(row: Row) -> Launch:
    """The row's kernel as it is launched for a LLaVA-like layer: 32 heads, 1024 tokens, batch 2; or a short one.

    Fast rows have 4 KV heads: the output of grouped queries takes more registers.
    """
    batch, heads, length = (1, 8, SHORT) if row.short else (2, 32, 1024)
    q_len = 1 if row.kernel == "few_rows" else length

    def empty(*shape, dtype=row.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    kv_heads = 4 if row.kind == "fast" else heads
    query = empty(batch, heads, q_len, row.head_dim)
    key, value = (empty(batch, kv_heads, length, row.head_dim) for _ in range(2))
    mask = {
        "key": empty(batch, length, dtype=torch.bool),
        "bool": empty(batch, 1, q_len, length, dtype=torch.bool),
        "bias": empty(batch, 1, q_len, length),
    }[row.mask]
    mask = None if row.kind == "plain" or (row.kind == "fast" and row.mask != "key") else mask
    fast, few = row.kind == "fast", row.kernel == "few_rows"
    problem = Problem(query, key, Scoring(mask, scale=row.head_dim**-0.5), row.target, fast=fast, by_key=not few)
    image = empty(batch, length, dtype=torch.uint8)
    tally = Tally(*(empty(batch, *shape, dtype=torch.int32) for shape in ((heads,), (2,))))
    head = empty(batch, dtype=torch.int32)
    minus_lse = empty(batch, heads, lse.padded_length(length), dtype=torch.float32)
    if mask is not None and not few:
        packing = pack.pack(problem, mask)
    if row.kernel == "pack":
        return packing
    if row.kernel == "lse":
        return lse.lse(problem, minus_lse, image=image, tally=tally)
    if row.kernel == "sinks":
        return sinks.sinks(problem, image, minus_lse, 0.002, tally, choice=Choice(head, 0.0))
    if row.kernel == "one_pass":
        tickets = empty(batch * (heads + 1), dtype=torch.int32)
        return one_pass.one_pass(problem, image, 0.002, minus_lse, tally.counts, tickets, Choice(head, 0.0))
    output = empty_output(query, value)
    if few:
        return few_rows.few_rows(problem, value, head, output)[0]
    return attend.attend(problem, value, head, output, minus_lse)


def rows(everything: bool) -> list[Row]:
    """Every row of the table, under every mask form; or sm_90's, and the plain output at head dim 128 of the others, on
    sm_100 also under an additive mask, as there the order of loads decides whether Triton fences K.

    Of `few_rows` and the short ones then only those on sm_90 at head dim 128: CI has time for 40 builds.
    """
    table = [
        Row(kernel, target, kind, head_dim, mask, tiles is SHORT_TILES)
        for tiles in (TILES, SHORT_TILES)
        for kernel, targets in tiles.items()
        for target, kinds in targets.items()
        for kind in kinds
        for head_dim in HEAD_DIMS
        for mask in (("key", "bool", "bias") if kind == "masked" else ("bias",))
        if kinds[kind][HEAD_DIMS.index(head_dim)] and (kernel != "one_pass" or kind == "plain" or mask == "key")
    ]
    if not everything:
        primary = ("attend", "plain", 128)
        split = Row("attend", "sm_100", "masked", 128, "bias")
        table = [r for r in table if r.target == "sm_90" or (r.kernel, r.kind, r.head_dim) == primary or r == split]
        table = [r for r in table if r.mask == "bias" or r.head_dim == 128]
        table = [r for r in table if r.kernel != "few_rows" or (r.kind, r.head_dim) == primary[1:]]
        table = [r for r in table if not r.short or (r.target == "sm_90" and r.head_dim == 128 and r.mask != "bool")]
    table += [
        Row(kernel, target, "fast", dim, mask)
        for kernel in FAST
        for target in FAST[kernel]
        for dim in FAST[kernel][target]
        for mask in ("bias", "key")
    ]
    targets = TARGETS if everything else ("sm_90",)
    return table + [Row("pack", target, "masked", 128, mask) for target in targets for mask in ("key", "bias")]


def build(row: Row) -> tuple[Row, Cost, list[str]]:
    """What the row costs, and what is wrong with it."""
    launch = make_launch(row)
    cost = compile_launch(launch, row.target)
    target, tile, fast = TARGETS[row.target], launch.tile, isinstance(launch.tile, FastTile)
    if fast:  # of a group of four warps, which keeps 64 rows or, in sinks, 64 keys
        scores = 64 * (tile.block_m if row.kernel == "sinks" else tile.block_n)
    else:
        scores = tile.block_m * (SHORT if row.kernel == "one_pass" else tile.block_n)
    elements = scores / (32 * tile.options["num_warps"])
    online = LOOPS.get(row.kernel, {})
    loops = {}
    for name in online:
        share = launch.arguments.get("SHARED_N", tile.block_n) / tile.block_n if name == "shared map" else 1
        loops[name] = steady_loop(cost.code, elements * share, online[name], several=fast)
    if row.kernel == "one_pass":
        loops = {"one pass": whole_program(cost.code, elements)}
    problems = []
    if fast != (row.kind == "fast"):
        problems.append("not the kernel that the row names")
    if cost.shared_bytes > target.shared_kib * 1024:
        problems.append(f"more than {target.shared_kib} KiB of shared memory")
    if (loops or row.kernel == "few_rows") and row.matrix not in cost.code:
        problems.append(f"no {row.matrix} instruction")
    if cost.spill_bytes and (fast or not tile.spills):
        problems.append(f"spills {cost.spill_bytes} bytes and the table gives no reason")
    if not fast and tile.spills == ONCE and spills_in_loops(cost.code):
        problems.append("spills in a loop, and the table says that it does not")
    unfenced = {} if fast else unfenced_reads(cost.ptx)
    if unfenced:
        problems.append(f"{len(unfenced)} matrix instructions read shared memory without a proxy fence")
    if row.kind != "float32":
        twice = [name for name, loop in loops.items() if loop and loop.exps >= 2]
        problems += [f"takes every exp of the {name} {loops[name].exps:.1f} times" for name in twice]
    if row.target == "sm_90":
        problems += serialised(cost.ptx)
    if row.target == "sm_90" and row.kind != "float32":
        problems += [problem for name, loop in loops.items() for problem in loop_problems(row, name, loop)]
    return row, cost._replace(code="", ptx="", loops=loops), problems


def serialised(ptx: str) -> list[str]:
    """ptxas's notes C75xx, by number: it waits for each wgmma before the next, and why."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "--output-file", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [f"ptxas serialises wgmma: {note}" for note in sorted(set(re.findall(r"\(C75\d\d\)", done.stderr)))]


def loop_problems(row: Row, name: str, loop: Loop | None) -> list[str]:
    """What keeps a loop from the speed that the design counts on."""
    if loop is None:
        return [f"no {name} loop with matrix products and exps found"]
    problems = []
    floor = max(1 / EXPS_A_CLOCK, row.head_dim / MATRIX_A_CLOCK[row.target])
    if row.kernel in ("lse", "sinks") and loop.issues / ISSUES_A_CLOCK > 1.1 * floor:
        problems.append(f"issues {loop.issues:.1f} a score: more than 10 % above the floor")
    if row.kind == "masked" and row.mask == "bool" and loop.edge_issues > 2 * loop.issues:
        problems.append(
            f"issues {loop.edge_issues:.1f} a score where the mask splits a block: more than twice {name}'s"
        )
    if row.kind == "fast":
        if row.kernel != "attend" and loop.issues > FAST_ISSUES:
            problems.append(f"issues {loop.issues:.1f} a score: more than {FAST_ISSUES}")
        least = FAST_EXPS_BETWEEN[row.kernel]
        if loop.exps_between < least:
            problems.append(f"{loop.exps_between:.1f} exps beside a product: fewer than {least}")
    if loop.scalar_loads:
        problems.append(f"{loop.scalar_loads} scalar loads in the {name} loop")
    return problems


def clocks(row: Row, name: str, loop: Loop, value_width: int) -> str:
    """Clocks of a multiprocessor per score by what the loop issues, its exps and its matrix products: a model."""
    text = f"{loop.issues:6.1f} {loop.edge_issues:5.1f} "
    text += f"{loop.issues / ISSUES_A_CLOCK:6.3f} {loop.exps / EXPS_A_CLOCK:6.3f}"
    if row.kind != "float32":
        values = {"shared map": value_width, "own map": row.head_dim}.get(name, 0)
        text += f" {(row.head_dim + values) / MATRIX_A_CLOCK[row.target]:6.3f}"
    beside = f"{loop.exps_between:5.1f} {loop.waits:5.2f}" if row.target == "sm_90" else ""
    return f"{text:33} {beside:11}  {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every row of the tile table")
    chosen = rows(parser.parse_args().all)
    print(f"{len(chosen)} builds, triton {triton.__version__}")
    print("target  kernel dims  kind     block_m x block_n  warps stages  registers  spilled  shared KiB", end="")
    print("  matrix   issues  edge  clocks: issue, exp, matrix  a product: exps beside, waits")
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row, cost, problems in pool.map(build, chosen):
            tile = make_launch(row).tile
            width, warps = getattr(tile, "value_width", 0), tile.options["num_warps"]
            stages = tile.options.get("num_stages", getattr(tile, "stages", 0))
            loops = [clocks(row, name, loop, width) for name, loop in cost.loops.items() if loop]
            failed += bool(problems)
            kind = row.mask if row.kind == "masked" else row.kind
            kind += " key" if row.kind == "fast" and row.mask == "key" else ""
            print(
                f"{row.target:7} {row.kernel:6} {row.head_dim:4}  {kind:8} {tile.block_m:7} x {tile.block_n:<7}  "
                f"{warps:5} {stages:6}  {cost.registers:9}  {cost.spill_bytes:7}  "
                f"{cost.shared_bytes / 1024:10.0f}  {row.matrix:7} {loops[0] if loops else ''}  {'; '.join(problems)}",
                flush=True,
            )
            for loop in loops[1:]:
                print(f"{'':92}{loop}")
    print(f"{len(chosen)} builds, {failed} wrong")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

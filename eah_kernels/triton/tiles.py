"""The pinned tile configurations: one table, by kernel, target, mask class or float32, and head dim; none is autotuned.

`make resources` compiles these rows and prints registers, shared memory and spills. sm_80 stands for NVIDIA parts with
163 KiB of shared memory a block, sm_89 for those with about 99 KiB, gfx942 for AMD's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

FUSED = {"enable_fp_fusion": True}  # a product and its sum in one instruction; from Triton 3.10 on not by default


@dataclass(frozen=True, eq=False)  # a row is itself: its hash is cheap
class Tile:
    """block_m query rows x block_n keys (0: fixed by the kernel). value_width: features of values that share one map,
    shared_n: keys of such a map's tile (0: block_n).

    max_registers: a thread's limit, where it lets one more program be resident; NVIDIA only, 0 for none.
    spills: why registers of this row may spill to memory; empty means that they must not.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    value_width: int = 0
    shared_n: int = 0
    max_registers: int = 0
    spills: str = ""

    @cached_property
    def options(self) -> dict[str, int]:
        """How a kernel is launched with it."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n} if self.block_m else {}
        return blocks | limit | {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSED}


@dataclass(frozen=True, eq=False)
class FastTile:
    """A row of the Gluon kernels (hopper/): block_m query rows x block_n keys, `stages` tiles in shared memory.

    value_width: as of Tile.
    """

    block_m: int
    block_n: int
    stages: int
    value_width: int = 0

    @cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": 4, **FUSED}  # warps of each group that computes


HEAD_DIMS = (64, 128, 256)  # a row serves head dims up to this
SHORT = 768  # tokens of the longest prompt that SHORT_TILES are for
# Above so many programs, and 256 keys, one_pass is left. It does not issue less than lse and sinks together, and of its
# programs one is resident where two of theirs are: of work enough for all multiprocessors it takes 1.15 to 1.4 times
# as long. By bench/multiprocessor.py the two meet between 300 and 470 programs on 132 multiprocessors, hardly
# depending on the length; 384 are 32 heads of 768 tokens. Up to 256 keys it is never more than 1.07 times.
ONE_PASS_PROGRAMS = 384
SPLIT_BLOCKS = "two programs are resident; only the loop over blocks that the mask splits spills, beside its words"
ONCE = "at most 32 bytes, once a program, before and after its loops; mostly so that two programs are resident"
HELD = "a block of rows holds all its scores in registers; at most 32 bytes, once a program"
THREE_TF32 = "a float32 product by three TF32 products keeps every operand twice in registers"

# plain: 16-bit, no mask or only causality and soft-cap. masked: 16-bit, a mask tensor or a window. float32: either.
TILES = {
    "lse": {
        "sm_80": {
            "plain": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
            "masked": (
                Tile(128, 64, 8, 2, spills=ONCE),
                Tile(128, 64, 8, 2, spills=ONCE),
                Tile(128, 64, 8, 2, spills=ONCE),
            ),
            "float32": (Tile(64, 32, 4, 2), Tile(64, 16, 4, 1), Tile(64, 16, 8, 1, spills=THREE_TF32)),
        },
        "sm_89": {
            "plain": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            "masked": (
                Tile(128, 64, 8, 2),
                Tile(128, 64, 8, 2, spills=ONCE),
                Tile(64, 64, 4, 2, spills=SPLIT_BLOCKS),
            ),
            "float32": (Tile(64, 32, 4, 2), Tile(64, 16, 4, 1), Tile(32, 16, 4, 1, spills=THREE_TF32)),
        },
        "sm_90": {
            "plain": (
                Tile(128, 128, 8, 3, max_registers=128),
                Tile(128, 128, 8, 2, max_registers=128),
                Tile(128, 128, 8, 2),
            ),
            "masked": (
                Tile(128, 64, 8, 2, max_registers=128),
                Tile(128, 64, 8, 2, max_registers=128),
                Tile(128, 64, 8, 2),
            ),
            "float32": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 16, 4, 1, spills=THREE_TF32)),
        },
        "sm_100": {
            "plain": (
                Tile(128, 128, 8, 3, spills=ONCE),
                Tile(128, 128, 8, 2, spills=ONCE),
                Tile(128, 128, 8, 2),
            ),
            "masked": (
                Tile(128, 128, 8, 3),
                Tile(128, 64, 8, 2, spills=SPLIT_BLOCKS),
                Tile(128, 64, 8, 2),
            ),
            "float32": (Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1, spills=THREE_TF32)),
        },
        "gfx942": {
            "plain": (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            "masked": (Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
            "float32": (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        },
    },
    "sinks": {
        "sm_80": {
            "plain": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3, spills=ONCE)),
            "masked": (Tile(64, 128, 8, 3), Tile(32, 128, 8, 2, spills=SPLIT_BLOCKS), Tile(32, 128, 8, 2)),
            "float32": (
                Tile(16, 64, 4, 1),
                Tile(16, 32, 4, 1, spills=THREE_TF32),
                Tile(16, 64, 8, 1, spills=THREE_TF32),
            ),
        },
        "sm_89": {
            "plain": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 2)),
            "masked": (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2, spills=SPLIT_BLOCKS), Tile(32, 128, 8, 2)),
            "float32": (
                Tile(16, 64, 4, 1, spills=ONCE),
                Tile(16, 64, 4, 1, spills=THREE_TF32),
                Tile(16, 32, 4, 1, spills=THREE_TF32),
            ),
        },
        "sm_90": {
            "plain": (
                Tile(64, 128, 8, 3, max_registers=128),
                Tile(64, 128, 8, 3, max_registers=128),
                Tile(64, 128, 8, 3),
            ),
            "masked": (
                Tile(64, 128, 8, 3, max_registers=128, spills=SPLIT_BLOCKS),
                Tile(64, 128, 8, 3, max_registers=128, spills=SPLIT_BLOCKS),
                Tile(64, 128, 8, 3),
            ),
            "float32": (Tile(32, 128, 8, 2), Tile(16, 64, 4, 1), Tile(16, 64, 4, 1, spills=THREE_TF32)),
        },
        "sm_100": {
            "plain": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
            "masked": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
            "float32": (Tile(32, 128, 8, 2), Tile(16, 64, 8, 1), Tile(16, 64, 8, 1, spills=THREE_TF32)),
        },
        "gfx942": {
            "plain": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 128, 8, 3)),
            "masked": (Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2)),
            "float32": (Tile(64, 128, 8, 3), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
        },
    },
    "attend": {
        "sm_80": {
            "plain": (Tile(128, 32, 8, 2, 256, 16), Tile(128, 32, 8, 2, 256, 16), Tile(128, 16, 8, 2, 256)),
            "masked": (Tile(128, 32, 8, 2, 256, 16), Tile(128, 32, 8, 2, 256, 16), Tile(128, 16, 8, 2, 256)),
            "float32": (
                Tile(32, 16, 2, 1, 64),
                Tile(64, 16, 4, 1, 128, spills=THREE_TF32),
                Tile(64, 16, 4, 1, 256, spills=THREE_TF32),
            ),
        },
        "sm_89": {
            "plain": (Tile(128, 32, 8, 2, 256, 16), Tile(128, 32, 8, 2, 256, 16), Tile(128, 16, 8, 2, 256)),
            "masked": (Tile(128, 32, 8, 2, 256, 16), Tile(128, 32, 8, 2, 256, 16), Tile(128, 16, 8, 2, 256)),
            "float32": (
                Tile(32, 32, 2, 1, 64),
                Tile(64, 16, 4, 1, 128, spills=THREE_TF32),
                Tile(32, 16, 2, 1, 256, spills=THREE_TF32),
            ),
        },
        "sm_90": {
            "plain": (Tile(128, 64, 8, 2, 256), Tile(128, 64, 8, 2, 256), Tile(128, 32, 8, 2, 256)),
            "masked": (
                Tile(128, 32, 8, 2, 256),
                Tile(128, 32, 8, 2, 256),
                Tile(128, 32, 8, 2, 256, spills=ONCE),
            ),
            "float32": (
                Tile(64, 16, 4, 1, 128),
                Tile(128, 32, 8, 1, 128, spills=THREE_TF32),
                Tile(64, 32, 4, 1, 256, spills=THREE_TF32),
            ),
        },
        "sm_100": {
            "plain": (Tile(128, 64, 8, 2, 256), Tile(128, 64, 8, 2, 256), Tile(128, 32, 8, 2, 256)),
            "masked": (Tile(128, 64, 8, 2, 256), Tile(128, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256)),
            "float32": (
                Tile(64, 32, 8, 1, 128),
                Tile(64, 32, 8, 1, 128, spills=THREE_TF32),
                Tile(32, 16, 4, 1, 256, spills=THREE_TF32),
            ),
        },
        "gfx942": {
            "plain": (
                Tile(128, 64, 8, 2, 256),
                Tile(128, 32, 8, 2, 256),
                Tile(128, 32, 8, 2, 256, spills=ONCE),
            ),
            "masked": (Tile(128, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256), Tile(64, 16, 8, 2, 256)),
            "float32": (Tile(64, 32, 8, 2, 256), Tile(64, 32, 4, 2, 128), Tile(64, 16, 4, 1, 256)),
        },
    },
    "few_rows": {
        "sm_80": {
            "plain": (Tile(16, 64, 8, 2, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "masked": (Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "float32": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 16, 8, 1, 256, spills=THREE_TF32)),
        },
        "sm_89": {
            "plain": (Tile(16, 64, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256)),
            "masked": (Tile(16, 32, 8, 2, 256, spills=ONCE), Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256)),
            "float32": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 16, 8, 1, 256, spills=THREE_TF32)),
        },
        "sm_90": {
            "plain": (Tile(16, 64, 8, 2, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "masked": (Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "float32": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 16, 8, 1, 256, spills=THREE_TF32)),
        },
        "sm_100": {
            "plain": (Tile(16, 64, 8, 2, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "masked": (Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 3, 512), Tile(16, 32, 8, 2, 512)),
            "float32": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 16, 8, 1, 256, spills=THREE_TF32)),
        },
        "gfx942": {
            "plain": (Tile(16, 64, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256)),
            "masked": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256)),
            "float32": (Tile(16, 32, 8, 2, 256), Tile(16, 32, 8, 2, 256), Tile(16, 16, 8, 1, 256)),
        },
    },
}
# By kernel, target and head dim. Built, executed as PTX, and not measured: only backend="triton", by name, takes them.
FAST = {
    "lse": {"sm_90": {64: FastTile(192, 128, 4), 128: FastTile(192, 128, 4)}},
    "sinks": {"sm_90": {64: FastTile(128, 192, 4), 128: FastTile(128, 192, 4)}},
    "attend": {"sm_90": {64: FastTile(128, 64, 3, 256), 128: FastTile(128, 64, 3, 256)}},
}
AS_LONGER = (None, None, None)  # the rows of TILES serve short prompts, too
# For prompts up to SHORT. one_pass loads a tile of keys during the product of the one before where num_stages is 2.
SHORT_TILES: dict[str, dict[str, dict[str, tuple[Tile | None, ...]]]] = {
    "one_pass": {
        "sm_80": {
            "plain": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), None),
            "masked": (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1, spills=HELD), None),
        },
        "sm_89": {
            "plain": (Tile(64, 64, 8, 1, spills=HELD), Tile(64, 64, 8, 1, spills=HELD), None),
            "masked": (Tile(64, 64, 8, 1, spills=HELD), Tile(64, 64, 8, 1, spills=HELD), None),
        },
        "sm_90": {
            "plain": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
            "masked": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        },
        "sm_100": {
            "plain": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            "masked": (Tile(64, 128, 8, 2, spills=HELD), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        },
        "gfx942": {},  # its barrier does not wait for the other waves' stores, which the tickets rely on
    },
    "attend": {
        "sm_80": {
            "plain": (Tile(64, 32, 4, 2, 256, 16), Tile(64, 32, 4, 2, 256, 16), Tile(64, 16, 4, 2, 256)),
            "masked": AS_LONGER,
        },
        "sm_89": {
            "plain": (Tile(64, 32, 4, 2, 256, 16), Tile(64, 32, 4, 2, 256, 16), Tile(64, 16, 4, 2, 256)),
            "masked": AS_LONGER,
        },
        "sm_90": {
            "plain": (Tile(64, 32, 4, 2, 256), Tile(64, 32, 4, 2, 256), None),
            "masked": (Tile(64, 32, 4, 2, 256), Tile(64, 32, 4, 2, 256, spills=ONCE), None),
        },
        "sm_100": {
            "plain": (Tile(64, 64, 4, 2, 256), Tile(64, 64, 4, 2, 256), Tile(64, 32, 8, 2, 256)),
            "masked": AS_LONGER,  # the plain ones are fenced and spill nothing, but are not compared yet
        },
        "gfx942": {
            "plain": (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256), Tile(64, 16, 8, 2, 256)),
            "masked": (Tile(64, 32, 8, 2, 256), Tile(64, 32, 8, 2, 256), Tile(64, 16, 8, 2, 256)),
        },
    },
}
INTERPRETER = Tile(64, 64, num_warps=4, num_stages=1, value_width=256)


@lru_cache
def find_tile(kernel: str, target: str, head_dim: int, dtype: torch.dtype, masked: bool) -> Tile:
    """The row of TILES for a kernel; head_dim is the larger of the key's and the value's."""
    if target == "interpreter":
        return INTERPRETER
    return TILES[kernel][target][_kind(dtype, masked)][_bucket(head_dim)]


@lru_cache
def find_short_tile(kernel: str, target: str, head_dim: int, dtype: torch.dtype, masked: bool) -> Tile | None:
    """The row of SHORT_TILES, if there is one."""
    if target == "interpreter":
        return INTERPRETER
    tiles = SHORT_TILES[kernel][target].get(_kind(dtype, masked))
    return tiles[_bucket(head_dim)] if tiles else None


def _kind(dtype: torch.dtype, masked: bool) -> str:
    return "float32" if dtype == torch.float32 else "masked" if masked else "plain"


def _bucket(head_dim: int) -> int:
    return next(i for i, most in enumerate(HEAD_DIMS) if head_dim <= most)

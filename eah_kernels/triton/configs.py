"""The pinned tile configurations: one table, by kernel, target, head dim, dtype and mask class.

Each row was compiled ahead of time (`make resources` prints registers, shared memory and spills); none is autotuned.
sm_89 stands for every NVIDIA part with about 99 KiB of shared memory a block, sm_80 for those with 163 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
KERNELS = ("lse", "sinks", "shared_map", "own_map")


@dataclass(frozen=True)
class Tile:
    """block_m query rows x block_n keys; value_width is the features of the value heads that share one map."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    value_width: int = 0

    def options(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n} if self.block_m else {}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def find_tile(kernel: str, target: str, head_dim: int, dtype: torch.dtype, tiled_mask: bool) -> Tile:
    """head_dim is the larger of the key's and the value's; tiled_mask: a 4-D mask, read tile by tile."""
    if target == "interpreter":
        return Tile(64, 64, 4, 1, 256)
    raise NotImplementedError

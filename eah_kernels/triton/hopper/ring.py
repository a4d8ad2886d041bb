"""Warps of different jobs: one brings tiles by TMA into a ring of places in shared memory, groups of four compute.

A place has two mbarriers: `ready`, when a tile has come, and `empty`, when every group has read it. Tile n lies in
place n % STAGES, and is the (n // STAGES)th there: the parity of that number tells a barrier's phases apart.
A group waits for every tile and gives every one back, also those that it has no use for, or its arrivals would count
for another tile's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LENGTHS = ["q_len", "kv_len"]  # not specialised on
ROWS: gl.constexpr = gl.constexpr(64)  # of a product of one group of four warps
# What Triton 3.9 names otherwise than 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


class Ring(NamedTuple):
    tiles: Any  # [STAGES, 1, HEADS, BLOCK, DIM]
    ready: Any  # [STAGES, 1] mbarriers
    empty: Any


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return Ring(tiles, ready, empty)


@gluon.jit
def bring(ring, n, desc, b, h, start):
    """The one warp that brings: tile n, rows start, start + 1, ... of a head; those past its end as zeros."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    place = n % STAGES
    mbarrier.wait(ring.empty.index(place), (n // STAGES & 1) ^ 1)
    mbarrier.expect(ring.ready.index(place), desc.block_type.nbytes)
    load_tile(desc, [b, h, start, 0], ring.ready.index(place), ring.tiles.index(place))


@gluon.jit
def bring_cleared(ring, n, desc, b, h, start, shown_ptr, landed, before):
    """As `bring`, with zeros in place of the rows that shown_ptr hides, whatever the memory holds: 0 * NaN is NaN in a
    product. landed: a mbarrier for nothing else; before: how many tiles were brought by it."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    BLOCK: gl.constexpr = ring.tiles.shape[3]
    PIECES: gl.constexpr = ring.tiles.shape[2] * ring.tiles.shape[4] // 64  # in which a row of 64 columns is 128 bytes
    place = n % STAGES
    mbarrier.wait(ring.empty.index(place), (n // STAGES & 1) ^ 1)
    mbarrier.expect(landed, desc.block_type.nbytes)
    load_tile(desc, [b, h, start, 0], landed, ring.tiles.index(place))
    mbarrier.wait(landed, before & 1)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lines = reinterpret(ring.tiles.index(place), gl.int32, [PIECES * BLOCK, 32], LINES)
    zeros = gl.full([32], 0, gl.int32, gl.BlockedLayout([32], [32], [1], [0]))
    for row in range(BLOCK):
        if gl.load(shown_ptr + row) == 0:
            for piece in gl.static_range(PIECES):
                lines.index(piece * BLOCK + row).store(zeros)
    fence_async_shared()  # the product reads as TMA writes, past what threads wrote
    mbarrier.arrive(ring.ready.index(place), count=1)


@gluon.jit
def take(ring, n):
    """Tile n, [1, HEADS, BLOCK, DIM], once it is there."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.ready.index(n % STAGES), n // STAGES & 1)
    return ring.tiles.index(n % STAGES)


@gluon.jit
def wide(ring, n):
    """Tile n, taken before, [BLOCK, HEADS * DIM]: the first 64 columns of every head, then the second, and so on."""
    tile = ring.tiles.index(n % ring.tiles.shape[0])
    shape: gl.constexpr = [tile.shape[2], tile.shape[1] * tile.shape[3]]
    return reinterpret(tile, tile.dtype, shape, gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def give_back(ring, n):
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.arrive(ring.empty.index(n % STAGES), count=1)


@gluon.jit
def leave_out(ring, first, last):
    """Tiles that a group has no use for."""
    for n in range(first, last):
        take(ring, n)
        give_back(ring, n)


@gluon.jit
def bring_parts(parts, ready, desc, b, h, start):
    """The groups' own tiles, ROWS rows each; all are ready at once."""
    PARTS: gl.constexpr = parts.shape[0]
    mbarrier.expect(ready, PARTS * desc.block_type.nbytes)
    for part in gl.static_range(PARTS):
        load_tile(desc, [b, h, start + ROWS * part, 0], ready, parts.index(part))


@gluon.jit
def matrix(tile):
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def start_product(own, ring, n):
    """own tile_n^T, [ROWS, BLOCK] float32, under way until `finish_product`."""
    tile = matrix(take(ring, n))
    LAYOUT: gl.constexpr = product_layout(tile.shape[0])
    zeros = gl.full([ROWS, tile.shape[0]], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(own, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def finish_product(product, ring, n, LATER: gl.constexpr = 0):
    """LATER: so many products that were started after it may go on."""
    product = warpgroup_mma_wait(LATER, [product])
    give_back(ring, n)
    return product


@gluon.constexpr_function
def product_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


def descriptor(tensor: Tensor, block: int, heads: int = 1) -> TensorDescriptor:
    """Tiles of `block` rows of so many heads of (B, H, S, D), for TMA. A dimension of one entry may have any stride."""
    shape, dim = list(tensor.shape), tensor.shape[3]
    strides = [dim if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True)]
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[tensor.dtype]
    form = [1, heads, block, dim]
    return TensorDescriptor(tensor, shape, strides, form, gl.NVMMASharedLayout.get_default_for(form, dtype))

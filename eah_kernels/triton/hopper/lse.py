"""As ../lse.py, for sm_90: three groups of warps with 64 rows each share the tiles of keys that a fourth brings.

The product with the next tile is under way while a tile's exps are taken. The loop goes two tiles a step, so that no
score is copied from register to register.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from eah_kernels.triton.bundles import PAD, Span, Tally, View
from eah_kernels.triton.hopper.ring import (
    LENGTHS,
    ROWS,
    bring,
    bring_parts,
    descriptor,
    finish_product,
    leave_out,
    make_ring,
    matrix,
    product_layout,
    start_product,
)
from eah_kernels.triton.launch import Launch, Problem, cdiv, view, view_lines
from eah_kernels.triton.loads import at, head_of
from eah_kernels.triton.ranges import intersect, visible_range, whole_or_none
from eah_kernels.triton.scores import LOWEST, running_exps
from eah_kernels.triton.tiles import FastTile

GROUPS: gl.constexpr = gl.constexpr(3)


class ShownKeys(NamedTuple):
    """What a (B, Skv) mask says of the keys from the ring's first one on."""

    shown_ptr: Any  # a byte a key, 0 where the mask hides it or there is none; padded to a tile
    seen: Span


@gluon.jit
def produce(q, k, rows, rows_ready, ring, b, h, kv_h, start_m, start_n, blocks):
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    bring_parts(rows, rows_ready, q, b, h, start_m)
    for n in range(blocks):
        bring(ring, n, k, b, kv_h, start_n + n * BLOCK_N)


@gluon.jit
def shifted(span, start):
    return Span(span.first - start, span.full - start, span.edge - start, span.last - start, span.biased)


@gluon.jit
def hide(score, start_n, position, keys=None):
    """-inf where the key comes after the row's position, or is hidden: whatever it holds, it reaches nothing."""
    local_n = gl.arange(0, score.shape[1], gl.SliceLayout(0, score.type.layout))
    seen = local_n[None, :] <= (position - start_n)[:, None]
    if keys is not None:
        seen = seen & (gl.load(keys.shown_ptr + start_n + local_n) != 0)[None, :]
    return gl.where(seen, score, float("-inf"))


@gluon.jit
def consume(rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, keys, PART: gl.constexpr):
    """Keys are numbered from the first of the ring's."""
    BLOCK_N: gl.constexpr = ring.tiles.shape[3]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    start_m += PART * ROWS
    offset = kv_len - q_len
    position = start_m + offset + gl.arange(0, ROWS, BY_ROW)
    row_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
    row_sum = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
    own = matrix(rows.index(PART))
    span = Span(0, 0, (start_m + offset + 1) // BLOCK_N * BLOCK_N, gl.minimum(start_m + ROWS, q_len) + offset, False)
    full = 0
    if keys is not None:
        span = whole_or_none(intersect(span, keys.seen, 0, kv_len, BLOCK_N), BLOCK_N)
        full = gl.maximum(span.full // BLOCK_N, 0)
    last = gl.where(start_m < q_len, gl.maximum(gl.cdiv(span.last, BLOCK_N), 0), 0)
    mbarrier.wait(rows_ready, 0)
    if keys is not None:
        for n in range(0, gl.minimum(full, last)):
            score = hide(finish_product(start_product(own, ring, n), ring, n), n * BLOCK_N, position, keys)
            row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, True)
    if full < last:
        whole = full + (gl.minimum(span.edge // BLOCK_N, last - 1) - full) // 2 * 2
        score = finish_product(start_product(own, ring, full), ring, full)
        for n in range(full, whole, 2):  # blocks that every row sees
            following = start_product(own, ring, n + 1)
            row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, True)
            following = finish_product(following, ring, n + 1)
            score = start_product(own, ring, n + 2)
            row_max, row_sum, _, _ = running_exps(following, row_max, row_sum, scale, True)
            score = finish_product(score, ring, n + 2)
        score = hide(score, whole * BLOCK_N, position, keys)
        row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, True)
        for n in range(whole + 1, last):
            score = hide(finish_product(start_product(own, ring, n), ring, n), n * BLOCK_N, position, keys)
            row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, True)
    leave_out(ring, last, blocks)
    row = start_m + gl.arange(0, ROWS, BY_ROW)
    lse = gl.where((row < q_len) & (row_sum != 0), -row_max - gl.log2(row_sum), float("-inf"))
    gl.store(out_ptr + row, lse, mask=row < columns)


@gluon.jit
def image_tokens_at(image_ptr, start, kv_len):
    """Of 1024 keys of one batch row of the image mask, 0 past its end."""
    key = start + gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    return gl.load(image_ptr + key, mask=key < kv_len, other=0).to(gl.int32)


@gluon.jit
def count_image_tokens(image_ptr, kv_len):
    count = image_tokens_at(image_ptr, 0, kv_len)
    for start in range(1024, kv_len, 1024):
        count += image_tokens_at(image_ptr, start, kv_len)
    return gl.sum(count, 0)


@gluon.jit
def has_image_token(image_ptr, kv_len):
    """Reads up to the first."""
    found, start = 0, 0
    while (found == 0) & (start < kv_len):
        found = gl.sum(image_tokens_at(image_ptr, start, kv_len), 0)
        start += 1024
    return found != 0


@gluon.jit(do_not_specialize=[*LENGTHS, "columns"])
def _lse_kernel(
    q, k, shown, cells, image, head_ptr, tally, minus_lse, batch, heads, q_len, kv_len, columns, scale,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As the Triton kernel. shown, cells: of a (B, Skv) mask, or None. columns: of minus_lse."""
    BLOCK_M: gl.constexpr = GROUPS * ROWS
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    pid = gl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_m = (gl.num_programs(0) // (batch * heads) - 1 - pid // (batch * heads)) * BLOCK_M  # longest rows first
    out_ptr = head_of(minus_lse, b, h).ptr
    if shown is None:
        start_n, seen_to = 0, kv_len
        keys: gl.constexpr = None
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        seen = visible_range(head_of(cells, b, 0).ptr, cells.row, kv_len, gl.arange(0, 128, LAYOUT), 1)
        start_n = seen.first // BLOCK_N * BLOCK_N
        seen_to = seen.last
        keys = ShownKeys(head_of(shown, b, 0).ptr + start_n, shifted(seen, start_n))
    if head_ptr is not None:
        h = gl.load(head_ptr + b)
        if h < 0:
            return
    if image is not None:
        image_ptr = at(image, b, kv_len)
        if start_m == 0:
            gl.store(tally.counts + b * heads + h, 0)
            if h == 0:
                gl.store(tally.progress + 2 * b, 0)
                gl.store(tally.progress + 2 * b + 1, count_image_tokens(image_ptr, kv_len))
        if not has_image_token(image_ptr, kv_len):
            return

    rows = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    rows_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(rows_ready, count=1)
    ring = make_ring(k, STAGES, GROUPS)
    last_n = gl.minimum(gl.minimum(start_m + BLOCK_M, q_len) + (kv_len - q_len), seen_to)
    blocks = gl.maximum(gl.cdiv(last_n - start_n, BLOCK_N), 0)
    kv_len -= start_n
    fence_async_shared()  # TMA writes where the count's sum and the mbarriers were written
    gl.warp_specialize(
        [
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, keys, 0)),
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, keys, 1)),
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, keys, 2)),
            (produce, (q, k, rows, rows_ready, ring, b, h, h // GROUP, start_m, start_n, blocks)),
        ],
        [4, 4, 1],
        [160, 160, 24],  # registers a thread; the first group gets the rest, 168
    )


def shown_keys(problem: Problem) -> list[View | None]:
    """Of a (B, Skv) mask, which keys it shows, what its cells hold, and how many it shows before each; or nothing."""
    mask = problem.mask
    if mask is None:
        return [None, None, None]
    keys = (cdiv(problem.kv_len, PAD.value) + 1) * PAD.value  # as loads.key_mask finds them
    shown = mask.view(torch.uint8)[..., 8 * keys :]
    return [view(shown), view(shown[..., keys:]), view(mask.view(torch.int32)[..., keys:])]


def lse(problem: Problem, tile: FastTile, out, *, image=None, tally: Tally | None = None, head=None) -> Launch:
    """As ../lse.py."""
    batch, heads, columns = out.shape
    shown, cells, _ = shown_keys(problem)
    return Launch(
        _lse_kernel,
        batch * heads * cdiv(columns, tile.block_m),
        tile,
        dict(shown=shown, cells=cells)
        | dict(q=descriptor(problem.query, ROWS.value), k=descriptor(problem.key, tile.block_n), head_ptr=head)
        | dict(image=image, tally=tally, minus_lse=view_lines(out), columns=columns)
        | {name: problem.arguments[name] for name in ("batch", "q_len", "kv_len", "scale")}
        | dict(heads=heads, GROUP=problem.rules.GROUP, STAGES=tile.stages),
    )

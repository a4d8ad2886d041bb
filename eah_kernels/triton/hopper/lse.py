"""As ../lse.py, for sm_90: three groups of warps with 64 rows each share the tiles of keys that a fourth brings.

The product with the next tile is under way while a tile's exps are taken. The loop goes two tiles a step, so that no
score is copied from register to register.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from eah_kernels.triton.bundles import Tally
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
from eah_kernels.triton.launch import Launch, Problem, cdiv, view_lines
from eah_kernels.triton.loads import at, head_of
from eah_kernels.triton.scores import LOWEST, running_exps
from eah_kernels.triton.tiles import FastTile

GROUPS: gl.constexpr = gl.constexpr(3)


@gluon.jit
def produce(q, k, rows, rows_ready, ring, b, h, kv_h, start_m, blocks):
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    bring_parts(rows, rows_ready, q, b, h, start_m)
    for n in range(blocks):
        bring(ring, n, k, b, kv_h, n * BLOCK_N)


@gluon.jit
def hide(score, start_n, position):
    """-inf where the key comes after the row's position."""
    local_n = gl.arange(0, score.shape[1], gl.SliceLayout(0, score.type.layout))
    return gl.where(local_n[None, :] <= (position - start_n)[:, None], score, float("-inf"))


@gluon.jit
def consume(rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, PART: gl.constexpr):
    BLOCK_N: gl.constexpr = ring.tiles.shape[3]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    start_m += PART * ROWS
    offset = kv_len - q_len
    position = start_m + offset + gl.arange(0, ROWS, BY_ROW)
    row_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
    row_sum = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
    last = 0
    mbarrier.wait(rows_ready, 0)
    if start_m < q_len:
        own = matrix(rows.index(PART))
        last = gl.cdiv(gl.minimum(start_m + ROWS, q_len) + offset, BLOCK_N)
        whole = gl.minimum((start_m + offset + 1) // BLOCK_N, last - 1) // 2 * 2
        score = finish_product(start_product(own, ring, 0), ring, 0)
        for n in range(0, whole, 2):  # blocks that every row sees
            following = start_product(own, ring, n + 1)
            row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, True)
            following = finish_product(following, ring, n + 1)
            score = start_product(own, ring, n + 2)
            row_max, row_sum, _, _ = running_exps(following, row_max, row_sum, scale, True)
            score = finish_product(score, ring, n + 2)
        row_max, row_sum, _, _ = running_exps(hide(score, whole * BLOCK_N, position), row_max, row_sum, scale, True)
        for n in range(whole + 1, last):
            score = finish_product(start_product(own, ring, n), ring, n)
            row_max, row_sum, _, _ = running_exps(hide(score, n * BLOCK_N, position), row_max, row_sum, scale, True)
    leave_out(ring, last, blocks)
    row = start_m + gl.arange(0, ROWS, BY_ROW)
    lse = gl.where((row < q_len) & (row_sum != 0), -row_max - gl.log2(row_sum), float("-inf"))
    gl.store(out_ptr + row, lse, mask=row < columns)


@gluon.jit
def count_image_tokens(image, b, kv_len):
    """Of one batch row of the image mask."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    count = gl.full([1024], 0, gl.int32, LAYOUT)
    for start in range(0, kv_len, 1024):
        key = start + gl.arange(0, 1024, LAYOUT)
        count += gl.load(at(image, b, kv_len) + key, mask=key < kv_len, other=0).to(gl.int32)
    return gl.sum(count, 0)


@gluon.jit(do_not_specialize=[*LENGTHS, "columns"])
def _lse_kernel(
    q, k, image, head_ptr, tally, minus_lse, batch, heads, q_len, kv_len, columns, scale,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As the Triton kernel. columns: of minus_lse."""
    BLOCK_M: gl.constexpr = GROUPS * ROWS
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    pid = gl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_m = (gl.num_programs(0) // (batch * heads) - 1 - pid // (batch * heads)) * BLOCK_M  # longest rows first
    out_ptr = head_of(minus_lse, b, h).ptr
    if head_ptr is not None:
        h = gl.load(head_ptr + b)
        if h < 0:
            return
    if image is not None:
        image_tokens = count_image_tokens(image, b, kv_len)
        if start_m == 0:
            gl.store(tally.counts + b * heads + h, 0)
            if h == 0:
                gl.store(tally.progress + 2 * b, 0)
                gl.store(tally.progress + 2 * b + 1, image_tokens)
        if image_tokens == 0:
            return

    rows = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    rows_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(rows_ready, count=1)
    ring = make_ring(k, STAGES, GROUPS)
    blocks = gl.cdiv(gl.minimum(start_m + BLOCK_M, q_len) + (kv_len - q_len), BLOCK_N)
    fence_async_shared()  # TMA writes where the count's sum and the mbarriers were written
    gl.warp_specialize(
        [
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, 0)),
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, 1)),
            (consume, (rows, rows_ready, ring, out_ptr, start_m, blocks, q_len, kv_len, columns, scale, 2)),
            (produce, (q, k, rows, rows_ready, ring, b, h, h // GROUP, start_m, blocks)),
        ],
        [4, 4, 1],
        [160, 160, 24],  # registers a thread; the first group gets the rest, 168
    )


def lse(problem: Problem, tile: FastTile, out, *, image=None, tally: Tally | None = None, head=None) -> Launch:
    """As ../lse.py."""
    batch, heads, columns = out.shape
    return Launch(
        _lse_kernel,
        batch * heads * cdiv(columns, tile.block_m),
        tile,
        dict(q=descriptor(problem.query, ROWS.value), k=descriptor(problem.key, tile.block_n), head_ptr=head)
        | dict(image=image, tally=tally, minus_lse=view_lines(out), columns=columns)
        | {name: problem.arguments[name] for name in ("batch", "q_len", "kv_len", "scale")}
        | dict(heads=heads, GROUP=problem.rules.GROUP, STAGES=tile.stages),
    )

"""As ../sinks.py, for sm_90: three groups of warps with 64 keys each share the tiles of rows that a fourth brings.

The product with the next tile is under way while a tile's exps are taken and added; the loop goes two tiles a step, so
that no score is copied from register to register.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from eah_kernels.triton.bundles import Choice, Span, Tally
from eah_kernels.triton.hopper.lse import ShownKeys, shown_keys
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
from eah_kernels.triton.ranges import intersect, visible_range, whole_or_none
from eah_kernels.triton.sinks import comes_last
from eah_kernels.triton.tiles import FastTile

GROUPS: gl.constexpr = gl.constexpr(3)


@gluon.jit
def choose_head(b, batch, heads, tally, choice):
    """As in ../sinks.py: every program of batch row b comes here once, after its sinks; the last one chooses."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if comes_last(tally.progress + 2 * b, gl.num_programs(0) // batch):
        most, head = -1, -1
        for start in range(0, heads, 128):
            h = start + gl.arange(0, 128, LAYOUT)
            count = gl.load(tally.counts + b * heads + h, mask=h < heads, other=-1, cache_modifier=".cg")
            most_here = gl.max(count, 0)
            head_here = gl.min(gl.where(count == most_here, h, heads), 0)
            head = gl.where(most_here > most, head_here, head)
            most = gl.maximum(most, most_here)
        image_tokens = gl.maximum(gl.load(tally.progress + 2 * b + 1), 1)
        density = gl.div_rn(gl.cast(most, gl.float32), gl.cast(image_tokens, gl.float32))
        gl.store(choice.head + b, gl.where((most > 0) & (density >= choice.min_density), head, -1))


@gluon.jit
def produce(q, k, columns, columns_ready, ring, b, h, kv_h, start_n, start_m, blocks):
    BLOCK_M: gl.constexpr = q.block_type.shape[2]
    bring_parts(columns, columns_ready, k, b, kv_h, start_n)
    for n in range(blocks):
        bring(ring, n, q, b, h, start_m + n * BLOCK_M)


@gluon.jit
def probabilities(score, lse_ptr, start_m, factor):
    """Their sums over the tile's rows. lse_ptr: negated log-sum-exps, in log2 units."""
    local_m = gl.arange(0, score.shape[1], gl.SliceLayout(0, score.type.layout))
    row_lse = gl.load(lse_ptr + start_m + local_m)
    return gl.sum(gl.exp2(score * factor + row_lse[None, :]), 1)


@gluon.jit
def split_probabilities(score, lse_ptr, start_m, factor, offset, key, rows):
    """The same, without the rows that do not come after the key or, under a mask, do not count, whatever they hold."""
    local_m = gl.arange(0, score.shape[1], gl.SliceLayout(0, score.type.layout))
    seeing = local_m[None, :] > (key - start_m - offset)[:, None]
    if rows is not None:
        seeing = seeing & (gl.load(rows.shown_ptr + offset + start_m + local_m) != 0)[None, :]
    row_lse = gl.load(lse_ptr + start_m + local_m)
    return gl.sum(gl.exp2(gl.where(seeing, score * factor + row_lse[None, :], float("-inf"))), 1)


@gluon.jit
def consume(
    columns, columns_ready, ring, sums, lse_ptr,
    start_n, start_m, blocks, q_len, kv_len, factor, rows, PART: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = ring.tiles.shape[3]
    BY_KEY: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_M))
    start_n += PART * ROWS
    key = start_n + gl.arange(0, ROWS, BY_KEY)
    offset = kv_len - q_len
    mass = gl.full([ROWS], 0.0, gl.float32, BY_KEY)
    first = gl.maximum(start_n + 1 - offset - start_m, 0) // BLOCK_M
    full = gl.cdiv(gl.maximum(start_n + ROWS - offset - start_m, 0), BLOCK_M)
    edge, last = blocks, blocks
    if rows is not None:
        span = Span(start_m + first * BLOCK_M, start_m + full * BLOCK_M, q_len, q_len, False)
        span = whole_or_none(intersect(span, rows.seen, offset, kv_len, BLOCK_M), BLOCK_M)
        first, full = (span.first - start_m) // BLOCK_M, gl.maximum(span.full - start_m, 0) // BLOCK_M
        edge = gl.cdiv(gl.maximum(span.edge - start_m, 0), BLOCK_M)
        last = gl.minimum(gl.maximum(gl.cdiv(span.last - start_m, BLOCK_M), 0), blocks)
    first = gl.minimum(first, last)
    full = gl.minimum(full, last)
    edge = gl.minimum(edge, last)
    own = matrix(columns.index(PART))
    mbarrier.wait(columns_ready, 0)
    leave_out(ring, 0, first)
    for n in range(first, full):
        score = finish_product(start_product(own, ring, n), ring, n)
        mass += split_probabilities(score, lse_ptr, start_m + n * BLOCK_M, factor, offset, key, rows)
    if full < edge:  # the blocks whose rows all see every key
        end = full + (edge - full - 1) // 2 * 2
        score = finish_product(start_product(own, ring, full), ring, full)
        for n in range(full, end, 2):
            following = start_product(own, ring, n + 1)
            mass += probabilities(score, lse_ptr, start_m + n * BLOCK_M, factor)
            following = finish_product(following, ring, n + 1)
            score = start_product(own, ring, n + 2)
            mass += probabilities(following, lse_ptr, start_m + (n + 1) * BLOCK_M, factor)
            score = finish_product(score, ring, n + 2)
        mass += probabilities(score, lse_ptr, start_m + end * BLOCK_M, factor)
        for n in range(end + 1, edge):  # one at most
            score = finish_product(start_product(own, ring, n), ring, n)
            mass += probabilities(score, lse_ptr, start_m + n * BLOCK_M, factor)
    if rows is not None:
        for n in range(gl.maximum(full, edge), last):
            score = finish_product(start_product(own, ring, n), ring, n)
            mass += split_probabilities(score, lse_ptr, start_m + n * BLOCK_M, factor, offset, key, rows)
        leave_out(ring, last, blocks)
    sums.index(PART).store(mass)


@gluon.jit(do_not_specialize=LENGTHS)
def _sinks_kernel(
    q, k, shown, cells, before, image, minus_lse, tally, mean, threshold, choice, batch, heads, q_len, kv_len, scale,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As the Triton kernel. shown, cells, before: of a (B, Skv) mask, or None."""
    BLOCK_M: gl.constexpr = q.block_type.shape[2]
    BLOCK_N: gl.constexpr = GROUPS * ROWS
    pid = gl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_n = pid // (batch * heads) * BLOCK_N  # longest columns first
    image_ptr = at(image, b, kv_len)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if shown is None:
        counting: gl.constexpr = None
    else:
        shown_ptr, before_ptr = head_of(shown, b, 0).ptr, head_of(before, b, 0).ptr
        seen = visible_range(head_of(cells, b, 0).ptr, cells.row, kv_len, gl.arange(0, 128, LAYOUT), 1)
        counting = ShownKeys(shown_ptr, seen)
    local_n = gl.arange(0, 256, LAYOUT)
    among = (local_n < BLOCK_N) & (start_n + local_n < kv_len)
    is_image = gl.load(image_ptr + start_n + local_n, mask=among, other=0).to(gl.int32)
    if gl.sum(is_image, 0) == 0:
        if choice is not None:
            choose_head(b, batch, heads, tally, choice)
        return
    columns = gl.allocate_shared_memory(k.dtype, [GROUPS] + k.block_type.shape, k.layout)
    columns_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(columns_ready, count=1)
    ring = make_ring(q, STAGES, GROUPS)
    sums = gl.allocate_shared_memory(gl.float32, [GROUPS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    lse_ptr = head_of(minus_lse, b, h).ptr
    start_m = gl.maximum(start_n + 1 - (kv_len - q_len), 0) // BLOCK_M * BLOCK_M
    blocks = gl.maximum(gl.cdiv(q_len - start_m, BLOCK_M), 0)
    fence_async_shared()  # TMA writes where sums and the mbarriers were written
    gl.warp_specialize(
        [
            (consume, (columns, columns_ready, ring, sums, lse_ptr,
                start_n, start_m, blocks, q_len, kv_len, scale.factor, counting, 0)),
            (consume, (columns, columns_ready, ring, sums, lse_ptr,
                start_n, start_m, blocks, q_len, kv_len, scale.factor, counting, 1)),
            (consume, (columns, columns_ready, ring, sums, lse_ptr,
                start_n, start_m, blocks, q_len, kv_len, scale.factor, counting, 2)),
            (produce, (q, k, columns, columns_ready, ring, b, h, h // GROUP, start_n, start_m, blocks)),
        ],
        [4, 4, 1],
        [160, 160, 24],  # registers a thread; the first group gets the rest, 168
    )  # fmt: skip
    sinks = 0
    for part in gl.static_range(GROUPS):
        key = start_n + part * ROWS + gl.arange(0, ROWS, LAYOUT)
        is_image = gl.load(image_ptr + key, mask=key < kv_len, other=0) != 0
        since = gl.minimum(gl.maximum(key + 1, kv_len - q_len), kv_len)
        seeing = kv_len - since
        if shown is not None:
            seeing = gl.load(before_ptr + kv_len) - gl.load(before_ptr + since)
        column_mean = gl.div_rn(sums.index(part).load(LAYOUT), gl.maximum(seeing, 1).to(gl.float32))
        if shown is not None:
            column_mean = gl.where(gl.load(shown_ptr + key, mask=key < kv_len, other=0) != 0, column_mean, 0.0)
        sinks += gl.sum((is_image & (column_mean > threshold)).to(gl.int32), 0)
        if mean is not None:
            gl.store(at(mean, b * heads + h, kv_len) + key, column_mean, mask=is_image)
    gl.atomic_add(tally.counts + b * heads + h, sinks, sem="relaxed")
    if choice is not None:
        choose_head(b, batch, heads, tally, choice)


def sinks(
    problem: Problem,
    tile: FastTile,
    image,
    minus_lse,
    threshold,
    tally: Tally,
    *,
    column_mean,
    choice: Choice | None,
) -> Launch:
    """As ../sinks.py."""
    batch, heads, _, _ = problem.query.shape
    shown, cells, before = shown_keys(problem)
    return Launch(
        _sinks_kernel,
        batch * heads * cdiv(problem.key.shape[2], tile.block_n),
        tile,
        dict(shown=shown, cells=cells, before=before)
        | dict(q=descriptor(problem.query, tile.block_m), k=descriptor(problem.key, ROWS.value), threshold=threshold)
        | dict(image=image, minus_lse=view_lines(minus_lse), mean=column_mean, choice=choice)
        | {name: problem.arguments[name] for name in ("batch", "q_len", "kv_len", "scale")}
        | dict(tally=tally, heads=heads, GROUP=problem.rules.GROUP, STAGES=tile.stages),
    )

"""As ../attend.py, for sm_90: two groups of warps with 64 rows each share the tiles that a third brings.

The product of a tile's probabilities with its values is under way beside the next tile's scores and their exps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from eah_kernels.triton.bundles import CELL, HIDES, Heads, Span
from eah_kernels.triton.hopper.lse import ShownKeys, hide, shifted, shown_keys
from eah_kernels.triton.hopper.ring import (
    LENGTHS,
    ROWS,
    bring,
    bring_cleared,
    bring_parts,
    descriptor,
    finish_product,
    leave_out,
    make_ring,
    matrix,
    product_layout,
    start_product,
    take,
    wide,
)
from eah_kernels.triton.launch import Launch, Problem, cdiv, value_groups, view, view_lines
from eah_kernels.triton.loads import at, head_of, row_of
from eah_kernels.triton.ranges import intersect, visible_range, whole_or_none
from eah_kernels.triton.scores import LOWEST, running_exps
from eah_kernels.triton.tiles import FastTile

GROUPS: gl.constexpr = gl.constexpr(2)


@gluon.jit
def produce(
    q, k, v, rows, rows_ready, keys, values, b, h, kv_h, first_value, start_m, start_n, blocks,
    landed, shown, cells_ptr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    bring_parts(rows, rows_ready, q, b, h, start_m)
    cleared = 0
    for n in range(blocks):
        start = start_n + n * BLOCK_N
        bring(keys, n, k, b, kv_h, start)
        if shown is None:
            bring(values, n, v, b, first_value, start)
        elif gl.load(cells_ptr + n) & HIDES != 0:
            bring_cleared(values, n, v, b, first_value, start, shown.shown_ptr + n * BLOCK_N, landed, cleared)
            cleared += 1
        else:
            bring(values, n, v, b, first_value, start)


@gluon.jit
def start_mixing(p, values, n, mixed):
    """mixed + p values_n, under way until `finish_product`."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, mixed.type.layout, 2)
    tile = wide(values, n)
    return warpgroup_mma(gl.convert_layout(p.to(tile.dtype), LAYOUT), tile, mixed, is_async=True)


@gluon.jit
def consume(
    rows, rows_ready, keys, values, mixtures, lse_ptr, position, blocks, kv_len, scale, shown,
    SHARED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Keys are numbered from the first of the ring's. Rows that see none of them walk a tile all the same."""
    BLOCK_N: gl.constexpr = keys.tiles.shape[3]
    WIDE: gl.constexpr = mixtures.shape[2]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    LAYOUT: gl.constexpr = product_layout(WIDE)
    position += PART * ROWS
    row = position + gl.arange(0, ROWS, BY_ROW)
    last = 0
    mbarrier.wait(rows_ready, 0)
    if position < kv_len:
        own = matrix(rows.index(PART))
        span = Span(0, 0, (position + 1) // BLOCK_N * BLOCK_N, gl.minimum(position + ROWS, kv_len), False)
        if shown is not None:
            span = whole_or_none(intersect(span, shown.seen, 0, kv_len, BLOCK_N), BLOCK_N)
        last = gl.maximum(gl.cdiv(span.last, BLOCK_N), 1)
        full = gl.minimum(span.full // BLOCK_N, last)
        edge = gl.minimum(span.edge // BLOCK_N, last)
        mixed = gl.full([ROWS, WIDE], 0.0, gl.float32, LAYOUT)
        score = hide(finish_product(start_product(own, keys, 0), keys, 0), 0, row, shown)
        if SHARED:
            row_lse = gl.load(lse_ptr + row)
            p = gl.exp2(score * scale.factor + row_lse[:, None])
        else:
            row_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
            row_sum = gl.full([ROWS], 0.0, gl.float32, BY_ROW)
            row_max, row_sum, p, _ = running_exps(score, row_max, row_sum, scale, True)
        take(values, 0)
        for SIDE in gl.static_range(1 if shown is None else 0, 3):  # before the whole blocks, they, after them
            begin = gl.maximum(0 if SIDE == 0 else full if SIDE == 1 else edge, 1)
            end = full if SIDE == 0 else edge if SIDE == 1 else last
            for n in range(begin, end):
                score = start_product(own, keys, n)
                mixed = start_mixing(p, values, n - 1, mixed)
                score = finish_product(score, keys, n, 1)
                if SIDE != 1:
                    score = hide(score, n * BLOCK_N, row, shown)
                if SHARED:
                    p = gl.exp2(score * scale.factor + row_lse[:, None])
                else:
                    row_max, row_sum, p, rescale = running_exps(score, row_max, row_sum, scale, True)
                take(values, n)  # ptxas moves no exp past the wait for it, but moves them past the product's
                mixed = finish_product(mixed, values, n - 1)
                if not SHARED:
                    mixed = mixed * gl.convert_layout(rescale, gl.SliceLayout(1, LAYOUT))[:, None]
        mixed = finish_product(start_mixing(p, values, last - 1, mixed), values, last - 1)
        if not SHARED:
            if shown is not None:
                row_sum = gl.where(row_sum == 0, 1.0, row_sum)
            mixed = mixed / gl.convert_layout(row_sum, gl.SliceLayout(1, LAYOUT))[:, None]
        mixtures.index(PART).store(mixed.to(mixtures.dtype))
    for n in range(last, blocks):  # in the order in which they are brought
        leave_out(keys, n, n + 1)
        leave_out(values, n, n + 1)


@gluon.jit
def store(mixture, out, rows, value_heads, HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Of HEADS value heads, each for GROUP query heads. Columns: as of `wide`."""
    WIDE: gl.constexpr = mixture.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDE, gl.SliceLayout(0, LAYOUT))
    member = column // 64 % HEADS
    feature = column % 64 + column // (64 * HEADS) * 64
    tile = out.ptr + row[:, None] * out.row
    tile = tile + (gl.cast(member * GROUP, gl.int64) * out.h + feature)[None, :]
    kept = (row < rows)[:, None] & (member < value_heads)[None, :]
    mixed = mixture.load(LAYOUT)
    for copy in range(GROUP):
        gl.store(at(tile, copy, out.h), mixed, mask=kept)


@gluon.jit
def attend_rows(
    q, k, v, minus_lse, out, b, h, first_value, kv_heads, start_m, start_n, q_len, kv_len, scale, shown, cells_ptr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """Rows start_m, ... with the map of head h: times the value heads from first_value on, or (not SHARED) h's own.

    start_n: the first key's tile; shown and cells_ptr number the keys from it.
    """
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    rows = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    rows_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(rows_ready, count=1)
    if shown is None:
        landed: gl.constexpr = None
    else:
        landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(landed, count=1)
    keys = make_ring(k, STAGES - 1, GROUPS)  # which are given back half a step before values
    values = make_ring(v, STAGES, GROUPS)
    HEADS: gl.constexpr = v.block_type.shape[1]
    WIDE: gl.constexpr = HEADS * v.block_type.shape[3]
    mixtures = gl.allocate_shared_memory(q.dtype, [GROUPS, ROWS, WIDE], gl.NVMMASharedLayout(128, 16, 2))
    offset = kv_len - q_len
    position = start_m + offset - start_n
    lse_ptr = head_of(minus_lse, b, h).ptr + start_n - offset  # by the position of the row's own key
    last_n = gl.minimum(start_m + GROUPS * ROWS, q_len) + offset - start_n
    if shown is not None:
        last_n = gl.minimum(last_n, shown.seen.last)
    blocks = gl.maximum(gl.cdiv(last_n, BLOCK_N), 1)
    kv_len -= start_n
    fence_async_shared()  # TMA counts on the mbarriers
    gl.warp_specialize(
        [
            (consume, (rows, rows_ready, keys, values, mixtures, lse_ptr, position, blocks, kv_len, scale, shown,
                SHARED, 0)),
            (consume, (rows, rows_ready, keys, values, mixtures, lse_ptr, position, blocks, kv_len, scale, shown,
                SHARED, 1)),
            (produce, (q, k, v, rows, rows_ready, keys, values, b, h, h // GROUP, first_value, start_m, start_n, blocks,
                landed, shown, cells_ptr)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; the first group gets the rest, 240
    )  # fmt: skip
    out = head_of(out, b, first_value * GROUP if SHARED else h)
    for part in gl.static_range(GROUPS):
        start = start_m + part * ROWS
        if start < q_len:
            mixture = mixtures.index(part)
            store(mixture, row_of(out, start), q_len - start, kv_heads - first_value, HEADS, GROUP if SHARED else 1)


@gluon.jit(do_not_specialize=LENGTHS)
def _attend_kernel(
    q, k, v, own_v, out, shown, cells, minus_lse, head_ptr, batch, heads, q_len, kv_len, scale,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As the Triton kernel. v: in tiles of the value heads of a unit; own_v: of one. shown, cells: of a (B, Skv) mask,
    or None."""
    BLOCK_N: gl.constexpr = k.block_type.shape[2]
    units, heads, kv_heads = heads
    pid = gl.program_id(0)
    b = pid % batch
    unit = pid // batch % (units + heads)
    row_blocks = gl.num_programs(0) // (batch * (units + heads))
    start_m = (row_blocks - 1 - pid // (batch * (units + heads))) * (GROUPS * ROWS)  # longest rows first
    if shown is None:
        start_n = 0
        keys: gl.constexpr = None
        cells_ptr: gl.constexpr = None
    else:
        gl.static_assert(BLOCK_N == CELL)
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        cells_ptr = head_of(cells, b, 0).ptr
        seen = visible_range(cells_ptr, cells.row, kv_len, gl.arange(0, 128, LAYOUT), 1)
        start_n = gl.minimum(seen.first, kv_len - 1) // BLOCK_N * BLOCK_N
        keys = ShownKeys(head_of(shown, b, 0).ptr + start_n, shifted(seen, start_n))
        cells_ptr += start_n // CELL
    h = gl.load(head_ptr + b)
    if unit < units:
        if h >= 0:
            first_value = unit * v.block_type.shape[1]
            attend_rows(
                q, k, v, minus_lse, out, b, h, first_value, kv_heads, start_m, start_n, q_len, kv_len, scale,
                keys, cells_ptr, GROUP, STAGES, True,
            )  # fmt: skip
    elif h < 0:
        h = unit - units
        attend_rows(
            q, k, own_v, minus_lse, out, b, h, h // GROUP, kv_heads, start_m, start_n, q_len, kv_len, scale,
            keys, cells_ptr, GROUP, STAGES, False,
        )  # fmt: skip


def attend(problem: Problem, tile: FastTile, value, head, out, minus_lse) -> Launch:
    """As ../attend.py."""
    batch, heads, q_len, dim = problem.query.shape
    kv_heads = value.shape[1]
    units, values = value_groups(kv_heads, dim, tile)
    shown, cells, _ = shown_keys(problem)
    return Launch(
        _attend_kernel,
        batch * (units + heads) * cdiv(q_len, tile.block_m),
        tile,
        dict(q=descriptor(problem.query, ROWS.value), k=descriptor(problem.key, tile.block_n), head_ptr=head)
        | dict(v=descriptor(value, tile.block_n, values.HEADS), own_v=descriptor(value, tile.block_n))
        | {name: problem.arguments[name] for name in ("batch", "q_len", "kv_len", "scale")}
        | dict(out=view(out), minus_lse=view_lines(minus_lse), heads=Heads(units, heads, kv_heads))
        | dict(shown=shown, cells=cells, GROUP=problem.rules.GROUP, STAGES=tile.stages),
    )

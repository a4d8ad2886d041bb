"""The output, given the chosen head (spec, step 6): one launch, two kinds of programs; one leaves a batch row at once.

SHARED, the map of head h* for all: one Q K^T and one exp per tile serve VALUE_HEADS value heads, side by side in one
wide tile. The row log-sum-exps are known, so the map is normalised before P V: no online softmax, no rescaling, and P
is rounded as the eager form rounds it. With grouped-query attention each KV head's output is computed once and written
GROUP times.

Otherwise (head -1), the layer's ordinary attention: a FlashAttention-2 forward (arXiv 2307.08691), a head a program.
"""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import CELL, NO_MASK, Columns, Heads, Layer, RowBlock, Sizes
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, cdiv, value_groups, view, view_lines
from eah_kernels.triton.loads import at, head_of, load_operand, load_values, mask_of, row_of, value_columns
from eah_kernels.triton.ranges import AFTER, cells_of, key_range, place, walk
from eah_kernels.triton.scores import LOWEST, running_exps, score_block
from eah_kernels.triton.sequences import lse_of, sequence_of
from eah_kernels.triton.tiles import Tile

AT_ONCE = 264  # programs of a finer tile that a large GPU holds: two on each of 132 multiprocessors


@triton.jit
def attend_rows(
    layer, b, h, start_m, first_value,
    R: tl.constexpr, V: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows start_m, ... with the map of head h: times the value heads from first_value on, or (not SHARED) h's own."""
    q, k, v, out, mask, packed, minus_lse, kv_heads, sizes, scale = layer
    VALUE_HEADS: tl.constexpr = V.HEADS if SHARED else 1
    q, k, v = head_of(q, b, h), head_of(k, b, h // R.GROUP), head_of(v, b, first_value)
    out = row_of(head_of(out, b, first_value * R.GROUP if SHARED else h), start_m)
    cells, words, seen_of = packed.cells, packed.words, packed.seen
    if R.MASK != NO_MASK:
        mask, cells = mask_of(mask, b, h, R), cells_of(cells, mask, b, h, sizes.kv_len, R)
    if not R.BY_KEY:
        words, seen_of = head_of(words, b, h), row_of(head_of(seen_of, b, h), start_m // CELL)

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    real = start_m + local_m < sizes.q_len
    rows = load_operand(q, start_m, real, R)
    if SHARED:
        row_lse = tl.load(head_of(minus_lse, b, h).ptr + start_m + local_m)
    else:
        row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)

    # P V in parts no wider than high: else mma.sync's warps would take columns each, and every score several times.
    WIDTH: tl.constexpr = VALUE_HEADS * V.PAD
    PARTS: tl.constexpr = WIDTH // BLOCK_M if R.MMA_SYNC and WIDTH > BLOCK_M else 1
    columns, mixed = (), ()
    for part in tl.static_range(PARTS):
        these = value_columns(first_value, kv_heads, V, VALUE_HEADS, part, PARTS)
        columns = columns + (these,)  # type: ignore[assignment]
        mixed = mixed + (tl.zeros([BLOCK_M, WIDTH // PARTS], tl.float32),)  # type: ignore[assignment]
    PRECISION: tl.constexpr = R.PRECISION
    span = key_range(start_m, sizes, cells, R, BLOCK_M, BLOCK_N)
    block = RowBlock(rows, start_m, k, mask, words, span, sizes, scale)
    for EDGE in tl.static_range(2):  # the blocks that every row sees, then the others
        begin, end = walk(span, EDGE, AFTER, R.BOTH_SIDES)
        # A loop that may run zero times merges zeros with a product under way, and ptxas then waits for every wgmma at
        # once (C7515). Left out as a whole instead, it ends with its own wait. Loops over words of a mask wait anyway.
        if not (R.WGMMA and R.BY_KEY) or begin < end:
            for start_n in range(begin, end, BLOCK_N):
                start_n = place(span, tl.multiple_of(start_n, BLOCK_N), EDGE, R.BOTH_SIDES, BLOCK_N)
                RAW: tl.constexpr = R.RAW_MAX and not EDGE and not SHARED
                score, seen = score_block(block, start_n, R, EDGE, RAW, BLOCK_N)
                if SHARED:
                    p = tl.exp2(score + row_lse[:, None])
                else:
                    row_max, row_sum, p, rescale = running_exps(score, row_max, row_sum, scale, RAW)
                # Values that no row of the tile sees are not read, whatever they hold.
                key = start_n + local_n
                if EDGE and R.BY_KEY and R.WINDOW:
                    seen = seen & (key > start_m + (sizes.kv_len - sizes.q_len) - sizes.window)
                elif EDGE and not R.BY_KEY:
                    by_cells = tl.load(seen_of.ptr + key)
                    for line in tl.static_range(1, BLOCK_M // CELL):
                        by_cells = by_cells | tl.load(at(seen_of.ptr, line, seen_of.row) + key)
                    seen = seen & (by_cells != 0)
                sums = ()
                for part in tl.static_range(PARTS):
                    member, feature, exists = columns[part]  # type: ignore[var-annotated]
                    values = load_values(v, start_n, seen, Columns(member, feature, exists))
                    before = mixed[part] if SHARED else mixed[part] * rescale[:, None]
                    product = tl.dot(p.to(values.dtype), values, before, input_precision=PRECISION)
                    sums = sums + (product,)  # type: ignore[assignment]
                mixed = sums
    for part in tl.static_range(PARTS):
        member, feature, exists = columns[part]
        result = mixed[part]  # type: ignore[var-annotated]
        if not SHARED:
            result = result / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
        column = tl.cast(member * R.GROUP, tl.int64) * out.h + feature * out.column
        tile = out.ptr + local_m[:, None] * out.row + column[None, :]
        for copy in range(R.GROUP if SHARED else 1):
            tl.store(at(tile, copy, out.h), result, mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _attend_kernel(
    q, k, v, out, mask, packed, minus_lse, head_ptr, batch, heads, q_len, kv_len, window, scale,
    R: tl.constexpr, V: tl.constexpr, SHARED_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a row block, the units come first, then the query heads. SHARED_N: keys of a shared map's tile."""
    batch, cu_seqlens, tokens = batch
    units, heads, kv_heads = heads
    pid = tl.program_id(0)
    b = pid % batch
    unit = pid // batch % (units + heads)
    blocks = tl.num_programs(0) // (batch * (units + heads))
    start_m = (blocks - 1 - pid // (batch * (units + heads))) * BLOCK_M  # longest rows first
    if cu_seqlens is not None:
        first, q_len = sequence_of(cu_seqlens, tokens, b, q_len)
        if start_m >= q_len:
            return
        kv_len = q_len
        q, k, v, out = row_of(q, first), row_of(k, first), row_of(v, first), row_of(out, first)
        minus_lse = lse_of(minus_lse, b, first)
    sizes = Sizes(q_len, kv_len, window)
    h = tl.load(head_ptr + b)
    layer = Layer(q, k, v, out, mask, packed, minus_lse, kv_heads, sizes, scale)
    if unit < units:
        if h >= 0:
            attend_rows(layer, b, h, start_m, unit * V.HEADS, R, V, True, BLOCK_M, SHARED_N)
    elif h < 0:
        h = unit - units
        attend_rows(layer, b, h, start_m, h // R.GROUP, R, V, False, BLOCK_M, BLOCK_N)


def attend(problem: Problem, value, head, out, minus_lse) -> Launch:
    """Writes out (B, Hq, Sq, Dv), given head (B,) and minus_lse (B, Hq, padded_length), read where a head is chosen."""
    batch, heads = problem.query.shape[:2]
    kv_heads, value_dim = value.shape[1], value.shape[3]
    short = _short_tile(problem, kv_heads, value_dim)
    fast = None if short else problem.fast_tile("attend", value)
    if fast:
        from eah_kernels.triton.hopper import attend as hopper  # Gluon is not everywhere

        return hopper.attend(problem, fast, value, head, out, minus_lse)
    tile = short or problem.tile("attend", value_dim)
    units, values = value_groups(kv_heads, value_dim, tile)
    return Launch(
        _attend_kernel,
        batch * (units + heads) * cdiv(problem.q_len, tile.block_m),
        tile,
        problem.arguments
        | dict(v=view(value), out=view(out), packed=problem.packed_for_keys(), head_ptr=head, V=values)
        | dict(minus_lse=view_lines(minus_lse), heads=Heads(units, heads, kv_heads))
        | dict(batch=problem.batch, SHARED_N=tile.shared_n or tile.block_n),
    )


def _short_tile(problem: Problem, kv_heads: int, value_dim: int) -> Tile | None:
    """The finer one, where all its programs for chosen heads run at once: then the longest of them sets the time."""
    short = problem.short_tile("attend", value_dim)
    if short is None:
        return None
    units, _ = value_groups(kv_heads, value_dim, short)
    programs = problem.query.shape[0] * units * cdiv(problem.q_len, short.block_m)
    return short if programs <= AT_ONCE else None

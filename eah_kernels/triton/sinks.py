"""Vision sinks per head, key-stationary, and the choice: no float atomics, no S x S tensor (spec, steps 2 to 5).

A program owns a block of keys of one head and walks the query rows that see them, adding exp2(score - lse) into a 2-D
accumulator that is reduced once at the end. A block without an image token leaves at once. The sinks of the blocks of a
head are added by integer atomics, so the counts are the same in every run; a batch row's last program chooses its head.
"""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import BIAS_MASK, CELL, NO_MASK, Choice, Pairs, Sizes, Tally
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, cdiv, view_lines
from eah_kernels.triton.loads import at, dot_rows, head_of, load_operand, mask_of, row_of
from eah_kernels.triton.ranges import BEFORE, cells_of, place, row_range, seeing_rows, walk
from eah_kernels.triton.scores import add_entries, counting_rows, score_tile, shown_keys, unpack
from eah_kernels.triton.sequences import lse_of, sequence_of


@triton.jit
def comes_last(ticket, programs):
    """Whether this program, which draws the ticket once, is the last of so many to do so.

    Released at the one draw and acquired at the other, all that the others did before is seen; what they stored is read
    from the L2 cache, where atomics act.
    """
    return tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1


@triton.jit
def choose_head(b, heads, counts, image_tokens, choice):
    """Of batch row b, once the sinks of all its heads are counted (spec, step 5)."""
    most, head = -1, -1
    for start in range(0, heads, 128):
        h = start + tl.arange(0, 128)
        count = tl.load(counts + b * heads + h, mask=h < heads, other=-1, cache_modifier=".cg")
        most_here, head_here = tl.max(count, 0, return_indices=True, return_indices_tie_break_left=True)
        head = tl.where(most_here > most, start + head_here, head)
        most = tl.maximum(most, most_here)
    density = tl.div_rn(tl.cast(most, tl.float32), tl.maximum(image_tokens, 1).to(tl.float32))
    tl.store(choice.head + b, tl.where((most > 0) & (density >= choice.min_density), head, -1))


@triton.jit
def finish(b, batch, heads, tally, choice):
    """Every program of batch row b comes here once, after its sinks."""
    if comes_last(tally.progress + 2 * b, tl.num_programs(0) // batch):
        choose_head(b, heads, tally.counts, tl.load(tally.progress + 2 * b + 1), choice)


@triton.jit(do_not_specialize=LENGTHS)
def _sinks_kernel(
    q, k, mask, packed, image, minus_lse, tally, mean, threshold, choice, batch, heads, q_len, kv_len, window, scale,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch, cu_seqlens, tokens = batch
    pid = tl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    if cu_seqlens is not None:
        first, q_len = sequence_of(cu_seqlens, tokens, b, q_len)
        kv_len = q_len
        q, k, minus_lse = row_of(q, first), row_of(k, first), lse_of(minus_lse, b, first)
    sizes = Sizes(q_len, kv_len, window)
    start_n = pid // (batch * heads) * BLOCK_N  # under a causal mask, longest columns first
    local_n = tl.arange(0, BLOCK_N)
    key = start_n + local_n
    cells, words, counts_of = packed.cells, packed.words, packed.counts
    inside = key < kv_len
    image = at(image, b, kv_len) if cu_seqlens is None else image + first
    is_image = tl.load(image + key, mask=inside, other=0) != 0
    if tl.sum(is_image.to(tl.int32), 0) == 0:
        if choice is not None:
            finish(b, batch, heads, tally, choice)
        return
    q, k, minus_lse = head_of(q, b, h), head_of(k, b, h // R.GROUP), head_of(minus_lse, b, h)
    if R.MASK != NO_MASK:
        mask, cells = mask_of(mask, b, h, R), cells_of(cells, mask, b, h, kv_len, R)
    if not R.BY_KEY:
        words, counts_of = head_of(words, b, h), head_of(counts_of, b, h)

    shown = shown_keys(start_n, local_n, key < kv_len, mask, R.MASK)
    columns = load_operand(k, start_n, shown, R)
    local_m = tl.arange(0, BLOCK_M)
    span = row_range(start_n, sizes, cells, R, BLOCK_M, BLOCK_N)
    mass = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for EDGE in tl.static_range(2):  # the blocks whose rows all see every key, then the others
        begin, end = walk(span, EDGE, BEFORE, R.BOTH_SIDES)
        for start_m in range(begin, end, BLOCK_M):
            start_m = place(span, tl.multiple_of(start_m, BLOCK_M), EDGE, R.BOTH_SIDES, BLOCK_M)
            counts = start_m + local_m < q_len
            row_lse = tl.load(minus_lse.ptr + start_m + local_m)
            if EDGE and R.BY_KEY and not (R.CAUSAL and R.MASK == NO_MASK):
                # A row that does not count enters as zeros and with lse = +inf: whatever it holds, it adds nothing.
                counts = counting_rows(start_m, sizes, mask, R, BLOCK_M)
                row_lse = tl.where(counts, row_lse, float("-inf"))
            rows = load_operand(q, start_m, counts, R)
            pairs = Pairs(start_m, local_m[None, :], start_n, local_n[:, None])
            score = dot_rows(columns, rows, R)
            score, _ = score_tile(score, pairs, sizes, mask, scale, R, NO_MASK, EDGE and R.BY_KEY, False)
            score += row_lse[None, :]  # [BLOCK_N, BLOCK_M]
            if EDGE and not R.BY_KEY:  # the words hide rows that do not count: last, as their log-sum-exp may be NaN
                visible = unpack(words, start_n, start_m, BLOCK_N, BLOCK_M)
                if R.MASK == BIAS_MASK:
                    corner = at(at(mask.ptr, start_m, mask.row), start_n, mask.column)
                    score = add_entries(score, visible, span.biased, corner, mask.column, mask.row)
                score = tl.where(visible, score, float("-inf"))
            mass += tl.exp2(score)
    if R.BY_KEY:
        seeing = seeing_rows(key, sizes, mask, R)
    else:
        seeing = tl.zeros([BLOCK_N], tl.int32)
        for cell in range(span.first // CELL, tl.cdiv(span.last, CELL), 16):
            line = cell + tl.arange(0, 16)[:, None]
            entry = at(counts_of.ptr, line, counts_of.row) + key[None, :]
            seeing += tl.sum(tl.load(entry, mask=line * CELL < span.last, other=0).to(tl.int32), 0)
    column_mean = tl.div_rn(tl.sum(mass, 1), tl.maximum(seeing, 1).to(tl.float32))
    column_mean = tl.where(shown, column_mean, 0.0)
    sinks = tl.sum((is_image & (column_mean > threshold)).to(tl.int32), 0)
    tl.atomic_add(tally.counts + b * heads + h, sinks, sem="relaxed")
    if choice is not None:
        finish(b, batch, heads, tally, choice)
    if mean is not None:
        tl.store(at(mean, b * heads + h, kv_len) + key, column_mean, mask=is_image)


def sinks(
    problem: Problem, image, minus_lse, threshold, tally: Tally, *, column_mean=None, choice: Choice | None = None
) -> Launch:
    """Adds each head's sinks to tally.counts (B, Hq); writes column_mean (B, Hq, Skv) at image tokens, if given.

    image (B, Skv) uint8 and column_mean are contiguous.

    With a choice, whose tally is as `lse` leaves it, also writes every batch row's chosen head.
    """
    fast = problem.fast_tile("sinks")
    if fast:
        from eah_kernels.triton.hopper import sinks as hopper  # Gluon is not everywhere

        form = dict(column_mean=column_mean, choice=choice)
        return hopper.sinks(problem, fast, image, minus_lse, threshold, tally, **form)
    tile = problem.tile("sinks")
    batch, heads, _, _ = problem.query.shape
    return Launch(
        _sinks_kernel,
        batch * heads * cdiv(problem.kv_len, tile.block_n),
        tile,
        problem.arguments
        | dict(packed=problem.packed_for_rows(), image=image, mean=column_mean, threshold=threshold)
        | dict(minus_lse=view_lines(minus_lse), tally=tally, choice=choice, heads=heads)
        | dict(batch=problem.batch),
    )

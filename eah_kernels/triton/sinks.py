"""Vision sinks per head, key-stationary, and the choice: no float atomics, no S x S tensor (spec, steps 2 to 5).

A program owns a block of keys of one head and walks the query rows that see them, adding exp2(score - lse) into a 2-D
accumulator that is reduced once at the end. A block without an image token leaves at once. The sinks of the blocks of a
head are added by integer atomics, so the counts are the same in every run; a batch row's last program chooses its head.
"""

import triton
import triton.language as tl

from eah_kernels.triton.launch import LENGTHS, Launch, Problem, image_arguments
from eah_kernels.triton.primitives import (
    CELL,
    KEY_MASK,
    NO_MASK,
    at,
    counting_rows,
    dot_rows,
    intersect,
    load_operand,
    mask_tile,
    score_tile,
    shown_keys,
    visible_range,
)


@triton.jit
def seeing_rows(
    key, q_len, kv_len, before_ptr, window, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """n_j of the keys: rows at positions since .. until - 1, without the own one, that count.

    Without a mask all count; with a (B, Skv) mask, those at real keys: before_ptr numbers the real keys before each. A
    hidden key's number means nothing.
    """
    since = tl.full(key.shape, 0, tl.int32) + tl.maximum(kv_len - q_len, 0)
    until = tl.full(key.shape, 0, tl.int32) + kv_len
    if CAUSAL:
        since = tl.maximum(since, key + 1)
    if WINDOW:
        until = tl.minimum(until, key + window)
    since = tl.minimum(since, until)
    own = (since <= key) & (key < until)
    if MASK == NO_MASK:
        rows = until - since
    else:
        rows = tl.load(before_ptr + until) - tl.load(before_ptr + since)
    return rows - own.to(tl.int32)


@triton.jit
def row_range(
    start_n, q_len, kv_len, window, cells_ptr, stride,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `key_range`: rows [first, last) that may see a key of start_n, ... beside their own; those of [full, edge) see
    them all, without a bias, and count, as far as they exist."""
    offset = kv_len - q_len
    first = tl.maximum(-offset, 0) // BLOCK_M * BLOCK_M
    full = tl.cdiv(tl.maximum(start_n + BLOCK_N - offset, 0), BLOCK_M) * BLOCK_M
    edge, last = q_len, q_len
    biased = False
    if CAUSAL:
        first = tl.maximum(start_n + 1 - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        last = tl.minimum(q_len, start_n + BLOCK_N - 1 + window - offset)
        edge = tl.minimum(tl.maximum(start_n + window - offset, 0) // BLOCK_M * BLOCK_M, last)
    if MASK != NO_MASK:
        BY_KEY: tl.constexpr = MASK == KEY_MASK
        LINES: tl.constexpr = 1 if BY_KEY else (BLOCK_N + CELL - 1) // CELL
        line = cells_ptr if BY_KEY else at(cells_ptr, start_n // CELL, stride)
        length = kv_len if BY_KEY else q_len  # a (B, Skv) mask hides the rows whose own keys it hides
        seen_first, seen_full, seen_edge, seen_last, biased = visible_range(line, stride, length, LINES)
        shift = offset if BY_KEY else 0
        first, full, edge, last = intersect(
            first, full, edge, last, seen_first, seen_full, seen_edge, seen_last, shift, length, BLOCK_M
        )
    full = tl.cdiv(tl.where(full < edge, full, last), BLOCK_M) * BLOCK_M
    edge = tl.maximum(edge, full)
    return first, full, edge, last, biased


@triton.jit
def choose_head(b, batch, heads, count_ptr, progress_ptr, head_ptr, min_density):
    """Every program of batch row b comes here once, after its sinks; the last one chooses (spec, step 5).

    progress_ptr: (B, 2) int32, programs that came here and image tokens. Releasing at the one and acquiring at the
    other, the last program sees all counts; they are read from the L2 cache, where atomics act.
    """
    came_before = tl.atomic_add(progress_ptr + 2 * b, 1, sem="acq_rel")
    if came_before == tl.num_programs(0) // batch - 1:
        most, head = -1, -1
        for start in range(0, heads, 128):
            h = start + tl.arange(0, 128)
            count = tl.load(count_ptr + b * heads + h, mask=h < heads, other=-1, cache_modifier=".cg")
            most_here, head_here = tl.max(count, 0, return_indices=True, return_indices_tie_break_left=True)
            head = tl.where(most_here > most, start + head_here, head)
            most = tl.maximum(most, most_here)
        image_tokens = tl.maximum(tl.load(progress_ptr + 2 * b + 1), 1)
        density = tl.div_rn(most.to(tl.float32), image_tokens.to(tl.float32))
        tl.store(head_ptr + b, tl.where((most > 0) & (density >= min_density), head, -1))


@triton.jit(do_not_specialize=LENGTHS)
def _sinks_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    words_ptr, stride_wb, stride_wh, stride_wm, cells_ptr, stride_cb, stride_ch, stride_cn,
    before_ptr, stride_bb, counts_ptr, stride_nb, stride_nh, stride_nm,
    image_ptr, stride_ib, stride_in, minus_lse_ptr, stride_lb, stride_lh, count_ptr, mean_ptr, threshold,
    progress_ptr, head_ptr, min_density, batch, heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    WANT_MEAN: tl.constexpr, CHOOSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_n = pid // (batch * heads) * BLOCK_N  # under a causal mask, longest columns first
    local_n = tl.arange(0, BLOCK_N)
    key = start_n + local_n
    image = tl.load(at(at(image_ptr, b, stride_ib), key, stride_in), mask=key < kv_len, other=0) != 0
    if tl.sum(image.to(tl.int32), 0) == 0:
        if CHOOSE:
            choose_head(b, batch, heads, count_ptr, progress_ptr, head_ptr, min_density)
        return
    q_ptr = at(at(q_ptr, b, stride_qb), h, stride_qh)
    k_ptr = at(at(k_ptr, b, stride_kb), h // GROUP, stride_kh)
    mask_ptr = at(at(mask_ptr, b, stride_mb), h, stride_mh)
    BY_KEY: tl.constexpr = MASK == NO_MASK or MASK == KEY_MASK
    if MASK != NO_MASK:
        cells_ptr = at(at(cells_ptr, b, stride_cb), h, stride_ch)
    if MASK == KEY_MASK:
        before_ptr = at(before_ptr, b, stride_bb)
    if not BY_KEY:
        words_ptr = at(at(words_ptr, b, stride_wb), h, stride_wh)
        counts_ptr = at(at(counts_ptr, b, stride_nb), h, stride_nh)
    minus_lse_ptr = at(at(minus_lse_ptr, b, stride_lb), h, stride_lh)

    shown = shown_keys(start_n, local_n, key < kv_len, mask_ptr, stride_mn, MASK)
    k, k_tail = load_operand(k_ptr, start_n, shown, stride_kn, stride_kd, MAIN, TAIL, HEAD_DIM)
    local_m = tl.arange(0, BLOCK_M)
    first, full, edge, last, biased = row_range(
        start_n, q_len, kv_len, window, cells_ptr, stride_cn, MASK, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    mass = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    BOTH_SIDES: tl.constexpr = MASK != NO_MASK or WINDOW
    for EDGE in tl.static_range(2):  # the blocks whose rows all see every key, then the others
        begin = first if EDGE else full
        end = edge if not EDGE else last - (edge - full) if BOTH_SIDES else full
        for start_m in range(begin, end, BLOCK_M):
            if EDGE and BOTH_SIDES:
                start_m += tl.where(start_m < full, 0, edge - full)
            start_m = tl.multiple_of(start_m, BLOCK_M)
            counts = start_m + local_m < q_len
            minus_lse = tl.load(minus_lse_ptr + start_m + local_m)
            if EDGE and BY_KEY and not (CAUSAL and MASK == NO_MASK):
                # A row that does not count enters as zeros and with lse = +inf: whatever it holds, it adds nothing.
                counts = counting_rows(start_m, q_len, kv_len, mask_ptr, stride_mm, stride_mn, BLOCK_M, MASK, HIDDEN)
                minus_lse = tl.where(counts, minus_lse, float("-inf"))
            q, q_tail = load_operand(q_ptr, start_m, counts, stride_qm, stride_qd, MAIN, TAIL, HEAD_DIM)
            qk = dot_rows(k, q, k_tail, q_tail, TAIL, PRECISION)  # [BLOCK_N, BLOCK_M]
            score, _ = score_tile(
                qk, start_m, local_m[None, :], start_n, local_n[:, None], q_len, kv_len, mask_ptr, stride_mm, stride_mn,
                scale, cap, window, NO_MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, EDGE and BY_KEY, False,
            )  # fmt: skip
            score += minus_lse[None, :]
            if EDGE and not BY_KEY:  # the words hide rows that do not count: last, as their log-sum-exp may be NaN
                score = mask_tile(
                    score, start_n, start_m, words_ptr, stride_wm, biased,
                    at(at(mask_ptr, start_m, stride_mm), start_n, stride_mn), stride_mn, stride_mm, MASK,
                )  # fmt: skip
            mass += tl.exp2(score)
    if BY_KEY:
        rows = seeing_rows(key, q_len, kv_len, before_ptr, window, MASK, CAUSAL, WINDOW)
    else:
        rows = tl.zeros([BLOCK_N], tl.int32)
        for cell in range(first // CELL, tl.cdiv(last, CELL), 16):
            line = cell + tl.arange(0, 16)[:, None]
            counts = tl.load(at(counts_ptr, line, stride_nm) + key[None, :], mask=line * CELL < last, other=0)
            rows += tl.sum(counts.to(tl.int32), 0)
    mean = tl.div_rn(tl.sum(mass, 1), tl.maximum(rows, 1).to(tl.float32))
    mean = tl.where(shown, mean, 0.0)
    sinks = tl.sum((image & (mean > threshold)).to(tl.int32), 0)
    tl.atomic_add(count_ptr + b * heads + h, sinks, sem="relaxed")
    if CHOOSE:
        choose_head(b, batch, heads, count_ptr, progress_ptr, head_ptr, min_density)
    if WANT_MEAN:
        tl.store(mean_ptr + tl.cast(b * heads + h, tl.int64) * kv_len + key, mean, mask=image)


def sinks(
    problem: Problem,
    image_mask,
    minus_lse,
    threshold,
    sink_counts,
    *,
    column_mean=None,
    head=None,
    progress=None,
    min_density=0.0,
) -> Launch:
    """Adds each head's sinks to sink_counts (B, Hq); writes column_mean (B, Hq, Skv) at image tokens, if given.

    With head (B,) and progress (B, 2) int32, as `lse` leaves it, also writes every batch row's chosen head.
    """
    tile = problem.tile("sinks")
    batch, heads, _, _ = problem.query.shape
    return Launch(
        _sinks_kernel,
        batch * heads * triton.cdiv(problem.key.shape[2], tile.block_n),
        tile,
        problem.arguments
        | problem.packed_operand("words", "wb wh wm", "column_words")
        | problem.packed_operand("cells", "cb ch cn", "column_cells")
        | problem.packed_operand("before", "bb")
        | problem.packed_operand("counts", "nb nh nm", "column_counts")
        | image_arguments(image_mask)
        | dict(
            minus_lse_ptr=minus_lse, stride_lb=minus_lse.stride(0), stride_lh=minus_lse.stride(1), count_ptr=sink_counts
        )
        | dict(mean_ptr=column_mean, WANT_MEAN=column_mean is not None, threshold=threshold, heads=heads)
        | dict(head_ptr=head, progress_ptr=progress, min_density=min_density, CHOOSE=head is not None),
    )

"""Vision sinks per head, key-stationary, and the choice: no float atomics, no S x S tensor (spec, steps 2 to 5).

A program owns a block of keys of one head and walks the query rows that see them, adding exp2(score - lse) into a 2-D
accumulator that is reduced once at the end. A block without an image token leaves at once. The sinks of the blocks of a
head are added by integer atomics, so the counts are the same in every run; a batch row's last program chooses its head.
"""

import triton
import triton.language as tl

from eah_kernels.triton.launch import LENGTHS, Launch, Problem, image_arguments
from eah_kernels.triton.primitives import (
    KEY_MASK,
    NO_MASK,
    at,
    counting_rows,
    dot_rows,
    load_operand,
    score_tile,
    shown_keys,
)


@triton.jit
def seeing_rows(
    key, start_n, first, kv_len, lowest, mask_ptr, stride_mn, window,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """n_j of the keys start_n, ...: counting rows, given by their positions from `lowest` on, that see the key.

    Without a mask every row counts; with a (B, Skv) mask, those at real keys. A hidden key's number means nothing.
    """
    since = tl.full([BLOCK_N], 0, tl.int32) + lowest
    until = tl.full([BLOCK_N], 0, tl.int32) + kv_len - 1
    if CAUSAL:
        since = tl.maximum(since, key + 1)
    if WINDOW:
        until = tl.minimum(until, key + window - 1)
    if MASK == NO_MASK:
        rows = until - since + 1
        if not CAUSAL:
            rows -= (key >= lowest).to(tl.int32)
    else:
        rows = tl.zeros([BLOCK_N], tl.int32)
        whole = kv_len
        if CAUSAL and not WINDOW:  # from here on every row sees every key of the block
            whole = tl.minimum(start_n + BLOCK_N, kv_len)
        for start in range(tl.maximum(first, 0), whole, BLOCK_M):
            position = start + tl.arange(0, BLOCK_M)
            real = tl.load(at(mask_ptr, position, stride_mn), mask=position < whole, other=1) == 0
            seen = real[None, :] & (position[None, :] >= since[:, None]) & (position[None, :] <= until[:, None])
            rows += tl.sum((seen & (position[None, :] != key[:, None])).to(tl.int32), 1)
        further = tl.zeros([1024], tl.int32)
        for start in range(whole, kv_len, 1024):
            position = start + tl.arange(0, 1024)
            real = tl.load(at(mask_ptr, position, stride_mn), mask=position < kv_len, other=1) == 0
            further += real.to(tl.int32)
        rows += tl.sum(further, 0)
    return rows


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
    minus_lse_ptr = at(at(minus_lse_ptr, b, stride_lb), h, stride_lh)

    shown = shown_keys(start_n, local_n, key < kv_len, mask_ptr, stride_mn, MASK)
    k, k_tail = load_operand(k_ptr, start_n, shown, stride_kn, stride_kd, MAIN, TAIL, HEAD_DIM)
    local_m = tl.arange(0, BLOCK_M)
    offset = kv_len - q_len
    BY_KEY: tl.constexpr = MASK == NO_MASK or MASK == KEY_MASK
    TILE_MASK: tl.constexpr = NO_MASK if BY_KEY else MASK  # a hidden key is left out at the end
    PLAIN: tl.constexpr = CAUSAL and BY_KEY and not WINDOW
    first = 0
    last = q_len
    if CAUSAL:
        first = tl.maximum(start_n + 1 - offset, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        last = tl.minimum(q_len, start_n + BLOCK_N - 1 + window - offset)
    edge = last
    if PLAIN:  # from here on every row sees every key of the block, none its own
        edge = tl.cdiv(tl.maximum(start_n + BLOCK_N - offset, 0), BLOCK_M) * BLOCK_M

    mass = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    rows = tl.zeros([BLOCK_N], tl.int32)
    for PHASE in tl.static_range(2 if PLAIN else 1):
        for start_m in range(edge if PHASE else first, last if PHASE else tl.minimum(edge, last), BLOCK_M):
            start_m = tl.multiple_of(start_m, BLOCK_M)
            # A row that does not count enters as zeros and with lse = +inf: whatever it holds, it adds nothing.
            if PLAIN and MASK == NO_MASK:
                counts = start_m + local_m < q_len
            else:
                counts = counting_rows(start_m, q_len, kv_len, mask_ptr, stride_mm, stride_mn, BLOCK_M, MASK, HIDDEN)
            q, q_tail = load_operand(q_ptr, start_m, counts, stride_qm, stride_qd, MAIN, TAIL, HEAD_DIM)
            minus_lse = tl.load(minus_lse_ptr + start_m + local_m)
            if not PLAIN or MASK != NO_MASK:
                minus_lse = tl.where(counts, minus_lse, float("-inf"))
            qk = dot_rows(k, q, k_tail, q_tail, TAIL, PRECISION)  # [BLOCK_N, BLOCK_M]
            score, visible = score_tile(
                qk, start_m, local_m[None, :], start_n, local_n[:, None], q_len, kv_len, mask_ptr, stride_mm, stride_mn,
                scale, cap, window, TILE_MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, PHASE == 0, False,
            )  # fmt: skip
            mass += tl.exp2(score + minus_lse[None, :])
            if not BY_KEY:
                rows += tl.sum((visible & counts[None, :]).to(tl.int32), 1)
    if BY_KEY:
        rows = seeing_rows(
            key, start_n, first + offset, kv_len, tl.maximum(offset, 0), mask_ptr, stride_mn, window,
            MASK, CAUSAL, WINDOW, BLOCK_M, BLOCK_N,
        )  # fmt: skip
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
        | image_arguments(image_mask)
        | dict(
            minus_lse_ptr=minus_lse, stride_lb=minus_lse.stride(0), stride_lh=minus_lse.stride(1), count_ptr=sink_counts
        )
        | dict(mean_ptr=column_mean, WANT_MEAN=column_mean is not None, threshold=threshold, heads=heads)
        | dict(head_ptr=head, progress_ptr=progress, min_density=min_density, CHOOSE=head is not None),
    )

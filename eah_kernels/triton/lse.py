"""Row log-sum-exp of every query head, or of the chosen one: a FlashAttention-2 forward (arXiv 2307.08691) without P V.

Stored negated, in log2 units, for q_len rows padded to a multiple of LSE_PAD; -inf in the padding and for rows that see
no key, so that exp2(score + minus_lse) is 0 there without a test. On the way it counts the image tokens and zeroes what
the next pass adds to.
"""

import triton
import triton.language as tl

from eah_kernels.triton.launch import LENGTHS, Launch, Problem, image_arguments
from eah_kernels.triton.primitives import (
    KEY_MASK,
    LOWEST,
    NO_MASK,
    at,
    count_image_tokens,
    key_range,
    load_operand,
    score_block,
)

LSE_PAD = 128


@triton.jit(do_not_specialize=LENGTHS)
def _lse_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
    image_ptr, stride_ib, stride_in, head_ptr, count_ptr, progress_ptr, minus_lse_ptr, stride_lb, stride_lh,
    batch, heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CHOSEN: tl.constexpr, SKIP_TEXT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """CHOSEN: only head head_ptr[b], nothing where it is -1. SKIP_TEXT: nothing for a batch row without image token."""
    pid = tl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_m = (tl.num_programs(0) // (batch * heads) - 1 - pid // (batch * heads)) * BLOCK_M  # longest rows first
    minus_lse_ptr = at(at(minus_lse_ptr, b, stride_lb), h, stride_lh) + start_m
    if CHOSEN:
        h = tl.load(head_ptr + b)
        if h < 0:
            return
    if SKIP_TEXT:
        image_tokens = count_image_tokens(at(image_ptr, b, stride_ib), stride_in, kv_len)
        if start_m == 0:
            tl.store(count_ptr + b * heads + h, 0)
            if h == 0:
                tl.store(progress_ptr + 2 * b, 0)
                tl.store(progress_ptr + 2 * b + 1, image_tokens)
        if image_tokens == 0:
            return
    q_ptr = at(at(q_ptr, b, stride_qb), h, stride_qh)
    k_ptr = at(at(k_ptr, b, stride_kb), h // GROUP, stride_kh)
    mask_ptr = at(at(mask_ptr, b, stride_mb), h, stride_mh)
    BY_KEY: tl.constexpr = MASK == NO_MASK or MASK == KEY_MASK
    if MASK != NO_MASK:
        cells_ptr = at(at(cells_ptr, b, stride_cb), h, stride_ch)
    if not BY_KEY:
        words_ptr = at(at(words_ptr, b, stride_wb), h, stride_wh)

    local_m = tl.arange(0, BLOCK_M)
    if start_m >= q_len:
        tl.store(minus_lse_ptr + local_m, tl.full([BLOCK_M], float("-inf"), tl.float32))
        return
    real = start_m + local_m < q_len
    q, q_tail = load_operand(q_ptr, start_m, real, stride_qm, stride_qd, MAIN, TAIL, HEAD_DIM)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first, full, edge, last, biased = key_range(
        start_m, q_len, kv_len, window, cells_ptr, stride_cm, MASK, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    BOTH_SIDES: tl.constexpr = MASK != NO_MASK or WINDOW
    for EDGE in tl.static_range(2):  # the blocks that every row sees, then the others
        begin = full if not EDGE else first if BOTH_SIDES else edge
        end = edge if not EDGE else last - (edge - full) if BOTH_SIDES else last
        for start_n in range(begin, end, BLOCK_N):
            if EDGE and BOTH_SIDES:
                start_n += tl.where(start_n < full, 0, edge - full)
            start_n = tl.multiple_of(start_n, BLOCK_N)
            score, _ = score_block(
                q, q_tail, start_m, start_n, k_ptr, stride_kn, stride_kd, mask_ptr, stride_mm, stride_mn,
                words_ptr, stride_wn, biased, q_len, kv_len, scale, cap, window,
                HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, EDGE, BLOCK_N,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(score, 1))
            row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(score - new_max[:, None]), 1)
            row_max = new_max
    minus_lse = tl.where(real & (row_sum != 0), -row_max - tl.log2(row_sum), float("-inf"))
    tl.store(minus_lse_ptr + local_m, minus_lse)


def lse(problem: Problem, out, *, image_mask=None, sink_counts=None, progress=None, head=None) -> Launch:
    """Fills out (B, Hq, padded_length) float32 for every head, or out (B, 1, padded_length) for head (B,).

    With image_mask, batch rows without image token are left out, sink_counts (B, Hq) int32 zeroed, and each row of
    progress (B, 2) int32 set to 0 and the number of its image tokens.
    """
    tile = problem.tile("lse")
    batch = problem.query.shape[0]
    return Launch(
        _lse_kernel,
        batch * out.shape[1] * (out.shape[2] // tile.block_m),
        tile,
        problem.arguments
        | problem.packed_operand("words", "wb wh wn")
        | problem.packed_operand("cells", "cb ch cm")
        | image_arguments(image_mask)
        | dict(
            head_ptr=head,
            count_ptr=sink_counts,
            progress_ptr=progress,
            minus_lse_ptr=out,
            stride_lb=out.stride(0),
            stride_lh=out.stride(1),
        )
        | dict(heads=out.shape[1], CHOSEN=head is not None, SKIP_TEXT=image_mask is not None),
    )


def padded_length(q_len: int) -> int:
    return triton.cdiv(q_len, LSE_PAD) * LSE_PAD

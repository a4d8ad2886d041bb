"""Row log-sum-exp of every query head, or of the chosen one: a FlashAttention-2 forward (arXiv 2307.08691) without P V.

Stored negated, in log2 units, for q_len rows padded to a multiple of LSE_PAD; -inf in the padding and for rows that see
no key, so that exp2(score + minus_lse) is 0 there without a test. On the way it counts the image tokens and zeroes what
the next pass adds to.
"""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import LSE_PAD, NO_MASK, RowBlock, Sizes, Tally
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, cdiv, view_lines
from eah_kernels.triton.loads import at, count_image_tokens, has_image_token, head_of, load_operand, mask_of, row_of
from eah_kernels.triton.ranges import AFTER, cells_of, key_range, place, walk
from eah_kernels.triton.scores import LOWEST, running_exps, score_block
from eah_kernels.triton.sequences import is_past, lse_of, sequence_of


@triton.jit(do_not_specialize=LENGTHS)
def _lse_kernel(
    q, k, mask, packed, image, head_ptr, tally, minus_lse, batch, heads, q_len, kv_len, window, scale,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """With a head_ptr only head head_ptr[b], nothing where it is -1. With an image nothing for a batch row without an
    image token; the tally is then counted and zeroed."""
    batch, cu_seqlens, tokens = batch
    pid = tl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_m = (tl.num_programs(0) // (batch * heads) - 1 - pid // (batch * heads)) * BLOCK_M  # longest rows first
    if cu_seqlens is not None:
        first, q_len = sequence_of(cu_seqlens, tokens, b, q_len)
        kv_len = q_len
        q, k, minus_lse = row_of(q, first), row_of(k, first), lse_of(minus_lse, b, first)
    sizes = Sizes(q_len, kv_len, window)
    out_ptr = head_of(minus_lse, b, h).ptr + start_m
    cells, words = packed.cells, packed.words
    if head_ptr is not None:
        h = tl.load(head_ptr + b)
        if h < 0:
            return
    if image is not None:
        image = at(image, b, kv_len) if cu_seqlens is None else image + first
        if start_m == 0:
            tl.store(tally.counts + b * heads + h, 0)
            if h == 0:
                tl.store(tally.progress + 2 * b, 0)
                tl.store(tally.progress + 2 * b + 1, count_image_tokens(image, kv_len))
        if not has_image_token(image, kv_len):
            return
    q, k = head_of(q, b, h), head_of(k, b, h // R.GROUP)
    if R.MASK != NO_MASK:
        mask, cells = mask_of(mask, b, h, R), cells_of(cells, mask, b, h, kv_len, R)
    if not R.BY_KEY:
        words = head_of(words, b, h)

    local_m = tl.arange(0, BLOCK_M)
    if cu_seqlens is not None and is_past(start_m, q_len):
        return
    if BLOCK_M < LSE_PAD and start_m >= q_len:
        tl.store(out_ptr + local_m, tl.full([BLOCK_M], float("-inf"), tl.float32))
        return
    real = start_m + local_m < q_len
    rows = load_operand(q, start_m, real, R)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    span = key_range(start_m, sizes, cells, R, BLOCK_M, BLOCK_N)
    block = RowBlock(rows, start_m, k, mask, words, span, sizes, scale)
    for EDGE in tl.static_range(2):  # the blocks that every row sees, then the others
        begin, end = walk(span, EDGE, AFTER, R.BOTH_SIDES)
        for start_n in range(begin, end, BLOCK_N):
            start_n = place(span, tl.multiple_of(start_n, BLOCK_N), EDGE, R.BOTH_SIDES, BLOCK_N)
            RAW: tl.constexpr = R.RAW_MAX and not EDGE
            score, _ = score_block(block, start_n, R, EDGE, RAW, BLOCK_N)
            row_max, row_sum, _, _ = running_exps(score, row_max, row_sum, scale, RAW)
    lse = tl.where(real & (row_sum != 0), -row_max - tl.log2(row_sum), float("-inf"))
    tl.store(out_ptr + local_m, lse)


def lse(problem: Problem, out, *, image=None, tally: Tally | None = None, head=None) -> Launch:
    """Fills out (B, Hq, padded_length) float32 for every head, or out (B, 1, padded_length) for head (B,).

    With image (B, Skv) uint8, contiguous, batch rows without image token are left out, and the tally is begun: no
    sinks, no program done, and the number of each row's image tokens.
    """
    fast = problem.fast_tile("lse")
    if fast:
        from eah_kernels.triton.hopper import lse as hopper  # Gluon is not everywhere

        return hopper.lse(problem, fast, out, image=image, tally=tally, head=head)
    tile = problem.tile("lse")
    batch, heads = out.shape[:2]
    return Launch(
        _lse_kernel,
        batch * heads * (padded_length(problem.q_len) // tile.block_m),
        tile,
        problem.arguments
        | dict(packed=problem.packed_for_keys(), image=image, head_ptr=head, tally=tally)
        | dict(minus_lse=view_lines(out), heads=heads)
        | dict(batch=problem.batch),
    )


def padded_length(q_len: int) -> int:
    return cdiv(q_len, LSE_PAD.value) * LSE_PAD.value

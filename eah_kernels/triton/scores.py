"""Scores of a tile of rows and keys, in log2 units, -inf where a mask, causality, a window or the end hides the key."""

import triton
import triton.language as tl

from eah_kernels.triton.bundles import BIAS_MASK, BOOL_MASK, KEY_MASK, NO_MASK, Pairs
from eah_kernels.triton.loads import at, dot_rows, load_operand

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # a running maximum before the first visible key; finite


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 x) + 1), and near 0, where that cancels, the Taylor series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def shown_keys(start_n, local_n, keep, mask, MASK: tl.constexpr):
    """`keep` without the keys that a (B, Skv) mask hides: loaded as zeros, whatever they hold reaches nothing."""
    if MASK == KEY_MASK:
        keep = keep & (tl.load(at(mask.ptr, start_n, mask.column) + local_n * mask.column, mask=keep, other=0) == 0)
    return keep


@triton.jit
def score_tile(
    qk, pairs, sizes, mask, scale, R: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, OWN: tl.constexpr
):
    """Scores of these pairs of rows and keys, in either order, -inf where hidden, and the visible pairs.

    A (B, Skv) mask hides by adding -inf a column, which its keys, loaded as zeros, allow; it is left out of the visible
    pairs. EDGE = False: no pair of the tile is hidden, by its position or by a mask. OWN = False hides every row's own
    key too. The caller drops rows past q_len, and under CAUSAL keys past kv_len, which only such rows see. MASK: the
    form to apply here, R.MASK or NO_MASK.
    """
    start_m, local_m, start_n, local_n = pairs
    if R.SOFTCAP:
        score = scale.cap * tanh(qk * scale.factor)
    else:
        score = qk * scale.factor
    visible = tl.full(qk.shape, 1, tl.int1)
    if EDGE:
        row = start_m + local_m
        key = start_n + local_n
        inside = key < sizes.kv_len
        position = row + (sizes.kv_len - sizes.q_len)
        if R.CAUSAL:
            visible = visible & (key <= position if OWN else key < position)
        else:
            visible = visible & (inside if OWN else inside & (key != position))
        if R.WINDOW:
            visible = visible & (key > position - sizes.window)
        if MASK == KEY_MASK:
            score += tl.load(at(mask.ptr, start_n, mask.column) + local_n * mask.column, mask=inside, other=0)
        elif MASK != NO_MASK:
            corner = at(at(mask.ptr, start_m, mask.row), start_n, mask.column)
            entry = tl.load(
                corner + local_m * mask.row + local_n * mask.column,
                mask=inside & (row < sizes.q_len),
                other=0 if MASK == BOOL_MASK else float("-inf"),
            )
            if MASK == BOOL_MASK:
                visible = visible & (entry != 0)
            else:
                visible = visible & (entry > R.HIDDEN)
                score += entry.to(tl.float32) * LOG2E
        score = tl.where(visible, score, float("-inf"))
    return score, visible


@triton.jit
def counting_rows(start_m, sizes, mask, R: tl.constexpr, BLOCK: tl.constexpr):
    """Which of the rows start_m, ... see their own key, [BLOCK] bool."""
    row = start_m + tl.arange(0, BLOCK)
    own = row + (sizes.kv_len - sizes.q_len)
    counts = row < sizes.q_len
    if not R.CAUSAL:  # which has a key for every row
        counts = counts & (own >= 0)
    if R.MASK != NO_MASK:
        entry = at(mask.ptr, own, mask.column)
        if R.MASK != KEY_MASK:
            entry = entry + tl.cast(row, tl.int64) * mask.row
        shown = tl.load(entry, mask=counts, other=0)
        counts = counts & (shown != 0 if R.MASK == BOOL_MASK else shown > R.HIDDEN)
    return counts


@triton.jit
def unpack(words, start_a, start_b, A: tl.constexpr, B: tl.constexpr):
    """The visible pairs [A, B] of lines start_a, ..., one after the other in memory, and start_b, ..., the bits."""
    local_b = tl.arange(0, B)[None, :]
    word = at(words.ptr, start_b // 32, words.row) + start_a + tl.arange(0, A)
    bits = tl.load(word)[:, None]
    if B < 32:
        bits = bits >> (start_b % 32)
    for further in tl.static_range(1, B // 32):
        bits = tl.where(local_b >= 32 * further, tl.load(at(word, further, words.row))[:, None], bits)
    return ((bits >> (local_b % 8)) >> (local_b // 8 * 8 % 32)) & 1 != 0


@triton.jit
def add_entries(tile, shown, biased, entry_ptr, stride_a, stride_b):
    """`tile`, scores or zeros, plus an additive mask's entries at shown pairs, if `biased`; the first at entry_ptr.

    Not to be called between two matrix products: after its branch Triton waits for the second one's operands apart,
    past the only fence, and wgmma would read them without (tests/compiled/fences.py).
    """
    if biased:
        local_a, local_b = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
        entry = tl.load(entry_ptr + local_a * stride_a + local_b * stride_b, mask=shown, other=0)
        tile += entry.to(tl.float32) * LOG2E
    return tile


@triton.jit
def score_block(block, start_n, R: tl.constexpr, EDGE: tl.constexpr, RAW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scores of a block of rows and BLOCK_N keys, start_n and on, -inf where hidden; which keys were loaded.

    EDGE = False: the rows see all of the keys. RAW then gives the products, not scaled.
    LATE_WORDS: with a copy of words before Q K^T, K is waited for apart from V, past the loop's only proxy fence, and
    tcgen05.mma would read K without one. An additive mask's entries, read before it, then come by bounds, not by words.
    """
    rows, start_m, k, mask, words, span, sizes, scale = block
    local_m = tl.arange(0, rows.main.shape[0])
    local_n = tl.arange(0, BLOCK_N)
    BY_KEY: tl.constexpr = R.BY_KEY
    TILE_MASK: tl.constexpr = R.MASK if EDGE and BY_KEY else NO_MASK
    keep = start_n + local_n < (sizes.kv_len if EDGE else start_n + BLOCK_N)
    keep = shown_keys(start_n, local_n, keep, mask, TILE_MASK)
    SPLIT: tl.constexpr = EDGE and not BY_KEY
    if SPLIT and not R.LATE_WORDS:
        visible = unpack(words, start_m, start_n, rows.main.shape[0], BLOCK_N)
    if SPLIT and R.MASK == BIAS_MASK:
        shown = (start_m + local_m < sizes.q_len)[:, None] & keep[None, :] if R.LATE_WORDS else visible
        corner = at(at(mask.ptr, start_m, mask.row), start_n, mask.column)
        bias = tl.zeros([rows.main.shape[0], BLOCK_N], tl.float32)
        bias = add_entries(bias, shown, span.biased, corner, mask.row, mask.column)
    qk = dot_rows(rows, load_operand(k, start_n, keep, R), R)
    if SPLIT and R.LATE_WORDS:
        visible = unpack(words, start_m, start_n, rows.main.shape[0], BLOCK_N)
    if RAW:
        return qk, keep
    pairs = Pairs(start_m, local_m[:, None], start_n, local_n[None, :])
    score, _ = score_tile(qk, pairs, sizes, mask, scale, R, TILE_MASK, EDGE and BY_KEY, True)
    if SPLIT:
        if R.MASK == BIAS_MASK:
            score += bias
        score = tl.where(visible, score, float("-inf"))
    return score, keep


@triton.jit
def running_exps(score, row_max, row_sum, scale, RAW: tl.constexpr):
    """An online softmax's step: the maximum and the sum of exps with these scores, their exps, and what rescales
    earlier ones. RAW: they are products; a factor a row and one in the exp's FMA take the place of one a score."""
    if RAW:
        new_max = tl.maximum(row_max, tl.max(score, 1) * scale.factor)
        p = tl.exp2(score * scale.factor - new_max[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(score, 1))
        p = tl.exp2(score - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    return new_max, row_sum * rescale + tl.sum(p, 1), p, rescale

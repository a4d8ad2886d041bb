"""What the kernels share: a tile of operands, a tile of scores, the rows that count.

Scores are in log2 units. Offsets within a tile are 32-bit; every base they are added to is multiplied in 64 bits.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # a running maximum before the first visible key; finite

# MASK: the form of the attention mask
NO_MASK: tl.constexpr = tl.constexpr(0)
KEY_MASK: tl.constexpr = tl.constexpr(1)  # (B, Skv) float32, 0 or -inf, read by key alone
BOOL_MASK: tl.constexpr = tl.constexpr(2)  # (B, Hq, Sq, Skv) bool
BIAS_MASK: tl.constexpr = tl.constexpr(3)  # (B, Hq, Sq, Skv) floating, added to the score

# What a cell of CELL x CELL pairs holds, or a (B, Skv) mask's cell of CELL keys: a sum of these (pack.py)
CELL: tl.constexpr = tl.constexpr(64)
SHOWS: tl.constexpr = tl.constexpr(1)  # a visible pair
HIDES: tl.constexpr = tl.constexpr(2)  # a hidden pair
BIASED: tl.constexpr = tl.constexpr(4)  # a visible pair to whose score the mask adds a value other than 0


@triton.jit
def at(ptr, index, stride):
    return ptr + tl.cast(index, tl.int64) * stride


@triton.jit
def load_rows(ptr, start, keep, stride, stride_d, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Rows start, start + 1, ... of a (rows, DIM) matrix: [len(keep), WIDTH] from feature FIRST on, 0 where dropped."""
    row = tl.arange(0, keep.shape[0])[:, None]
    feature = FIRST + tl.arange(0, WIDTH)[None, :]
    mask = keep[:, None]
    if FIRST + WIDTH > DIM:
        mask = mask & (feature < DIM)
    return tl.load(at(ptr, start, stride) + row * stride + feature * stride_d, mask=mask, other=0.0)


@triton.jit
def load_operand(
    ptr, start, keep, stride, stride_d, MAIN: tl.constexpr, TAIL: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """Rows start, start + 1, ... of a (rows, DIM) matrix in two parts, MAIN and TAIL features; no tail: main twice."""
    main = load_rows(ptr, start, keep, stride, stride_d, 0, MAIN, DIM)
    tail = main
    if TAIL > 0:
        tail = load_rows(ptr, start, keep, stride, stride_d, MAIN, TAIL, DIM)
    return main, tail


@triton.jit
def count_image_tokens(image_ptr, stride_in, kv_len):
    """Of one batch row, whose image mask image_ptr points to."""
    count = tl.zeros([1024], tl.int32)
    for start in range(0, kv_len, 1024):
        key = start + tl.arange(0, 1024)
        count += tl.load(at(image_ptr, key, stride_in), mask=key < kv_len, other=0)
    return tl.sum(count, 0)


@triton.jit
def shown_keys(start_n, local_n, keep, mask_ptr, stride_mn, MASK: tl.constexpr):
    """`keep` without the keys that a (B, Skv) mask hides: loaded as zeros, whatever they hold reaches nothing."""
    if MASK == KEY_MASK:
        keep = keep & (tl.load(at(mask_ptr, start_n, stride_mn) + local_n * stride_mn, mask=keep, other=0) == 0)
    return keep


@triton.jit
def value_columns(
    first_value, kv_heads, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr
):  # fmt: skip
    """Of the VALUE_HEADS value heads from first_value on, side by side: which of them a column belongs to, its feature,
    whether there is one."""
    wide = tl.arange(0, VALUE_HEADS * VALUE_PAD)
    member = wide // VALUE_PAD
    feature = wide % VALUE_PAD
    return member, feature, (feature < VALUE_DIM) & (first_value + member < kv_heads)


@triton.jit
def dot_rows(a, b, a_tail, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head dim, which is a main part and, for dims such as 80 or 192, a tail."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision=PRECISION)
    return product


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 x) + 1), and near 0, where that cancels, the Taylor series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


@triton.jit
def score_tile(
    qk, start_m, local_m, start_n, local_n, q_len, kv_len, mask_ptr, stride_mm, stride_mn, scale, cap, window,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Scores, -inf where hidden, and the visible pairs of rows start_m + local_m and keys start_n + local_n.

    local_m and local_n broadcast to the tile, in either order. A (B, Skv) mask hides by adding -inf a column, which
    its keys, loaded as zeros, allow; it is left out of the visible pairs. EDGE = False: no pair of the tile is hidden,
    by its position or by a mask. OWN = False hides every row's own key too. The caller drops rows past q_len, and
    under CAUSAL keys past kv_len, which only such rows see. With SOFTCAP, scale is scale / softcap and cap is
    log2(e) softcap.
    """
    if SOFTCAP:
        score = cap * tanh(qk * scale)
    else:
        score = qk * scale
    visible = tl.full(qk.shape, 1, tl.int1)
    if EDGE:
        row = start_m + local_m
        key = start_n + local_n
        inside = key < kv_len
        position = row + (kv_len - q_len)
        if CAUSAL:
            visible = visible & (key <= position if OWN else key < position)
        else:
            visible = visible & (inside if OWN else inside & (key != position))
        if WINDOW:
            visible = visible & (key > position - window)
        if MASK == KEY_MASK:
            score += tl.load(at(mask_ptr, start_n, stride_mn) + local_n * stride_mn, mask=inside, other=0)
        elif MASK != NO_MASK:
            tile = at(at(mask_ptr, start_m, stride_mm), start_n, stride_mn) + local_m * stride_mm + local_n * stride_mn
            entry = tl.load(tile, mask=inside & (row < q_len), other=0 if MASK == BOOL_MASK else float("-inf"))
            if MASK == BOOL_MASK:
                visible = visible & (entry != 0)
            else:
                visible = visible & (entry > HIDDEN)
                score += entry.to(tl.float32) * LOG2E
        score = tl.where(visible, score, float("-inf"))
    return score, visible


@triton.jit
def counting_rows(
    start_m, q_len, kv_len, mask_ptr, stride_mm, stride_mn,
    BLOCK: tl.constexpr, MASK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Which of the rows start_m, ... see their own key, [BLOCK] bool."""
    row = start_m + tl.arange(0, BLOCK)
    own = row + (kv_len - q_len)
    counts = (row < q_len) & (own >= 0)
    if MASK != NO_MASK:
        entry = at(mask_ptr, own, stride_mn)
        if MASK != KEY_MASK:
            entry = entry + tl.cast(row, tl.int64) * stride_mm
        shown = tl.load(entry, mask=counts, other=0)
        counts = counts & (shown != 0 if MASK == BOOL_MASK else shown > HIDDEN)
    return counts


@triton.jit
def unpack(words_ptr, stride_w, start_a, start_b, A: tl.constexpr, B: tl.constexpr):
    """The visible pairs [A, B] of lines start_a, ..., one after the other in memory, and start_b, ..., the bits."""
    local_b = tl.arange(0, B)[None, :]
    word = at(words_ptr, start_b // 32, stride_w) + start_a + tl.arange(0, A)
    bits = tl.load(word)[:, None]
    if B < 32:
        bits = bits >> (start_b % 32)
    for further in tl.static_range(1, B // 32):
        bits = tl.where(local_b >= 32 * further, tl.load(at(word, further, stride_w))[:, None], bits)
    return ((bits >> (local_b % 8)) >> (local_b // 8 * 8 % 32)) & 1 != 0


@triton.jit
def mask_tile(
    score, start_a, start_b, words_ptr, stride_w, biased, entry_ptr, stride_a, stride_b, MASK: tl.constexpr
):  # fmt: skip
    """The score under a packed 4-D mask, -inf where hidden; biased: plus the entries, the tile's first at entry_ptr."""
    visible = unpack(words_ptr, stride_w, start_a, start_b, score.shape[0], score.shape[1])
    if MASK == BIAS_MASK:  # noqa: SIM102
        if biased:
            local_a, local_b = tl.arange(0, score.shape[0])[:, None], tl.arange(0, score.shape[1])[None, :]
            entry = tl.load(entry_ptr + local_a * stride_a + local_b * stride_b, mask=visible, other=0)
            score += entry.to(tl.float32) * LOG2E
    return tl.where(visible, score, float("-inf"))


@triton.jit
def score_block(
    q, q_tail, start_m, start_n, k_ptr, stride_kn, stride_kd, mask_ptr, stride_mm, stride_mn, words_ptr, stride_wn,
    biased, q_len, kv_len, scale, cap, window,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    EDGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of rows q, start_m and on, and BLOCK_N keys, start_n and on, -inf where hidden; which keys were loaded.

    EDGE = False: the rows see all of the keys.
    """
    local_m = tl.arange(0, q.shape[0])
    local_n = tl.arange(0, BLOCK_N)
    BY_KEY: tl.constexpr = MASK == NO_MASK or MASK == KEY_MASK
    TILE_MASK: tl.constexpr = MASK if EDGE and BY_KEY else NO_MASK
    keep = start_n + local_n < (kv_len if EDGE else start_n + BLOCK_N)
    keep = shown_keys(start_n, local_n, keep, mask_ptr, stride_mn, TILE_MASK)
    k, k_tail = load_operand(k_ptr, start_n, keep, stride_kn, stride_kd, MAIN, TAIL, HEAD_DIM)
    qk = dot_rows(q, k, q_tail, k_tail, TAIL, PRECISION)
    score, _ = score_tile(
        qk, start_m, local_m[:, None], start_n, local_n[None, :], q_len, kv_len, mask_ptr, stride_mm, stride_mn,
        scale, cap, window, TILE_MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, EDGE and BY_KEY, True,
    )  # fmt: skip
    if EDGE and not BY_KEY:
        score = mask_tile(
            score, start_m, start_n, words_ptr, stride_wn, biased,
            at(at(mask_ptr, start_m, stride_mm), start_n, stride_mn), stride_mm, stride_mn, MASK,
        )  # fmt: skip
    return score, keep


@triton.jit
def visible_range(cells_ptr, stride, length, LINES: tl.constexpr):
    """Along `length` pairs of LINES lines of cells, (first, full, edge, last, biased): the visible ones lie in
    [first, last), those in [full, edge) are all visible and unbiased, and biased says whether any is not."""
    cells = tl.cdiv(length, CELL)
    first, full, edge, last, biased = cells, 0, 0, 0, 0
    for start in range(0, cells, 128):
        cell = start + tl.arange(0, 128)
        kind = tl.load(cells_ptr + cell, mask=cell < cells, other=0).to(tl.int32)
        for line in tl.static_range(1, LINES):
            kind = kind | tl.load(at(cells_ptr, line, stride) + cell, mask=cell < cells, other=0).to(tl.int32)
        first = tl.minimum(first, tl.min(tl.where(kind & SHOWS != 0, cell, cells), 0))
        last = tl.maximum(last, tl.max(tl.where(kind & SHOWS != 0, cell + 1, 0), 0))
        biased = tl.maximum(biased, tl.max(kind, 0))
        end = tl.max(tl.where(kind == SHOWS, cell + 1, 0), 0)
        begin = tl.max(tl.where((kind != SHOWS) & (cell < end), cell + 1, start), 0)
        full = tl.where(end > 0, tl.where((begin == start) & (edge == start), full, begin), full)
        edge = tl.maximum(edge, end)
    return first * CELL, full * CELL, edge * CELL, last * CELL, biased >= BIASED


@triton.jit
def intersect(
    first, full, edge, last, seen_first, seen_full, seen_edge, seen_last, shift, length, BLOCK: tl.constexpr
):  # fmt: skip
    """The blocks of a range, narrowed to those that the mask's range, which lies `shift` further, leaves."""
    first = tl.maximum(first, tl.maximum(seen_first - shift, 0) // BLOCK * BLOCK)
    last = tl.minimum(last, seen_last - shift)
    full = tl.maximum(full, tl.cdiv(tl.maximum(seen_full - shift, 0), BLOCK) * BLOCK)
    whole = tl.maximum(seen_edge - shift, 0) // BLOCK * BLOCK
    edge = tl.minimum(tl.where(seen_edge < length, tl.minimum(edge, whole), edge), last)
    return first, full, edge, last


@triton.jit
def key_range(
    start_m, q_len, kv_len, window, cells_ptr, stride,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys [first, last) that rows start_m, ... may see; the blocks of [full, edge) they all see, without a bias.

    cells_ptr: the cells of all rows, or of all keys under a (B, Skv) mask. Last, whether the mask adds anything.
    """
    offset = kv_len - q_len
    first, full, edge, last = 0, 0, kv_len // BLOCK_N * BLOCK_N, kv_len
    biased = False
    end_m = tl.minimum(start_m + BLOCK_M, q_len)
    if CAUSAL:
        edge = tl.minimum(tl.maximum(start_m + offset + 1, 0), kv_len) // BLOCK_N * BLOCK_N
        last = end_m + offset
    if WINDOW:
        first = tl.maximum(start_m + offset - window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(end_m + offset - window, 0), BLOCK_N) * BLOCK_N
    if MASK != NO_MASK:
        LINES: tl.constexpr = 1 if MASK == KEY_MASK else (BLOCK_M + CELL - 1) // CELL
        line = cells_ptr if MASK == KEY_MASK else at(cells_ptr, start_m // CELL, stride)
        seen_first, seen_full, seen_edge, seen_last, biased = visible_range(line, stride, kv_len, LINES)
        first, full, edge, last = intersect(
            first, full, edge, last, seen_first, seen_full, seen_edge, seen_last, 0, kv_len, BLOCK_N
        )
    if MASK != NO_MASK or WINDOW:
        full = tl.cdiv(tl.where(full < edge, full, last), BLOCK_N) * BLOCK_N
        edge = tl.maximum(edge, full)
    return first, full, edge, last, biased

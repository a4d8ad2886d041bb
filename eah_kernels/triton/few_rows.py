"""The output of a few query rows on a long cache, given the chosen head (spec, "Decoding"): split over the keys.

Memory is the limit, not arithmetic. With head h* chosen, one K head and every V head are read once: (1 + Hkv) / (2 Hkv)
of the bytes of ordinary decoding, 0.52 with 32 KV heads. A program takes a stretch of the keys and VALUE_HEADS value
heads side by side (their programs read the same K, one of them from memory, the others from the L2 cache). Without a
head, a program takes the query heads of one KV head: each is read once.

A second kernel combines the partial outputs of the stretches (FlashDecoding), always in the same order.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from eah_kernels.triton.bundles import NO_MASK, Pairs, Partial, Sizes, View
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, cdiv, value_groups, view
from eah_kernels.triton.loads import at, dot_rows, head_of, load_operand, load_values, mask_of, row_of, value_columns
from eah_kernels.triton.scores import score_tile
from eah_kernels.triton.tiles import Tile

MAX_ROWS = 16  # the height of a matrix instruction: up to this, more rows read no more and cost nothing
COMBINED = 32  # stretches that `_combine_kernel` loads at once
COMBINING = Tile(0, 0, num_warps=4, num_stages=1)
SPLITS = ["shared_splits", "own_splits"]  # these grow with kv_len


@triton.jit
def stretch_rows(
    q, k, v, mask, partial, b, h, first_row, first_value, heads, split, splits, parts, sizes, scale,
    R: tl.constexpr, V: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One stretch of keys. Rows: of head h if SHARED, else of its GROUP heads from h on, head then row, from first_row.

    With SHARED a value head's number stands for Hq in `partial`; the statistics are at the program's first.
    """
    VALUE_HEADS: tl.constexpr = V.HEADS if SHARED else 1
    PRECISION: tl.constexpr = R.PRECISION
    q_len, kv_len = sizes.q_len, sizes.kv_len
    local = first_row + tl.arange(0, BLOCK_M)
    real = local < (q_len if SHARED else q_len * R.GROUP)
    row = tl.where(real, local % q_len, q_len)
    head = h + tl.where(real, local // q_len, 0)
    rows = load_operand(_row_by_row(q, b, head, row), 0, real, R)
    k, v = head_of(k, b, h // R.GROUP), head_of(v, b, first_value)
    if R.MASK != NO_MASK:
        mask = mask_of(mask, b, head[:, None], R, True)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    local_n = tl.arange(0, BLOCK_N)
    columns = value_columns(first_value, heads // R.GROUP, V, VALUE_HEADS)
    mixed = tl.zeros([BLOCK_M, VALUE_HEADS * V.PAD], tl.float32)

    first = 0
    if R.WINDOW:
        first = tl.maximum(kv_len - q_len - sizes.window + 1, 0) // BLOCK_N * BLOCK_N
    stretch = tl.cdiv(tl.cdiv(kv_len - first, BLOCK_N), splits) * BLOCK_N
    first += split * stretch
    for start_n in range(first, tl.minimum(first + stretch, kv_len), BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        key = start_n + local_n
        seen = key < kv_len
        qk = dot_rows(rows, load_operand(k, start_n, seen, R), R)  # [BLOCK_M, BLOCK_N]
        pairs = Pairs(0, row[:, None], start_n, local_n[None, :])
        score, visible = score_tile(qk, pairs, sizes, mask, scale, R, R.MASK, True, True)
        score = tl.where(seen[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        mixed = mixed * rescale[:, None]
        # Values that no row of the tile sees are not read, whatever they hold.
        if R.WINDOW:
            seen = seen & (key > kv_len - q_len - sizes.window)
        if R.MASK != NO_MASK:
            seen = seen & (tl.max(visible.to(tl.int32), 0) > 0)
        values = load_values(v, start_n, seen, columns)  # [BLOCK_N, VALUE_HEADS * V.PAD]
        mixed = tl.dot(p.to(values.dtype), values, mixed, input_precision=PRECISION)

    slot = tl.cast(head, tl.int64)
    if SHARED:
        slot = slot * 0 + first_value
    slot = ((tl.cast(b, tl.int64) * heads + slot) * q_len + row) * parts + split
    tl.store(partial.stat + slot * 2, row_max, mask=real)
    tl.store(partial.stat + slot * 2 + 1, row_sum, mask=real)
    slot = slot[:, None] + tl.cast(columns.member, tl.int64)[None, :] * q_len * parts
    tl.store(partial.out + slot * V.DIM + columns.feature[None, :], mixed, mask=real[:, None] & columns.exists[None, :])


@triton.jit
def _row_by_row(q, b, head, row):
    """Rows `row` of heads `head`, each with a pointer of its own."""
    ptr = at(q.ptr, b, q.b) + tl.cast(head, tl.int64)[:, None] * q.h + tl.cast(row, tl.int64)[:, None] * q.row
    return View(ptr, q.b, q.h, 0, q.column)


@triton.jit(do_not_specialize=LENGTHS + SPLITS)
def _few_rows_kernel(
    q, k, v, mask, head_ptr, partial, shared_splits, own_splits, batch, units, heads, q_len, kv_len, window, scale,
    R: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a batch row: first the programs for a chosen head, units (groups of value heads) x shared_splits, then those
    for none, KV heads x blocks of rows x own_splits. Half of them leave at once."""
    sizes = Sizes(q_len, kv_len, window)
    parts = tl.maximum(shared_splits, own_splits)
    pid = tl.program_id(0)
    b = pid % batch
    pid = pid // batch
    h = tl.load(head_ptr + b)
    if pid < units * shared_splits:
        if h >= 0:
            stretch_rows(
                q, k, v, mask, partial, b, h, 0, pid % units * V.HEADS, heads, pid // units, shared_splits, parts,
                sizes, scale, R, V, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif h < 0:
        pid -= units * shared_splits
        kv_heads = heads // R.GROUP
        kv_head = pid % kv_heads
        pid = pid // kv_heads
        blocks = tl.cdiv(q_len * R.GROUP, BLOCK_M)
        stretch_rows(
            q, k, v, mask, partial, b, kv_head * R.GROUP, pid % blocks * BLOCK_M, kv_head, heads, pid // blocks,
            own_splits, parts, sizes, scale, R, V, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SPLITS, "q_len"])
def _combine_kernel(
    head_ptr, partial, shared_splits, own_splits, out, heads, q_len,
    R: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row of one query head: its stretches, PARTS at a time, each weighed by its share of the exponentials."""
    parts = tl.maximum(shared_splits, own_splits)
    pid = tl.program_id(0)
    row = pid % q_len
    h = pid // q_len % heads
    b = pid // (q_len * heads)
    source, first, splits = h, h, own_splits
    if tl.load(head_ptr + b) >= 0:
        source = h // R.GROUP
        first = source // V.HEADS * V.HEADS
        splits = shared_splits
    stat_ptr = partial.stat + ((tl.cast(b, tl.int64) * heads + first) * q_len + row) * parts * 2
    part_ptr = partial.out + ((tl.cast(b, tl.int64) * heads + source) * q_len + row) * parts * V.DIM
    feature = tl.arange(0, V.PAD)
    most = tl.full([PARTS], float("-inf"), tl.float32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        most = tl.maximum(most, tl.load(stat_ptr + split * 2, mask=split < splits, other=float("-inf")))
    shift = tl.max(most, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros([PARTS], tl.float32)
    PAD: tl.constexpr = V.PAD
    mixed = tl.zeros([PARTS, PAD], tl.float32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        written = split < splits
        weight = tl.exp2(tl.load(stat_ptr + split * 2, mask=written, other=float("-inf")) - shift)
        total += weight * tl.load(stat_ptr + split * 2 + 1, mask=written, other=0.0)
        tile = part_ptr + split[:, None] * V.DIM + feature[None, :]
        part = tl.load(tile, mask=written[:, None] & (feature < V.DIM)[None, :], other=0.0)
        mixed += part * weight[:, None]
    sum_of_exps = tl.sum(total, 0)
    mixed = tl.sum(mixed, 0) / tl.where(sum_of_exps == 0, 1.0, sum_of_exps)
    out = row_of(head_of(out, b, h), row)
    tl.store(out.ptr + feature * out.column, mixed, mask=feature < V.DIM)


def few_rows(problem: Problem, value, head, out) -> tuple[Launch, Launch]:
    """Writes out (B, Hq, Sq, Dv), Sq <= MAX_ROWS, given head (B,)."""
    batch, heads, q_len, _ = problem.query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    tile = problem.tile("few_rows", value_dim)
    units, values = value_groups(kv_heads, value_dim, tile)
    blocks = cdiv(q_len * problem.rules.GROUP, tile.block_m)
    slots = multiprocessors(problem.query.device, problem.target)
    walk = cdiv(kv_len, tile.block_n)
    shared_splits = split(walk, batch * units, slots)
    own_splits = split(walk, batch * kv_heads * blocks, slots)
    parts = max(shared_splits, own_splits)
    part = out.new_empty(batch, heads, q_len, parts, value_dim, dtype=torch.float32)
    partial = Partial(part, part.new_empty(batch, heads, q_len, parts, 2))
    common = dict(head_ptr=head, partial=partial, shared_splits=shared_splits, own_splits=own_splits)
    common |= dict(heads=heads, V=values)
    stretches = Launch(
        _few_rows_kernel,
        batch * (units * shared_splits + kv_heads * blocks * own_splits),
        tile,
        problem.arguments | common | dict(v=view(value), units=units),
    )
    combined = Launch(
        _combine_kernel,
        batch * heads * q_len,
        COMBINING,
        common | dict(out=view(out), q_len=q_len, R=problem.rules, PARTS=COMBINED),
    )
    return stretches, combined


@lru_cache(1024)
def split(walk: int, programs: int, slots: int) -> int:
    """Into how many stretches to split `walk` blocks of keys, with `programs` programs for each stretch.

    One program is resident on each of `slots` multiprocessors (make resources: it takes half of the registers, or
    more). Starting and ending costs a program about as much as a block does; COMBINED stretches cost the second kernel
    as much again. So programs of one or two blocks, several to a multiprocessor, never pay: with as many programs as
    multiprocessors a stretch is as long as it can be.
    """
    most = max(1, min(walk, slots // programs * 4))

    def cost(stretches: int) -> float:
        return cdiv(programs * stretches, slots) * (cdiv(walk, stretches) + 1) + stretches / COMBINED

    return min(range(1, most + 1), key=cost)


@lru_cache
def multiprocessors(device: torch.device, target: str) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return {"sm_80": 108, "sm_89": 128, "sm_100": 148, "gfx942": 304}.get(target, 132)

"""The output of a few query rows on a long cache, given the chosen head (spec, "Decoding"): split over the keys.

Memory is the limit, not arithmetic. With head h* chosen, one K head and every V head are read once: (1 + Hkv) / (2 Hkv)
of the bytes of ordinary decoding, 0.52 with 32 KV heads. A program takes a stretch of the keys and VALUE_HEADS value
heads side by side (their programs read the same K, one of them from memory, the others from the L2 cache). Without a
head, a program takes the query heads of one KV head: each is read once.

A second kernel combines the partial outputs of the stretches (FlashDecoding), always in the same order.
"""

import torch
import triton
import triton.language as tl

from eah_kernels.triton.configs import Tile
from eah_kernels.triton.launch import LENGTHS, Launch, Problem, narrow, operand, value_groups
from eah_kernels.triton.primitives import (
    KEY_MASK,
    NO_MASK,
    at,
    dot_rows,
    load_operand,
    score_tile,
    shown_keys,
    value_columns,
)

MAX_ROWS = 16  # the height of a matrix instruction: up to this, more rows read no more and cost nothing
MAX_SPLITS = 64
PROGRAMS = 512  # to aim at: about four for each multiprocessor of a large GPU
SHORTEST = 64  # keys of a stretch, at least
SPLITS = ["shared_splits", "own_splits", "parts"]  # these grow with kv_len


@triton.jit
def decode_rows(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    part_ptr, stat_ptr, parts, b, h, first_row, first_value, split, splits,
    heads, kv_heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One stretch of keys. Rows: of head h if SHARED, else of its GROUP heads from h on, head then row, from first_row.

    part (B, Hq, Sq, parts, VALUE_DIM) float32: the output relative to stat (B, Hq, Sq, parts, 2), the row's maximum
    score and its sum of exponentials. With SHARED a value head's number stands for Hq; stat is at the program's first.
    """
    local = first_row + tl.arange(0, BLOCK_M)
    real = local < (q_len if SHARED else q_len * GROUP)
    row = tl.where(real, local % q_len, q_len)
    head = h + tl.where(real, local // q_len, 0)
    wide_head = tl.cast(head, tl.int64)[:, None]
    q_ptr = at(q_ptr, b, stride_qb) + wide_head * stride_qh + tl.cast(row, tl.int64)[:, None] * stride_qm
    k_ptr = at(at(k_ptr, b, stride_kb), h // GROUP, stride_kh)
    v_ptr = at(at(v_ptr, b, stride_vb), first_value, stride_vh)
    mask_ptr = at(mask_ptr, b, stride_mb)
    key_ptr = mask_ptr
    if MASK != NO_MASK and MASK != KEY_MASK:
        mask_ptr = mask_ptr + wide_head * stride_mh

    q, q_tail = load_operand(q_ptr, 0, real, 0, stride_qd, MAIN, TAIL, HEAD_DIM)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    local_n = tl.arange(0, BLOCK_N)
    member, feature, exists = value_columns(first_value, kv_heads, VALUE_DIM, VALUE_PAD, VALUE_HEADS)
    v_column = tl.cast(member, tl.int64) * stride_vh + feature * stride_vd
    out = tl.zeros([BLOCK_M, VALUE_HEADS * VALUE_PAD], tl.float32)

    first = 0
    if WINDOW:
        first = tl.maximum(kv_len - q_len - window + 1, 0) // BLOCK_N * BLOCK_N
    stretch = tl.cdiv(tl.cdiv(kv_len - first, BLOCK_N), splits) * BLOCK_N
    first += split * stretch
    for start_n in range(first, tl.minimum(first + stretch, kv_len), BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        key = start_n + local_n
        keep = shown_keys(start_n, local_n, key < kv_len, key_ptr, stride_mn, MASK)
        k, k_tail = load_operand(k_ptr, start_n, keep, stride_kn, stride_kd, MAIN, TAIL, HEAD_DIM)
        qk = dot_rows(q, k, q_tail, k_tail, TAIL, PRECISION)  # [BLOCK_M, BLOCK_N]
        score, visible = score_tile(
            qk, 0, row[:, None], start_n, local_n[None, :], q_len, kv_len, mask_ptr, stride_mm, stride_mn,
            scale, cap, window, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, True, True,
        )  # fmt: skip
        score = tl.where(keep[None, :], score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        out = out * rescale[:, None]
        # 0 * NaN is NaN in a matrix product: values that no row of the tile sees are not read.
        seen = keep
        if WINDOW:
            seen = seen & (key > kv_len - q_len - window)
        if MASK != NO_MASK and MASK != KEY_MASK:
            seen = seen & (tl.max(visible.to(tl.int32), 0) > 0)
        v_tile = at(v_ptr, start_n, stride_vn) + local_n[:, None] * stride_vn + v_column[None, :]
        v = tl.load(v_tile, mask=seen[:, None] & exists[None, :], other=0.0)  # [BLOCK_N, VALUE_HEADS * VALUE_PAD]
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)

    slot = tl.cast(head, tl.int64)
    if SHARED:
        slot = slot * 0 + first_value
    slot = ((tl.cast(b, tl.int64) * heads + slot) * q_len + row) * parts + split
    tl.store(stat_ptr + slot * 2, row_max, mask=real)
    tl.store(stat_ptr + slot * 2 + 1, row_sum, mask=real)
    slot = slot[:, None] + tl.cast(member, tl.int64)[None, :] * q_len * parts
    tl.store(part_ptr + slot * VALUE_DIM + feature[None, :], out, mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=LENGTHS + SPLITS)
def _decode_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    head_ptr, part_ptr, stat_ptr, parts, shared_splits, own_splits,
    batch, units, blocks, heads, kv_heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a batch row: first the programs for a chosen head, units (groups of value heads) x shared_splits, then those
    for none, KV heads x blocks of rows x own_splits. Half of them leave at once."""
    pid = tl.program_id(0)
    b = pid % batch
    pid = pid // batch
    h = tl.load(head_ptr + b)
    if pid < units * shared_splits:
        if h >= 0:
            decode_rows(
                q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
                k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
                v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
                mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
                part_ptr, stat_ptr, parts, b, h, 0, pid % units * VALUE_HEADS, pid // units, shared_splits,
                heads, kv_heads, q_len, kv_len, scale, cap, window,
                GROUP, HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP,
                True, VALUE_DIM, VALUE_PAD, VALUE_HEADS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif h < 0:
        pid -= units * shared_splits
        kv_head = pid % kv_heads
        pid = pid // kv_heads
        decode_rows(
            q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
            k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
            v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
            mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
            part_ptr, stat_ptr, parts, b, kv_head * GROUP, pid % blocks * BLOCK_M, kv_head, pid // blocks, own_splits,
            heads, kv_heads, q_len, kv_len, scale, cap, window,
            GROUP, HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP,
            False, VALUE_DIM, VALUE_PAD, 1, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=SPLITS)
def _combine_kernel(
    head_ptr, part_ptr, stat_ptr, parts, shared_splits, own_splits,
    out_ptr, stride_ob, stride_oh, stride_om, stride_od, heads, q_len,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """One row of one query head: its stretches, each weighed by its share of the sum of exponentials."""
    pid = tl.program_id(0)
    row = pid % q_len
    h = pid // q_len % heads
    b = pid // (q_len * heads)
    source, first, splits = h, h, own_splits
    if tl.load(head_ptr + b) >= 0:
        source = h // GROUP
        first = source // VALUE_HEADS * VALUE_HEADS
        splits = shared_splits
    split = tl.arange(0, MOST)
    written = split < splits
    stat = ((tl.cast(b, tl.int64) * heads + first) * q_len + row) * parts + split
    maximum = tl.load(stat_ptr + stat * 2, mask=written, other=float("-inf"))
    total = tl.load(stat_ptr + stat * 2 + 1, mask=written, other=0.0)
    shift = tl.max(maximum, 0)
    weight = tl.exp2(maximum - tl.where(shift == float("-inf"), 0.0, shift))
    total = tl.sum(total * weight, 0)
    weight = weight / tl.where(total == 0, 1.0, total)
    feature = tl.arange(0, VALUE_PAD)
    part = ((tl.cast(b, tl.int64) * heads + source) * q_len + row) * parts + split
    tile = part[:, None] * VALUE_DIM + feature[None, :]
    part = tl.load(part_ptr + tile, mask=written[:, None] & (feature < VALUE_DIM)[None, :], other=0.0)
    out = tl.sum(part * weight[:, None], 0)
    out_ptr = at(at(at(out_ptr, b, stride_ob), h, stride_oh), row, stride_om)
    tl.store(out_ptr + feature * stride_od, out, mask=feature < VALUE_DIM)


def decode(problem: Problem, value, head, out) -> tuple[Launch, Launch]:
    """Writes out (B, Hq, Sq, Dv), Sq <= MAX_ROWS, given head (B,)."""
    value = narrow(value)
    batch, heads, q_len, _ = problem.query.shape
    kv_heads, kv_len, value_dim = value.shape[1:]
    tile = problem.tile("decode", value_dim)
    units, value_options = value_groups(kv_heads, value_dim, tile)
    blocks = triton.cdiv(q_len * (heads // kv_heads), tile.block_m)
    most = min(MAX_SPLITS, triton.cdiv(kv_len, SHORTEST))
    shared_splits, own_splits = (
        max(1, min(most, triton.cdiv(PROGRAMS, batch * programs))) for programs in (units, kv_heads * blocks)
    )
    parts = max(shared_splits, own_splits)
    part = out.new_empty(batch, heads, q_len, parts, value_dim, dtype=torch.float32)
    common = (
        dict(head_ptr=head, part_ptr=part, stat_ptr=part.new_empty(batch, heads, q_len, parts, 2), heads=heads)
        | dict(parts=parts, shared_splits=shared_splits, own_splits=own_splits)
        | value_options
    )
    stretches = Launch(
        _decode_kernel,
        batch * (units * shared_splits + kv_heads * blocks * own_splits),
        tile,
        problem.arguments
        | operand("v", "vb vh vn vd", value)
        | common
        | dict(units=units, blocks=blocks, kv_heads=kv_heads),
    )
    combined = Launch(
        _combine_kernel,
        batch * heads * q_len,
        Tile(0, 0, num_warps=4, num_stages=1),
        common
        | operand("out", "ob oh om od", out)
        | dict(q_len=q_len, GROUP=heads // kv_heads, MOST=triton.next_power_of_2(parts)),
    )
    return stretches, combined

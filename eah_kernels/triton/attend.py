"""The output, given the chosen head (spec, step 6): one launch, two kinds of programs; one leaves a batch row at once.

SHARED, the map of head h* for all: one Q K^T and one exp per tile serve VALUE_HEADS value heads, side by side in one
wide tile. The row log-sum-exps are known, so the map is normalised before P V: no online softmax, no rescaling, and P
is rounded as the eager form rounds it. With grouped-query attention each KV head's output is computed once and written
GROUP times.

Otherwise (head -1), the layer's ordinary attention: a FlashAttention-2 forward (arXiv 2307.08691), a head a program.
"""

import triton
import triton.language as tl

from eah_kernels.triton.launch import LENGTHS, Launch, Problem, narrow, operand, value_groups
from eah_kernels.triton.primitives import (
    CELL,
    KEY_MASK,
    LOWEST,
    NO_MASK,
    at,
    key_range,
    load_operand,
    score_block,
    value_columns,
)


@triton.jit
def attend_rows(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    out_ptr, stride_ob, stride_oh, stride_om, stride_od,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
    seen_ptr, stride_sb, stride_sh, stride_sm,
    minus_lse_ptr, stride_lb, stride_lh,
    b, h, start_m, first_value, kv_heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows start_m, ... with the map of head h: times the value heads from first_value on, or (not SHARED) h's own."""
    first_out = first_value * GROUP if SHARED else h
    q_ptr = at(at(q_ptr, b, stride_qb), h, stride_qh)
    k_ptr = at(at(k_ptr, b, stride_kb), h // GROUP, stride_kh)
    v_ptr = at(at(v_ptr, b, stride_vb), first_value, stride_vh)
    out_ptr = at(at(at(out_ptr, b, stride_ob), first_out, stride_oh), start_m, stride_om)
    mask_ptr = at(at(mask_ptr, b, stride_mb), h, stride_mh)
    BY_KEY: tl.constexpr = MASK == NO_MASK or MASK == KEY_MASK
    if MASK != NO_MASK:
        cells_ptr = at(at(cells_ptr, b, stride_cb), h, stride_ch)
    if not BY_KEY:
        words_ptr = at(at(words_ptr, b, stride_wb), h, stride_wh)
        seen_ptr = at(at(at(seen_ptr, b, stride_sb), h, stride_sh), start_m // CELL, stride_sm)

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    real = start_m + local_m < q_len
    q, q_tail = load_operand(q_ptr, start_m, real, stride_qm, stride_qd, MAIN, TAIL, HEAD_DIM)
    if SHARED:
        minus_lse = tl.load(at(at(minus_lse_ptr, b, stride_lb), h, stride_lh) + start_m + local_m)
    else:
        row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)

    member, feature, exists = value_columns(first_value, kv_heads, VALUE_DIM, VALUE_PAD, VALUE_HEADS)
    v_column = tl.cast(member, tl.int64) * stride_vh + feature * stride_vd
    out = tl.zeros([BLOCK_M, VALUE_HEADS * VALUE_PAD], tl.float32)
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
            score, keep = score_block(
                q, q_tail, start_m, start_n, k_ptr, stride_kn, stride_kd, mask_ptr, stride_mm, stride_mn,
                words_ptr, stride_wn, biased, q_len, kv_len, scale, cap, window,
                HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP, EDGE, BLOCK_N,
            )  # fmt: skip
            if SHARED:
                p = tl.exp2(score + minus_lse[:, None])
            else:
                new_max = tl.maximum(row_max, tl.max(score, 1))
                p = tl.exp2(score - new_max[:, None])
                rescale = tl.exp2(row_max - new_max)
                row_sum = row_sum * rescale + tl.sum(p, 1)
                row_max = new_max
                out = out * rescale[:, None]
            # 0 * NaN is NaN in a matrix product: values that no row of the tile sees are zeroed.
            key = start_n + local_n
            seen = keep
            if EDGE and BY_KEY and WINDOW:
                seen = seen & (key > start_m + (kv_len - q_len) - window)
            elif EDGE and not BY_KEY:
                by_cells = tl.load(seen_ptr + key)
                for line in tl.static_range(1, BLOCK_M // CELL):
                    by_cells = by_cells | tl.load(at(seen_ptr, line, stride_sm) + key)
                seen = seen & (by_cells != 0)
            v_tile = at(v_ptr, start_n, stride_vn) + local_n[:, None] * stride_vn + v_column[None, :]
            v = tl.load(v_tile, mask=seen[:, None] & exists[None, :], other=0.0)  # [BLOCK_N, VALUE_HEADS * VALUE_PAD]
            out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
    if not SHARED:
        out = out / tl.where(row_sum == 0, 1.0, row_sum)[:, None]
    out_column = tl.cast(member * GROUP, tl.int64) * stride_oh + feature * stride_od
    out_tile = out_ptr + local_m[:, None] * stride_om + out_column[None, :]
    for copy in range(GROUP if SHARED else 1):
        tl.store(at(out_tile, copy, stride_oh), out, mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _attend_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    out_ptr, stride_ob, stride_oh, stride_om, stride_od,
    mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
    words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
    seen_ptr, stride_sb, stride_sh, stride_sm,
    head_ptr, minus_lse_ptr, stride_lb, stride_lh,
    batch, units, heads, kv_heads, q_len, kv_len, scale, cap, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, VALUE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """units: groups of VALUE_HEADS value heads. Of a row block, they come first, then the query heads."""
    pid = tl.program_id(0)
    b = pid % batch
    unit = pid // batch % (units + heads)
    blocks = tl.num_programs(0) // (batch * (units + heads))
    start_m = (blocks - 1 - pid // (batch * (units + heads))) * BLOCK_M  # longest rows first
    h = tl.load(head_ptr + b)
    if unit < units:
        if h >= 0:
            attend_rows(
                q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
                k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
                v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
                out_ptr, stride_ob, stride_oh, stride_om, stride_od,
                mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
                words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
                seen_ptr, stride_sb, stride_sh, stride_sm,
                minus_lse_ptr, stride_lb, stride_lh,
                b, h, start_m, unit * VALUE_HEADS, kv_heads, q_len, kv_len, scale, cap, window,
                GROUP, HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP,
                True, VALUE_DIM, VALUE_PAD, VALUE_HEADS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif h < 0:
        attend_rows(
            q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
            k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
            v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
            out_ptr, stride_ob, stride_oh, stride_om, stride_od,
            mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn,
            words_ptr, stride_wb, stride_wh, stride_wn, cells_ptr, stride_cb, stride_ch, stride_cm,
            seen_ptr, stride_sb, stride_sh, stride_sm,
            minus_lse_ptr, stride_lb, stride_lh,
            b, unit - units, start_m, (unit - units) // GROUP, kv_heads, q_len, kv_len, scale, cap, window,
            GROUP, HEAD_DIM, MAIN, TAIL, PRECISION, MASK, HIDDEN, CAUSAL, WINDOW, SOFTCAP,
            False, VALUE_DIM, VALUE_PAD, 1, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def attend(problem: Problem, value, head, out, minus_lse) -> Launch:
    """Writes out (B, Hq, Sq, Dv), given head (B,) and minus_lse (B, Hq, padded_length), read where a head is chosen."""
    value = narrow(value)
    batch, heads, q_len, _ = problem.query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    tile = problem.tile("attend", value_dim)
    units, value_options = value_groups(kv_heads, value_dim, tile)
    return Launch(
        _attend_kernel,
        batch * (units + heads) * triton.cdiv(q_len, tile.block_m),
        tile,
        problem.arguments
        | problem.packed_operand("words", "wb wh wn")
        | problem.packed_operand("cells", "cb ch cm")
        | problem.packed_operand("seen", "sb sh sm")
        | operand("v", "vb vh vn vd", value)
        | operand("out", "ob oh om od", out)
        | dict(head_ptr=head, minus_lse_ptr=minus_lse, stride_lb=minus_lse.stride(0), stride_lh=minus_lse.stride(1))
        | dict(units=units, heads=heads, kv_heads=kv_heads)
        | value_options,
    )

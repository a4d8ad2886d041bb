"""Log-sum-exps, sinks and the choice in one launch, for as many keys as fit in registers (spec, steps 2 to 5).

A program keeps the scores of BLOCK_M rows of a head: one Q K^T and one exp a score give the rows' log-sum-exps and,
with these, the sum over the rows for each key. Of a head's programs the last one adds them, always
in the same order, so the counts are the same in every run; the last one of a batch row chooses its head.
"""

from functools import lru_cache
from threading import Thread

import torch
import triton
import triton.language as tl
from torch import Tensor

from eah_kernels.triton.bundles import KEY_MASK, NO_MASK, Choice, Pairs, Sizes, Tally
from eah_kernels.triton.launch import Launch, Problem, cdiv, power_of_two, view, view_lines
from eah_kernels.triton.loads import at, count_image_tokens, dot_rows, head_of, load_operand, row_of
from eah_kernels.triton.lse import padded_length
from eah_kernels.triton.ranges import seeing_rows
from eah_kernels.triton.scores import LOWEST, counting_rows, score_tile, shown_keys
from eah_kernels.triton.sequences import is_past, lse_of, sequence_of
from eah_kernels.triton.sinks import choose_head, comes_last
from eah_kernels.triton.tiles import ONE_PASS_PROGRAMS

KEYS_STEP = 256  # kernels are compiled for multiples of this


@triton.jit
def load_keys(k, mask, start_n, end, R: tl.constexpr, BLOCK_N: tl.constexpr):
    local_n = tl.arange(0, BLOCK_N)
    return load_operand(k, start_n, shown_keys(start_n, local_n, start_n + local_n < end, mask, R.MASK), R)


@triton.jit
def is_whole(start_m, start_n, sizes, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether every row of the tile sees all of its keys, and none of them is its own."""
    whole = start_n + BLOCK_N <= start_m
    if not R.CAUSAL:
        whole = whole | (start_n >= start_m + BLOCK_M) & (start_n + BLOCK_N <= sizes.kv_len)
    if R.WINDOW:
        whole = whole & (start_n > start_m + BLOCK_M - 1 - sizes.window)
    return whole & (R.MASK == NO_MASK)


@triton.jit
def count_sinks(
    mass, image, mask, blocks, sizes, threshold, R: tl.constexpr, LINES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """The sinks among KEYS keys, whose sums over the rows lie in `blocks` lines of mass."""
    line = tl.arange(0, LINES)[:, None]
    key = tl.arange(0, KEYS)
    inside = key < sizes.kv_len
    sums = tl.load(
        mass.ptr + line * mass.row + key[None, :],
        mask=(line < blocks) & inside[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    seeing = seeing_rows(key, sizes, mask, R)
    column_mean = tl.div_rn(tl.sum(sums, 0), tl.maximum(seeing, 1).to(tl.float32))
    is_image = tl.load(image + key, mask=inside, other=0) != 0
    return tl.sum((is_image & (column_mean > threshold)).to(tl.int32), 0)


@triton.jit(do_not_specialize=["q_len", "window"])
def _one_pass_kernel(
    q, k, mask, image, minus_lse, mass, tally, threshold, choice, batch, heads, q_len, window, scale,
    R: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q_len rows and as many keys, KEYS at most. mask: a (B, Skv) one's lines (pack.py), or None. mass: a line for each
    block of rows. AHEAD: a tile of keys is loaded during the product of the one before.
    """
    batch, cu_seqlens, tokens = batch
    pid = tl.program_id(0)
    b = pid % batch
    h = pid // batch % heads
    start_m = (tl.num_programs(0) // (batch * heads) - 1 - pid // (batch * heads)) * BLOCK_M  # longest rows first
    if cu_seqlens is not None:
        first_token, q_len = sequence_of(cu_seqlens, tokens, b, q_len)
        q, k, minus_lse = row_of(q, first_token), row_of(k, first_token), lse_of(minus_lse, b, first_token)
    sizes = Sizes(q_len, q_len, window)
    image = at(image, b, q_len) if cu_seqlens is None else image + first_token
    image_tokens = count_image_tokens(image, q_len)
    if image_tokens == 0:
        if start_m == 0:
            tl.store(tally.counts + b * heads + h, 0)
            if h == 0:
                tl.store(choice.head + b, -1)
        return
    local_m, local_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row = start_m + local_m
    lse_ptr = head_of(minus_lse, b, h).ptr + row
    if cu_seqlens is not None and is_past(start_m, q_len):
        return
    if start_m >= q_len:
        tl.store(lse_ptr, tl.full([BLOCK_M], float("-inf"), tl.float32))
        return
    q, k, mass = head_of(q, b, h), head_of(k, b, h // R.GROUP), head_of(mass, b, h)
    if R.MASK == KEY_MASK:
        mask = head_of(mask, b, h)

    TILES: tl.constexpr = KEYS // BLOCK_N
    rows = load_operand(q, start_m, row < q_len, R)
    first, end = 0, q_len  # of the keys that a row sees
    if R.CAUSAL:
        end = tl.minimum(start_m + BLOCK_M, q_len)
    if R.WINDOW:
        first = start_m - window + 1
    keys = load_keys(k, mask, 0, end, R, BLOCK_N)
    following = keys
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    scores = ()
    for tile in tl.static_range(TILES):
        start_n = tile * BLOCK_N
        if AHEAD and tile + 1 < TILES:
            following = load_keys(k, mask, start_n + BLOCK_N, end, R, BLOCK_N)
        elif not AHEAD and tile > 0:
            keys = load_keys(k, mask, start_n, end, R, BLOCK_N)
        score = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        if (first < start_n + BLOCK_N) & (start_n < end):
            score = dot_rows(rows, keys, R)
            pairs = Pairs(start_m, local_m[:, None], start_n, local_n[None, :])
            if is_whole(start_m, start_n, sizes, R, BLOCK_M, BLOCK_N):
                score, _ = score_tile(score, pairs, sizes, mask, scale, R, NO_MASK, False, True)
            else:
                score, _ = score_tile(score, pairs, sizes, mask, scale, R, R.MASK, True, True)
            row_max = tl.maximum(row_max, tl.max(score, 1))
        scores = scores + (score,)  # type: ignore[assignment]
        keys = following

    row_sum = tl.zeros([BLOCK_M], tl.float32)
    exps = ()
    for tile in tl.static_range(TILES):
        p = scores[tile]  # type: ignore[var-annotated]
        if (first < tile * BLOCK_N + BLOCK_N) & (tile * BLOCK_N < end):
            p = tl.exp2(p - row_max[:, None])
            row_sum += tl.sum(p, 1)
        exps = exps + (p,)  # type: ignore[assignment]
    lse = tl.where((row < q_len) & (row_sum != 0), -row_max - tl.log2(row_sum), float("-inf"))
    tl.store(lse_ptr, lse)

    counts = counting_rows(start_m, sizes, mask, R, BLOCK_M)
    share = tl.where(counts, 1 / tl.where(row_sum == 0, 1.0, row_sum), 0.0)
    line = row_of(mass, start_m // BLOCK_M).ptr
    for tile in tl.static_range(TILES):
        start_n = tile * BLOCK_N
        sums = tl.zeros([BLOCK_N], tl.float32)
        if (first < start_n + BLOCK_N) & (start_n < end):
            p = exps[tile] * share[:, None]
            if R.MASK != NO_MASK:
                p = tl.where(counts[:, None], p, 0.0)  # whatever the other rows hold
            if not is_whole(start_m, start_n, sizes, R, BLOCK_M, BLOCK_N):
                p = tl.where(row[:, None] != start_n + local_n[None, :], p, 0.0)
            sums = tl.sum(p, 0)
        tl.store(line + start_n + local_n, sums)

    tl.debug_barrier()  # the sums of all threads come before the ticket
    blocks = tl.cdiv(q_len, BLOCK_M)
    tickets = tally.progress + b * (heads + 1)
    if comes_last(tickets + h, blocks):
        tl.store(tickets + h, 0)
        LINES: tl.constexpr = triton.next_power_of_2(KEYS // BLOCK_M)
        sinks = count_sinks(
            mass, image, mask, blocks, sizes, threshold, R, LINES, triton.next_power_of_2(KEYS)
        )  # fmt: skip
        tl.store(tally.counts + b * heads + h, sinks)
        if comes_last(tickets + heads, heads):
            tl.store(tickets + heads, 0)
            choose_head(b, heads, tally.counts, image_tokens, choice)


def takes(problem: Problem) -> bool:
    """Whether this kernel is to stand for `lse` and `sinks`, the choice included: one row of tiles, no 4-D mask, and
    not so many programs that throughput counts more than the longest of them."""
    tile = problem.short_tile("one_pass")
    if tile is None or not problem.rules.BY_KEY:
        return False
    batch, heads = problem.query.shape[:2]
    return problem.q_len <= KEYS_STEP or batch * heads * cdiv(problem.q_len, tile.block_m) <= ONE_PASS_PROGRAMS


def one_pass(problem: Problem, image, threshold, minus_lse, sink_counts, tickets, choice: Choice) -> Launch:
    """Fills minus_lse (B, Hq, padded_length) as `lse` does, sink_counts (B, Hq) and the choice of every batch row.

    image (B, S) uint8 is contiguous; batch rows without image token are left out of minus_lse. tickets: B * (Hq + 1) or
    more int32 zeros, and zeros again afterwards.
    """
    tile = problem.short_tile("one_pass")
    assert tile is not None  # takes(problem)
    batch, heads = problem.query.shape[:2]
    keys = cdiv(problem.q_len, KEYS_STEP) * KEYS_STEP
    mass = minus_lse.new_empty(batch, heads, cdiv(problem.q_len, tile.block_m), keys)
    arguments = {name: value for name, value in problem.arguments.items() if name != "kv_len"}
    return Launch(
        _one_pass_kernel,
        batch * heads * (padded_length(problem.q_len) // tile.block_m),
        tile,
        arguments
        | dict(image=image, minus_lse=view_lines(minus_lse))
        | dict(mass=view(mass), tally=Tally(sink_counts, tickets), threshold=threshold, choice=choice, heads=heads)
        | dict(KEYS=keys, AHEAD=tile.num_stages > 1)
        | dict(batch=problem.batch),
        form=keys,
    )


def zeroed_tickets(query: Tensor) -> Tensor:
    """Tickets for one launch on query's device and current stream: kept from call to call, but in a CUDA graph.

    Launches on a stream follow each other, so they can share what each of them leaves as it was.
    """
    size = query.shape[0] * (query.shape[1] + 1)
    if not query.is_cuda or torch.cuda.is_current_stream_capturing():
        return query.new_zeros(size, dtype=torch.int32)
    return kept_tickets(torch.cuda.current_stream(query.device), power_of_two(size))


@lru_cache(maxsize=64)
def kept_tickets(stream: torch.cuda.Stream, size: int) -> Tensor:
    """Allocated by a thread of its own: the caller's allocations may belong to a CUDA graph (torch.compile's trees)."""
    made = []

    def make():
        with torch.cuda.stream(stream):
            made.append(torch.zeros(size, dtype=torch.int32, device=stream.device))

    thread = Thread(target=make)
    thread.start()
    thread.join()
    return made[0]

"""backend="triton": the fused kernels. No host synchronisation; memory linear in length, but for a 4-D mask's bits and,
where its rows are not aligned, a copy of an additive one.

fast: with the Gluon kernels of hopper/ where they suit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.selection import receiving_heads
from eah_kernels.triton import attend as _attend
from eah_kernels.triton import few_rows as _few_rows
from eah_kernels.triton import lse as _lse
from eah_kernels.triton import one_pass as _one_pass
from eah_kernels.triton import pack as _pack
from eah_kernels.triton import sinks as _sinks
from eah_kernels.triton.bundles import LSE_PAD, Choice, Tally
from eah_kernels.triton.launch import LOG2E, Problem, image_bytes, narrow, packed_view
from eah_kernels.triton.plan import Plan, plan_of


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring, fast: bool = False):
    problem, value, image = Problem(query, key, scoring, fast=fast), narrow(value), image_bytes(image_mask)
    batch, heads, q_len, _ = query.shape
    output = empty_output(query, value)
    minus_lse = query.new_empty(batch, heads, _lse.padded_length(q_len), dtype=torch.float32)
    with torch.cuda.device_of(query):
        plan = plan_of("eah_attention", problem, value.shape[3], scoring.attention_mask, value, image, output)
        if scoring.attention_mask is not None:
            plan.launch(_pack.pack(problem, scoring.attention_mask))
        head, sink_counts = _choose(plan, problem, image, threshold, min_density, minus_lse)
        plan.launch(_attend.attend(problem, value, head, output, minus_lse))
    return output, head, sink_counts


def eah_attention_varlen(
    query, key, value, image_mask, cu_seqlens, max_seqlen, output, threshold, min_density, number, scoring: Scoring
):
    """Fills output (T, Hq, Dv). In the launches of one sequence; see ../varlen.py."""
    tokens, heads, _ = query.shape
    sequences, longest = cu_seqlens.shape[0] - 1, min(max_seqlen, tokens)
    if sequences == 0 or longest == 0:
        head = cu_seqlens.new_full((sequences,), -1)
        return head, head.new_zeros(sequences, heads)
    bounds, image = cu_seqlens.contiguous(), image_bytes(image_mask)
    q, k, v, out = (packed_view(tensor, sequences) for tensor in (query, key, value, output))
    problem = Problem(q, k, scoring, cu_seqlens=bounds, longest=longest)
    minus_lse = query.new_empty(heads, _lse.padded_length(tokens) + sequences * LSE_PAD.value, dtype=torch.float32)
    minus_lse = minus_lse.expand(sequences, -1, -1)

    with torch.cuda.device_of(query):
        plan = plan_of("eah_attention_varlen", problem, v.shape[3], None, v, image, out, bounds)
        head, sink_counts = _choose(plan, problem, image, threshold, min_density, minus_lse)
        plan.launch(_attend.attend(problem, v, head, out, minus_lse))
        if number is not None:
            own = torch.empty_like(out[0]).expand_as(out)
            plan = plan_of("own maps of packed sequences", problem, v.shape[3], None, v, own, bounds)
            plan.launch(_attend.attend(problem, v, torch.full_like(head, -1), own, minus_lse))
            sequence = torch.bucketize(torch.arange(tokens, device=query.device), bounds[1:-1], right=True)
            receives = receiving_heads(sink_counts, head, number)[sequence]
            out[0].copy_(torch.where(receives.T[..., None], out[0], own[0]))
    if out.data_ptr() != output.data_ptr():  # strides too large for a tile's offsets
        output.copy_(out[0].transpose(0, 1))
    return head, sink_counts


def _choose(plan: Plan, problem: Problem, image, threshold, min_density, minus_lse) -> tuple[Tensor, Tensor]:
    """Fills minus_lse where it is read. The chosen heads and the sinks of each."""
    query = problem.query
    batch, heads = query.shape[:2]
    sink_counts = query.new_empty(batch, heads, dtype=torch.int32)
    head = query.new_empty(batch, dtype=torch.int32)
    choice = Choice(head, min_density)
    if _one_pass.takes(problem):
        tickets = _one_pass.zeroed_tickets(query)
        plan.launch(_one_pass.one_pass(problem, image, threshold, minus_lse, sink_counts, tickets, choice))
    else:
        tally = Tally(sink_counts, query.new_empty(batch, 2, dtype=torch.int32))
        plan.launch(
            _lse.lse(problem, minus_lse, image=image, tally=tally),
            _sinks.sinks(problem, image, minus_lse, threshold, tally, choice=choice),
        )
    return head, sink_counts


def sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring: Scoring, fast: bool = False):
    problem, image = Problem(query, key, scoring, fast=fast), image_bytes(image_mask)
    batch, heads, q_len, _ = query.shape
    sink_counts = query.new_zeros(batch, heads, dtype=torch.int32)
    minus_lse = query.new_empty(batch, heads, _lse.padded_length(q_len), dtype=torch.float32)
    mean_shape = (batch, heads, key.shape[2]) if return_column_mean else (0,)
    column_mean = query.new_zeros(mean_shape, dtype=torch.float32)
    mean = column_mean if return_column_mean else None
    with torch.cuda.device_of(query):
        plan = plan_of("sink_statistics", problem, 0, scoring.attention_mask, image, mean)
        if scoring.attention_mask is not None:
            plan.launch(_pack.pack(problem, scoring.attention_mask))
        plan.launch(
            _lse.lse(problem, minus_lse),
            _sinks.sinks(problem, image, minus_lse, threshold, Tally(sink_counts), column_mean=mean),
        )
    natural = minus_lse[..., :q_len] / -LOG2E
    return sink_counts, torch.where(natural == torch.inf, -torch.inf, natural), column_mean


def shared_map_attention(query, key, value, head, scoring: Scoring, fast: bool = False) -> Tensor:
    few = query.shape[2] <= _few_rows.MAX_ROWS
    problem = Problem(query, key, scoring, fast=fast, by_key=not few)
    value, head = narrow(value), head.contiguous()
    batch, heads, q_len, _ = query.shape
    output = empty_output(query, value)
    with torch.cuda.device_of(query):
        if few:
            plan = plan_of("few rows", problem, value.shape[3], value, head, output)
            plan.launch(*_few_rows.few_rows(problem, value, head, output))
            return output
        minus_lse = query.new_empty(batch, 1, _lse.padded_length(q_len), dtype=torch.float32)
        plan = plan_of("shared_map_attention", problem, value.shape[3], scoring.attention_mask, value, head, output)
        if scoring.attention_mask is not None:
            plan.launch(_pack.pack(problem, scoring.attention_mask))
        plan.launch(
            _lse.lse(problem, minus_lse, head=head),
            _attend.attend(problem, value, head, output, minus_lse.expand(-1, heads, -1)),
        )
    return output

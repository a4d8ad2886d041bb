"""backend="triton": the fused kernels. No host synchronisation; memory linear in length, but for a 4-D mask's bits.

fast: with the Gluon kernels of hopper/ where they suit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.triton import attend as _attend
from eah_kernels.triton import few_rows as _few_rows
from eah_kernels.triton import lse as _lse
from eah_kernels.triton import one_pass as _one_pass
from eah_kernels.triton import pack as _pack
from eah_kernels.triton import sinks as _sinks
from eah_kernels.triton.bundles import Choice, Tally
from eah_kernels.triton.launch import LOG2E, Problem


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring, fast: bool = False):
    problem = Problem(query, key, scoring, fast=fast)
    batch, heads, q_len, _ = query.shape
    sink_counts = query.new_empty(batch, heads, dtype=torch.int32)
    minus_lse = query.new_empty(batch, heads, _lse.padded_length(q_len), dtype=torch.float32)
    head = query.new_empty(batch, dtype=torch.int32)
    choice = Choice(head, min_density)
    output = empty_output(query, value)
    with torch.cuda.device_of(query):
        if problem.mask is not None:
            _pack.pack(problem, problem.mask).run()
        if _one_pass.takes(problem):
            tickets = _one_pass.zeroed_tickets(query)
            _one_pass.one_pass(problem, image_mask, threshold, minus_lse, sink_counts, tickets, choice).run()
        else:
            tally = Tally(sink_counts, query.new_empty(batch, 2, dtype=torch.int32))
            _lse.lse(problem, minus_lse, image_mask=image_mask, tally=tally).run()
            _sinks.sinks(problem, image_mask, minus_lse, threshold, tally, choice=choice).run()
        _attend.attend(problem, value, head, output, minus_lse).run()
    return output, head, sink_counts


def sink_statistics(query, key, image_mask, threshold, return_column_mean, scoring: Scoring, fast: bool = False):
    problem = Problem(query, key, scoring, fast=fast)
    batch, heads, q_len, _ = query.shape
    sink_counts = query.new_zeros(batch, heads, dtype=torch.int32)
    minus_lse = query.new_empty(batch, heads, _lse.padded_length(q_len), dtype=torch.float32)
    mean_shape = (batch, heads, key.shape[2]) if return_column_mean else (0,)
    column_mean = query.new_zeros(mean_shape, dtype=torch.float32)
    with torch.cuda.device_of(query):
        if problem.mask is not None:
            _pack.pack(problem, problem.mask).run()
        _lse.lse(problem, minus_lse).run()
        mean = column_mean if return_column_mean else None
        _sinks.sinks(problem, image_mask, minus_lse, threshold, Tally(sink_counts), column_mean=mean).run()
    natural = minus_lse[..., :q_len] / -LOG2E
    return sink_counts, torch.where(natural == torch.inf, -torch.inf, natural), column_mean


def shared_map_attention(query, key, value, head, scoring: Scoring, fast: bool = False) -> Tensor:
    problem = Problem(query, key, scoring, fast=fast)
    head = head.contiguous()
    batch, heads, q_len, _ = query.shape
    output = empty_output(query, value)
    if q_len <= _few_rows.MAX_ROWS:
        with torch.cuda.device_of(query):
            for launch in _few_rows.few_rows(problem, value, head, output):
                launch.run()
        return output
    minus_lse = query.new_empty(batch, 1, _lse.padded_length(q_len), dtype=torch.float32)
    with torch.cuda.device_of(query):
        if problem.mask is not None:
            _pack.pack(problem, problem.mask).run()
        _lse.lse(problem, minus_lse, head=head).run()
        _attend.attend(problem, value, head, output, minus_lse.expand(-1, heads, -1)).run()
    return output

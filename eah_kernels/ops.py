"""torch.library ops over the inference backends. Each returns plain tensors; a backend is imported when it first runs.

A backend is a module with `eah_attention`, `sink_statistics` and `shared_map_attention`, each taking a `Scoring`. Only
"torch" has `heads_by_row`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from eah_kernels.backends import ROWS
from eah_kernels.checks import REFUSED_GRAD
from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring

SCORING = "Tensor? attention_mask, bool causal, float scale, int? sliding_window, float? softcap, str backend"


@cache
def backend_module(name: str) -> ModuleType:
    module = ROWS[name].module
    assert module is not None, f"{name} is called without an op"
    return import_module(module)


@torch.library.custom_op(
    "eah_kernels::eah_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor image_mask, float threshold, float min_density, "
    f"{SCORING}) -> (Tensor output, Tensor head, Tensor sink_counts)",
)
def eah_attention(query, key, value, image_mask, threshold, min_density, *scoring_backend):
    *scoring, backend = scoring_backend
    arguments = query, key, value, image_mask, threshold, min_density
    return backend_module(backend).eah_attention(*arguments, Scoring(*scoring))


@eah_attention.register_fake
def _(query, key, value, image_mask, *_):
    batch, heads = query.shape[:2]
    integers = query.new_empty(batch, heads, dtype=torch.int32)
    return empty_output(query, value), integers.new_empty(batch), integers


@torch.library.custom_op(
    "eah_kernels::sink_statistics",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor image_mask, float threshold, bool return_column_mean, "
    f"{SCORING}) -> (Tensor sink_counts, Tensor lse, Tensor column_mean)",
)
def sink_statistics(query, key, image_mask, threshold, return_column_mean, *scoring_backend):
    """Without `return_column_mean`, column_mean is (0,)."""
    *scoring, backend = scoring_backend
    arguments = query, key, image_mask, threshold, return_column_mean
    return backend_module(backend).sink_statistics(*arguments, Scoring(*scoring))


@sink_statistics.register_fake
def _(query, key, image_mask, threshold, return_column_mean, *_):
    batch, heads, q_len, _ = query.shape
    mean_shape = (batch, heads, key.shape[2]) if return_column_mean else (0,)
    return (
        query.new_empty(batch, heads, dtype=torch.int32),
        query.new_empty(batch, heads, q_len, dtype=torch.float32),
        query.new_empty(mean_shape, dtype=torch.float32),
    )


@torch.library.custom_op(
    "eah_kernels::shared_map_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor head, {SCORING}) -> Tensor",
)
def shared_map_attention(query, key, value, head, *scoring_backend):
    """head is (B,) or (B, Sq)."""
    *scoring, backend = scoring_backend
    attend = backend_module(backend).shared_map_attention
    if head.dim() == 2:
        return _by_row(attend, query, key, value, head, Scoring(*scoring))
    return attend(query, key, value, head, Scoring(*scoring))


@shared_map_attention.register_fake
def _(query, key, value, head, *_):
    return empty_output(query, value)


def _by_row(attend, query, key, value, head, scoring: Scoring) -> Tensor:
    """Rows that share a head are attended together. Reads the heads on the host."""
    q_len, kv_len = query.shape[2], key.shape[2]
    output = empty_output(query, value)
    for b, heads in enumerate(head.tolist()):
        row, rules = slice(b, b + 1), scoring.at(b)
        for chosen in sorted(set(heads)):
            one = head.new_full((1,), chosen)
            if heads.count(chosen) == q_len:
                output[row] = attend(query[row], key[row], value[row], one, rules)
                continue
            rows = (head[b] == chosen).nonzero().flatten()
            some = rules.of_rows(rows, q_len, kv_len, query.device)
            output[row, :, rows] = attend(query[row][:, :, rows], key[row], value[row], one, some)
    return output


@torch.library.custom_op(
    "eah_kernels::heads_by_row",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor image_mask, Tensor column_sum, Tensor seeing, float threshold, "
    f"float min_density, {SCORING}) -> (Tensor head, Tensor sink_counts, Tensor column_sum, Tensor seeing)",
)
def heads_by_row(query, key, image_mask, column_sum, seeing, threshold, min_density, *scoring_backend):
    *scoring, backend = scoring_backend
    arguments = query, key, image_mask, column_sum, seeing, threshold, min_density
    return backend_module(backend).heads_by_row(*arguments, Scoring(*scoring))


@heads_by_row.register_fake
def _(query, key, image_mask, column_sum, seeing, threshold, min_density, *scoring_backend):
    batch, heads, q_len, _ = query.shape
    counts = query.new_empty(batch, heads, q_len, dtype=torch.int32)
    mask_heads = max(seeing.shape[1], Scoring(*scoring_backend[:-1]).mask_heads)
    seeing = seeing.new_empty(batch, mask_heads, seeing.shape[2])
    return counts.new_empty(batch, q_len), counts, torch.empty_like(column_sum), seeing


def _refuse_grad(ctx, inputs, output):
    raise RuntimeError(REFUSED_GRAD)


def _no_backward(ctx, *grads):
    raise AssertionError("unreachable: the forward refuses inputs that require grad")


for _op in (eah_attention, sink_statistics, shared_map_attention, heads_by_row):
    _op.register_autograd(_no_backward, setup_context=_refuse_grad)

"""The public functions: they check their arguments (checks.py) and hand them to a backend.

Nothing here reads a value on the device: checks look at shapes, dtypes, devices and Python numbers only.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from eah_kernels import ops, reference, selection
from eah_kernels.backends import Call, choose_backend
from eah_kernels.checks import (
    check_counts,
    check_fraction,
    check_head,
    check_image_mask,
    check_scoring,
    check_value,
    describe,
    receivers,
    refuse_derivatives,
    require_tensors,
)
from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring
from eah_kernels.precision import exact, reference_dtype


class EAHResult(NamedTuple):
    """output (B, Hq, Sq, Dv) in query's dtype; head (B,) int32, -1 = none; sink_counts (B, Hq) int32."""

    output: Tensor
    head: Tensor
    sink_counts: Tensor

    def __repr__(self) -> str:
        return _named_shapes(self)


class SinkStatistics(NamedTuple):
    """sink_counts (B, Hq) int32; lse (B, Hq, Sq) float32, natural log; column_mean (B, Hq, Skv) float32 or None."""

    sink_counts: Tensor
    lse: Tensor
    column_mean: Tensor | None

    def __repr__(self) -> str:
        return _named_shapes(self)


def eah_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_mask: Tensor,
    *,
    threshold: float = 0.002,
    min_density: float = 0.0,
    broadcast_to: int | Literal["all"] = "all",
    attention_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> EAHResult:
    """Attention in which the head with the most vision sinks lends its map to every head (arXiv 2411.09968, section 4).

    Per batch row: a vision sink of head h is an image-token key whose attention, averaged over the rows that can see
    it (its own row left out), exceeds `threshold`; the head with the most sinks, lowest index on a tie, is chosen.
    No head is chosen (-1) when it has no sink, or when sinks / image tokens < `min_density`: that row's output is then
    ordinary attention.

    Args:
        query: (B, Hq, Sq, D). float16, bfloat16, float32 or float64; any strides, as for key and value.
        key: (B, Hkv, Skv, D), Hkv a divisor of Hq (grouped-query attention); query's dtype and device.
        value: (B, Hkv, Skv, Dv); query's dtype and device. D and Dv at most 256.
        image_mask: (B, Skv) bool, True where the key is an image token.
        threshold: a mean attention probability, >= 0.
        min_density: a fraction of the row's image tokens, 0..1.
        broadcast_to: how many heads receive the map, 1..Hq: those with the fewest sinks, the higher index on a tie (the
            paper's ablation). The others keep their own. A number below Hq costs ordinary attention on top.
        attention_mask: None; (B, Skv) bool, True = real key; (B|1, 1|Hq, Sq, Skv) bool, True = visible; or that shape
            in a floating dtype, added to the scaled, soft-capped score: an entry <= finfo(dtype).min / 2 hides the key.
            float64 is read as float32 unless query is float64.
        causal: hide the keys after row i's own position i + Skv - Sq; combined with attention_mask.
        scale: multiplies q . k; default 1 / sqrt(D).
        sliding_window: hide the keys at own position - sliding_window and before; >= 1.
        softcap: c within 1e-30..1e30 turns the scaled score s into c * tanh(s / c).
        backend: "auto" (see backends.py), "reference" (eager, differentiable), "torch" (blocked, any device),
            "triton" (CUDA or ROCm device, or TRITON_INTERPRET=1) or "native" (the C++ extension: CPU, and on CUDA
            devices what native/cuda.py takes). A named backend never falls back.

    Returns:
        EAHResult. A row of `output` that sees no key is 0. A batch row without image token has head -1 and counts 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, a backend that cannot be used here among them; the message
            names the argument and says why.
        RuntimeError: an input requires grad under grad mode, or has a tangent of forward-mode differentiation, and the
            backend is not "reference".
    """
    scoring = check_scoring(query, key, attention_mask, causal, scale, sliding_window, softcap)
    check_value(query, key, value)
    check_image_mask(image_mask, query.shape[0], key.shape[2], query.device)
    check_fraction("threshold", threshold, math.inf)
    check_fraction("min_density", min_density, 1.0)
    number = receivers(broadcast_to, query.shape[1])
    # A number of heads is chosen from the statistics.
    function = "eah_attention" if number is None else "sink_statistics"
    backend = choose_backend(backend, Call(function, query, key, value, scoring))
    refuse_derivatives(backend, query, key, value, attention_mask)
    if query.numel() == 0 or key.shape[2] == 0 or value.numel() == 0:
        counts = query.new_zeros(query.shape[:2], dtype=torch.int32)
        return EAHResult(empty_output(query, value).zero_(), counts.new_full(query.shape[:1], -1), counts)
    with exact(query):
        return enhanced(query, key, value, image_mask, threshold, min_density, number, scoring, backend)


def enhanced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_mask: Tensor,
    threshold: float,
    min_density: float,
    number: int | None,
    scoring: Scoring,
    backend: str,
) -> EAHResult:
    """`eah_attention` of arguments that were checked and are not empty. number: of the receiving heads; None = all."""
    arguments = query, key, value, image_mask, threshold, min_density
    if backend == "reference":
        return EAHResult(*reference.eah_attention(*arguments, scoring, reference_dtype(query), number))
    if number is None:
        return EAHResult(*ops.eah_attention(*arguments, *scoring, backend))
    sink_counts, _, _ = ops.sink_statistics(query, key, image_mask, threshold, False, *scoring, backend)
    head = selection.select_head(sink_counts, image_mask, min_density)
    receives = selection.receiving_heads(sink_counts, head, number)
    return EAHResult(_lend(query, key, value, head, receives, scoring, backend), head, sink_counts)


def sink_statistics(
    query: Tensor,
    key: Tensor,
    image_mask: Tensor,
    *,
    threshold: float = 0.002,
    attention_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    return_column_mean: bool = False,
    backend: str = "auto",
) -> SinkStatistics:
    """The vision sinks of every head, without choosing one. Arguments and errors as for `eah_attention`.

    Returns:
        SinkStatistics: sink_counts (B, Hq) int32; lse (B, Hq, Sq) float32, the natural log of each row's sum of
        exponentials, -inf for a row that sees no key; column_mean (B, Hq, Skv) float32, the mean attention c_h[j] of
        each image-token key, 0 elsewhere, or None unless `return_column_mean`.
    """
    scoring = check_scoring(query, key, attention_mask, causal, scale, sliding_window, softcap)
    check_image_mask(image_mask, query.shape[0], key.shape[2], query.device)
    check_fraction("threshold", threshold, math.inf)
    backend = choose_backend(backend, Call("sink_statistics", query, key, None, scoring))
    refuse_derivatives(backend, query, key, attention_mask)
    batch, heads, q_len, _ = query.shape
    if query.numel() == 0 or key.shape[2] == 0:
        counts = query.new_zeros(batch, heads, dtype=torch.int32)
        lse = query.new_full((batch, heads, q_len), -math.inf, dtype=torch.float32)
        mean = query.new_zeros(batch, heads, key.shape[2], dtype=torch.float32)
    else:
        arguments = query, key, image_mask, threshold
        with exact(query):
            if backend == "reference":
                counts, lse, mean = reference.sink_statistics(*arguments, scoring, reference_dtype(query))
                lse, mean = lse.float(), mean.float()
            else:
                counts, lse, mean = ops.sink_statistics(*arguments, return_column_mean, *scoring, backend)
    return SinkStatistics(counts, lse, mean if return_column_mean else None)


def seeing_rows(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None = None,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
) -> Tensor:
    """How many rows each key's column mean is taken over: n_j, the counting rows other than its own that see key j.

    Arguments and errors as for `eah_attention`; of query and key only the shapes matter. column_mean * n_j is the sum
    of the column, to which the rows of later forwards can be added.

    Returns:
        (B, Hq, Skv) int32.
    """
    scoring = check_scoring(query, key, attention_mask, causal, None, sliding_window, None)
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    if q_len == 0 or kv_len == 0:
        return torch.zeros(batch, heads, kv_len, dtype=torch.int32, device=query.device)
    return scoring.seeing_rows(q_len, kv_len, query.device).expand(batch, heads, kv_len).contiguous()


def select_head(sink_counts: Tensor, image_mask: Tensor, min_density: float = 0.0) -> Tensor:
    """The head with the most sinks per batch row, lowest index on a tie.

    Args:
        sink_counts: (B, Hq) int32, from `sink_statistics`.
        image_mask: (B, Skv) bool.
        min_density: no head below this many sinks per image token, 0..1.

    Returns:
        (B,) int32; -1 where no head has a sink, the row has no image token, or the density is below `min_density`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_counts(sink_counts)
    check_image_mask(image_mask, sink_counts.shape[0], None, sink_counts.device)
    check_fraction("min_density", min_density, 1.0)
    return selection.select_head(sink_counts, image_mask, min_density)


def receiving_heads(sink_counts: Tensor, head: Tensor, broadcast_to: int | Literal["all"]) -> Tensor:
    """The heads that take the chosen head's map: those with the fewest sinks, the higher index on a tie.

    Args:
        sink_counts: (B, Hq) int32, from `sink_statistics`.
        head: (B,) int32, from `select_head`.
        broadcast_to: how many, 1..Hq, or "all".

    Returns:
        (B, Hq) bool; no head of a row whose `head` is -1.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_counts(sink_counts)
    check_head(head, sink_counts)
    number = receivers(broadcast_to, sink_counts.shape[1])
    return selection.receiving_heads(sink_counts, head, sink_counts.shape[1] if number is None else number)


def shared_map_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head: Tensor,
    *,
    receives: Tensor | None = None,
    attention_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with the map of `head` for every head: P_{h*} V_h, or P_h V_h where `head` is -1.

    Args:
        head: (B,) or, for a choice by row, (B, Sq) int32, each -1 or a query head's index (not checked: that would
            read the device, which a choice by row does).
        receives: (B, Hq) or (B, Hq, Sq) bool, as from `receiving_heads`: the heads that take the map; the others keep
            their own.
        The others as for `eah_attention`, and so the errors.

    Returns:
        (B, Hq, Sq, Dv) in query's dtype, 0 for a row that sees no key.
    """
    scoring = check_scoring(query, key, attention_mask, causal, scale, sliding_window, softcap)
    check_value(query, key, value)
    batch, heads, q_len, _ = query.shape
    check_head(head, query, q_len)
    if receives is not None:
        require_tensors(receives=receives)
        shapes = (batch, heads), (batch, heads, q_len)
        if tuple(receives.shape) not in shapes or receives.dtype != torch.bool or receives.device != query.device:
            accepted = f"{shapes[0]} or {shapes[1]} bool on {query.device}"
            raise ValueError(f"receives must be {accepted}, got {describe(receives)}")
    backend = choose_backend(backend, Call("shared_map_attention", query, key, value, scoring))
    refuse_derivatives(backend, query, key, value, attention_mask)
    if query.numel() == 0 or key.shape[2] == 0 or value.numel() == 0:
        return empty_output(query, value).zero_()
    with exact(query):
        if backend == "reference":
            return reference.shared_map_attention(query, key, value, head, scoring, reference_dtype(query), receives)
        return _lend(query, key, value, head, receives, scoring, backend)


def _lend(query, key, value, head, receives, scoring: Scoring, backend: str) -> Tensor:
    shared = ops.shared_map_attention(query, key, value, head, *scoring, backend)
    if receives is None:
        return shared
    none = head.new_full(head.shape[:1], -1)
    own = ops.shared_map_attention(query, key, value, none, *scoring, backend)
    receives = receives[..., None] if receives.dim() == 2 else receives
    return torch.where(receives[..., None], shared, own)  # where head is -1 they are the same


def _named_shapes(result: NamedTuple) -> str:
    """A result in one line: it is printed without reading the device."""
    fields = (f"{name}={describe(t) if t is not None else None}" for name, t in result._asdict().items())
    return f"{type(result).__name__}({', '.join(fields)})"

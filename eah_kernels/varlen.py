"""EAH on packed sequences: several prompts one after the other in one tensor, as serving engines hold their tokens."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from eah_kernels.api import EAHResult, enhanced
from eah_kernels.backends import Call, choose_backend
from eah_kernels.checks import (
    check_fraction,
    check_image_mask,
    check_scoring,
    check_value,
    describe,
    receivers,
    refuse_derivatives,
    require_tensors,
)
from eah_kernels.masks import Scoring
from eah_kernels.ops import backend_module
from eah_kernels.precision import exact

AT_ONCE = ("triton", "gluon")  # the backends with an `eah_attention_varlen`; the others take a sequence at a time


def eah_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_mask: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    threshold: float = 0.002,
    min_density: float = 0.0,
    broadcast_to: int | Literal["all"] = "all",
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> EAHResult:
    """`eah_attention` of N sequences of different lengths, packed without padding; names as in flash_attn_varlen_func.

    Equal to N causal calls, each with the tokens of one sequence. Each has its own head, or none. Backend "triton"
    takes all of them in as many launches as one, without a synchronisation; the others take one after the other.

    Args:
        query: (T, Hq, D), T tokens in all. float16, bfloat16, float32 or float64; any strides, as for key and value.
        key: (T, Hkv, D), Hkv a divisor of Hq; query's dtype and device.
        value: (T, Hkv, Dv); query's dtype and device. D and Dv at most 256.
        image_mask: (T,) bool, True where the key is an image token.
        cu_seqlens: (N + 1,) int32 on query's device: sequence n is tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1. It
            begins with 0, does not decrease and ends with T; a sequence may be empty.
        max_seqlen: the number of tokens of the longest sequence, or any larger number.
        out: (T, Hq, Dv), query's dtype and device: where the output is written. It may have any strides; its memory
            must not overlap with itself or with the inputs'.
        The others as for `eah_attention`.

    Where it costs no synchronisation, on the CPU and in every other backend than "triton", the values of cu_seqlens are
    checked and max_seqlen with them. "triton" on a device instead takes what they say within 0..T, and of each sequence
    max_seqlen tokens at most: nothing beyond the tensors is read or written, and rows of the output that are then in no
    sequence stay as they were.

    Returns:
        EAHResult: output (T, Hq, Dv) in query's dtype, `out` if it was given; head (N,) int32, -1 = none, as of an
        empty sequence; sink_counts (N, Hq) int32.

    Raises:
        TypeError, ValueError: as `eah_attention`.
        RuntimeError: an input requires grad under grad mode and the backend is not "reference", or `out` is given.
    """
    _check_packed(query, key, value, image_mask, cu_seqlens, max_seqlen)
    batched = as_batch(query), as_batch(key), as_batch(value)
    scoring = check_scoring(*batched[:2], None, True, scale, sliding_window, softcap)
    check_value(*batched)
    check_fraction("threshold", threshold, math.inf)
    check_fraction("min_density", min_density, 1.0)
    number = receivers(broadcast_to, query.shape[1])
    backend = choose_backend(backend, Call("eah_attention_varlen", *batched, scoring))
    _check_out(out, query, value)
    _refuse_grad_through(out, query, key, value)
    refuse_derivatives(backend, query, key, value)
    output = query.new_empty(*query.shape[:2], value.shape[2]) if out is None else out
    arguments = query, key, value, image_mask, cu_seqlens, max_seqlen, output, threshold, min_density, number
    rules = scoring.scale, scoring.sliding_window, scoring.softcap, backend
    with exact(query):
        run = one_by_one if backend == "reference" else packed
        head, sink_counts = run(*arguments, *rules)
    return EAHResult(output, head, sink_counts)


@torch.library.custom_op(
    "eah_kernels::eah_attention_varlen",
    mutates_args=("output",),
    schema="(Tensor query, Tensor key, Tensor value, Tensor image_mask, Tensor cu_seqlens, SymInt max_seqlen, "
    "Tensor(a!) output, float threshold, float min_density, int? number, float scale, int? sliding_window, "
    "float? softcap, str backend) -> (Tensor head, Tensor sink_counts)",
)
def packed(query, key, value, image_mask, cu_seqlens, max_seqlen, output, *knobs_rules_backend):
    _check_apart(output, query=query, key=key, value=value)
    arguments = query, key, value, image_mask, cu_seqlens, max_seqlen, output
    *knobs, scale, sliding_window, softcap, backend = knobs_rules_backend
    if backend not in AT_ONCE:
        return one_by_one(*arguments, *knobs_rules_backend)
    if cu_seqlens.device.type == "cpu":
        checked_bounds(cu_seqlens, max_seqlen, query.shape[0])
    scoring = Scoring(None, True, scale, sliding_window, softcap)
    return backend_module(backend).eah_attention_varlen(*arguments, *knobs, scoring)


@packed.register_fake
def _(query, key, value, image_mask, cu_seqlens, *_):
    head = cu_seqlens.new_empty(cu_seqlens.shape[0] - 1)
    return head, head.new_empty(*head.shape, query.shape[1])


def one_by_one(
    query, key, value, image_mask, cu_seqlens, max_seqlen, output, threshold, min_density, number, *rules_backend
) -> tuple[Tensor, Tensor]:
    """Fills `output`, a sequence at a time, and returns the heads and the sink counts."""
    *rules, backend = rules_backend
    scoring = Scoring(None, True, *rules)
    bounds = checked_bounds(cu_seqlens, max_seqlen, query.shape[0])
    head = cu_seqlens.new_full((len(bounds) - 1,), -1)
    sink_counts = head.new_zeros(*head.shape, query.shape[1])
    for n, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            continue
        tokens = slice(first, end)
        q, k, v = (as_batch(tensor[tokens]) for tensor in (query, key, value))
        one = enhanced(q, k, v, image_mask[None, tokens], threshold, min_density, number, scoring, backend)
        output[tokens] = one.output[0].transpose(0, 1)
        head[n], sink_counts[n] = one.head[0], one.sink_counts[0]
    return head, sink_counts


def as_batch(tensor: Tensor) -> Tensor:
    """(T, H, D) as one batch row, (1, H, T, D)."""
    return tensor.transpose(0, 1)[None]


def checked_bounds(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> list[int]:
    """The values of cu_seqlens, which are read on the host."""
    bounds = cu_seqlens.tolist()
    lengths = [end - first for first, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        accepted = f"must begin with 0, not decrease and end with the number of tokens, {tokens}"
        raise ValueError(f"cu_seqlens {accepted}, got {_shortened(bounds)}")
    longest = max(lengths, default=0)
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen must be at least the longest sequence's {longest} tokens, got {max_seqlen}")
    return bounds


def _shortened(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 16 else f"[{str(numbers[:8])[1:-1]}, ..., {str(numbers[-8:])[1:-1]}]"


def _check_packed(query, key, value, image_mask, cu_seqlens, max_seqlen) -> None:
    """What is said of packed tensors in other words than of batches."""
    require_tensors(query=query, key=key, value=value, image_mask=image_mask, cu_seqlens=cu_seqlens)
    if query.dim() != 3 or query.shape[1] == 0:
        raise ValueError(f"query must be (T, Hq, D) with Hq >= 1, got {describe(query)}")
    tokens = query.shape[0]
    for name, tensor, form in ("key", key, "(T, Hkv, D)"), ("value", value, "(T, Hkv, Dv)"):
        if tensor.dim() != 3 or tensor.shape[0] != tokens or tensor.shape[1] != key.shape[1]:
            heads = "" if name == "key" else f" and key's Hkv = {key.shape[1]}"
            raise ValueError(f"{name} must be {form} with query's T = {tokens}{heads}, got {describe(tensor)}")
    if tuple(image_mask.shape) != (tokens,):
        raise ValueError(f"image_mask must be (T,) = ({tokens},), got {tuple(image_mask.shape)}")
    check_image_mask(image_mask[None], 1, tokens, query.device)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (N + 1,) int32, got {describe(cu_seqlens)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on query's device {query.device}, got {cu_seqlens.device}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int >= 0, got {max_seqlen!r}")


def _check_out(out: Tensor | None, query: Tensor, value: Tensor) -> None:
    if out is None:
        return
    require_tensors(out=out)
    shape = *query.shape[:2], value.shape[2]
    if tuple(out.shape) != shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(f"out must be (T, Hq, Dv) = {shape} {query.dtype} on {query.device}, got {describe(out)}")
    dimensions = zip(out.stride(), out.shape, strict=True)
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in dimensions if size > 1):
        if stride <= reach:
            raise ValueError(f"out must not overlap with itself in memory, got strides {out.stride()}")
        reach += stride * (size - 1)


def _check_apart(output: Tensor, **inputs: Tensor) -> None:
    """Where the op runs: under torch.compile a tensor has no address before."""
    for name, tensor in inputs.items():
        if _overlap(output, tensor):
            raise ValueError(f"out must not overlap with {name} in memory")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype may share an entry, so far as their strides tell.

    They share none where one ends before the other begins, nor where they take turns in memory, as the halves of a
    fused tensor do: then they are apart already among the addresses within one step of a stride.
    """
    size = one.element_size()
    distance = (other.data_ptr() - one.data_ptr()) // size
    if one.numel() == 0 or other.numel() == 0 or not -_reach(other) < distance < _reach(one):
        return False
    steps = (step for step in one.stride() if step > 0)
    return not any(_reach(one, step) <= distance % step <= step - _reach(other, step) for step in steps)


def _reach(tensor: Tensor, step: int | None = None) -> int:
    """Entries from a tensor's first to its last one's end; of the strides that are no multiples of `step`, if given."""
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return 1 + sum(stride * (size - 1) for stride, size in strides if step is None or stride % step)


def _refuse_grad_through(out: Tensor | None, *inputs: Tensor) -> None:
    if out is not None and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, out)):
        raise RuntimeError("eah_kernels: no gradient flows through out; leave it out, or call under torch.no_grad()")

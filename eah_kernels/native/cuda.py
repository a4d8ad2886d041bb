"""backend="native" on CUDA devices: the kernels of csrc/cuda/, and what they take.

`eah_attention` is one launch for prompts of up to 1024 tokens, `shared_map_attention` one for a decoding step (one
query row). For sm_80 and up; its compiled PTX is executed on the CPU (tests/compiled), it was not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from eah_kernels.layout import empty_output
from eah_kernels.masks import Scoring

MAX_TOKENS = 1024  # csrc/cuda/attention.h, MAX_PREFILL
MAX_BATCH = 128  # the same file
HEAD_DIMS = (64, 128)
HALF = (torch.float16, torch.bfloat16)
ON_BOUNDARIES = "0: rows on 16-byte boundaries"
OPS = torch.ops.eah_kernels_cuda  # registered by eah_kernels._cuda; the tests put a stand-in here


def why_not() -> str | None:
    """Why eah_kernels._cuda cannot be used, or None: its ops are then registered."""
    return _load()


why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in cpu.py


@cache
def _load() -> str | None:
    try:
        import_module("eah_kernels._cuda")
    except ModuleNotFoundError:
        return (
            "the extension eah_kernels._cuda is not built; `pip install --no-build-isolation .` in a clone builds it "
            "where nvcc and a torch with CUDA are"
        )
    except ImportError as error:
        return f"the extension eah_kernels._cuda does not load: {error}"
    return None


def why_not_these(function: str, query: Tensor, key: Tensor, value: Tensor | None, scoring: Scoring) -> str | None:
    """Why the kernels do not take a call of one of the functions below, or None. When it runs, addresses count too."""
    if function == "eah_attention_varlen":
        return 'on a CUDA device it takes no packed sequences; backends "triton" and "torch" do'
    if value is None or function == "sink_statistics":
        return (
            "on a CUDA device it has no statistics of their own; accepted are eah_attention with "
            'broadcast_to="all", and shared_map_attention with one query row'
        )
    for fits, name, got, accepted in _wanted(function, query, key, value, scoring):
        if not fits:
            return _refusal(name, got, accepted)
    return None


def _wanted(function: str, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Iterator[tuple]:
    """What must be so, of what, what it is, and what is accepted."""
    q_len, kv_len, mask = query.shape[2], key.shape[2], scoring.attention_mask
    if function == "eah_attention":
        yield query.dtype in HALF, "query's dtype", query.dtype, "float16 and bfloat16"
        yield scoring.causal, "causal", scoring.causal, "True"
        yield q_len == kv_len, "key's length", kv_len, f"query's length, {q_len}"
        yield q_len <= MAX_TOKENS, "query's length", q_len, f"1..{MAX_TOKENS}"
    else:
        yield q_len == 1, "query's length", q_len, "1, a decoding step"
    form = "None" if mask is None else f"{mask.dim()}-D {mask.dtype}"
    yield mask is None or mask.dim() == 2, "attention_mask", form, "None and (B, Skv) torch.bool"
    yield scoring.sliding_window is None, "sliding_window", scoring.sliding_window, "None"
    yield scoring.softcap is None, "softcap", scoring.softcap, "None"
    yield query.shape[0] <= MAX_BATCH, "query's batch", query.shape[0], f"1..{MAX_BATCH}"
    dims = query.shape[-1], value.shape[-1]
    yield dims[0] == dims[1] in HEAD_DIMS, "the head dims of key and value", dims, "64 and 64, 128 and 128"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        yield tensor.stride(3) == 1, f"{name}'s last stride", tensor.stride(3), "1"
        past = _past_boundary(tensor)
        yield not any(past), f"{name}'s strides modulo 16 bytes", past, ON_BOUNDARIES


def _past_boundary(tensor: Tensor) -> list[int]:
    strides = zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    return [n * tensor.element_size() % 16 for n, length in strides if length > 1]


def _refusal(name: str, got, accepted: str) -> str:
    return f"its CUDA kernels do not take these inputs; {name}: got {got}, accepted: {accepted}"


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring):
    _check_addresses(query=query, key=key, value=value)
    output = empty_output(query, value)
    sink_counts = query.new_empty(query.shape[:2], dtype=torch.int32)
    head = query.new_empty(query.shape[0], dtype=torch.int32)
    scratch = query.new_empty(OPS.prefill_scratch(*query.shape[:3]), dtype=torch.float32)
    knobs = scoring.attention_mask, scoring.scale, threshold, min_density
    with torch.cuda.device_of(query):
        OPS.prefill(query, key, value, image_mask, *knobs, output, head, sink_counts, scratch)
    return output, head, sink_counts


def shared_map_attention(query, key, value, head, scoring: Scoring) -> Tensor:
    _check_addresses(query=query, key=key, value=value)
    output = empty_output(query, value)
    sizes = *query.shape[:2], *key.shape[1:3], query.shape[-1]
    scratch = query.new_empty(OPS.few_rows_scratch(*sizes), dtype=torch.float32)
    with torch.cuda.device_of(query):
        OPS.few_rows(query, key, value, head.contiguous(), scoring.attention_mask, scoring.scale, output, scratch)
    return output


def _check_addresses(**tensors: Tensor) -> None:
    """Where the op runs: under torch.compile a tensor has no address before."""
    for name, tensor in tensors.items():
        past = tensor.data_ptr() % 16
        if past:
            refusal = _refusal(f"{name}'s address modulo 16 bytes", past, ON_BOUNDARIES)
            raise ValueError(f'backend="native" cannot be used: {refusal}')

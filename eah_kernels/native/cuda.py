"""backend="native" on CUDA devices: the kernels of csrc/cuda/, and what they take.

`eah_attention` is one launch for prompts of up to 1024 tokens, `shared_map_attention` one for a decoding step (one
query row). For sm_80 and up; its compiled PTX is executed on the CPU (tests/compiled), it was not yet run on a GPU.
"""

from __future__ import annotations

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


def eah_attention(query, key, value, image_mask, threshold, min_density, scoring: Scoring):
    q_len, kv_len = query.shape[2], key.shape[2]
    _require(query.dtype in HALF, "query's dtype", query.dtype, "float16 and bfloat16")
    _require(scoring.causal, "causal", scoring.causal, "True")
    _require(q_len == kv_len, "key's length", kv_len, f"query's length, {q_len}")
    _require(q_len <= MAX_TOKENS, "query's length", q_len, f"1..{MAX_TOKENS}")
    _check(query, key, value, scoring)
    output = empty_output(query, value)
    sink_counts = query.new_empty(query.shape[:2], dtype=torch.int32)
    head = query.new_empty(query.shape[0], dtype=torch.int32)
    scratch = query.new_empty(OPS.prefill_scratch(*query.shape[:3]), dtype=torch.float32)
    knobs = scoring.attention_mask, scoring.scale, threshold, min_density
    with torch.cuda.device_of(query):
        OPS.prefill(query, key, value, image_mask, *knobs, output, head, sink_counts, scratch)
    return output, head, sink_counts


def sink_statistics(*_):
    raise ValueError(
        'backend="native" cannot be used: on a CUDA device it has no statistics of their own; accepted are '
        'eah_attention with broadcast_to="all", and shared_map_attention with one query row'
    )


def shared_map_attention(query, key, value, head, scoring: Scoring) -> Tensor:
    _require(query.shape[2] == 1, "query's length", query.shape[2], "1, a decoding step")
    _check(query, key, value, scoring)
    output = empty_output(query, value)
    sizes = *query.shape[:2], *key.shape[1:3], query.shape[-1]
    scratch = query.new_empty(OPS.decode_scratch(*sizes), dtype=torch.float32)
    with torch.cuda.device_of(query):
        OPS.decode(query, key, value, head.contiguous(), scoring.attention_mask, scoring.scale, output, scratch)
    return output


def _check(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> None:
    mask = scoring.attention_mask
    form = "None" if mask is None else f"{mask.dim()}-D {mask.dtype}"
    _require(mask is None or mask.dim() == 2, "attention_mask", form, "None and (B, Skv) torch.bool")
    _require(scoring.sliding_window is None, "sliding_window", scoring.sliding_window, "None")
    _require(scoring.softcap is None, "softcap", scoring.softcap, "None")
    _require(query.shape[0] <= MAX_BATCH, "query's batch", query.shape[0], f"1..{MAX_BATCH}")
    dims = query.shape[-1], value.shape[-1]
    _require(dims[0] == dims[1] in HEAD_DIMS, "the head dims of key and value", dims, "64 and 64, 128 and 128")
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        strides, size = tensor.stride(), tensor.element_size()
        _require(strides[3] == 1, f"{name}'s last stride", strides[3], "1")
        steps = [n * size for n, length in zip(strides[:3], tensor.shape[:3], strict=True) if length > 1]
        past = [n % 16 for n in (tensor.data_ptr(), *steps)]
        _require(not any(past), f"{name}'s address and strides modulo 16 bytes", past, "0: rows on 16-byte boundaries")


def _require(fits: bool, name: str, got, accepted: str) -> None:
    if not fits:
        raise ValueError(
            f'backend="native" cannot be used: its CUDA kernels do not take these inputs; {name}: got {got}, '
            f"accepted: {accepted}"
        )

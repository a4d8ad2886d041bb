"""Checks of the public functions' arguments: shapes, dtypes, devices, Python numbers, never a value on a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eah_kernels.masks import Scoring

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = torch.finfo(torch.float32).max
MAX_HEAD_DIM = 256
REFUSED = "eah_kernels: the torch, triton and native backends are for inference and query, key, value or attention_mask"
REFUSED_GRAD = f'{REFUSED} requires grad: use backend="reference", or call under torch.no_grad()'
REFUSED_TANGENT = f'{REFUSED} has a tangent of forward-mode differentiation: use backend="reference"'


def check_scoring(query, key, attention_mask, causal, scale, sliding_window, softcap) -> Scoring:
    require_tensors(query=query, key=key)
    if query.dim() != 4 or query.shape[1] == 0:
        raise ValueError(f"query must be (B, Hq, Sq, D) with Hq >= 1, got {describe(query)}")
    _, _, q_len, head_dim = query.shape
    if query.dtype not in DTYPES:
        raise TypeError(f"query must be {', '.join(map(str, DTYPES))}, got {query.dtype}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query's head dim must be 1..{MAX_HEAD_DIM}, got {head_dim}")
    _check_key_or_value("key", key, query)
    if key.shape[-1] != head_dim:
        raise ValueError(f"key's head dim must be query's, {head_dim}, got {key.shape[-1]}")
    kv_len = key.shape[2]
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    if causal and kv_len < q_len:
        raise ValueError(f"key must have at least query's length with causal=True, got {kv_len} keys for {q_len} rows")
    if attention_mask is not None:
        _check_attention_mask(attention_mask, query, kv_len)
    if sliding_window is not None and (type(sliding_window) is not int or sliding_window < 1):
        raise ValueError(f"sliding_window must be None or an int >= 1, got {sliding_window!r}")
    if softcap is not None and not (_is_number(softcap) and 1e-30 <= softcap <= 1e30):  # inverted in float32
        raise ValueError(f"softcap must be None or a number within 1e-30..1e30, got {softcap!r}")
    if sliding_window is not None and sliding_window >= kv_len:
        sliding_window = None
    if attention_mask is not None and attention_mask.dtype == torch.float64 != query.dtype:
        attention_mask = attention_mask.float()
    if scale is None:
        scale = head_dim**-0.5
    elif not (_is_number(scale) and abs(scale) <= LARGEST):
        raise ValueError(f"scale must be None or a number that float32 holds, got {scale!r}")
    return Scoring(attention_mask, causal, float(scale), sliding_window, softcap)


def check_counts(sink_counts: Tensor) -> None:
    require_tensors(sink_counts=sink_counts)
    if sink_counts.dim() != 2 or sink_counts.shape[1] == 0 or sink_counts.dtype != torch.int32:
        raise ValueError(f"sink_counts must be (B, Hq) int32 with Hq >= 1, got {describe(sink_counts)}")


def check_head(head: Tensor, like: Tensor, q_len: int | None = None) -> None:
    """(B,), or (B, Sq) where q_len is given."""
    require_tensors(head=head)
    batch = like.shape[0]
    by_row = q_len is not None and head.dim() == 2
    fits = tuple(head.shape) == ((batch, q_len) if by_row else (batch,))
    if not fits or head.dtype != torch.int32 or head.device != like.device:
        accepted = f"({batch},)" if q_len is None else f"({batch},) or ({batch}, {q_len})"
        raise ValueError(f"head must be {accepted} int32 on {like.device}, got {describe(head)}")


def receivers(broadcast_to: int | str, heads: int) -> int | None:
    """How many heads receive the map; None = all."""
    if broadcast_to == "all":
        return None
    if type(broadcast_to) is not int or not 1 <= broadcast_to <= heads:
        raise ValueError(f'broadcast_to must be "all" or an int within 1..{heads}, got {broadcast_to!r}')
    return broadcast_to if broadcast_to < heads else None


def check_value(query: Tensor, key: Tensor, value: Tensor) -> None:
    require_tensors(value=value)
    _check_key_or_value("value", value, query)
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(f"value must have key's heads and length {tuple(key.shape[1:3])}, got {describe(value)}")
    if not 1 <= value.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"value's head dim must be 1..{MAX_HEAD_DIM}, got {value.shape[-1]}")


def _check_key_or_value(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dim() != 4 or tensor.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must be (B, Hkv, Skv, D) with query's B = {query.shape[0]}, got {describe(tensor)}")
    if tensor.shape[1] == 0 or query.shape[1] % tensor.shape[1]:
        raise ValueError(f"{name}'s heads must divide query's {query.shape[1]} heads, got {tensor.shape[1]}")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_image_mask(image_mask: Tensor, batch: int, kv_len: int | None, device: torch.device) -> None:
    require_tensors(image_mask=image_mask)
    if image_mask.dtype != torch.bool:
        raise TypeError(f"image_mask must be torch.bool, got {image_mask.dtype}")
    expected = (batch, image_mask.shape[-1] if kv_len is None and image_mask.dim() == 2 else kv_len)
    if tuple(image_mask.shape) != expected:
        raise ValueError(f"image_mask must be (B, Skv) = {expected}, got {tuple(image_mask.shape)}")
    if image_mask.device != device:
        raise ValueError(f"image_mask must be on query's device {device}, got {image_mask.device}")


def _check_attention_mask(mask: Tensor, query: Tensor, kv_len: int) -> None:
    require_tensors(attention_mask=mask)
    batch, heads, q_len, _ = query.shape
    if mask.dim() == 2:
        fits = tuple(mask.shape) == (batch, kv_len)
    else:
        fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        fits = fits and tuple(mask.shape[2:]) == (q_len, kv_len)
    if not fits:
        raise ValueError(
            f"attention_mask must be (B, Skv) = {(batch, kv_len)} or (B|1, 1|Hq, Sq, Skv) = "
            f"({batch}|1, 1|{heads}, {q_len}, {kv_len}), got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and (mask.dim() == 2 or mask.dtype not in DTYPES):
        accepted = "torch.bool" if mask.dim() == 2 else f"torch.bool, {', '.join(map(str, DTYPES))}"
        raise TypeError(f"a {mask.dim()}-D attention_mask must be {accepted}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attention_mask must be on query's device {query.device}, got {mask.device}")


def check_fraction(name: str, number: float, most: float) -> None:
    if not (_is_number(number) and 0 <= number <= most):
        accepted = "a number >= 0" if most == math.inf else f"a number in 0..{most:g}"
        raise ValueError(f"{name} must be {accepted}, got {number!r}")


def _is_number(number) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool)


def refuse_derivatives(backend: str, *tensors: Tensor | None) -> None:
    """An op refuses gradients, too, but functorch's in other words, and a tangent would be lost without a word."""
    if backend == "reference":
        return
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        raise RuntimeError(REFUSED_GRAD)
    level = getattr(forward_ad, "_current_level", 0)  # asked for only to save 3 us a call
    if level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(REFUSED_TANGENT)


def require_tensors(**tensors) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "a nested tensor" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be a dense tensor, of layout torch.strided, got {layout}")


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"

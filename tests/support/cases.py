"""Inputs in which heads differ, and what every backend is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from eah_kernels import EAHResult, eah_attention, reference, shared_map_attention, sink_statistics
from eah_kernels.masks import Scoring
from eah_kernels.native import cpu
from eah_kernels.testing import agrees, largest_error

WHY_NOT_NATIVE = cpu.why_not()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(WHY_NOT_NATIVE is not None, reason=str(WHY_NOT_NATIVE)))


@dataclass(frozen=True)
class Case:
    """One layer's attention. `image`: first, middle, last, scattered, all, or absent (in batch row 0).

    `mask`: None; left or right (2-D padding); bool, bool_heads, bool_all (one for all rows), bias, bias_heads, bias_min
    (finfo.min hides), bias_rows (whole rows hidden), bool_causal, bias_causal (causality and left padding, as models
    build them), bias_few (the same, and a few entries that add something); `mask_dtype`: of a bias, where it is not
    query's.
    `layout`: bhsd, bshd (transformers'), sliced (last dim strided) or expanded (one KV head for all).
    """

    q_len: int = 63
    kv_len: int | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    dim: int = 64
    value_dim: int | None = None
    image: str = "middle"
    mask: str | None = None
    mask_dtype: torch.dtype | None = None
    causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    layout: str = "bshd"
    peak: float = 1.5

    def __str__(self):
        default = Case()
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return "-".join(changed) or "default"

    @property
    def rules(self) -> dict:
        return dict(causal=self.causal, sliding_window=self.sliding_window, softcap=self.softcap, scale=self.scale)


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    image_mask: Tensor
    attention_mask: Tensor | None
    rules: dict

    @property
    def scoring(self) -> Scoring:
        scale = self.query.shape[-1] ** -0.5 if self.rules["scale"] is None else self.rules["scale"]
        return Scoring(self.attention_mask, **{**self.rules, "scale": scale})

    def widened(self) -> Inputs:
        return replace(self, query=self.query.double(), key=self.key.double(), value=self.value.double())


def make(case: Case, dtype=torch.float32, device="cpu", seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    kv_len = case.kv_len or case.q_len

    def tensor(heads, length, dim, scale):
        shape = (case.batch, heads, length, dim)
        out = (torch.randn(shape, generator=generator) * scale).to(device, dtype)
        if case.layout == "bshd":
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        elif case.layout == "sliced":
            wide = out.new_full((*shape[:-1], 2 * dim + 3), torch.nan)
            wide[..., 3::2] = out
            out = wide[..., 3::2]
        elif case.layout == "expanded":
            out = out[:, :1].expand(shape)
        return surrounded(out) if case.layout == "bhsd" else out

    query = tensor(case.heads, case.q_len, case.dim, case.peak)
    key = tensor(case.kv_heads, kv_len, case.dim, case.peak)
    value = tensor(case.kv_heads, kv_len, case.value_dim or case.dim, 1.0)
    if case.layout == "expanded":
        query = query * torch.linspace(0.5, 1.5, case.heads, device=device, dtype=dtype)[:, None, None]
    image_mask = make_image(case, kv_len, generator).to(device)
    mask = make_mask(case, kv_len, generator, case.mask_dtype or dtype)
    return Inputs(query, key, value, image_mask, None if mask is None else mask.to(device), case.rules)


def surrounded(tensor: Tensor) -> Tensor:
    """The same tensor, its memory bordered by NaN: an over-read shows."""
    memory = tensor.new_full((tensor.numel() + 4096,), torch.nan)
    inside = memory[2048 : 2048 + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


LAYOUTS = ["sliced", "expanded", "reversed", "misaligned", "negated"]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory, among NaN, True or 0: reading past them shows.

    sliced: every stride doubled; expanded: one batch row for all; reversed: the dimensions in the opposite order;
    misaligned: one element off a 16-byte boundary; negated: floats kept with the opposite sign, as torch's views of
    complex tensors may.
    """
    if layout == "negated" and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if layout == "expanded":
        return laid_out(tensor[:1], "misaligned").expand_as(tensor)
    if layout == "reversed":
        order = range(tensor.dim() - 1, -1, -1)
        return tensor.permute(*order).contiguous().permute(*order)
    step = 2 if layout == "sliced" else 1
    shape = [step * size for size in tensor.shape]
    filler = torch.nan if tensor.is_floating_point() else tensor.dtype == torch.bool
    memory = torch.full((math.prod(shape) + 64,), filler, dtype=tensor.dtype, device=tensor.device)
    wide = memory[1 : 1 + math.prod(shape)].view(shape)
    return wide[tuple(slice(None, None, step) for _ in shape)].copy_(tensor)


def make_image(case: Case, kv_len: int, generator) -> Tensor:
    image = torch.zeros(case.batch, kv_len, dtype=torch.bool)
    third = max(1, kv_len // 3)
    if case.image == "scattered":
        image = torch.rand(case.batch, kv_len, generator=generator) < 0.3
    elif case.image == "all":
        image[:] = True
    else:
        start = {"first": 0, "middle": third // 2, "absent": third // 2, "last": kv_len - third}[case.image]
        image[:, start : start + 2 * third] = True
    if case.image == "absent":
        image[0] = False
    return image


def make_mask(case: Case, kv_len: int, generator, dtype) -> Tensor | None:
    if case.mask is None:
        return None
    pad = torch.tensor([kv_len // 5 * (b % 2) for b in range(case.batch)])
    key = torch.arange(kv_len)
    if case.mask == "left":
        return key >= pad[:, None]
    if case.mask == "right":
        return key < kv_len - pad[:, None]
    heads = case.heads if case.mask.endswith("heads") else 1
    shape = (1 if case.mask == "bool_all" else case.batch, heads, case.q_len, kv_len)
    shown = torch.rand(shape, generator=generator) < 0.7
    if case.mask in ("bool_causal", "bias_causal", "bias_few"):
        position = torch.arange(case.q_len)[:, None] + kv_len - case.q_len
        shown = ((key >= pad[:, None])[:, None] & (key <= position))[:, None]
    if case.mask == "bias_rows":
        shown[:, :, case.q_len // 3 : case.q_len // 2] = False
    if case.mask.startswith("bool"):
        return shown
    bias = torch.randn(shape, generator=generator).to(dtype)
    if case.mask in ("bias_causal", "bias_few"):
        bias = torch.zeros(shape, dtype=dtype)
    if case.mask == "bias_few":
        bias[:, :, case.q_len // 2 : case.q_len // 2 + 9, 20:30] = 1.0
    least = torch.finfo(dtype).min if case.mask in ("bias_min", "bias_causal") else -torch.inf
    return bias.masked_fill(~shown, least)


def pick_threshold(column_mean: Tensor, image_mask: Tensor) -> float:
    """A threshold that splits the columns and that no column mean is near: counts can then be compared exactly."""
    means = column_mean[image_mask[:, None].expand_as(column_mean)].sort().values
    means = means[means > 0]
    if means.numel() < 4:
        return 0.002
    middle = means[means.numel() // 2 : -1 if means.numel() < 20 else means.numel() * 19 // 20]
    gap = middle.diff().argmax() if middle.numel() > 1 else 0
    return float((middle[gap] + middle[min(gap + 1, middle.numel() - 1)]) / 2)


def exact(inputs: Inputs, threshold: float | None = None):
    """The float64 reference: (output, head, sink_counts, lse, column_mean, threshold)."""
    wide = inputs.widened()
    scoring = wide.scoring
    _, lse, mean = reference.sink_statistics(wide.query, wide.key, wide.image_mask, 0.0, scoring, torch.float64)
    threshold = pick_threshold(mean, inputs.image_mask) if threshold is None else threshold
    output, head, counts = reference.eah_attention(
        wide.query, wide.key, wide.value, wide.image_mask, threshold, 0.0, scoring, torch.float64
    )
    return output, head, counts, lse, mean, threshold


def run(inputs: Inputs, threshold: float, backend: str) -> EAHResult:
    options = dict(attention_mask=inputs.attention_mask, backend=backend, **inputs.rules)
    return eah_attention(inputs.query, inputs.key, inputs.value, inputs.image_mask, threshold=threshold, **options)


def column_mean(inputs: Inputs, backend: str) -> Tensor:
    options = dict(attention_mask=inputs.attention_mask, backend=backend, **inputs.rules)
    return sink_statistics(inputs.query, inputs.key, inputs.image_mask, return_column_mean=True, **options).column_mean


def assert_close(out: Tensor, ref: Tensor, plain: Tensor, value: Tensor | None = None) -> None:
    """eah_kernels.testing.agrees, with what is wrong."""
    assert out.shape == ref.shape and out.dtype == plain.dtype and not out.isnan().any(), "shape, dtype or NaN"
    assert agrees(out, ref, plain, value), (
        f"off by {largest_error(out, ref):.3g}; the eager form by {largest_error(plain, ref):.3g}"
    )


def assert_statistics_close(lse: Tensor, mean: Tensor, exact_lse: Tensor, exact_mean: Tensor) -> None:
    """Row log-sum-exps and column means against those of float64."""
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-4, atol=1e-6)


def check(case: Case, backend: str, dtype=torch.float32, device="cpu") -> None:
    """Statistics, choice and output of a backend against the float64 reference."""
    inputs = make(case, dtype, device)
    output, head, counts, lse, mean, threshold = exact(inputs)
    tensors = inputs.query, inputs.key, inputs.value
    options = dict(attention_mask=inputs.attention_mask, backend=backend, **inputs.rules)

    result = eah_attention(*tensors, inputs.image_mask, threshold=threshold, **options)
    assert torch.equal(result.sink_counts, counts)
    assert torch.equal(result.head, head)
    plain = reference.shared_map_attention(*tensors, head, inputs.scoring, dtype)
    assert_close(result.output, output, plain)

    statistics = sink_statistics(
        *tensors[:2], inputs.image_mask, threshold=threshold, return_column_mean=True, **options
    )
    assert torch.equal(statistics.sink_counts, counts)
    assert_statistics_close(statistics.lse, statistics.column_mean, lse, mean)

    other = torch.arange(case.batch, dtype=torch.int32, device=inputs.query.device) % case.heads - 1
    ref = reference.shared_map_attention(*(t.double() for t in tensors), other, inputs.scoring, torch.float64)
    plain = reference.shared_map_attention(*tensors, other, inputs.scoring, dtype)
    assert_close(shared_map_attention(*tensors, other, **options), ref, plain)

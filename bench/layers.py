"""The attention layers that are measured, by the models they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """One prefill: batch x heads/kv_heads x length x dim, with image_tokens from token 35 on.

    padded: every second row of the batch is left-padded by an eighth. sinks: False = a threshold no column reaches.
    rows: query rows on a cache of `length` keys, a decoding step with a head held; 0 for a prefill.
    """

    name: str
    heads: int
    kv_heads: int
    length: int
    dim: int = 128
    batch: int = 1
    image_tokens: int = 576
    padded: bool = False
    sinks: bool = True
    rows: int = 0

    def small(self) -> Layer:
        """The same layer cut down to where the reference is quick."""
        group = self.heads // self.kv_heads
        small = dict(batch=min(self.batch, 2), heads=2 * group, kv_heads=2, length=200)
        return replace(self, image_tokens=min(self.image_tokens, 120), **small)

    @property
    def flops(self) -> float:
        """What EAH needs once: Q K^T of every head, Q K^T and P V of the shared map per KV head; causal.

        With a head held only the latter.
        """
        if self.rows:
            return 2 * self.batch * self.rows * self.length * self.dim * (1 + self.kv_heads)
        pairs = self.batch * self.length * (self.length + 1) / 2
        return 2 * pairs * self.dim * (self.heads + 1 + self.kv_heads)

    @property
    def cache_elements(self) -> int:
        """What a step with a head held reads of the cache: one K head and every V head."""
        return self.batch * self.length * self.dim * (1 + self.kv_heads) if self.rows else 0

    @property
    def read_elements(self) -> int:
        """The fewest that any contestant reads."""
        tokens = self.batch * self.length * self.dim
        return self.cache_elements or tokens * (self.heads + 2 * self.kv_heads)

    def __str__(self) -> str:
        length = f"{self.rows} of {self.length}" if self.rows else self.length
        return f"{self.name}: {self.batch} x {self.heads}/{self.kv_heads} x {length} x {self.dim}"


PREFILL = (  # on a GPU
    Layer("LLaVA-1.5", 32, 32, 648),
    Layer("LLaVA-NeXT", 32, 32, 2928, image_tokens=2880),
    Layer("Qwen2-VL", 28, 4, 2928, image_tokens=2800),
    Layer("Qwen2-VL, 8k", 28, 4, 8192, image_tokens=8000),
    Layer("LLaVA-1.5, batch 8", 32, 32, 648, batch=8),
    Layer("LLaVA-1.5, batch 8, left-padded", 32, 32, 648, batch=8, padded=True),
    Layer("InternVL, 64-dim heads", 14, 2, 1800, dim=64, image_tokens=1792),
    Layer("Qwen2-VL, no image", 28, 4, 2928, image_tokens=0),
    Layer("Qwen2-VL, no sink", 28, 4, 2928, image_tokens=2800, sinks=False),
    Layer("Qwen2-VL, 32k", 28, 4, 32768, image_tokens=32000),
)
LATENCY = (  # on a GPU, where launches and the host tell
    PREFILL[0],
    Layer("LLaVA-1.5, decoding, 2k", 32, 32, 2048, rows=1),
    Layer("LLaVA-1.5, decoding, 4k", 32, 32, 4096, rows=1),
    Layer("LLaVA-1.5, decoding, 16k", 32, 32, 16384, rows=1),
    Layer("Qwen2-VL, decoding, 8k", 28, 4, 8192, rows=1),
    Layer("LLaVA-1.5, decoding, 4k, batch 8", 32, 32, 4096, batch=8, rows=1),
)
CPU_LAYERS = (
    Layer("LLaVA-1.5", 32, 32, 648),
    Layer("LLaVA-1.5, batch 2, left-padded", 32, 32, 648, batch=2, padded=True),
    Layer("LLaVA-1.5, three images", 32, 32, 2048, image_tokens=1728),
    Layer("Qwen2-VL, one image", 28, 4, 648),
    Layer("Qwen2-VL, no image", 28, 4, 648, image_tokens=0),
    Layer("Qwen2-VL, no sink", 28, 4, 648, sinks=False),
    Layer("LLaVA-1.5, decoding", 32, 32, 2048, rows=1),
    Layer("Qwen2-VL, decoding", 28, 4, 2048, rows=1),
)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    image_mask: Tensor
    attention_mask: Tensor | None  # (B, S) bool
    threshold: float


def make_inputs(layer: Layer, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random values in transformers' layout; later heads have sharper maps, so that their sinks differ."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(heads, length=layer.length):
        shape = (layer.batch, length, heads, layer.dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).transpose(1, 2)

    sharpness = torch.linspace(0.5, 2, layer.heads, device=device)[:, None, None]
    query = (tensor(layer.heads, layer.rows or layer.length) * sharpness).to(dtype)
    key, value = (tensor(layer.kv_heads).to(dtype) for _ in range(2))
    position = torch.arange(layer.length, device=device).expand(layer.batch, -1)
    padding = torch.zeros(layer.batch, 1, dtype=torch.long, device=device)
    if layer.padded:
        padding[::2] = layer.length // 8
    start = padding + 35
    image_mask = (position >= start) & (position < start + layer.image_tokens)
    mask = position >= padding if layer.padded else None
    return Inputs(query, key, value, image_mask, mask, 2 / layer.length if layer.sinks else 1.0)

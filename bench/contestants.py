"""What is measured, each function checked against the reference before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eah_kernels import eah_attention, native_parts, reference, shared_map_attention, sink_statistics
from eah_kernels.masks import Scoring
from eah_kernels.testing import agrees, largest_error

from .layers import Inputs, Layer, make_inputs

SDPA = {
    "SDPA, math": SDPBackend.MATH,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DECODE_PROGRAMS = (132, 264, 512)  # one, two and about four for each multiprocessor of a Hopper GPU


@dataclass(frozen=True)
class Contestant:
    """computes: "eah" (output, head, counts), "attention", "shared map", "statistics" (counts) or "column sums".

    "held": the shared map again, of a decoding step.
    """

    name: str
    computes: str
    run: Callable[[Inputs], object]


def published_eager(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """EAH as published: all maps in full, probabilities in the model's dtype, every sum over S x S."""
    query, key, value, image_mask, mask, threshold = inputs
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    score = query @ key.mT * query.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    real = torch.ones_like(image_mask) if mask is None else mask
    score = score.masked_fill(~(visible & real[:, None, None]), torch.finfo(score.dtype).min)
    maps = score.softmax(-1, dtype=torch.float32).to(query.dtype)
    counted = maps.masked_fill(~real[:, None, :, None], 0).tril(-1).sum(-2, dtype=torch.float32)
    rows = real.flip(-1).cumsum(-1).flip(-1) - real.int()
    sinks = (counted / rows.clamp(min=1)[:, None] > threshold) & (image_mask & real)[:, None]
    counts = sinks.sum(-1, dtype=torch.int32)
    most, head = counts.max(-1)
    for row in range(len(query)):
        if most[row] > 0:
            maps[row] = maps[row, head[row]]
    return maps @ value, torch.where(most > 0, head, -1).int(), counts


def sdpa(backend: SDPBackend | None) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        mask, grouped = None, inputs.query.shape[1] != inputs.key.shape[1]
        if inputs.attention_mask is not None:
            length = inputs.query.shape[2]
            causal = torch.ones(length, length, dtype=torch.bool, device=inputs.query.device).tril()
            own = torch.eye(length, dtype=torch.bool, device=inputs.query.device)  # or rows without a key are NaN
            mask = (causal & inputs.attention_mask[:, None, None]) | own
        tensors = inputs.query, inputs.key, inputs.value
        causal = mask is None and inputs.query.shape[2] == inputs.key.shape[2]  # the row of a decoding step sees all
        options = dict(attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        if backend is None:
            return F.scaled_dot_product_attention(*tensors, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, **options)

    return run


def flex_attention() -> Callable[[Inputs], Tensor]:
    """Compiled anew for every shape: past eight of one function, torch.compile leaves it as it is, which is eager."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = {}

    def run(inputs: Inputs) -> Tensor:
        if inputs.attention_mask is not None:
            raise RuntimeError("measured without padding only")
        shape = inputs.query.shape, inputs.key.shape, inputs.query.dtype
        if shape not in compiled:
            torch.compiler.reset()
            compiled.clear()
            length = inputs.query.shape[2]
            block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, inputs.query.device)
            compiled[shape] = torch.compile(flex_attention, dynamic=False, fullgraph=True), block_mask
        attention, block_mask = compiled[shape]
        grouped = inputs.query.shape[1] != inputs.key.shape[1]
        return attention(*inputs[:3], block_mask=block_mask, enable_gqa=grouped)

    return run


def flash_colreduce(inputs: Inputs) -> Tensor:
    """Column sums of every head's map, diagonal included, by the package of that name (PyPI)."""
    from flash_colreduce import flash_colreduce

    if inputs.attention_mask is not None:
        raise RuntimeError("measured without padding only")
    key = inputs.key.repeat_interleave(inputs.query.shape[1] // inputs.key.shape[1], 1)
    return flash_colreduce(inputs.query, key, "sum", is_causal=True)


def contestants(device: str, layer: Layer, dtype: torch.dtype = torch.bfloat16) -> list[Contestant]:
    """Everything that may be measured on a device; what cannot run there says so when it is checked."""
    backends = ("torch", "native") if device == "cpu" else ("triton",)
    native_cuda = device != "cpu" and native_parts()["cuda"] is None
    if layer.rows:
        names = {"SDPA": None} if device == "cpu" else SDPA
        found = [Contestant(name, "attention", sdpa(backend)) for name, backend in names.items()]
        ours_here = (*backends, "native") if native_cuda else backends
        found += [Contestant(f"EAH, {backend}", "held", shared_map(backend)) for backend in ours_here]
        if device == "cuda":
            found += [Contestant(f"EAH, triton, {n} programs", "held", decoding_in(n)) for n in DECODE_PROGRAMS]
        return found
    found = [Contestant("eager EAH, as published", "eah", published_eager)]
    if device == "cpu":
        found.append(Contestant("SDPA", "attention", sdpa(None)))
    else:
        found += [Contestant(name, "attention", sdpa(backend)) for name, backend in SDPA.items()]
        if dtype == torch.bfloat16:  # it compiles for seconds a shape
            found.append(Contestant("FlexAttention", "attention", flex_attention()))
        if find_spec("flash_colreduce"):
            found.append(Contestant("flash-colreduce", "column sums", flash_colreduce))
    for backend in backends:
        found += ours(backend)
    if native_cuda:
        found.append(ours("native")[0])  # up to 1024 tokens; it has no parts
    return found


def shared_map(backend: str) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        head = torch.zeros(len(inputs.query), dtype=torch.int32, device=inputs.query.device)
        return shared_map_attention(*inputs[:3], head, attention_mask=inputs.attention_mask, backend=backend)

    return run


def decoding_in(programs: int) -> Callable[[Inputs], Tensor]:
    """The Triton decoding kernel split as for so many multiprocessors, each with a program."""
    shipped = shared_map("triton")

    def run(inputs: Inputs) -> Tensor:
        from eah_kernels.triton import few_rows

        before, few_rows.multiprocessors = few_rows.multiprocessors, lambda device, target: programs
        try:
            return shipped(inputs)
        finally:
            few_rows.multiprocessors = before

    return run


def ours(backend: str) -> list[Contestant]:
    """A backend of ours, whole and in its parts."""

    def eah(inputs):
        options = dict(attention_mask=inputs.attention_mask, threshold=inputs.threshold, backend=backend)
        return eah_attention(*inputs[:4], **options)

    def statistics(inputs):
        options = dict(attention_mask=inputs.attention_mask, threshold=inputs.threshold, backend=backend)
        return sink_statistics(*inputs[:2], inputs.image_mask, **options).sink_counts

    return [
        Contestant(f"EAH, {backend}", "eah", eah),
        Contestant(f"EAH, {backend}: statistics alone", "statistics", statistics),
        Contestant(f"EAH, {backend}: output alone", "shared map", shared_map(backend)),
    ]


def check(contestant: Contestant, layer: Layer, dtype: torch.dtype, device: str) -> str | None:
    """Why the contestant does not compute what it claims, on a small form of the layer; None if it does."""
    inputs = make_inputs(layer.small(), dtype, device)
    query, key, value, image_mask, mask, threshold = inputs
    expected = eah_attention(
        query, key, value, image_mask, attention_mask=mask, threshold=threshold, backend="reference"
    )
    try:
        result = contestant.run(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if contestant.computes == "statistics":
        return None if torch.equal(result, expected.sink_counts) else "other sink counts than the reference"
    scoring = Scoring(mask, scale=layer.dim**-0.5)
    if contestant.computes == "column sums":
        sums = [reference.attention_maps(query, key, scoring, kind)[0].sum(-2) for kind in (torch.float64, dtype)]
        return difference(result.to(dtype), *sums)
    output, head = result, torch.zeros_like(expected.head)
    if contestant.computes == "eah":
        output, head, counts = result
        rounded = contestant.name.startswith("eager") and dtype != torch.float32  # its counts are those of rounded maps
        if not rounded and not (torch.equal(head, expected.head) and torch.equal(counts, expected.sink_counts)):
            return "another head or other sink counts than the reference"
    elif contestant.computes == "attention":
        head = torch.full_like(head, -1)
    outputs = [
        output,
        reference.shared_map_attention(*(t.double() for t in (query, key, value)), head, scoring, torch.float64),
        reference.shared_map_attention(query, key, value, head, scoring, dtype),
    ]
    if mask is not None:  # what a padding row outputs is nobody's concern
        outputs = [each.masked_fill(~mask[:, None, :, None], 0) for each in outputs]
    return difference(*outputs)


def difference(output: Tensor, expected: Tensor, plain: Tensor) -> str | None:
    """How far output is from the reference where that is too far (eah_kernels.testing)."""
    if agrees(output, expected, plain):
        return None
    return f"an error of {largest_error(output, expected):.1e} against the reference"

"""Few query rows on many keys: the split-KV kernel in its forms, and every backend beside it."""

import pytest
import torch

from eah_kernels import reference, shared_map_attention

from ..support import cases
from ..support.cases import NATIVE, Case, assert_close, make

SHAPES = [
    Case(q_len=1, kv_len=300),
    Case(q_len=1, kv_len=5, dim=40, value_dim=24),
    Case(q_len=1, kv_len=129, heads=8, kv_heads=2, dim=128, layout="sliced"),
    Case(q_len=1, kv_len=130, heads=7, kv_heads=1, dim=80, value_dim=256),
    Case(q_len=1, kv_len=257, heads=32, kv_heads=1, dim=32),
    Case(q_len=3, kv_len=200, heads=6, kv_heads=3, dim=192, value_dim=128),
    Case(q_len=16, kv_len=150, heads=4, kv_heads=2, layout="bhsd"),
    Case(q_len=2, kv_len=70, dim=256, heads=2, kv_heads=2, layout="expanded"),
    Case(q_len=5, kv_len=3, causal=False),
    Case(q_len=4, kv_len=4),
    Case(q_len=1, kv_len=5000, heads=2, kv_heads=1, dim=16),  # as many stretches as there may be
    Case(q_len=7, kv_len=90, heads=8, kv_heads=2),
]
MASKS = [
    Case(q_len=1, kv_len=300, mask="left"),
    Case(q_len=2, kv_len=130, mask="right", heads=8, kv_heads=2),
    Case(q_len=1, kv_len=200, mask="bool", causal=False),
    Case(q_len=3, kv_len=200, mask="bool_heads", heads=8, kv_heads=2),
    Case(q_len=1, kv_len=200, mask="bool_all"),
    Case(q_len=6, kv_len=90, mask="bias", softcap=5.0),
    Case(q_len=1, kv_len=200, mask="bias_heads", mask_dtype=torch.float16),
    Case(q_len=9, kv_len=70, mask="bias_rows"),
    Case(q_len=1, kv_len=400, mask="bias_min", causal=False),
    Case(q_len=1, kv_len=400, sliding_window=100),
    Case(q_len=4, kv_len=300, sliding_window=65, heads=8, kv_heads=2, mask="left"),
    Case(q_len=3, kv_len=100, causal=False, sliding_window=7, mask="bool"),
    Case(q_len=1, kv_len=100, softcap=30.0, scale=0.3),
]


def check(case, backend, dtype, device):
    """Batch rows with and without a head, heads of the first and the last KV head."""
    inputs = make(case, dtype, device)
    tensors = inputs.query, inputs.key, inputs.value
    options = dict(attention_mask=inputs.attention_mask, backend=backend, **inputs.rules)
    for chosen in ([case.heads - 1, -1], [-1, 0]):
        head = torch.tensor(chosen, dtype=torch.int32, device=device)
        wide = (tensor.double() for tensor in tensors)
        ref = reference.shared_map_attention(*wide, head, inputs.scoring, torch.float64)
        plain = reference.shared_map_attention(*tensors, head, inputs.scoring, dtype)
        assert_close(shared_map_attention(*tensors, head, **options), ref, plain)


@pytest.mark.parametrize("case", SHAPES + MASKS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_float32(case, backend, kernel_device):
    check(case, backend, torch.float32, kernel_device)


@pytest.mark.parametrize("case", SHAPES[:6:2] + MASKS[::3], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_float16(case, backend, kernel_device):
    check(case, backend, torch.float16, kernel_device)


@pytest.mark.parametrize("case", SHAPES + MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [NATIVE])
def test_with_statistics(case, backend, dtype, kernel_device):
    cases.check(case, backend, dtype, kernel_device)


@pytest.mark.parametrize("backend", ["torch", NATIVE])
def test_values_near_the_largest_number(backend):
    """Weights that are not normalised before the product would overflow."""
    query, key = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 700, 16)
    value = torch.full((1, 2, 700, 16), 3e38)
    for head in (0, -1):
        out = shared_map_attention(query, key, value, torch.tensor([head], dtype=torch.int32), backend=backend)
        torch.testing.assert_close(out, value[:, :, :1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("mask", ["key", "bool", "bias", "window"])
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_hidden_keys_may_hold_anything(backend, mask, kernel_device):
    """The unwritten end of a static cache, a key that padding hides, keys before the window."""
    case = Case(q_len=2, kv_len=200, heads=8, kv_heads=2, sliding_window=60 if mask == "window" else None)
    inputs = make(case, device=kernel_device)
    shown = torch.ones(2, 200, dtype=torch.bool, device=kernel_device)
    if mask == "window":
        shown[:, :139] = False
    else:
        shown[0, 120:] = False
        shown[:, 3] = False
    dense = shown[:, None, None].expand(-1, 1, 2, -1)
    masks = {"key": shown, "bool": dense, "bias": torch.zeros(dense.shape, device=kernel_device)}
    masks["bias"] = masks["bias"].masked_fill(~dense, -torch.inf)
    options = dict(attention_mask=masks.get(mask), causal=False, sliding_window=case.sliding_window, backend=backend)
    head = torch.tensor([5, -1], dtype=torch.int32, device=kernel_device)
    clean = shared_map_attention(inputs.query, inputs.key, inputs.value, head, **options)
    hidden = ~shown[:, None, :, None].expand_as(inputs.key)
    for filling in (torch.nan, torch.inf):
        key, value = (tensor.masked_fill(hidden, filling) for tensor in (inputs.key, inputs.value))
        assert torch.equal(shared_map_attention(inputs.query, key, value, head, **options), clean)


def test_up_to_sixteen_rows(kernel_device, monkeypatch):
    from eah_kernels import triton

    calls = []

    def few_rows(problem, *arguments):
        calls.append(problem.query.shape[2])
        return launch(problem, *arguments)

    launch = triton._few_rows.few_rows
    monkeypatch.setattr(triton._few_rows, "few_rows", few_rows)
    for q_len in (1, 16, 17):
        check(Case(q_len=q_len, kv_len=40), "triton", torch.float32, kernel_device)
    assert set(calls) == {1, 16}

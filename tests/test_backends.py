"""Every backend computes what the reference defines, over shapes, masks, layouts and dtypes."""

import pytest
import torch

from support import Case, check

SHAPES = [
    Case(q_len=1),
    Case(q_len=3, heads=8, kv_heads=2, image="first"),
    Case(q_len=63, dim=40, value_dim=24),
    Case(q_len=113, heads=7, kv_heads=1, dim=80, image="last"),
    Case(q_len=113, kv_heads=1, dim=96, value_dim=128, image="scattered"),
    Case(q_len=65, heads=8, kv_heads=1, dim=128, layout="bhsd"),
    Case(q_len=70, heads=6, kv_heads=3, dim=192, value_dim=128),
    Case(q_len=33, dim=256, heads=2, kv_heads=2),
    Case(q_len=17, kv_len=63),
    Case(q_len=1, kv_len=130, image="all"),
    Case(q_len=63, kv_len=20, causal=False),
    Case(q_len=65, layout="sliced", dim=72),
    Case(q_len=65, layout="expanded"),
    Case(q_len=129, image="absent"),
    Case(q_len=63, scale=0.2, layout="bhsd"),
    Case(q_len=63, scale=-0.1),
]
MASKS = [
    Case(mask="left"),
    Case(mask="right", heads=8, kv_heads=2, q_len=113),
    Case(mask="left", causal=False, q_len=40, kv_len=70),
    Case(mask="right", sliding_window=9, q_len=113),
    Case(mask="left", softcap=5.0),
    Case(mask="bool", image="scattered"),
    Case(mask="bool", causal=False, heads=8, kv_heads=2),
    Case(mask="bool_heads", heads=8, kv_heads=2, image="scattered"),
    Case(mask="bool_heads", causal=False, q_len=20, kv_len=70, image="absent"),
    Case(mask="bias", q_len=113),
    Case(mask="bias_min", softcap=10.0, causal=False),
    Case(mask="bias_rows", sliding_window=20, heads=7, kv_heads=1),
    Case(causal=False),
    Case(causal=False, sliding_window=16, q_len=113),
    Case(sliding_window=1),
    Case(sliding_window=17, heads=8, kv_heads=2, q_len=113, kv_len=150),
    Case(softcap=3.0, q_len=113, image="absent"),
]
LONG = [
    Case(q_len=648, batch=1, image="middle", peak=1.0),
    Case(q_len=648, batch=1, kv_heads=1, image="absent", mask="left"),
    Case(q_len=1023, batch=1, heads=2, kv_heads=1, image="scattered"),
]


@pytest.mark.parametrize("case", SHAPES + MASKS + LONG, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32(case, backend, kernel_device):
    check(case, backend, torch.float32, kernel_device)


@pytest.mark.parametrize("case", [*SHAPES[2:8], *MASKS[::3]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float16(case, backend, kernel_device):
    check(case, backend, torch.float16, kernel_device)


@pytest.mark.parametrize("case", [*SHAPES[2:8], *MASKS[::3]], ids=str)
def test_bfloat16_torch(case):
    check(case, "torch", torch.bfloat16)


@pytest.mark.parametrize("case", [SHAPES[3], MASKS[1], MASKS[10]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64(case, backend):
    check(case, backend, torch.float64)

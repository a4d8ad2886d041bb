"""The Triton kernels as compiled for a GPU, executed on the CPU, beside the float64 reference.

ALL=1: every case of tests/kernels/test_{backends,decode_kernel}.py, every dtype, and sm_89 too.
"""

import os

import pytest
import torch

from eah_kernels import eah_attention_varlen, reference, shared_map_attention, varlen

from ..kernels import test_backends, test_decode_kernel, test_varlen
from ..support.cases import Case, assert_close, check, exact, make, run
from .triton_launch import compiled

ALL = bool(os.environ.get("ALL"))
TARGETS = ["sm_80", "sm_90", "sm_89"] if ALL else ["sm_80", "sm_90"]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

ATTENTION = [
    (Case(q_len=200, heads=2, kv_heads=1), BRAIN),
    (Case(q_len=113, kv_len=130, heads=7, kv_heads=1, dim=128, image="absent"), HALF),
    (Case(q_len=70, kv_len=80, heads=2, kv_heads=2, dim=256, image="last"), BRAIN),
    (Case(q_len=70, heads=6, kv_heads=3, dim=192, value_dim=128), HALF),
    (Case(q_len=65, heads=2, dim=72, value_dim=24, kv_heads=2, layout="sliced"), BRAIN),
    (Case(q_len=130, heads=2, kv_heads=2, mask="left"), BRAIN),
    (Case(q_len=130, kv_len=200, heads=2, kv_heads=1, mask="right", causal=False), HALF),
    (Case(q_len=113, kv_len=120, heads=2, kv_heads=2, sliding_window=30, softcap=5.0), BRAIN),
    (Case(q_len=140, heads=2, kv_heads=1, mask="bool_causal", causal=False, dim=128), BRAIN),
    (Case(q_len=100, heads=4, kv_heads=2, mask="bool_heads", image="scattered"), HALF),
    (Case(q_len=140, heads=2, kv_heads=1, mask="bias_few", image="first"), SINGLE),
    (Case(q_len=130, heads=2, kv_heads=1, mask="bias", softcap=10.0), BRAIN),
    (Case(q_len=90, heads=2, kv_heads=2, dim=128, scale=-0.1, layout="bhsd"), SINGLE),
    (Case(q_len=40, heads=2, kv_heads=1, dim=96, layout="expanded", image="all"), SINGLE),
]
LONG = [(Case(q_len=648, batch=1, peak=1.0, image="middle"), BRAIN)]
DECODE = [
    (Case(q_len=1, kv_len=300), BRAIN),
    (Case(q_len=1, kv_len=130, heads=7, kv_heads=1, dim=80, value_dim=256), HALF),
    (Case(q_len=16, kv_len=150, heads=4, kv_heads=2, layout="bhsd", mask="left"), BRAIN),
    (Case(q_len=3, kv_len=200, heads=8, kv_heads=2, dim=128, mask="bool_heads"), HALF),
    (Case(q_len=6, kv_len=90, mask="bias", softcap=5.0), BRAIN),
    (Case(q_len=4, kv_len=300, sliding_window=65, heads=8, kv_heads=2), SINGLE),
    (Case(q_len=2, kv_len=70, dim=256, heads=2, kv_heads=2, layout="expanded"), SINGLE),
]
EVERYTHING = [(case, BRAIN) for case in (Case(q_len=113, heads=4, kv_heads=2), Case(q_len=70, mask="right"))]
if ALL:
    dtypes = (HALF, BRAIN, SINGLE)
    shipped = test_backends.SHAPES + test_backends.MASKS + test_backends.SPLIT
    EVERYTHING += [(case, dtype) for case in shipped for dtype in dtypes]
    EVERYTHING += [(case, BRAIN) for case in test_backends.LONG]
    DECODE += [(c, dtype) for c in test_decode_kernel.SHAPES + test_decode_kernel.MASKS for dtype in dtypes]


def classes(cases, tritons=()):
    """tritons: the numbers of those that other versions of Triton compile, too."""
    marks = [[pytest.mark.tritons] if at in tritons else [] for at in range(len(cases))]
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)],
        ids=[f"{case}-{str(dtype).split('.')[1]}" for case, dtype in cases],
    )


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@classes(ATTENTION + LONG, tritons=[0, 5])
def test_attention(case, dtype, target):
    """The same bits in every order of blocks and warps, and what the reference says."""
    inputs = make(case, dtype)
    output, head, counts, _, _, threshold = exact(inputs)
    results = []
    for seed in (0, 1, 7) if case.q_len < 300 else (7,):
        with compiled(target, seed=seed):
            results.append(run(inputs, threshold, "triton"))
    assert torch.equal(results[0].sink_counts, counts) and torch.equal(results[0].head, head)
    plain = reference.shared_map_attention(inputs.query, inputs.key, inputs.value, head, inputs.scoring, dtype)
    assert_close(results[0].output, output, plain)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@classes(DECODE, tritons=[1])
def test_decode(case, dtype, target):
    with compiled(target, seed=3):
        test_decode_kernel.check(case, "triton", dtype, "cpu")


@classes(EVERYTHING)
def test_statistics_choice_and_a_given_head(case, dtype, target):
    with compiled(target, seed=5):
        check(case, "triton", dtype)


@pytest.mark.parametrize(
    ("lengths", "dtype", "options"),
    [
        ([70, 0, 33, 150], BRAIN, dict(sliding_window=60)),
        ([129, 20], HALF, dict(broadcast_to=2)),
        ([130, 0, 3], SINGLE, dict()),
    ],
    ids=str,
)
def test_packed_sequences(lengths, dtype, options, target):
    inputs = test_varlen.make(lengths, dim=64, dtype=dtype)
    results = []
    for seed in (0, 1):
        with compiled(target, seed=seed):
            results.append(test_varlen.check(inputs, "triton", **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_bounds_that_cannot_be_checked_reach_nothing_beyond_the_tensors(target, dtype, monkeypatch):
    """Clamped on the device, and rows past max_seqlen are left: the emulator refuses every access outside."""
    monkeypatch.setattr(varlen, "checked_bounds", lambda *_: None)
    *operands, _ = test_varlen.make([200], dim=64, dtype=dtype)
    bounds = torch.tensor([-70, 90, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = torch.full_like(operands[0], 7.0)
    with compiled(target, seed=2):
        head = eah_attention_varlen(*operands, bounds, 70, out=out, backend="triton").head
        one = torch.tensor([0, 70], dtype=torch.int32)
        first, second = (
            eah_attention_varlen(*(t[rows] for t in operands), one, 70, backend="triton")
            for rows in (slice(70), slice(90, 160))
        )
    assert torch.equal(out[:70], first.output) and torch.equal(out[90:160], second.output)
    assert out[70:90].eq(7).all() and out[160:].eq(7).all()
    assert head.tolist() == [*first.head.tolist(), *second.head.tolist(), -1]


def test_ties_go_to_the_lower_head(target):
    inputs = make(Case(q_len=70, heads=4, kv_heads=1), HALF)
    inputs.query[:, 3] = inputs.query[:, 1]
    inputs.query[:, 0] = inputs.query[:, 2] = 0
    with compiled(target, seed=2):
        result = run(inputs, 0.03, "triton")
    assert torch.equal(result.sink_counts[:, 1], result.sink_counts[:, 3]) and result.head.eq(1).all()


def test_a_head_of_other_strides(target):
    """Every second entry, and one for all; the entries between belong to nobody."""
    inputs = make(Case(q_len=40, batch=3), BRAIN)
    tensors = inputs.query, inputs.key, inputs.value
    spread = torch.full((6,), 99, dtype=torch.int32)[::2]
    spread.copy_(torch.tensor([2, -1, 1]))
    for head in (spread, torch.tensor([1], dtype=torch.int32).expand(3)):
        wide = (t.double() for t in tensors)
        ref = reference.shared_map_attention(*wide, head, inputs.scoring, torch.float64)
        plain = reference.shared_map_attention(*tensors, head, inputs.scoring, BRAIN)
        with compiled(target):
            assert_close(shared_map_attention(*tensors, head, backend="triton"), ref, plain)

"""csrc/cuda as nvcc compiles it, with its host code, executed on the CPU."""

import shutil

import pytest
import torch

from eah_kernels import reference
from eah_kernels.native import cuda as native_cuda

from ..kernels.test_native_cuda import DECODE, HALF, PREFILL
from ..support.cases import Case, assert_close, exact, make
from .cuda_launch import CompiledCuda

ORDERS = [(3, 0), (1, 1), (7, 2), (4, 3)]  # blocks, seed


@pytest.fixture(scope="session")
def compiled_cuda(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    return CompiledCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def executed(compiled_cuda):
    """Calls one of native_cuda's functions once for each number of blocks and order; the results are the same bits."""

    def call(function, *arguments, orders=ORDERS):
        results = []
        for blocks, seed in orders:
            with compiled_cuda.calls(blocks, seed):
                results.append(function(*arguments))
        for other in results[1:]:
            pairs = zip(other, results[0], strict=True) if isinstance(other, tuple) else [(other, results[0])]
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)
        return results[0]

    return call


def prefill(executed, inputs, threshold, min_density=0.0, **options):
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    return executed(native_cuda.eah_attention, *tensors, threshold, min_density, inputs.scoring, **options)


def check_prefill(executed, inputs, threshold=None, **options):
    output, head, counts, _, _, threshold = exact(inputs, threshold)
    result = prefill(executed, inputs, threshold, **options)
    assert torch.equal(result[2], counts) and torch.equal(result[1], head)
    dtype = inputs.query.dtype
    tensors = inputs.query, inputs.key, inputs.value
    assert_close(result[0], output, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))
    return result


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(executed, case, dtype):
    check_prefill(executed, make(case, dtype), orders=ORDERS[:: 1 if dtype == torch.float16 else 2])


def test_prefill_of_a_whole_image(executed):
    """648 tokens, 11 row blocks; a row without a choice beside one with."""
    inputs = make(Case(q_len=648, heads=3, kv_heads=1, image="absent", dim=64), torch.bfloat16)
    _, head, _ = check_prefill(executed, inputs, orders=ORDERS[2:3])
    assert head[0] == -1 and head[1] >= 0


def test_no_sink(executed):
    inputs = make(Case(q_len=113, heads=8, kv_heads=2), HALF[0])
    _, head, counts = check_prefill(executed, inputs, threshold=1.0, orders=ORDERS[2:])
    assert head.eq(-1).all() and counts.eq(0).all()


def test_ties_go_to_the_lower_head_and_head_0_may_win(executed):
    inputs = make(Case(q_len=70, heads=4, kv_heads=1), HALF[0])
    inputs.query[:, 3] = inputs.query[:, 1]
    inputs.query[:, 0] = inputs.query[:, 2] = 0
    _, head, counts = check_prefill(executed, inputs, threshold=0.03, orders=ORDERS[:1])
    assert torch.equal(counts[:, 1], counts[:, 3]) and head.eq(1).all()
    inputs.query[0, 0], inputs.query[0, 1] = inputs.query[0, 1].clone(), 0
    _, head, _ = check_prefill(executed, inputs, threshold=0.03, orders=ORDERS[1:2])
    assert head.tolist() == [0, 1]


def test_density_gate(executed):
    """Image tokens at hidden keys count in the denominator."""
    inputs = make(Case(q_len=70, mask="left"), HALF[1])
    threshold = exact(inputs)[-1]
    _, head, counts = prefill(executed, inputs, threshold, orders=ORDERS[:1])
    for b in range(2):
        density = counts[b].max().item() / inputs.image_mask[b].sum().item()
        assert prefill(executed, inputs, threshold, density * 0.999, orders=ORDERS[:1])[1][b] == head[b] >= 0
        assert prefill(executed, inputs, threshold, density * 1.001, orders=ORDERS[:1])[1][b] == -1


@pytest.mark.parametrize("mask", ["left", "right"])
def test_what_padding_holds_reaches_nothing(executed, mask):
    inputs = make(Case(q_len=113, mask=mask, heads=4, kv_heads=2), HALF[0])
    threshold = exact(inputs)[-1]
    clean = prefill(executed, inputs, threshold, orders=ORDERS[:1])
    padding = ~inputs.attention_mask[:, None, :, None]
    inputs.key.masked_fill_(padding, torch.nan)
    inputs.value.masked_fill_(padding, torch.inf)
    dirty = prefill(executed, inputs, threshold, orders=ORDERS[:2])
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    blind = inputs.attention_mask.cumsum(-1) == 0
    assert clean[0].transpose(1, 2)[blind].eq(0).all() and blind.any() == (mask == "left")
    inputs.query.masked_fill_(padding, torch.nan)
    dirty = prefill(executed, inputs, threshold, orders=ORDERS[:1])
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])
    real = inputs.attention_mask[:, None, :, None].expand_as(clean[0])
    assert torch.equal(clean[0][real], dirty[0][real])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(executed, case, dtype):
    inputs = make(case, dtype)
    tensors = inputs.query, inputs.key, inputs.value
    for head in ([-1, 0, case.heads - 1], [case.heads // 2, -1, 1]):
        head = torch.tensor(head[: case.batch], dtype=torch.int32)
        out = executed(native_cuda.shared_map_attention, *tensors, head, inputs.scoring)
        wide = (t.double() for t in tensors)
        ref = reference.shared_map_attention(*wide, head, inputs.scoring, torch.float64)
        assert_close(out, ref, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))


@pytest.mark.parametrize(("heads", "kv_len"), [(3, 513), (4, 200), (2, 200)])
def test_decode_with_so_much_work_that_it_is_cut_otherwise(executed, heads, kv_len):
    """128 batch rows: of 3 heads, spans of several tiles; of 4 and 2, blocks of as many values. NaN at hidden keys."""
    inputs = make(Case(q_len=1, kv_len=kv_len, heads=heads, kv_heads=heads, batch=128, mask="left"), HALF[0])
    tensors = inputs.query, inputs.key, inputs.value
    head = torch.arange(128, dtype=torch.int32) % (heads + 1) - 1
    ref = reference.shared_map_attention(*(t.double() for t in tensors), head, inputs.scoring, torch.float64)
    plain = reference.shared_map_attention(*tensors, head, inputs.scoring, HALF[0])
    inputs.key.masked_fill_(~inputs.attention_mask[:, None, :, None], torch.nan)
    inputs.value.masked_fill_(~inputs.attention_mask[:, None, :, None], torch.nan)
    out = executed(native_cuda.shared_map_attention, *tensors, head, inputs.scoring, orders=[(5, 1)])
    assert_close(out, ref, plain)


def test_decode_with_every_key_hidden(executed):
    inputs = make(Case(q_len=1, kv_len=140, mask="left"), HALF[0])
    inputs.attention_mask[:] = False
    head = torch.tensor([-1, 2], dtype=torch.int32)
    tensors = inputs.query, inputs.key, inputs.value
    assert executed(native_cuda.shared_map_attention, *tensors, head, inputs.scoring).eq(0).all()

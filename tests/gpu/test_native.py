"""The native CUDA kernels on a GPU: what tests/compiled shows on the CPU, and graphs, streams, addresses."""

from dataclasses import replace

import pytest
import torch

from eah_kernels import eah_attention, reference, shared_map_attention
from eah_kernels.backends import Call, choose_backend
from eah_kernels.native import cuda as native_cuda

from ..kernels.test_native_cuda import DECODE, HALF, PREFILL
from ..support.cases import Case, assert_close, exact, make, run
from .test_triton import FAR, FAR_ELEMENTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native_cuda.why_not() is not None, reason=str(native_cuda.why_not())),
]
LONG = [
    Case(q_len=648, heads=32, kv_heads=32, dim=128, image="absent", peak=1.0),
    Case(q_len=1024, heads=28, kv_heads=4, dim=128, mask="left", peak=1.0),
    Case(q_len=1023, heads=14, kv_heads=2, batch=8, mask="right", peak=1.0),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PREFILL + LONG, ids=str)
def test_prefill(case, dtype):
    inputs = make(case, dtype, "cuda")
    output, head, counts, _, _, threshold = exact(inputs)
    tensors = inputs.query, inputs.key, inputs.value
    plain = reference.shared_map_attention(*tensors, head, inputs.scoring, dtype)
    first = run(inputs, threshold, "native")
    assert torch.equal(first.sink_counts, counts) and torch.equal(first.head, head)
    assert_close(first.output, output, plain)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, threshold, "native"), first, strict=True))
    none = run(inputs, 1.0, "native")
    assert none.head.eq(-1).all()
    ordinary = reference.shared_map_attention(*(t.double() for t in tensors), none.head, inputs.scoring, torch.float64)
    assert_close(none.output, ordinary, reference.shared_map_attention(*tensors, none.head, inputs.scoring, dtype))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        *DECODE,
        Case(q_len=1, kv_len=4096, heads=32, kv_heads=32, dim=128),
        Case(q_len=1, kv_len=40000, heads=28, kv_heads=4, dim=128, mask="left"),
    ],
    ids=str,
)
def test_decode(case, dtype):
    inputs = make(case, dtype, "cuda")
    tensors = inputs.query, inputs.key, inputs.value
    head = torch.arange(case.batch, dtype=torch.int32, device="cuda") * 2 - 1
    options = dict(attention_mask=inputs.attention_mask, backend="native", **inputs.rules)
    out = shared_map_attention(*tensors, head, **options)
    ref = reference.shared_map_attention(*(t.double() for t in tensors), head, inputs.scoring, torch.float64)
    assert_close(out, ref, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))
    assert torch.equal(out, shared_map_attention(*tensors, head, **options))


def test_graph_capture_on_another_stream():
    inputs = make(Case(q_len=648, heads=8, kv_heads=2, dim=128, mask="left"), torch.bfloat16, "cuda")
    threshold = exact(inputs)[-1]
    step = inputs.query[:, :, -1:].contiguous()

    def layer():
        result = run(inputs, threshold, "native")
        options = dict(attention_mask=inputs.attention_mask, backend="native")
        return *result, shared_map_attention(step, inputs.key, inputs.value, result.head, **options)

    expected = layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for tensor in captured:
        tensor.fill_(7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_addresses_past_32_bits(name):
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    inputs = make(Case(q_len=200, dim=64), torch.float16, "cuda")
    threshold = exact(inputs)[-1]
    expected = run(inputs, threshold, "native")
    memory = torch.empty(FAR_ELEMENTS, dtype=torch.float16, device="cuda")
    far = memory.as_strided((2, 4, 200, 64), FAR["heads"]).copy_(getattr(inputs, name))
    assert torch.equal(far, getattr(inputs, name))
    moved = run(replace(inputs, **{name: far}), threshold, "native")
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_auto_does_not_take_them_and_they_do_not_fall_back():
    inputs = make(Case(q_len=70), torch.float16, "cuda")
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    assert choose_backend("auto", Call("eah_attention", *tensors[:3], inputs.scoring)) != "native"
    with pytest.raises(ValueError, match="softcap: got 5"):
        eah_attention(*tensors, softcap=5.0, backend="native")
    with pytest.raises(ValueError, match='broadcast_to="all"'):
        eah_attention(*tensors, broadcast_to=2, backend="native")

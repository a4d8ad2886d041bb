"""What only a GPU can show: bfloat16, long prompts, CUDA graphs, no host synchronisation, addresses past 32 bits."""

from dataclasses import replace

import pytest
import torch

from eah_kernels import eah_attention, shared_map_attention

from ..kernels.test_backends import LONG, MASKS, SHAPES
from ..kernels.test_decode_kernel import MASKS as DECODING_MASKS
from ..kernels.test_decode_kernel import SHAPES as DECODING
from ..kernels.test_decode_kernel import check as check_decoding
from ..support import long_prompts
from ..support.cases import Case, check, exact, make, run

pytestmark = pytest.mark.gpu

# Strides of a (2, 4, 200, 64) tensor: rows of a batch more than 2^31 elements apart, and then also a head stride that
# 32 bits cannot multiply.
FAR = {"batch": (2**31 + 64, 2**18, 64, 1), "heads": (2**31 + 64, 2**29 + 64, 64, 1)}
FAR_ELEMENTS = 2**32


@pytest.mark.parametrize("case", SHAPES + MASKS + LONG, ids=str)
def test_bfloat16(case):
    check(case, "triton", torch.bfloat16, "cuda")


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        Case(q_len=2928, batch=1, heads=7, kv_heads=1, dim=128, peak=1.0),
        Case(q_len=8192, batch=1, heads=2, kv_heads=2, dim=128, peak=1.0, mask="left"),
        Case(q_len=16384, batch=1, heads=2, kv_heads=1, dim=64, peak=1.0, image="scattered"),
    ],
    ids=str,
)
def test_long_prompts(case, dtype):
    long_prompts.check(case, "triton", dtype, "cuda")


@pytest.mark.parametrize("mask", [None, "left", "bias"])
def test_no_host_synchronisation_and_graph_capture(mask):
    inputs = make(Case(q_len=648, heads=8, kv_heads=2, dim=128, mask=mask, image="absent"), torch.float16, "cuda")
    threshold = exact(inputs)[-1]
    expected = run(inputs, threshold, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, threshold, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, threshold, "triton")
    for tensor in captured:
        tensor.fill_(7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    other = make(
        Case(q_len=648, heads=8, kv_heads=2, dim=128, mask=mask, image="middle"), torch.float16, "cuda", seed=1
    )
    inputs.query.copy_(other.query)
    inputs.image_mask.copy_(other.image_mask)
    expected = run(inputs, threshold, "triton")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_short_prompts_at_once():
    """Side by side on four streams, and in four graphs, captured on one stream: what a launch counts in is its own."""
    case = Case(q_len=648, heads=8, kv_heads=2, dim=128, peak=1.0)
    prompts = [make(case, torch.float16, "cuda", seed) for seed in range(4)]
    threshold = exact(prompts[0])[-1]
    expected = [run(inputs, threshold, "triton") for inputs in prompts]
    streams, graphs, captured = [torch.cuda.Stream() for _ in prompts], [], []
    for inputs in prompts:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(run(inputs, threshold, "triton"))
    for _ in range(20):
        torch.cuda.synchronize()
        results = []
        for stream, inputs in zip(streams, prompts, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(inputs, threshold, "triton"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for found in (results, captured):
            for want, got in zip(expected, found, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_short_prompts_in_the_graphs_of_torch_compile():
    """What is kept from call to call is not allocated among what belongs to a graph."""
    inputs = make(Case(q_len=100, heads=4, kv_heads=2), torch.float16, "cuda")
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    from eah_kernels.triton.one_pass import kept_tickets

    kept_tickets.cache_clear()
    compiled = torch.compile(lambda *given: eah_attention(*given, backend="triton"), mode="reduce-overhead")
    found = [[part.clone() for part in compiled(*tensors)] for _ in range(4)]
    expected = eah_attention(*tensors, backend="triton")
    for result in found:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("case", DECODING + DECODING_MASKS, ids=str)
def test_decoding_in_bfloat16(case):
    check_decoding(case, "triton", torch.bfloat16, "cuda")


@pytest.mark.parametrize("mask", [None, "left", "bool"])
def test_decoding_long_captured_and_without_synchronisation(mask):
    case = Case(q_len=1, kv_len=32768, heads=8, kv_heads=2, dim=128, mask=mask)
    check_decoding(case, "triton", torch.float16, "cuda")
    inputs = make(case, torch.float16, "cuda")
    head = torch.tensor([3, -1], dtype=torch.int32, device="cuda")

    def decode():
        options = dict(attention_mask=inputs.attention_mask, backend="triton", **inputs.rules)
        return shared_map_attention(inputs.query, inputs.key, inputs.value, head, **options)

    expected = decode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert torch.equal(decode(), expected)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode()
    head.copy_(head.flip(0))
    graph.replay()
    assert torch.equal(captured, decode()) and not torch.equal(captured, expected)


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_addresses_past_32_bits(name, strides):
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    inputs = make(Case(q_len=200, dim=64, heads=4, kv_heads=4), torch.float16, "cuda")
    threshold = exact(inputs)[-1]
    expected = run(inputs, threshold, "triton")
    memory = torch.empty(FAR_ELEMENTS, dtype=torch.float16, device="cuda")
    far = memory.as_strided((2, 4, 200, 64), strides).copy_(getattr(inputs, name))
    assert torch.equal(far, getattr(inputs, name))
    moved = run(replace(inputs, **{name: far}), threshold, "triton")
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_more_programs_than_a_second_grid_axis_holds():
    query = torch.randn(1, 70000, 2, 16, device="cuda")
    image = torch.ones(1, 2, dtype=torch.bool, device="cuda")
    result = eah_attention(query, query[:, :1], query[:, :1], image, backend="triton")
    expected = eah_attention(query, query[:, :1], query[:, :1], image, backend="torch")
    torch.testing.assert_close(result.output, expected.output, rtol=1e-4, atol=1e-5)

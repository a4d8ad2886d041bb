"""Packed sequences: `eah_attention_varlen` is a loop of `eah_attention`, each sequence by itself."""

from itertools import accumulate, pairwise

import pytest
import torch

from eah_kernels import eah_attention, eah_attention_varlen, reference, varlen
from eah_kernels.masks import Scoring

from ..support.cases import LAYOUTS, NATIVE, assert_close, laid_out, pick_threshold

BACKENDS = ["torch", "triton", NATIVE]
KNOBS = [
    dict(),
    dict(sliding_window=17),
    dict(softcap=5.0, scale=0.2),
    dict(min_density=0.6),
    dict(broadcast_to=3),
    dict(broadcast_to=1, sliding_window=2**40),
]


def make(lengths, heads=4, kv_heads=2, dim=16, value_dim=None, dtype=torch.float32, device="cpu", image="some"):
    """query, key, value, image_mask and cu_seqlens; of the sequences with image tokens every third has none."""
    generator, tokens = torch.Generator().manual_seed(len(lengths)), sum(lengths)

    def tensor(heads, dim, scale):
        return (torch.randn(tokens, heads, dim, generator=generator) * scale).to(device, dtype)

    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    marked = {"some": torch.rand(tokens, generator=generator) < 0.4, "none": sequence < 0, "all": sequence >= 0}[image]
    if image == "some":
        marked &= sequence % 3 != 2
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    operands = tensor(heads, dim, 1.5), tensor(kv_heads, dim, 1.5), tensor(kv_heads, value_dim or dim, 1.0)
    return *operands, marked.to(device), cu_seqlens


def alone(query, key, value, image_mask, cu_seqlens, **options):
    """By definition: a call for each sequence."""
    outputs, heads, counts = [query.new_empty(0, query.shape[1], value.shape[2])], [], []
    for first, end in pairwise(cu_seqlens.tolist()):
        rows = slice(first, end)
        one = eah_attention(
            *(t[rows].transpose(0, 1)[None] for t in (query, key, value)), image_mask[rows][None], **options
        )
        outputs.append(one.output[0].transpose(0, 1))
        heads.append(one.head)
        counts.append(one.sink_counts)
    return torch.cat(outputs), torch.cat(heads), torch.cat(counts)


def threshold_of(query, key, value, image_mask, cu_seqlens, sliding_window=None, softcap=None, scale=None, **_):
    """One that splits the columns of all the sequences, and that none is near."""
    scoring, means = Scoring(None, True, scale or query.shape[2] ** -0.5, sliding_window, softcap), []
    for first, end in pairwise(cu_seqlens.tolist()):
        q, k = (t[first:end].transpose(0, 1)[None].double() for t in (query, key))
        means.append(reference.sink_statistics(q, k, image_mask[None, first:end], 0.0, scoring, torch.float64)[2])
    return pick_threshold(torch.cat(means, -1), image_mask[None])


def check(inputs, backend, **knobs):
    """Against the reference in float64, one sequence at a time."""
    threshold = threshold_of(*inputs, **knobs)
    options = dict(threshold=threshold, **knobs)
    longest = int(inputs[4].diff().max())
    result = eah_attention_varlen(*inputs, longest, backend=backend, **options)
    wide = *(t.double() for t in inputs[:3]), *inputs[3:]
    output, head, counts = alone(*wide, backend="reference", **options)
    assert torch.equal(result.head, head) and torch.equal(result.sink_counts, counts)
    assert result.head.dtype == result.sink_counts.dtype == torch.int32
    plain, _, _ = alone(*inputs, backend="reference", **options)
    assert_close(result.output, output, plain, inputs[2])
    return result


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_every_knob(backend, knobs, kernel_device):
    result = check(make([40, 70, 20, 1], device=kernel_device), backend, **knobs)
    assert result.head[2] == -1 and not result.sink_counts[2].any()
    if "min_density" not in knobs:
        assert (result.head[:2] >= 0).all()


@pytest.mark.parametrize("lengths", [[5], [0, 9, 0, 0, 64, 0], [1, 1, 1], [129, 3, 63]], ids=str)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_lengths(backend, lengths, kernel_device):
    result = check(make(lengths, image="all", device=kernel_device), backend)
    empty = torch.tensor(lengths, device=kernel_device) == 0
    assert (result.head[empty] == -1).all() and not result.sink_counts[empty].any()


@pytest.mark.parametrize(
    "shape",
    [dict(heads=8, kv_heads=1, dim=40, value_dim=24), dict(heads=3, kv_heads=3, dim=80), dict(dim=16, value_dim=72)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend, dtype, shape, kernel_device):
    if backend == "triton" and dtype == torch.bfloat16 and kernel_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    check(make([33, 66], dtype=dtype, device=kernel_device, **shape), backend)


@pytest.mark.parametrize("image", ["none", "all"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_image_and_nothing_else(backend, image, kernel_device):
    result = check(make([30, 8], image=image, device=kernel_device), backend)
    assert (result.head >= 0).any() == (image == "all")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_operand_needs_a_layout(backend, layout, kernel_device):
    inputs = make([20, 30], device=kernel_device)
    threshold = threshold_of(*inputs)
    want = eah_attention_varlen(*inputs, 30, threshold=threshold, backend=backend)
    out = laid_out(want.output.new_zeros(want.output.shape), layout) if layout != "negated" else None
    got = eah_attention_varlen(
        *(laid_out(t, layout) for t in inputs), 30, threshold=threshold, out=out, backend=backend
    )
    assert out is None or got.output is out
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_takes_the_rows_of_a_larger_buffer(backend, kernel_device):
    inputs = make([20, 30], device=kernel_device)
    want = eah_attention_varlen(*inputs, 30, backend=backend).output
    buffer = want.new_full((80, 4, 16), 7.0)
    result = eah_attention_varlen(*inputs, 30, out=buffer[10:60], backend=backend)
    assert result.output.data_ptr() == buffer[10:].data_ptr() and torch.equal(buffer[10:60], want)
    assert buffer[:10].eq(7).all() and buffer[60:].eq(7).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_at_all(backend, kernel_device):
    query, key, value, image_mask, _ = make([1], device=kernel_device)
    for sequences in (0, 3):
        cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32, device=kernel_device)
        result = eah_attention_varlen(query[:0], key[:0], value[:0], image_mask[:0], cu_seqlens, 0, backend=backend)
        assert result.output.shape == (0, 4, 16) and result.sink_counts.shape == (sequences, 4)
        assert result.head.tolist() == [-1] * sequences and not result.sink_counts.any()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gradients_flow_through_the_reference_alone(backend, kernel_device):
    inputs = make([9, 5], device=kernel_device)
    inputs[0].requires_grad_()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        eah_attention_varlen(*inputs, 9, backend=backend)
    with pytest.raises(RuntimeError, match="through out"):
        eah_attention_varlen(*inputs, 9, out=torch.empty_like(inputs[0]), backend="reference")
    with torch.no_grad():
        eah_attention_varlen(*inputs, 9, backend=backend)
    eah_attention_varlen(*inputs, 9, threshold=0.05, backend="reference").output.sum().backward()
    got, inputs[0].grad = inputs[0].grad, None
    alone(*inputs, threshold=0.05, backend="reference")[0].sum().backward()
    torch.testing.assert_close(got, inputs[0].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, kernel_device):
    inputs = make([20, 0, 9], device=kernel_device)
    out = torch.empty_like(inputs[0])
    torch.library.opcheck(varlen.packed, (*inputs, 20, out, 0.02, 0.0, 2, 0.25, 9, None, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, kernel_device):
    inputs = make([20, 9], device=kernel_device)
    threshold = threshold_of(*inputs)

    def layer(query, key, value, image_mask, cu_seqlens, out):
        out = out.mul(2)
        result = eah_attention_varlen(
            query, key, value, image_mask, cu_seqlens, 20, threshold=threshold, out=out, backend=backend
        )
        return result.output.flatten(1) + out.flatten(1), result.head

    out = torch.zeros_like(inputs[0])
    want = layer(*inputs, out)
    got = torch.compile(layer, fullgraph=True)(*inputs, out)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_out_and_inputs_may_take_turns_in_memory():
    """Halves of fused tensors: by entries, by heads, by tokens. Whoever takes an entry more overlaps."""
    inputs = make([20, 30])
    query = inputs[0]
    want = eah_attention_varlen(*inputs, 30, backend="torch").output
    fused = {
        "entries": (torch.zeros(50, 4, 33), lambda t: (t[..., :16], t[..., 16:32], t[..., 15:31])),
        "heads": (torch.zeros(50, 9, 16), lambda t: (t[:, :4], t[:, 4:8], t[:, 3:7])),
        "tokens": (torch.zeros(101, 4, 16), lambda t: (t[:-1:2], t[1::2], t[2::2])),
    }
    for tensor, parts in fused.values():
        first, second, third = parts(tensor)
        for out, taken in (first, second), (second, first):
            taken.copy_(query)
            got = eah_attention_varlen(taken, *inputs[1:], 30, out=out, backend="torch").output
            assert torch.equal(got, want) and torch.equal(taken, query)
        third.copy_(query)
        with pytest.raises(ValueError, match="out must not overlap with query"):
            eah_attention_varlen(third, *inputs[1:], 30, out=first, backend="torch")
    with pytest.raises(ValueError, match="out must not overlap with key"):
        eah_attention_varlen(query, first[:, :2], *inputs[2:], 30, out=first, backend="torch")


T, H, D = 5, 4, 8


def arguments(**changes):
    base = dict(
        query=torch.randn(T, H, D),
        key=torch.randn(T, 2, D),
        value=torch.randn(T, 2, D),
        image_mask=torch.ones(T, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, T], dtype=torch.int32),
        max_seqlen=3,
        backend="torch",
    )
    return base | changes


def bounds(*values, **options):
    return torch.tensor(values, **(dict(dtype=torch.int32) | options))


SQUARE = torch.zeros(T, H, D)
BAD = [
    ("query must be", ValueError, dict(query=torch.zeros(1, H, T, D))),
    ("query must be", ValueError, dict(query=torch.zeros(T, 0, D))),
    ("query must be", TypeError, dict(query=torch.zeros(T, H, D, dtype=torch.int32))),
    ("query must be", TypeError, dict(query=[[1.0]])),
    ("query's head dim", ValueError, dict(query=torch.zeros(T, H, 257), key=torch.zeros(T, 2, 257))),
    ("key must be", ValueError, dict(key=torch.zeros(T + 1, 2, D))),
    ("key's heads", ValueError, dict(key=torch.zeros(T, 3, D), value=torch.zeros(T, 3, D))),
    ("key's heads", ValueError, dict(key=torch.zeros(T, 0, D), value=torch.zeros(T, 0, D))),
    ("key's head dim", ValueError, dict(key=torch.zeros(T, 2, D + 1))),
    ("key must have query's dtype", TypeError, dict(key=torch.zeros(T, 2, D, dtype=torch.float16))),
    ("key must be on", ValueError, dict(key=torch.zeros(T, 2, D, device="meta"))),
    ("value must be", ValueError, dict(value=torch.zeros(T, 4, D))),
    ("value must be", ValueError, dict(value=torch.zeros(T, 2))),
    ("value must be", TypeError, dict(value=None)),
    ("value's head dim", ValueError, dict(value=torch.zeros(T, 2, 257))),
    ("image_mask must be", ValueError, dict(image_mask=torch.ones(1, T, dtype=torch.bool))),
    ("image_mask must be", TypeError, dict(image_mask=torch.ones(T))),
    ("image_mask must be on", ValueError, dict(image_mask=torch.ones(T, dtype=torch.bool, device="meta"))),
    ("cu_seqlens must be", ValueError, dict(cu_seqlens=bounds(0, 2, T, dtype=torch.int64))),
    ("cu_seqlens must be", ValueError, dict(cu_seqlens=bounds())),
    ("cu_seqlens must be", ValueError, dict(cu_seqlens=bounds([0, T]))),
    ("cu_seqlens must be", TypeError, dict(cu_seqlens=[0, T])),
    ("cu_seqlens must be on", ValueError, dict(cu_seqlens=bounds(0, T, device="meta"))),
    (r"cu_seqlens must begin with 0.*, 5, got \[1, 5\]", ValueError, dict(cu_seqlens=bounds(1, T))),
    ("cu_seqlens must begin with 0", ValueError, dict(cu_seqlens=bounds(0, T - 1))),
    ("cu_seqlens must begin with 0", ValueError, dict(cu_seqlens=bounds(0, 4, 2, T), max_seqlen=9)),
    ("cu_seqlens must begin with 0", ValueError, dict(cu_seqlens=bounds(0))),
    (r"cu_seqlens .*\[0, 1, .*\.\.\., ", ValueError, dict(cu_seqlens=bounds(*range(40)))),
    ("max_seqlen must be at least the longest sequence's 3 tokens, got 2", ValueError, dict(max_seqlen=2)),
    ("max_seqlen must be an int", ValueError, dict(max_seqlen=-1)),
    ("max_seqlen must be an int", ValueError, dict(max_seqlen=3.0)),
    ("max_seqlen must be an int", ValueError, dict(max_seqlen=True)),
    ("max_seqlen must be an int", ValueError, dict(max_seqlen=torch.tensor(3))),
    ("threshold must be", ValueError, dict(threshold=-1.0)),
    ("min_density must be", ValueError, dict(min_density=2.0)),
    ("broadcast_to must be", ValueError, dict(broadcast_to=5)),
    ("sliding_window must be", ValueError, dict(sliding_window=0)),
    ("softcap must be", ValueError, dict(softcap=-1.0)),
    ("scale must be", ValueError, dict(scale=float("nan"))),
    ("backend must be", ValueError, dict(backend="cuda")),
    ("out must be", ValueError, dict(out=torch.zeros(T, H, D + 1))),
    ("out must be", ValueError, dict(out=torch.zeros(T, H, D, dtype=torch.float64))),
    ("out must be", TypeError, dict(out=[1.0])),
    ("out must not overlap with itself", ValueError, dict(out=torch.zeros(1, H, D).expand(T, H, D))),
    ("out must not overlap with query", ValueError, dict(query=SQUARE, out=SQUARE)),
    ("out must not overlap with value", ValueError, dict(value=SQUARE[:, :2], out=SQUARE)),
]


@pytest.mark.parametrize(("message", "error", "changes"), BAD)
def test_bad_input_is_named(message, error, changes):
    with pytest.raises(error, match=message):
        eah_attention_varlen(**arguments(**changes))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_every_backend_checks_the_bounds_on_the_cpu(backend, kernel_device):
    if backend == "triton" and kernel_device != "cpu":
        pytest.skip("not on a device: tests/compiled says what happens there")
    for changes in (dict(cu_seqlens=bounds(0, 4)), dict(max_seqlen=2)):
        with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
            eah_attention_varlen(**arguments(backend=backend, **changes))


def test_any_larger_max_seqlen_serves():
    want = eah_attention_varlen(**arguments(query=SQUARE)).head
    assert torch.equal(eah_attention_varlen(**arguments(query=SQUARE, max_seqlen=2**40)).head, want)

"""Every backend computes what the reference defines, over shapes, masks, layouts and dtypes."""

import pytest
import torch

from eah_kernels import eah_attention, reference, seeing_rows, shared_map_attention, sink_statistics

from ..support.cases import LAYOUTS, NATIVE, Case, check, exact, laid_out, make, run

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
    Case(mask="bool_all", q_len=40, kv_len=70),
    Case(mask="bias_heads", mask_dtype=torch.float64),
    Case(mask="bias", mask_dtype=torch.float16, q_len=70, kv_len=40, causal=False, sliding_window=30),
    Case(softcap=30.0, peak=0.7),
    Case(softcap=1000.0, peak=0.7, mask="left"),
    Case(sliding_window=2**31 - 1),
    Case(causal=False),
    Case(causal=False, sliding_window=16, q_len=113),
    Case(sliding_window=1),
    Case(sliding_window=17, heads=8, kv_heads=2, q_len=113, kv_len=150),
    Case(softcap=3.0, q_len=113, image="absent"),
]
SPLIT = [  # longer than a cell of the Triton kernels (64): blocks that a mask hides, shows or splits
    Case(mask="left", q_len=140, heads=2, kv_heads=1),
    Case(mask="bool_causal", q_len=140, causal=False, heads=2, kv_heads=1, image="first"),
    Case(mask="bias_causal", q_len=130, kv_len=200, heads=2, kv_heads=1, image="all", sliding_window=150),
    Case(mask="bias_few", q_len=140, causal=False, heads=2, kv_heads=1, image="first", softcap=5.0),
]
LONG = [
    Case(q_len=648, batch=1, heads=2, kv_heads=2, image="middle", peak=1.0),
    Case(q_len=648, batch=1, heads=2, kv_heads=1, image="absent", mask="left"),
    Case(q_len=1023, batch=1, heads=2, kv_heads=1, image="scattered"),
]


@pytest.mark.parametrize("case", SHAPES + MASKS + SPLIT + LONG, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_float32(case, backend, kernel_device):
    check(case, backend, torch.float32, kernel_device)


@pytest.mark.parametrize("case", [*SHAPES[2:8], *MASKS[::3]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_float16(case, backend, kernel_device):
    check(case, backend, torch.float16, kernel_device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mask", "q_len"), [("left", 1), ("bool_heads", 5), ("bias", 20)])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_no_operand_needs_a_layout(backend, mask, q_len, layout, kernel_device):
    """Every operand laid out alike: the same values give the same results, whatever lies between them in memory."""
    case = Case(heads=2, kv_heads=1, q_len=q_len, kv_len=33, dim=16, image="all", mask=mask)
    inputs = make(case, device=kernel_device)
    threshold = exact(inputs)[-1]
    head = torch.tensor([1, -1], dtype=torch.int32, device=kernel_device)
    receives = torch.tensor([[True, False], [False, True]], device=kernel_device)
    operands = [inputs.query, inputs.key, inputs.value, inputs.image_mask, head, receives, inputs.attention_mask]
    if layout == "expanded":  # the first batch row stands for all
        operands = [tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for tensor in operands]

    def results(query, key, value, image, head, receives, mask):
        options = dict(attention_mask=mask, backend=backend)
        return (
            *eah_attention(query, key, value, image, threshold=threshold, **options),
            *sink_statistics(query, key, image, threshold=threshold, return_column_mean=True, **options),
            shared_map_attention(query, key, value, head, **options),
            shared_map_attention(query, key, value, head, receives=receives, **options),
        )

    want, got = results(*operands), results(*(laid_out(tensor, layout) for tensor in operands))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SHAPES + MASKS, ids=str)
def test_seeing_rows(case, monkeypatch):
    """By hand: a row counts when it sees its own key; seen with rows in blocks of 16."""
    monkeypatch.setattr("eah_kernels.masks.ROWS", 16)
    inputs = make(case)
    _, _, visible = reference.attention_maps(inputs.query, inputs.key, inputs.scoring)
    visible = visible.expand(case.batch, case.heads, -1, -1)
    q_len, kv_len = visible.shape[2:]
    want = torch.zeros(case.batch, case.heads, kv_len, dtype=torch.int32)
    for row in range(q_len):
        own = row + kv_len - q_len
        if own >= 0:
            counts = visible[:, :, row, own, None] & visible[:, :, row] & (torch.arange(kv_len) != own)
            want += counts.int()
    rules = dict(causal=case.causal, sliding_window=case.sliding_window)
    assert torch.equal(seeing_rows(inputs.query, inputs.key, inputs.attention_mask, **rules), want)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_density_gate(backend, kernel_device):
    """Image tokens at hidden keys count in the density's denominator."""
    inputs = make(Case(mask="left", q_len=70), device=kernel_device)
    options = dict(threshold=exact(inputs)[-1], attention_mask=inputs.attention_mask, backend=backend)
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    hidden = inputs.image_mask & ~inputs.attention_mask
    assert hidden.any()
    open_gate = eah_attention(*tensors, **options)
    most, image_tokens = open_gate.sink_counts.max(-1).values, inputs.image_mask.sum(-1)
    for row in range(2):
        density = (most[row] / image_tokens[row]).item()
        assert eah_attention(*tensors, min_density=density * 0.999, **options).head[row] == open_gate.head[row] >= 0
        assert eah_attention(*tensors, min_density=density * 1.001, **options).head[row] == -1


@pytest.mark.parametrize("mask", ["left", "bool_heads"])
@pytest.mark.parametrize("broadcast_to", [1, 5, 8])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_a_number_of_heads_receives_the_map(backend, broadcast_to, mask, kernel_device):
    inputs = make(Case(batch=3, heads=8, kv_heads=2, q_len=70, image="absent", mask=mask), device=kernel_device)
    shared, head, counts, *_, threshold = exact(inputs)
    wide = inputs.widened()
    own = reference.shared_map_attention(
        wide.query, wide.key, wide.value, torch.full_like(head, -1), wide.scoring, torch.float64
    )
    by_count = [sorted(range(8), key=lambda h, row=row: (row[h], -h))[:broadcast_to] for row in counts.tolist()]
    want = own.clone()
    for row, receiving in enumerate(by_count):
        if head[row] >= 0:
            want[row, receiving] = shared[row, receiving]
    options = dict(attention_mask=inputs.attention_mask, backend=backend, broadcast_to=broadcast_to)
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    result = eah_attention(*tensors, threshold=threshold, **options)
    assert torch.equal(result.head, head) and torch.equal(result.sink_counts, counts)
    torch.testing.assert_close(result.output.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_the_choice_among_many_heads(backend, kernel_device):
    inputs = make(Case(q_len=6, heads=130, kv_heads=1, dim=16, batch=1, image="all"), device=kernel_device)
    inputs.query[:, :128] = 0  # maps alike; the winner is one of the last two
    threshold = exact(inputs)[-1]
    result, want = (run(inputs, threshold, b) for b in (backend, "reference"))
    assert torch.equal(result.head, want.head) and want.head >= 128
    assert torch.equal(result.sink_counts, want.sink_counts)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_threshold_zero_and_scale_zero(backend, kernel_device):
    """Every image token that another row sees is a sink of every head: head 0."""
    inputs = make(Case(q_len=20, image="all"), device=kernel_device)
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    result = eah_attention(*tensors, threshold=0.0, scale=0.0, backend=backend)
    assert result.sink_counts.eq(19).all() and result.head.eq(0).all()
    uniform = torch.ones(20, 20, device=kernel_device).tril()
    torch.testing.assert_close(result.output, (uniform / uniform.sum(-1, keepdim=True)) @ inputs.value)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_autocast_changes_nothing(backend, kernel_device):
    inputs = make(Case(q_len=40), device=kernel_device)
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    expected = eah_attention(*tensors, threshold=0.03, backend=backend)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        result = eah_attention(*tensors, threshold=0.03, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("case", [*SHAPES[2:8], *MASKS[::3]], ids=str)
@pytest.mark.parametrize("backend", ["torch", NATIVE])
def test_bfloat16(case, backend):
    check(case, backend, torch.bfloat16)


@pytest.mark.parametrize("case", [SHAPES[3], MASKS[1], MASKS[10]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_float64(case, backend):
    check(case, backend, torch.float64)

"""What no row sees reaches nothing, NaN and inf included; rows that see nothing give 0; ties go to the lower head."""

import pytest
import torch

from eah_kernels import select_head, sink_statistics

from ..support.cases import NATIVE, Case, column_mean, exact, make, run

BACKENDS = ["reference", "torch", "triton", NATIVE]


def hidden_keys(inputs):
    """(B, Skv) bool: keys that no row of any head sees."""
    everything = slice(None)
    q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
    visible = inputs.scoring.visible(q_len, kv_len, inputs.query.device, everything, everything)
    return ~visible.any(-2).any(1).expand(len(inputs.query), kv_len)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])  # a product takes its sign from the query
@pytest.mark.parametrize(
    "case",
    [
        Case(mask="left", q_len=70),
        Case(mask="right", q_len=70),
        Case(mask="left", q_len=70, causal=False),
        Case(q_len=20, kv_len=90, sliding_window=9),
        Case(mask="bool", q_len=70),
        Case(mask="bool", q_len=70, causal=False),
        Case(mask="bias_min", q_len=70),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_reach_nothing(backend, case, poison, kernel_device):
    inputs = make(case, device=kernel_device)
    if case.mask in ("bool", "bias_min"):
        column = inputs.attention_mask[..., 5:9]
        column.fill_(False if case.mask == "bool" else torch.finfo(torch.float32).min)
    hidden = hidden_keys(inputs)
    assert hidden.any()
    threshold = exact(inputs)[-1]
    clean, clean_mean = run(inputs, threshold, backend), column_mean(inputs, backend)
    for tensor in (inputs.key, inputs.value):
        tensor.masked_fill_(hidden[:, None, :, None], poison)
    dirty, dirty_mean = run(inputs, threshold, backend), column_mean(inputs, backend)
    assert torch.equal(clean.output, dirty.output)
    assert torch.equal(clean.sink_counts, dirty.sink_counts)
    assert torch.equal(clean_mean, dirty_mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["left", "right", "bool"])
def test_rows_that_do_not_count_touch_no_statistic(backend, mask, kernel_device):
    inputs = make(Case(mask=mask, q_len=70), device=kernel_device)
    counting = inputs.scoring.counting_rows(70, 70, inputs.query.device).expand(2, 1, 70)[:, 0]
    threshold = exact(inputs)[-1]
    clean, clean_mean = run(inputs, threshold, backend), column_mean(inputs, backend)
    inputs.query.masked_fill_(~counting[:, None, :, None], torch.nan)
    dirty, dirty_mean = run(inputs, threshold, backend), column_mean(inputs, backend)
    assert torch.equal(clean.sink_counts, dirty.sink_counts) and torch.equal(clean.head, dirty.head)
    assert torch.equal(clean_mean, dirty_mean)
    rows = counting[:, None, :, None].expand_as(clean.output)
    assert torch.equal(clean.output[rows], dirty.output[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["left", "bias_rows"])
@pytest.mark.parametrize("threshold", [None, 1.0])
def test_blind_rows_give_zero(backend, mask, threshold, kernel_device):
    """With the shared map and (threshold 1: no sink) with each head's own."""
    inputs = make(Case(mask=mask, q_len=70), device=kernel_device)
    everything = slice(None)
    visible = inputs.scoring.visible(70, 70, inputs.query.device, everything, everything)
    blind = ~visible.any(-1).expand(2, 4, 70)
    assert blind.any()
    result = run(inputs, exact(inputs)[-1] if threshold is None else threshold, backend)
    assert result.output[blind].eq(0).all() and not result.output.isnan().any()
    lse = sink_statistics(
        inputs.query, inputs.key, inputs.image_mask, attention_mask=inputs.attention_mask, backend=backend
    ).lse
    assert torch.equal(lse == -torch.inf, blind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_head(backend, kernel_device):
    inputs = make(Case(q_len=40, heads=4, kv_heads=2), device=kernel_device)
    inputs.query[:, 3] = inputs.query[:, 2]  # the same KV head: the same map
    counts = run(inputs, exact(inputs)[-1], backend).sink_counts
    assert torch.equal(counts[:, 2], counts[:, 3])
    inputs.query[:, :2] = 0  # two uniform maps, and a threshold just above their column means
    mean = exact(inputs)[4]
    result = run(inputs, 1.01 * mean[:, :2].max().item(), backend)
    assert result.sink_counts[0, 2] == result.sink_counts[0, 3] > 0
    assert result.head.tolist() == [2, 2]


def test_ties_in_select_head():
    counts = torch.tensor([[3, 7, 7, 1], [0, 0, 0, 0], [5, 5, 5, 5], [9, 1, 2, 9]], dtype=torch.int32)
    image = torch.ones(4, 20, dtype=torch.bool)
    assert select_head(counts, image).tolist() == [1, -1, 0, 0]
    image[3] = False
    image[3, :10] = True
    assert select_head(counts, image, 0.9).tolist() == [-1, -1, -1, 0]

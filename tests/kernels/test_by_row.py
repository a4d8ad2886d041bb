"""A head chosen anew at each later row: every row's choice and output equal those over all rows up to it."""

import pytest
import torch

from eah_kernels import heads_by_row, reference, seeing_rows, shared_map_attention, sink_statistics, torch_blocked
from eah_kernels.selection import densest_head

from ..support.cases import NATIVE, Case, assert_close, make, pick_threshold

ROWS = 40  # the later ones
CASES = [
    Case(q_len=100, image="scattered"),
    Case(q_len=100, heads=8, kv_heads=2, dim=40, value_dim=24, softcap=4.0, image="middle", mask="left"),
    Case(q_len=100, kv_heads=1, image="last", mask="right"),
    Case(q_len=100, image="first", sliding_window=30),
    Case(q_len=100, image="absent", sliding_window=30, mask="left", layout="sliced"),
    Case(q_len=100, image="scattered", mask="bool_causal", causal=False),
    Case(q_len=100, image="all", mask="bool_all"),
    Case(q_len=100, image="scattered", mask="bias_causal", causal=False, layout="bhsd"),
    Case(q_len=100, kv_heads=2, image="scattered", mask="bias_heads"),
    Case(q_len=100, image="scattered", mask="bool_heads"),
    Case(q_len=100, image="scattered", mask="bias_rows", batch=1, scale=0.2),
]


def of_last(mask, rows, first=0):
    """The mask of the last rows, of keys from `first` on."""
    return None if mask is None else mask[..., first:] if mask.dim() == 2 else mask[:, :, -rows:, first:]


def before(inputs):
    """The rows before the later ones: column sums and how many rows they are over."""
    n = inputs.query.shape[2] - ROWS
    q, k = inputs.query[:, :, :n], inputs.key[:, :, :n]
    mask = inputs.attention_mask
    mask = None if mask is None else mask[..., :n] if mask.dim() == 2 else mask[:, :, :n, :n]
    rules = {"attention_mask": mask, "causal": inputs.rules["causal"], "sliding_window": inputs.rules["sliding_window"]}
    image = inputs.image_mask[:, :n]
    mean = sink_statistics(q, k, image, return_column_mean=True, backend="torch", **inputs.rules | rules).column_mean
    seeing = seeing_rows(q, k, **rules).masked_fill(~image[:, None], 0)
    return [torch.nn.functional.pad(tensor, (0, ROWS)) for tensor in (mean * seeing, seeing)]


def by_definition(inputs):
    """The means at every later row, in float64: what a row sees does not depend on the rows after it."""
    wide, (length, device) = inputs.widened(), (inputs.query.shape[2], torch.device("cpu"))
    maps, _, visible = reference.attention_maps(wide.query, wide.key, wide.scoring, torch.float64)
    counting = wide.scoring.counting_rows(length, length, device)
    pairs = visible & counting[..., None] & ~torch.eye(length, dtype=torch.bool)
    sums, number = maps.masked_fill(~pairs, 0).cumsum(-2), pairs.cumsum(-2)
    return (sums / number.clamp(min=1))[:, :, -ROWS:].masked_fill(~inputs.image_mask[:, None, None], 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_equals_the_definition(case, monkeypatch):
    monkeypatch.setattr(torch_blocked, "ROWS", 16)
    inputs = make(case)
    means = by_definition(inputs)
    threshold = pick_threshold(means[..., -1, :], inputs.image_mask)
    sums, seeing = before(inputs)
    first = max(0, case.q_len - ROWS - (case.sliding_window or case.q_len))  # the window has left the keys before it
    query, key = inputs.query[:, :, -ROWS:], inputs.key[:, :, first:]
    options = {"attention_mask": of_last(inputs.attention_mask, ROWS, first), **inputs.rules}
    got = heads_by_row(query, key, inputs.image_mask, sums, seeing, threshold=threshold, min_density=0.2, **options)

    near = ((means - threshold).abs() < 1e-6).any(-1)  # rounding may decide there
    counts = (means > threshold).sum(-1)
    assert torch.equal(got.sink_counts.masked_fill(near, -1), counts.masked_fill(near, -1).int())
    assert near.float().mean() < 0.05
    tokens = inputs.image_mask.cumsum(-1)[:, -ROWS:]
    assert torch.equal(got.head, densest_head(got.sink_counts.transpose(1, 2), tokens, 0.2))
    mean = got.column_sum / got.seeing.clamp(min=1)
    torch.testing.assert_close(mean.double(), means[..., -1, :], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_map_for_each_row(case, backend):
    """Also with heads that do not receive; rows of one head alone, of several, and of none."""
    inputs = make(case)
    tensors = inputs.query[:, :, -ROWS:], inputs.key, inputs.value
    rules = {**inputs.rules, "attention_mask": of_last(inputs.attention_mask, ROWS)}
    head = torch.arange(ROWS, dtype=torch.int32).expand(case.batch, -1) % (case.heads + 1) - 1
    head = head.index_fill(0, torch.tensor([0]), 1).contiguous() if case.batch > 1 else head.contiguous()
    some = torch.arange(case.heads * ROWS).view(1, case.heads, ROWS).expand(case.batch, -1, -1) % 3 > 0
    for receives in (None, some):
        got = shared_map_attention(*tensors, head, receives=receives, backend=backend, **rules)
        scoring = inputs.scoring._replace(attention_mask=rules["attention_mask"])
        wide = [tensor.double() for tensor in tensors]
        exact = reference.shared_map_attention(*wide, head, scoring, torch.float64, receives)
        assert_close(got, exact, reference.shared_map_attention(*tensors, head, scoring, torch.float32, receives))
        for row in (0, 7, ROWS - 1):  # what (B, Sq) heads mean
            alone = scoring.of_rows(slice(row, row + 1), ROWS, case.q_len, torch.device("cpu"))
            one, takes = slice(row, row + 1), None if receives is None else receives[:, :, row]
            arguments = wide[0][:, :, one], *wide[1:], head[:, row], alone, torch.float64, takes
            torch.testing.assert_close(exact[:, :, one], reference.shared_map_attention(*arguments))


def test_bad_input():
    inputs = make(Case(q_len=6, dim=8))
    sums, seeing = torch.zeros(2, 4, 6), torch.zeros(2, 1, 6, dtype=torch.int32)
    arguments = inputs.query[:, :, 3:], inputs.key, inputs.image_mask
    heads_by_row(*arguments, sums, seeing)
    with pytest.raises(ValueError, match=r"column_sum must be \(2, 4, 6\) torch.float32 on cpu, got \(2, 1, 6\)"):
        heads_by_row(*arguments, sums[:, :1], seeing)
    with pytest.raises(ValueError, match=r"seeing must be \(2, 1\|4, 6\) torch.int32 on cpu, got \(2, 2, 6\)"):
        heads_by_row(*arguments, sums, seeing.expand(-1, 2, -1))
    with pytest.raises(ValueError, match="got 5 columns, 6 keys and 3 rows"):
        heads_by_row(*arguments[:2], inputs.image_mask[:, 1:], sums, seeing)
    with pytest.raises(ValueError, match=r"head must be \(2,\) or \(2, 3\) int32 on cpu, got \(2, 6\)"):
        shared_map_attention(*arguments[:2], inputs.value, torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"receives must be \(2, 4\) or \(2, 4, 3\) bool on cpu, got \(2, 4, 6\)"):
        head = torch.zeros(2, dtype=torch.int32)
        shared_map_attention(*arguments[:2], inputs.value, head, receives=torch.ones(2, 4, 6, dtype=torch.bool))


def test_as_ops():
    """opcheck's comparison with the fake kernels, under torch.compile's rules."""
    inputs = make(Case(q_len=6, dim=8, mask="bool_heads"))
    sums, seeing = torch.zeros(2, 4, 6), torch.zeros(2, 1, 6, dtype=torch.int32)
    scoring = inputs.scoring._replace(attention_mask=inputs.attention_mask[:, :, 3:])
    arguments = inputs.query[:, :, 3:], inputs.key, inputs.image_mask, sums, seeing, 0.1, 0.0, *scoring, "torch"
    torch.library.opcheck(torch.ops.eah_kernels.heads_by_row, arguments)
    head = torch.tensor([[0, -1, 3], [2, 2, 2]], dtype=torch.int32)
    arguments = inputs.query[:, :, 3:], inputs.key, inputs.value, head, *scoring, "torch"
    torch.library.opcheck(torch.ops.eah_kernels.shared_map_attention, arguments)

"""The reference against cases worked by hand, and against what the released code does (spec/algorithm.md)."""

import pytest
import torch

from eah_kernels import eah_attention, receiving_heads, reference, select_head, sink_statistics
from eah_kernels.masks import Scoring

# Attention weights before normalisation, row by row; head 0 and head 1. Worked on paper:
#   head 0: rows 1, 2, 3 give (1/2, 1/2), (1/2, 1/4, 1/4), (1/4, 1/4, 1/4, 1/4)
#           c[0] = (1/2 + 1/2 + 1/4) / 3 = 5/12    c[1] = (1/4 + 1/4) / 2 = 1/4    c[2] = 1/4
#   head 1: rows 1, 2, 3 give (3/4, 1/4), (1/4, 1/2, 1/4), (1/8, 1/2, 1/4, 1/8)
#           c[0] = (3/4 + 1/4 + 1/8) / 3 = 3/8     c[1] = (1/2 + 1/2) / 2 = 1/2    c[2] = 1/4
WEIGHTS = torch.tensor(
    [
        [[1, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 1], [3, 1, 1, 1], [1, 2, 1, 1], [1, 4, 2, 1]],
    ],
    dtype=torch.float32,
)
IMAGE = torch.tensor([[True, True, True, False]])
VALUE = torch.tensor([[1.0], [10.0], [100.0], [1000.0]]).expand(1, 2, 4, 1) * torch.tensor([1.0, -1.0])[:, None, None]


def from_weights(weights):
    """Query and key whose scores, at scale 1, are the logarithms of the weights."""
    heads, rows, _ = weights.shape
    query = torch.eye(rows).expand(1, heads, rows, rows)
    return query, weights.log().mT[None].contiguous()


def by_hand(threshold, image=IMAGE, weights=WEIGHTS, value=VALUE, **options):
    query, key = from_weights(weights)
    return eah_attention(query, key, value, image, threshold=threshold, scale=1.0, backend="reference", **options)


def test_column_means():
    query, key = from_weights(WEIGHTS)
    statistics = sink_statistics(query, key, IMAGE, scale=1.0, return_column_mean=True, backend="reference")
    expected = torch.tensor([[[5 / 12, 1 / 4, 1 / 4, 0], [3 / 8, 1 / 2, 1 / 4, 0]]])
    torch.testing.assert_close(statistics.column_mean, expected)
    torch.testing.assert_close(statistics.lse[0, 1].exp(), torch.tensor([1.0, 4.0, 4.0, 8.0]))


@pytest.mark.parametrize(
    ("threshold", "counts", "head"),
    [(0.3, [1, 2], 1), (0.4, [1, 1], 0), (0.45, [0, 1], 1), (0.6, [0, 0], -1), (0.2, [3, 3], 0)],
)
def test_choice(threshold, counts, head):
    result = by_hand(threshold)
    assert result.sink_counts.tolist() == [counts]
    assert result.head.tolist() == [head]


def test_the_map_is_shared_and_the_values_are_not():
    last_row = torch.tensor([1 / 8, 1 / 2, 1 / 4, 1 / 8]) @ torch.tensor([1.0, 10.0, 100.0, 1000.0])
    output = by_hand(0.3).output
    torch.testing.assert_close(output[0, :, 3, 0], torch.stack([last_row, -last_row]))
    ordinary = by_hand(0.6).output
    torch.testing.assert_close(ordinary[0, 0, 3, 0], torch.tensor(1111 / 4))
    torch.testing.assert_close(ordinary[0, 1, 3, 0], -last_row)


@pytest.mark.parametrize(
    ("broadcast_to", "receiving"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), ("all", [0, 1, 2, 3])]
)
def test_the_heads_with_fewest_sinks_receive(broadcast_to, receiving):
    """The higher index on a tie; none in a batch row without a chosen head."""
    counts = torch.tensor([[2, 0, 0, 5], [0, 0, 0, 0]], dtype=torch.int32)
    marked = receiving_heads(counts, torch.tensor([3, -1], dtype=torch.int32), broadcast_to)
    assert marked[0].nonzero().flatten().tolist() == receiving
    assert not marked[1].any()


def test_threshold_is_strict():
    uniform = torch.ones(1, 2, 2)
    image, value = torch.tensor([[True, False]]), torch.ones(1, 1, 2, 1)
    assert by_hand(0.5, image, uniform, value).sink_counts.item() == 0
    assert by_hand(0.4999, image, uniform, value).sink_counts.item() == 1


def test_a_column_that_only_its_own_row_sees_is_no_sink():
    result = by_hand(0.01, image=torch.tensor([[False, False, False, True]]))
    assert result.sink_counts.tolist() == [[0, 0]] and result.head.item() == -1


def test_density_gate():
    assert by_hand(0.3, min_density=0.66).head.item() == 1  # 2 sinks of 3 image tokens
    assert by_hand(0.3, min_density=0.67).head.item() == -1


def test_density_gate_at_the_exact_fraction():
    image = torch.arange(40)[None] < 20
    for sinks in range(1, 21):
        count = torch.tensor([[0, sinks]], dtype=torch.int32)
        assert select_head(count, image, sinks / 20).item() == 1


def test_no_image_token():
    result = by_hand(0.0, image=torch.zeros(1, 4, dtype=torch.bool))
    assert result.head.item() == -1 and result.sink_counts.tolist() == [[0, 0]]


@pytest.mark.parametrize("form", ["key", "bool", "bias", "bias_min"])
def test_padding_rows_do_not_count(form):
    """With key 0 padded, rows 1 to 3 of head 0 see (1), (1/2, 1/2), (1/3, 1/3, 1/3): c[1] = 5/12, c[2] = 1/3."""
    real = torch.tensor([[False, True, True, True]])
    mask = {
        "key": real,
        "bool": real[:, None, None].expand(1, 1, 4, 4),
        "bias": torch.zeros(1, 1, 4, 4).masked_fill(~real, -torch.inf),
        "bias_min": torch.zeros(1, 1, 4, 4).masked_fill(~real, torch.finfo(torch.float32).min),
    }[form]
    query, key = from_weights(WEIGHTS)
    mean = sink_statistics(
        query, key, IMAGE, scale=1.0, return_column_mean=True, attention_mask=mask, backend="reference"
    ).column_mean
    torch.testing.assert_close(mean[0, 0], torch.tensor([0, 5 / 12, 1 / 3, 0]))
    assert by_hand(0.9, attention_mask=mask).output[0, :, 0].eq(0).all()


def test_window_and_softcap():
    """Window 2: rows 1 to 3 of head 1 see (3/4, 1/4), (2/3, 1/3) of keys 1 and 2, (2/3, 1/3) of keys 2 and 3."""
    query, key = from_weights(WEIGHTS)
    options = dict(scale=1.0, return_column_mean=True, backend="reference")
    mean = sink_statistics(query, key, IMAGE, sliding_window=2, **options).column_mean
    torch.testing.assert_close(mean[0, 1], torch.tensor([3 / 4, 2 / 3, 2 / 3, 0]))
    mean = sink_statistics(query, key, IMAGE, softcap=0.5, **options).column_mean
    row = torch.stack([0.5 * torch.tanh(torch.tensor(3.0).log() / 0.5), torch.tensor(0.0)]).softmax(0)
    capped_two = 0.5 * torch.tanh(torch.tensor(2.0).log() / 0.5)
    capped_four = 0.5 * torch.tanh(torch.tensor(4.0).log() / 0.5)
    third = torch.stack([torch.tensor(0.0), capped_two, torch.tensor(0.0)]).softmax(0)[0]
    fourth = torch.stack([torch.tensor(0.0), capped_four, capped_two, torch.tensor(0.0)]).softmax(0)[0]
    torch.testing.assert_close(mean[0, 1, 0], (row[0] + third + fourth) / 3)


def test_the_reference_is_differentiable():
    query, key = (t.clone().double().requires_grad_() for t in from_weights(WEIGHTS))
    value = VALUE.clone().double().requires_grad_()
    head = torch.tensor([1], dtype=torch.int32)
    scoring = Scoring(torch.tensor([[True, True, False, True]]), scale=1.0)
    assert torch.autograd.gradcheck(
        lambda *t: reference.shared_map_attention(*t, head, scoring, torch.float64), (query, key, value)
    )


# The released code, restated from the description in the spec.


def released(maps, threshold=0.0008):
    """maps (B, H, rows, keys) -> the maps that the released layer multiplies with its values."""
    rows, keys = maps.shape[-2:]
    if rows == 1:
        return maps
    if rows != keys:
        raise RuntimeError("a chunk of several rows on a cache does not fit the square mask")
    columns = torch.arange(36, 611)
    counts = []
    for head in range(32):
        square = maps[0, head].tril(-1)  # the causal map without its diagonal
        mean = square[:, 36:611].sum(0) / (647 - columns)
        counts.append((mean > threshold).sum())
    winner = int(torch.stack(counts).argmax())
    maps = maps.clone()
    if winner != 0:
        maps[0, :32] = maps[0, winner]
    return maps


@pytest.fixture(scope="module")
def layer():
    """A LLaVA-1.5 layer's shapes, 32 heads whose maps differ in sharpness, head 20 with the most sinks."""
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.full((32,), 1.0)
    sharpness[20] = 0.1
    query = torch.randn(2, 32, 648, 8, generator=generator) * 3 * sharpness[:, None, None]
    key, value = (torch.randn(2, 32, 648, 8, generator=generator) for _ in range(2))
    return query, key, value


def maps_of(query, key):
    return reference.attention_maps(query, key, Scoring(scale=query.shape[-1] ** -0.5))[0]


def image_columns(length, first, last, batch=1):
    column = torch.arange(length)
    return ((column >= first) & (column <= last)).expand(batch, length)


def ours(layer, image, threshold=0.0008, batch=1):
    query, key, value = (t[:batch] for t in layer)
    return eah_attention(query, key, value, image, threshold=threshold, backend="reference")


def test_agrees_with_the_released_code_where_it_should(layer):
    query, key, value = (t[:1] for t in layer)
    result = ours(layer, image_columns(648, 36, 610))
    assert result.head.item() == 20
    torch.testing.assert_close(result.output, released(maps_of(query, key)) @ value)


def test_deviation_head_zero_may_win(layer):
    flipped = [t[:1].flip(1) for t in layer]
    flipped = [torch.cat([t[:, 11:], t[:, :11]], 1) for t in flipped]  # head 20 is now head 0
    result = eah_attention(*flipped, image_columns(648, 36, 610), threshold=0.0008, backend="reference")
    assert result.head.item() == 0
    maps = maps_of(*flipped[:2])
    assert torch.equal(released(maps), maps)
    torch.testing.assert_close(result.output, maps[:, :1] @ flipped[2])


def test_deviation_threshold_and_layer():
    import inspect

    assert inspect.signature(eah_attention).parameters["threshold"].default == 0.002
    eah = pytest.importorskip("eah")
    assert inspect.signature(eah.enable).parameters["layers"].default == (1,)


def test_deviation_all_image_tokens(layer):
    """LLaVA-1.5's 576 image tokens start at column 35; the released code looks at 36 to 610."""
    whole, narrower = image_columns(648, 35, 610), image_columns(648, 36, 610)
    assert whole.sum() == 576
    more = ours(layer, whole).sink_counts - ours(layer, narrower).sink_counts
    assert more.unique().tolist() == [0, 1] or more.unique().tolist() == [1]


def test_deviation_divisor(layer):
    """At S = 700 the released divisor is 52 too small for every column, so it sees sinks that are none."""
    query, key = (torch.cat([t[:1], t[:1, :, :52]], 2) for t in layer[:2])
    maps = maps_of(query, key)
    image = image_columns(700, 36, 610)
    mean = sink_statistics(query, key, image, return_column_mean=True, backend="reference").column_mean
    columns = torch.arange(36, 611)
    sums = maps.tril(-1)[0, :, :, 36:611].sum(-2)
    torch.testing.assert_close(mean[0, :, 36:611], sums / (699 - columns))
    assert ((sums / (647 - columns)) > 0.002).sum() > ((sums / (699 - columns)) > 0.002).sum()


def test_deviation_every_batch_row(layer):
    query, key, value = layer
    maps = maps_of(query, key)
    assert torch.equal(released(maps)[1], maps[1])
    result = ours(layer, image_columns(648, 36, 610, batch=2), batch=2)
    assert result.head.tolist() == [20, 20]
    torch.testing.assert_close(result.output[1], maps[1, 20] @ value[1])


def test_deviation_number_of_heads(layer):
    query, key, value = (t[:1] for t in layer)
    forty = [torch.cat([t, t[:, :8]], 1) for t in (query, key, value)]
    maps = maps_of(*forty[:2])
    assert torch.equal(released(maps)[:, 32:], maps[:, 32:])
    result = eah_attention(*forty, image_columns(648, 36, 610), threshold=0.0008, backend="reference")
    torch.testing.assert_close(result.output, maps[:, 20:21] @ forty[2])
    with pytest.raises(IndexError):
        released(maps[:, :28])


def test_deviation_short_prompts_chunks_and_single_rows(layer):
    query, key, value = (t[:1, :, :600] for t in layer)
    maps = maps_of(query, key)
    with pytest.raises(RuntimeError):
        released(maps)
    assert eah_attention(query, key, value, image_columns(600, 35, 590), threshold=0.0005).head.item() == 20
    with pytest.raises(RuntimeError):
        released(maps[:, :, -2:])
    assert torch.equal(released(maps[:, :, -1:]), maps[:, :, -1:])


def test_deviation_rounding_of_probabilities():
    """A mean of 1/3 rounded to bfloat16 is 0.33398: sums of rounded maps cross a threshold that the map does not."""
    query, key, value = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
    query, key, value = (t.bfloat16() for t in (query, key, value))
    image = torch.tensor([[False, False, True, False]])
    window = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    window[..., 3, 0] = False
    rounded = torch.tensor(1 / 3).bfloat16().float().item()
    threshold = (rounded + 1 / 3) / 2
    assert rounded > threshold
    result = eah_attention(query, key, value, image, threshold=threshold, attention_mask=window, backend="reference")
    assert result.sink_counts.item() == 0

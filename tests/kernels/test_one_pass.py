"""Short prompts: log-sum-exps, sinks and the choice by one kernel, and a finer tile for the output."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from bench import multiprocessor
from eah_kernels import reference
from eah_kernels.masks import Scoring
from tests.support.cases import LAYOUTS, Case, Inputs, assert_close, exact, laid_out, make, run

pytest.importorskip("triton")

from eah_kernels import triton as kernels
from eah_kernels.triton import launch as launching
from eah_kernels.triton import one_pass
from eah_kernels.triton.launch import Launch, Problem
from eah_kernels.triton.tiles import ONE_PASS_PROGRAMS

SMALL = dict(heads=2, kv_heads=1, dim=16)
EDGES = [
    Case(q_len=1, image="all", **SMALL),
    Case(q_len=2, image="all", batch=1, **SMALL),
    Case(q_len=64, image="absent", **SMALL),
    Case(q_len=65, image="all", mask="left", batch=3, **SMALL),
    Case(q_len=130, image="scattered", mask="right", batch=3, **SMALL),
    Case(q_len=256, image="all", causal=False, batch=1, **SMALL),
    Case(q_len=257, image="first", sliding_window=70, mask="left", **SMALL),
    Case(q_len=200, image="scattered", causal=False, sliding_window=70, softcap=5.0, batch=1, **SMALL),
    Case(q_len=768, image="scattered", mask="left", batch=1, **SMALL),
    Case(q_len=769, image="middle", batch=1, heads=1, kv_heads=1, dim=16),
]


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """What is launched; on the meta device it is not run."""
    found, run_it = [], Launch.run

    def run(self):
        found.append(self)
        if not any(isinstance(a, torch.Tensor) and a.is_meta for v in self.arguments.values() for a in flat(v)):
            run_it(self)

    monkeypatch.setattr(Launch, "run", run)
    return found


def flat(value):
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, tuple) else [value]


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_at_the_edges(case, launched, kernel_device):
    inputs = make(case, device=kernel_device)
    output, head, counts, *_, threshold = exact(inputs)
    result = run(inputs, threshold, "triton")
    assert torch.equal(result.sink_counts, counts) and torch.equal(result.head, head)
    dtype = inputs.query.dtype
    plain = reference.shared_map_attention(inputs.query, inputs.key, inputs.value, head, inputs.scoring, dtype)
    assert_close(result.output, output, plain)
    short = case.q_len <= 768 and kernel_device == "cpu"  # on a GPU, float32 is none of its tiles
    statistics = ["one_pass"] if short else ["lse", "sinks"]
    assert names(launched) == ["pack_keys"] * (case.mask is not None) + [*statistics, "attend"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_operand_needs_a_layout(layout, launched, kernel_device):
    """Also with NaN in the hidden keys and in the rows that stand there."""
    inputs = make(Case(q_len=70, image="all", mask="left", **SMALL), torch.float16, kernel_device)
    hidden = ~inputs.attention_mask[:, None, :, None]
    for tensor in (inputs.query, inputs.key, inputs.value):
        tensor.masked_fill_(hidden, torch.nan)
    if layout == "expanded":  # the first batch row stands for all
        inputs = Inputs(*(t[:1].repeat(2, *[1] * (t.dim() - 1)) for t in tensors_of(inputs)), inputs.rules)
    elsewhere = Inputs(*(laid_out(t, layout) for t in tensors_of(inputs)), inputs.rules)
    want, got = (run(each, 0.02, "triton") for each in (inputs, elsewhere))
    assert names(launched).count("one_pass") == 2 and want.sink_counts.any()
    seen = inputs.attention_mask[:, None, :, None].expand_as(want.output)
    assert torch.equal(got.sink_counts, want.sink_counts) and torch.equal(got.head, want.head)
    assert torch.equal(got.output[seen], want.output[seen]) and not want.output[seen].isnan().any()
    assert torch.equal(want.sink_counts, run(inputs, 0.02, "torch").sink_counts)


def tensors_of(inputs: Inputs) -> list[torch.Tensor]:
    return [inputs.query, inputs.key, inputs.value, inputs.image_mask, inputs.attention_mask]


@pytest.mark.parametrize("mask", [None, "left"])
def test_tickets_serve_again(mask, kernel_device):
    """What a launch leaves of its tickets, the next one starts from, also where batch rows leave at once."""
    inputs = make(Case(q_len=70, batch=3, image="absent", mask=mask, **SMALL), torch.float16, kernel_device)
    *_, threshold = exact(inputs)
    want = run(inputs, threshold, "reference")
    tickets = torch.zeros(3 * 3 + 4, dtype=torch.int32, device=kernel_device)
    for _ in range(2):
        with mock.patch.object(one_pass, "zeroed_tickets", lambda query: tickets):
            result = run(inputs, threshold, "triton")
        assert torch.equal(result.sink_counts, want.sink_counts) and torch.equal(result.head, want.head)
        assert not tickets.any()


@pytest.mark.parametrize("kv_heads", [32, 4])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_two_launches_and_half_the_work(target, kv_heads, launched, monkeypatch):
    """Of the longest program of each launch: the tiles that it walks times the products of one."""

    def longest(launch: Launch) -> int:
        tile, length, rules = launch.tile, launch.arguments["q_len"], launch.arguments["R"]
        walked = tile.block_m if names([launch]) == ["sinks"] else tile.block_n  # rows, under its keys
        features = rules.MAIN + rules.TAIL
        if "V" in launch.arguments:
            features += launch.arguments["V"].HEADS * launch.arguments["V"].PAD
        return -(-length // walked) * tile.block_m * tile.block_n * features

    monkeypatch.setattr(launching, "device_target", lambda device: target)
    query, key = (torch.empty(1, heads, 648, 128, dtype=torch.bfloat16, device="meta") for heads in (32, kv_heads))
    problem = query, key, key, torch.empty(1, 648, dtype=torch.bool, device="meta")

    def launches():
        launched.clear()
        kernels.eah_attention(*problem, 0.002, 0.0, Scoring(scale=0.1))
        return list(launched)

    now = launches()
    monkeypatch.setattr(Problem, "short_tile", lambda self, *_: None)
    before = launches()
    assert names(now) == ["one_pass", "attend"] and names(before) == ["lse", "sinks", "attend"]
    assert sum(map(longest, now)) <= sum(map(longest, before)) / 2


@pytest.mark.parametrize(
    ("batch", "heads", "length", "one"),
    [
        (1, 32, 768, True),
        (1, 33, 768, False),
        (2, 32, 384, True),
        (2, 32, 385, False),
        (64, 32, 256, True),
        (64, 32, 257, False),
    ],
)
def test_large_batches_take_both_kernels(batch, heads, length, one, launched, monkeypatch):
    """Above so many programs throughput counts, not the longest of them."""
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90")
    rows = torch.empty(batch, heads, length, 128, dtype=torch.bfloat16, device="meta")
    image = torch.empty(batch, length, dtype=torch.bool, device="meta")
    kernels.eah_attention(rows, rows, rows, image, 0.002, 0.0, Scoring(scale=0.1))
    assert names(launched) == [*(["one_pass"] if one else ["lse", "sinks"]), "attend"]


def test_the_model_that_bounds_it():
    """It reproduces the clocks that it is fitted to, and the bound lies where it says that the two ways meet."""
    for name, (loop, table) in multiprocessor.SHIPPED.items():
        assert loop.clocks == pytest.approx(table, rel=0.1), name
    for head_dim in (64, 128):
        for length in (384, 512, 648, 768):
            overlapping, apart = (multiprocessor.crossover(length, head_dim, groups) for groups in (2, 1))
            assert 295 <= overlapping <= ONE_PASS_PROGRAMS <= apart <= 475
        for length in (64, 128, 192, 256):
            one, two = multiprocessor.statistics_clocks(length, head_dim, 4096, 1)
            assert one <= 1.1 * two

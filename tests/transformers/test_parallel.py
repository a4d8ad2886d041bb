"""Two processes (gloo, on the CPU): the results of one process, tensor parallel and data parallel."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from eah.reasons import Reason

from ..support.family_models import build as build_family
from ..support.family_models import prompt as family_prompt
from ..support.oracle import Oracle
from ..support.tiny_models import IMAGE, build, prompt
from . import processes
from .processes import MIXED, SHARES

pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers shards weights otherwise")
pytest.importorskip("accelerate")

LIMIT = 120  # seconds for both processes, many times what they take


@pytest.fixture(scope="module")
def threshold(folder, one_thread):
    """Saves a LLaVA of 8 heads and 4 KV heads, and gives the threshold at which heads of both processes win.

    One of them reads the second KV head of its process.
    """
    inputs = prompt("llava", MIXED)
    for seed in range(30):
        model = build("llava", seed=seed, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
        oracle = Oracle(model, inputs["input_ids"] == IMAGE)
        oracle.tune(inputs)
        heads = [head for head in oracle.head[1].tolist() if head >= 0]
        if {head // 4 for head in heads} == {0, 1} and any(head % 4 > 1 for head in heads):
            model.save_pretrained(folder / "llava")
            return oracle.threshold
    raise AssertionError("no seed gives both processes a winner")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def ranks(folder, threshold):
    """The results of each of two processes."""
    build_family("qwen3_vl").save_pretrained(folder / "qwen3_vl")
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", processes.__name__]
    running, logs = [], [folder / "0.log", folder / "1.log"]
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                run = subprocess.Popen(
                    [*command, str(rank), "2", str(folder), str(threshold)], env=env, stdout=file, stderr=file
                )
            running.append(run)
        end = time.monotonic() + LIMIT
        while any(run.poll() is None for run in running):
            failed = any(run.returncode for run in running)  # the other one would wait for it
            if failed or time.monotonic() > end:
                break
            time.sleep(0.1)
    finally:
        for run in running:
            run.kill()
            run.wait()
    told = "\n".join(log.read_text()[-3000:] for log in logs)
    assert [run.returncode for run in running] == [0, 0], told
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder, threshold):
    """The results of one process."""
    return processes.ways(folder / "llava", threshold)


def test_both_processes_have_a_winner(alone):
    rows = alone["logits"][-1].rows
    heads = [row.head for row in rows]
    assert heads[2] is None and {head // 4 for head in heads if head is not None} == {0, 1}
    assert {row.head for row in alone["ties"][-1].rows} == {0, None}
    assert {row.head for row in alone["no sink"][-1].rows} == {None}
    dense = [row.density >= 0.75 for row in rows]
    assert any(dense) and [row.head is not None for row in alone["min_density"][-1].rows] == dense


KNOBS = ("ties", "min_density", "broadcast_to", "no sink")
FORWARDS = ("logits", *KNOBS, "embeddings", "mask of the caller", "compiled", "gradients")


@pytest.mark.parametrize("way", [*FORWARDS, *processes.WAYS])
def test_tensor_parallel(ranks, alone, way):
    """Rank by rank: logits or tokens, gradients, and the report of all heads."""
    *want, report = alone[way]
    for rank in ranks:
        *got, same = rank["sharded"][way]
        assert same == report
        for mine, wanted in zip(got, want, strict=True):
            if mine.is_floating_point():
                bound = 1e-4 * max(1.0, wanted.abs().max().item())
                torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=bound)
            else:
                assert torch.equal(mine, wanted)


def test_attention_maps_of_the_heads_of_a_process(ranks, alone):
    logits, maps, report = alone["maps"]
    for rank, results in enumerate(ranks):
        got, of_my_heads, same = results["sharded"]["maps"]
        assert same == report and of_my_heads.shape[1] == 4
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(of_my_heads, maps[:, 4 * rank : 4 * rank + 4], rtol=1e-4, atol=1e-4)


def test_replicated_attention_needs_no_collective(ranks, folder, threshold):
    """Sharded heads: the counts, then the chosen head. Qwen3-VL's plan leaves its decoder whole."""
    model, inputs = processes.load(folder / "qwen3_vl"), family_prompt("qwen3_vl", MIXED)
    logits, report = processes.forward(model, inputs, threshold=threshold)
    assert report.rows[0].head is not None
    for rank in ranks:
        assert rank["reductions"] == (2, 0)
        got, same = rank["replicated"]
        assert same == report
        torch.testing.assert_close(got, logits)


def test_masks_per_head_are_left_alone(ranks):
    for rank in ranks:
        plain, enabled, report = rank["masks per head"]
        assert torch.equal(enabled, plain) and report.stood_aside == Reason.MASK_PER_HEAD.value


def test_tracking_stands_aside_after_the_prompt(ranks, alone):
    tokens, report = alone["greedy"]
    assert not torch.equal(alone["hold"][0], tokens)
    for rank in ranks:
        got, tracked = rank["track"]
        assert torch.equal(got, tokens)
        assert tracked.rows == report.rows and tracked.afterwards == Reason.SPREAD.value


def test_data_parallel(ranks, folder, threshold):
    """Each process has its own batch, and enables the model before it is wrapped or after."""
    model = processes.load(folder / "llava")
    for share, rank in zip(SHARES, ranks, strict=True):
        inputs, got = prompt("llava", share), rank["data parallel"]
        logits, report = processes.forward(model, inputs, threshold=threshold)
        tokens, _ = processes.generated(model, inputs, threshold)
        assert got["class"] == "DistributedDataParallel"
        assert report.rows and [got[when][1] for when in ("before", "after", "tokens")] == [report] * 3
        torch.testing.assert_close(got["before"][0], logits)
        torch.testing.assert_close(got["after"][0], logits)
        assert torch.equal(got["tokens"][0], tokens)

"""The benchmark measures what it says, and the figures in the repository are those of its result files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention
import report
from contestants import Contestant, check, contestants
from eah_kernels import eah_attention, shared_map_attention
from layers import CPU_LAYERS, LAYERS

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "bench/results").glob("*/*.json"))


@pytest.mark.parametrize("layer", {layer.small(): layer for layer in LAYERS + CPU_LAYERS}, ids=str)
def test_every_contestant_computes_what_it_claims(layer):
    for contestant in contestants("cpu", layer):
        assert check(contestant, layer, torch.float32, "cpu") is None


def test_a_contestant_that_does_not_is_told_apart():
    layer = CPU_LAYERS[0]

    def plain(inputs):
        return eah_attention(*inputs[:4], threshold=1.0, backend="torch")

    assert "another head" in check(Contestant("cheat", "eah", plain), layer, torch.float32, "cpu")
    wrong = {"attention": lambda i: i.value, "shared map": lambda i: i.value, "statistics": lambda i: i.value}
    for computes, run in wrong.items():
        assert check(Contestant("cheat", computes, run), layer, torch.float32, "cpu")

    def ordinary(inputs):
        head = torch.full((1,), -1, dtype=torch.int32)
        return shared_map_attention(*inputs[:3], head, backend="torch")

    assert check(Contestant("cheat", "held", ordinary), CPU_LAYERS[-1], torch.float32, "cpu")

    def broken(inputs):
        raise ValueError("boom")

    assert "boom" in check(Contestant("broken", "eah", broken), layer, torch.float32, "cpu")


def test_a_backend_that_does_not_take_a_size_is_not_timed(monkeypatch):
    def picky(inputs):
        if inputs.query.shape[2] > 200:
            raise ValueError("accepted: 1..200")
        return eah_attention(*inputs[:4], threshold=inputs.threshold, backend="torch")

    monkeypatch.setattr(attention, "contestants", lambda *_: [Contestant("EAH, picky", "eah", picky)])
    [row] = attention.measure(CPU_LAYERS[0], torch.float32, "cpu", rounds=1)
    assert row["not_timed"] == "accepted: 1..200" and "median_ms" not in row


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_results_say_where_they_come_from(file):
    results = json.loads(file.read_text())
    assert results["device"] and results["command"] and results["date"] and results["rows"]
    assert {"python", "torch", "triton", "transformers"} <= set(results["versions"])
    assert len(results["commit"]) == 40, "measured with uncommitted changes"


def test_the_tables_in_the_readme_are_those_of_the_results(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    text = (ROOT / "README.md").read_text().split(report.MARKS[0])[1].split(report.MARKS[1])[0]
    assert text.strip() == report.readme_results().strip()


def test_the_chart_is_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "attention.json").write_bytes(RESULTS[0].with_name("attention.json").read_bytes())
    assert report.chart(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_device_run_in_small():
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "bench/device.sh", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        rows = json.loads(done.stdout[done.stdout.index("[\n") :])
        assert rows and all("median_ms" in row for row in rows)

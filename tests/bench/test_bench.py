"""The benchmark measures what it says, and the figures in the repository are those of its result files."""

import csv
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import attention, machine, measure, publish, report
from bench.contestants import Contestant, check, contestants
from bench.layers import CPU_LAYERS, LATENCY, PREFILL
from eah_kernels import eah_attention, shared_map_attention

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench/results").glob("*/*.json"))


SMALL = {replace(layer.small(), name=""): layer for layer in PREFILL + LATENCY + CPU_LAYERS}


@pytest.mark.parametrize("layer", SMALL.values(), ids=str)
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


def test_the_tables_in_the_docs_are_those_of_the_results():
    text = (ROOT / "docs/results.md").read_text().split(publish.MARKS[0])[1].split(publish.MARKS[1])[0]
    assert text.strip() == report.all_results().strip()


def test_the_history_has_the_published_results():
    history = list(csv.reader((ROOT / "bench/results/history.csv").open()))
    assert history[0] == publish.HISTORY
    for folder in report.published():
        results = json.loads((folder / "attention.json").read_text())
        of_run = [line for line in history if line[:3] == [results["date"], results["commit"], folder.name]]
        assert len(of_run) == sum("median_ms" in row for row in results["rows"])


def test_the_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "attention.json").write_bytes(RESULTS[0].with_name("attention.json").read_bytes())
    assert report.chart(tmp_path).read_bytes().startswith(b"\x89PNG")


def run_of(folder, **changes):
    """A folder of results, as a run leaves them."""
    row = dict(layer="a layer", dtype="float32", contestant="SDPA", computes="attention", tflops=1.0)
    row |= dict(median_ms=2.0, p20_ms=1.9, p80_ms=2.1, ratio_to_sdpa=1.0, ratio_to_eager=None) | changes.pop("row", {})
    results = dict(device="A CPU, 2 threads", machine={"cpus": 2}, versions={}, commit="a" * 40, command="python x")
    results |= dict(date="2026-01-01", left_out={}, rows=[row]) | changes
    folder.mkdir(exist_ok=True)
    (folder / "attention.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "docs").mkdir(parents=True)
    (root / "docs/results.md").write_text(f"before\n{publish.MARKS[0]}\nold\n{publish.MARKS[1]}\nafter\n")
    return root


def test_publishing(repository, tmp_path):
    pytest.importorskip("matplotlib")
    folder = publish.publish([run_of(tmp_path / "one")], repository)
    assert folder == repository / "bench/results/a-cpu-2-threads"
    page = (repository / "docs/results.md").read_text()
    assert "../bench/results/a-cpu-2-threads/attention.json" in page and "old" not in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert publish.publish([run_of(tmp_path / "two", date="2026-01-02")], repository) == folder
    history = list(csv.reader((repository / "bench/results/history.csv").open()))
    assert [line[0] for line in history] == ["date", "2026-01-01", "2026-01-02"]
    assert history[1][3:] == ["a layer", "float32", "SDPA", "2", "1"]


def test_another_machine_of_the_same_name_keeps_its_folder(repository, tmp_path):
    pytest.importorskip("matplotlib")
    first = publish.publish([run_of(tmp_path / "one")], repository)
    second = publish.publish([run_of(tmp_path / "two", machine={"cpus": 64})], repository)
    assert second.name == "a-cpu-2-threads-2" and first.exists()
    assert publish.publish([run_of(tmp_path / "three", machine={"cpus": 64})], repository) == second


def test_parts_of_one_run_are_published_together(repository, tmp_path):
    pytest.importorskip("matplotlib")
    parts = [run_of(tmp_path / "one"), run_of(tmp_path / "two", row={"layer": "another"})]
    rows = json.loads((publish.publish(parts, repository) / "attention.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == ["a layer", "another"]
    with pytest.raises(publish.Refused, match="commit differs"):
        publish.publish([parts[0], run_of(tmp_path / "three", commit="b" * 40)], repository)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"row": {"p80_ms": 4.0}}, "rounds differ by 2.1 times"),
        ({"commit": "a" * 40 + "+"}, "only results of committed code"),
        ({"commit": None}, "commit none"),
    ],
)
def test_what_is_not_published(repository, tmp_path, changes, why):
    with pytest.raises(publish.Refused, match=why):
        publish.publish([run_of(tmp_path / "one", **changes)], repository)
    assert [path.name for path in repository.rglob("*") if path.is_file()] == ["results.md"]


def test_a_busy_machine_is_refused_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(publish.os, "getloadavg", lambda: (7.5, 0, 0))
    monkeypatch.setattr(publish.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: pytest.fail("it was measured"))
    assert measure.main(["--publish", "--out", str(tmp_path)]) == 1
    assert "a load of 7.50 on 2 CPUs" in capsys.readouterr().err


def test_measuring_touches_no_tracked_file(monkeypatch, capsys, tmp_path):
    git = subprocess.run(["git", "check-ignore", "build/bench"], cwd=ROOT, capture_output=True)
    assert git.returncode == 0 or not (ROOT / ".git").exists()
    commands = []

    def run(command, cwd):
        assert cwd == ROOT
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure.subprocess, "run", run)
    monkeypatch.setattr(publish, "publish", lambda *_: pytest.fail("it was published"))
    assert measure.main(["--out", str(run_of(tmp_path / "out"))]) == 0
    assert [command[1:3] for command in commands] == [["-m", "bench.attention"], ["-m", "bench.model"]]
    assert all(command[3:] == ["--out", tmp_path / "out"] for command in commands)
    assert "minutes" in capsys.readouterr().out


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(machine, "said", lambda *_: None)
    described = machine.describe("cpu")
    assert "commit" not in described and described["device"] and described["machine"]
    assert machine.describe("cpu", "c" * 40)["commit"] == "c" * 40


def test_a_tool_that_is_not_there_says_nothing():
    assert machine.said("no-such-tool", "--version") is None
    assert machine.said("false") is None


def test_a_result_file_is_whole_after_every_row(monkeypatch, tmp_path):
    rows = iter([[{"layer": "first"}], KeyboardInterrupt()])

    def measured(*_):
        found = next(rows)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(attention, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--out", str(tmp_path), "--layers", "cpu"])
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == [{"layer": "first"}]
    assert [path.name for path in tmp_path.iterdir()] == ["attention.json"]


def test_layers_that_fail_or_find_no_time_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setitem(attention.LAYERS, "cpu", CPU_LAYERS[:2])
    monkeypatch.setattr(attention, "measure", lambda *_: 1 / 0)
    assert attention.main(["--out", str(tmp_path)]) == 1
    assert set(json.loads((tmp_path / "attention.json").read_text())["left_out"].values()) == {
        "ZeroDivisionError: division by zero"
    }
    assert attention.main(["--out", str(tmp_path), "--seconds", "0"]) == 0
    left_out = json.loads((tmp_path / "attention.json").read_text())["left_out"]
    assert len(left_out) == 4 and set(left_out.values()) == {"no time left"}


def test_a_result_says_its_command_without_the_folder_of_the_clone(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", [str(machine.ROOT / "bench/attention.py"), "--out", str(machine.ROOT / "build/bench")]
    )
    assert machine.command_line() == "python -m bench.attention --out build/bench"
    assert not any("/" in json.loads(file.read_text())["command"].replace("build/bench", "") for file in RESULTS)

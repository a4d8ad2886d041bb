"""The device run, dry: every part of bench/device.py on the CPU, with device_stub.py for the device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import attention, build_native, contestants, device, environment, kernel_times, layers, model, summary
from bench.layers import Layer

from ..gpu import test_triton
from ..support import long_prompts
from ..support.cases import Case, exact, make
from ..support.tiny_models import build, prompt
from .device_stub import stub_device

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DENSE = Layer("dense", 2, 1, 40, dim=32, image_tokens=20)
PADDED = Layer("padded", 1, 1, 40, dim=16, image_tokens=20, padded=True)
STEP = Layer("step", 1, 1, 140, dim=16, image_tokens=20, rows=1)
VARIANTS = {"as shipped", "no L2", "1/8 products", "no L2, 1/8 products"}
SCRIPTS = {"attention": attention, "kernel_times": kernel_times, "environment": environment, "model": model}


def tiny_inputs(device, dtype):
    inputs = prompt("llava", ["abIcdefghi"])
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


@pytest.fixture
def stub(monkeypatch):
    """The stub device, tiny layers and models, one round. bfloat16 is not for Triton's interpreter."""
    monkeypatch.setattr(Layer, "small", lambda self: self)
    monkeypatch.setattr(attention, "LAYERS", {"prefill": (DENSE, PADDED), "latency": (DENSE, STEP)})
    monkeypatch.setattr(attention, "DTYPES", {"cuda": (torch.float16,)})
    monkeypatch.setattr(kernel_times, "LAYERS", (DENSE, STEP))
    monkeypatch.setattr(kernel_times, "DTYPES", (torch.float16,))
    monkeypatch.setattr(environment.measure, "__defaults__", (1, 2**10, 16))
    monkeypatch.setattr(model, "MODELS", {"cuda": [("tiny", lambda: build("llava").config, tiny_inputs)]})
    with stub_device(monkeypatch) as stub:
        yield stub


@pytest.fixture
def dry(stub, monkeypatch, tmp_path):
    """Runs a part with each script in this process; other commands are noted and taken for done."""
    noted = []

    def execute(command, seconds, log):
        name = command[2].removeprefix("bench.")
        noted.append(command)
        if name in SCRIPTS:
            arguments = list(command[3:])
            if "--rounds" not in arguments and name != "environment":
                arguments += ["--rounds", "1"]
            if "--exp-as-add" in arguments:  # by a process of its own: tested by itself
                arguments += ["--exp-is-gone"]
                monkeypatch.setattr(kernel_times, "BOUNDS", kernel_times.BOUNDS[:1])
            if name == "model":
                arguments[arguments.index("--rounds") + 1] = "1"
                arguments += ["--new-tokens", "2"]
            assert not SCRIPTS[name].main(arguments)
        return "done"

    monkeypatch.setattr(device, "execute", execute)
    monkeypatch.setattr(device.shutil, "which", lambda name: name)

    def run(part):
        return device.main([str(part), str(tmp_path), "--commit", "c" * 40]), noted, tmp_path

    return run


def results(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("part", range(1, 7))
def test_a_part(part, dry, stub, monkeypatch, capsys):
    shared_map_attention, captured = contestants.shared_map_attention, {}

    def spy(query, key, *rest, **options):
        if stub.capturing:
            captured.setdefault(stub.captures, set()).add(key.data_ptr())
        return shared_map_attention(query, key, *rest, **options)

    monkeypatch.setattr(contestants, "shared_map_attention", spy)
    status, noted, folder = dry(part)
    assert status == 0
    files = [path.name for path in folder.iterdir()]
    assert len(files) <= 8 and all(re.fullmatch(r"[\w.-]+", name) for name in files)
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= summary.LINES and max(map(len, said)) <= summary.LINE
    for file in folder.glob("*.json"):
        found = json.loads(file.read_text())
        assert found["rows"] and not found["left_out"] and found["commit"] == "c" * 40
    seconds = [step.seconds for step in device.steps(part, folder)]
    assert sum(seconds) <= 480 and device.PART_SECONDS + 2 * device.GRACE <= 480
    commands = [" ".join(command) for command in noted]
    native = ("gpu/test_native.py", "-m pytest", "bench.attention")
    needs = [n for n, command in enumerate(commands) if any(name in command for name in native)]
    built = [n for n, command in enumerate(commands) if "bench.build_native" in command]
    assert not needs or built[0] < needs[0], "the CUDA part is built before it is used"
    {1: parallel_tests, 2: everybody_timed, 3: costs_taken_away, 4: copies_rotated}.get(part, lambda *_: None)(
        noted, folder, captured
    )


def parallel_tests(noted, folder, captured):
    tests = noted[-1]
    assert tests[tests.index("-n") + 1] == str(os.cpu_count()) and "--timeout" in tests
    assert tests[tests.index("--dist") + 1] == "loadgroup"  # what needs much memory, in turn


def everybody_timed(noted, folder, captured):
    rows = results(folder, "attention")["rows"]
    padded = {row["contestant"]: row for row in rows if row["layer"].startswith("padded")}
    assert "not_timed" in padded["SDPA, flash"] and padded["EAH, triton"]["sdpa"] == "SDPA, efficient"
    assert padded["EAH, triton"]["ratio_to_sdpa"] > 0
    dense = {row["contestant"]: row for row in rows if row["layer"].startswith("dense")}
    assert dense["EAH, triton"]["sdpa"] == "SDPA, flash"
    assert {"graph_ms", "host_ms", "graph_ratio_to_sdpa"} <= set(dense["EAH, triton"])
    kernels = {row["kernel"] for row in results(folder, "kernels")["rows"] if "median_ms" in row}
    assert {"lse", "sinks", "attend, shared map", "attend, own maps", "decode", "SDPA, flash"} <= kernels
    assert {"one pass", "attend, shared map, short", "all of EAH", "all of EAH, one pass"} <= kernels


def costs_taken_away(noted, folder, captured):
    rows = results(folder, "bounds")["rows"]
    assert {row["variant"] for row in rows if "median_ms" in row} == VARIANTS
    assert {row["exp"] for row in results(folder, "bounds-add")["rows"]} == {"add"}
    line = next(line for line in summary.lines(folder) if "lse" in line)
    assert all(name in line for name in ("no L2 ", "1/8 products ", "no exp^ "))


def copies_rotated(noted, folder, captured):
    """Inside each graph of a decoding step, through more than the L2 cache holds."""
    rows = {row["contestant"]: row for row in results(folder, "attention")["rows"] if row["layer"].startswith("step")}
    ours = {"EAH, triton", *(f"EAH, triton, {n} programs" for n in contestants.DECODE_PROGRAMS)}
    assert all("graph_ms" in rows[name] for name in ours)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [len(keys) for keys in captured.values()][-len(ours) :]
    assert len(copies) == len(ours) and all(n * STEP.cache_elements * 2 > 2 * cache for n in copies)


def test_a_capture_that_fails_ends_nothing(stub):
    def reads_the_host(inputs):
        return inputs.query.sum().item()

    rows, copies = [{}, {}], [layers.make_inputs(DENSE, torch.float16, "cuda", seed) for seed in range(2)]
    runs = [reads_the_host, lambda inputs: inputs.query * 2]
    attention.add_graph_times(list(zip(rows, runs, strict=True)), copies, rounds=1)
    assert "stream is capturing" in rows[0]["graph_not_timed"] and rows[1]["graph_ms"] > 0


def test_steps_that_fail_do_not_end_a_part(tmp_path, capsys):
    step = device.Step
    log = tmp_path / "log.txt"
    plan = [
        step("bad", ("sh", "-c", "echo this broke; exit 3"), 9),
        step("slow", ("sh", "-c", "trap 'echo in order; exit' INT; sleep 30 & wait"), 1),
        step("needs it", ("true",), 9, after="bad"),
        step("absent", ("no-such-tool",), 9),
        step("good", ("sh", "-c", "echo fine"), 9),
    ]
    ended = device.run(plan, log)
    assert [each.status for each in ended] == [
        "failed: exit status 3",
        "out of time",
        "left out: bad failed: exit status 3",
        "left out: no-such-tool is not on this machine",
        "done",
    ]
    assert [each.failed for each in ended] == [True, True, False, False, False]
    assert "in order" in log.read_text() and "fine" in log.read_text()
    said = device.report(6, ended, tmp_path, log)
    assert any("this broke" in line for line in said)


def test_a_failed_step_is_in_the_exit_status(dry, monkeypatch):
    monkeypatch.setattr(device, "execute", lambda command, *_: "failed: exit status 1")
    assert dry(6)[0] == 1


def test_time_runs_out_in_order(dry, monkeypatch):
    monkeypatch.setattr(device, "PART_SECONDS", 0)
    status, noted, folder = dry(2)
    assert status == 1 and not noted and "out of time" in (folder / "summary.txt").read_text()


@pytest.mark.parametrize("kernels", device.SANITIZED)
def test_the_sanitizer_has_tests_to_run(kernels):
    command = [sys.executable, *device.PYTEST, *device.SANITIZED[kernels], "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 3 <= int(re.search(r"(\d+)/\d+ tests collected", done.stdout)[1]) <= 12


def test_outcomes_are_read_from_the_log():
    log = "[gw3] [ 5%] PASSED tests/test_a.py::b[c=1] \ntests/test_a.py::d[e-f] FAILED [ 9%]\n"
    log += "FAILED tests/test_a.py::d[e-f]"
    assert device.test_outcomes(log)[0] == "1 passed, 1 failed"
    assert device.test_outcomes("nothing") == []


def test_without_a_device_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "bench/device.sh", "1", tmp_path / "out"], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr and not (tmp_path / "out").exists()


def test_flex_attention_is_compiled_for_every_shape(monkeypatch):
    """From the ninth shape on torch.compile would leave the function as it is."""
    ran = []

    def backend(module, _):
        return lambda *arguments: ran.append(1) or module(*arguments)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
    flex = contestants.flex_attention()
    for n in range(12):
        inputs = layers.make_inputs(Layer("flex", 2, 1, 20 + n, dim=16), torch.float32, "cpu")
        flex(inputs)
        assert len(ran) == n + 1


def test_the_far_strides_are_far_and_do_not_overlap():
    shape, offsets = (2, 4, 200, 64), 2**31
    for strides in test_triton.FAR.values():
        reach = 0  # of the dimensions within this one
        for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: pair[1]):
            assert stride > reach
            reach += (size - 1) * stride
        assert offsets < reach < test_triton.FAR_ELEMENTS


@pytest.mark.parametrize("case", [Case(q_len=200, kv_heads=2, mask="left"), Case(q_len=70, image="absent")], ids=str)
def test_the_reference_by_blocks_of_rows_is_the_reference(case):
    inputs = make(case)
    output, head, _, lse, mean, _ = exact(inputs)
    found = long_prompts.statistics(inputs, rows=64)
    torch.testing.assert_close(found, (lse, mean), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(long_prompts.shared_map(inputs, head, torch.float64, rows=64).double(), output)


def test_an_addition_for_each_exp(tmp_path):
    """The rewritten package computes, and differs in nothing but its exps."""
    kernel_times.without_exp(tmp_path)
    for name in ("scores", "sinks", "attend", "few_rows"):
        before, after = ((root / f"eah_kernels/triton/{name}.py").read_text() for root in (ROOT, tmp_path))
        assert "tl.exp2(" in before and "exp2(" not in re.sub('""".*?"""', "", after, flags=re.DOTALL)
        assert len(before.splitlines()) == len(after.splitlines())
        compile(after, name, "exec")
    assert not list(tmp_path.rglob("*.so"))


def test_the_process_without_exps_imports_the_rewritten_package(monkeypatch, tmp_path):
    def run(command, cwd, env):
        asked = [sys.executable, "-c", "import eah_kernels, bench; print(eah_kernels.__file__, bench.__file__)"]
        package, scripts = subprocess_run(asked, cwd=cwd, env=env, capture_output=True, text=True).stdout.split()
        assert package.startswith(cwd) and scripts.startswith(str(ROOT))
        assert command[-3:] == ["--out", str(tmp_path), "--exp-is-gone"]
        return subprocess.CompletedProcess(command, 3)

    subprocess_run = subprocess.run
    monkeypatch.setattr(kernel_times.subprocess, "run", run)
    assert kernel_times.main(["--bounds", "--exp-as-add", "--out", str(tmp_path)]) == 3


@pytest.mark.parametrize(
    "answers, built, status", [([""], 0, 0), (["absent", ""], 1, 0), (["absent", "no nvcc"], 1, 1)]
)
def test_the_cuda_part_is_built_where_it_is_missing(answers, built, status, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(build_native, "missing", lambda: answers.pop(0))
    monkeypatch.setattr(build_native.subprocess, "run", lambda command, cwd: commands.append(command))
    assert build_native.main() == status and len(commands) == built
    assert status == 0 or "no nvcc" in capsys.readouterr().out

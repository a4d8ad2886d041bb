"""One part of what a CUDA machine is asked for; each is useful by itself and ends within eight minutes.

    bash bench/device.sh PART FOLDER [--commit C]

    1  what the machine is; the CUDA part built; every GPU test, on all cores, so that compilation is parallel
    2  each kernel alone, then whole layers, beside FlashAttention-2, cuDNN and FlexAttention, with a cold L2 cache
    3  what binds each kernel: no L2 traffic, an eighth of the products, an addition for each exp
    4  where latency tells: 648 tokens and decoding steps, eagerly, in a CUDA graph, and the host's time
    5  whole models
    6  the native kernels, and some of Triton's, under compute-sanitizer, where it works on this machine

A part is a list of steps, each a process with its own time limit. A step that fails or runs out of time ends neither
the part nor what it wrote so far: files are whole after every layer and dtype. FOLDER gets them, log.txt and
summary.txt; the summary is printed last, and the exit status is 1 if a step failed.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import summary
from .machine import ROOT
from .timing import Deadline

PART_SECONDS = 455
GRACE = 10  # seconds to write what there is, once a step is told to stop
PYTEST = ("-m", "pytest", "-m", "gpu", "-vv", "-p", "no:cacheprovider")
SANITIZED = {  # small, and of every kind: prefill and decode, masks, a GQA group
    "native": ("tests/gpu/test_native.py", "-k", "prefill and 113 or decode and 300"),
    "triton": ("tests/gpu/test_triton.py", "-k", "test_bfloat16 and 113 and (left or right or scattered)"),
}
PROBE = "import torch; assert torch.ones(4, device='cuda').sum().item() == 4"
OUTCOME = re.compile(r"(?:\[gw\d+\].*? )?(PASSED|FAILED|ERROR|SKIPPED) (\S+)|(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)")


class Step(NamedTuple):
    """after: the name of a step without whose success this one is left out, and that is not a failure."""

    name: str
    command: tuple[str, ...]
    seconds: int
    after: str | None = None


class Ended(NamedTuple):
    step: Step
    status: str  # "done", "failed: ...", "out of time", "left out: ..."
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status.startswith(("failed", "out of time"))


def steps(part: int, folder: Path, commit: str | None = None) -> list[Step]:
    """What a part runs, in order."""

    def script(name: str, seconds: int, file: str, *arguments: str) -> Step:
        limits = () if file == "environment" else ("--seconds", str(seconds - 30))
        options = ("--out", str(folder), *(("--commit", commit) if commit else ()))
        return Step(name, (sys.executable, "-m", f"bench.{file}", *arguments, *limits, *options), seconds)

    def tests(name: str, seconds: int, *arguments: str, before: tuple[str, ...] = (), after: str | None = None) -> Step:
        return Step(name, (*before, sys.executable, *PYTEST, *arguments), seconds, after)

    environment = script("environment", 40, "environment")
    build = Step("build", (sys.executable, "-m", "bench.build_native"), 120)
    if part == 1:
        workers = ("-n", str(os.cpu_count()), "--dist", "loadgroup", "--timeout", "120")
        return [environment, build, tests("tests", 300, *workers)]
    if part == 2:
        return [environment, script("kernels", 100, "kernel_times"), build, script("layers", 200, "attention")]
    if part == 3:
        bounds = script("bounds", 200, "kernel_times", "--bounds")
        return [environment, bounds, script("bounds, no exp", 200, "kernel_times", "--bounds", "--exp-as-add")]
    if part == 4:
        return [environment, build, script("latency", 280, "attention", "--layers", "latency")]
    if part == 5:
        return [environment, script("models", 400, "model", "--rounds", "3")]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
    probe = Step("probe", (*sanitizer, "--tool", "memcheck", sys.executable, "-c", PROBE), 60)
    runs = [("memcheck", "native", 90), ("racecheck", "native", 90), ("memcheck", "triton", 90)]
    return [
        build,
        probe,
        *(
            tests(f"{tool}, {name}", seconds, *SANITIZED[name], before=(*sanitizer, "--tool", tool), after="probe")
            for tool, name, seconds in runs
        ),
    ]


def run(plan: list[Step], log: Path) -> list[Ended]:
    """Every step, whatever became of the others; the part's time is shared out among those still to come."""
    deadline, ended = Deadline(PART_SECONDS), []
    for step in plan:
        missing = next((e for e in ended if e.step.name == step.after and e.status != "done"), None)
        start = time.monotonic()
        if missing:
            status = f"left out: {missing.step.name} {missing.status}"
        elif shutil.which(step.command[0]) is None:
            status = f"left out: {step.command[0]} is not on this machine"
        elif deadline.left() <= 0:
            status = "out of time"
        else:
            status = execute(step.command, min(step.seconds, deadline.left()), log)
        ended.append(Ended(step, status, time.monotonic() - start))
        print(f"{step.name}: {status}, {ended[-1].seconds:.0f} s", flush=True)
    return ended


def execute(command: tuple[str, ...], seconds: float, log: Path) -> str:
    """Its output goes to the log. Out of time it is interrupted, so that it can end in order, and then killed."""
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            for end in (signal.SIGINT, signal.SIGKILL):
                os.killpg(process.pid, end)
                try:
                    process.wait(GRACE)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return "out of time"
    return "done" if code == 0 else f"failed: exit status {code}"


def test_outcomes(log: str) -> list[str]:
    """How many tests passed, failed and were skipped, by pytest's line for each, and the names of those that failed."""
    found = [(m[1] and (m[1], m[2])) or (m[4], m[3]) for m in map(OUTCOME.match, log.splitlines()) if m]
    found = list(dict.fromkeys(found))  # pytest repeats failures at its end
    counts = collections.Counter(outcome.lower() for outcome, _ in found)
    bad = [f"   {outcome} {name}" for outcome, name in found if outcome in ("FAILED", "ERROR")]
    return [", ".join(f"{n} {outcome}" for outcome, n in counts.items()), *bad] if found else []


def report(part: int, ended: list[Ended], folder: Path, log: Path) -> list[str]:
    """Statuses, the end of the log of what failed, tests, tables."""
    found = [f"part {part}: " + "; ".join(f"{e.step.name} {e.status} ({e.seconds:.0f} s)" for e in ended)]
    said = log.read_text(errors="replace") if log.exists() else ""
    found += test_outcomes(said)[:40]
    found += summary.lines(folder)
    for each in ended:
        if each.failed:
            of_step = said.partition(f"\n$ {' '.join(each.step.command)}\n")[2].partition("\n$ ")[0]
            found += [f"-- end of the log of {each.step.name}", *of_step.splitlines()[-8:]]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", type=int, choices=range(1, 7))
    parser.add_argument("folder", type=Path, help="for what it writes, at most 8 files")
    parser.add_argument("--commit", help="of the code measured, where there is no git")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"bench/device.sh needs a CUDA device: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    ended = run(steps(chosen.part, folder, chosen.commit), log)
    found = report(chosen.part, ended, folder, log)
    (folder / "summary.txt").write_text("\n".join(found) + "\n")
    print("\n".join(summary.cut(found)))
    return int(any(each.failed for each in ended))


if __name__ == "__main__":
    sys.exit(main())

"""Planted faults: every place where a fixed operator changes the compiled code, and whether the emulator notices.

python -m tests.compiled.mutants [--sample N] [--seed S] [--target T ...] [--journal FILE] [--minutes M]

A change is caught when the emulator finds something wrong or a bit of a result differs from the unchanged code's, which
test_compiled.py holds to the reference. Not tried are changes that no problem feels: code that is not reached, a wait
that never had anything to wait for, a bound whose two sides are never equal, a guard that never hides anything, a
shuffle of equal values. Left out is what does nothing by the rules of nothing.py; equivalent.txt lists the others that
do nothing, with the reason.

Exits 1 when a change of a kind in STRICT is not noticed. Says which lines of the list are about nothing, as they are
after a change to a kernel that gives registers other names, or about a change that was noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from pathlib import Path
from shutil import which
from typing import NamedTuple

import numpy as np
import torch

from .emulator import CAME, GUARD_FALSE, GUARD_TRUE, SENSITIVE, TOOK_FIRST, TOOK_SECOND, Executable
from .lowering import Program
from .nothing import BARRIERS, Flow, always, either_way, guards, idle, redundant, unread, uses
from .ptx import Kernel, Statement
from .replays import SEEDS, Replay, by_build, cuda_launches, launches
from .triton_launch import UNFENCED

LIST = Path(__file__).parent / "equivalent.txt"
OUTCOMES = ("noticed", "missed", "unfelt", "equivalent", "untried")
ALONE = 3  # launches that a change is tried on by itself
STRICT = ("copy wait", "wgmma wait", "wgmma fence", *["proxy fence"] * (not UNFENCED), "order")


class Mutant(NamedTuple):
    """feels: what must happen at the statement for the change to do anything (emulator.py: CAME and so on)."""

    operator: str
    at: int  # of the kernel's statements
    statement: Statement | None  # in its place
    feels: int = CAME


def mutants_of(kernel: Kernel) -> Iterator[Mutant]:
    guarding, used, true, flow = guards(kernel), uses(kernel), always(kernel), Flow(kernel)
    never_read = unread(kernel)
    for at, statement in enumerate(kernel.statements):
        for operator, other, feels in changes(statement):
            if operator in ("barrier", "proxy fence", "wgmma fence", "wgmma wait") and redundant(flow, at):
                continue
            if operator == "bound":
                if either_way(statement, used[statement.operands[0]]):
                    continue
                if statement.operands[0] not in guarding:
                    operator = "comparison"
            if operator == "predicate" and (statement.guard in true if other else idle(statement, never_read)):
                continue
            yield Mutant(operator, at, other, feels)


def changes(statement: Statement) -> Iterator[tuple[str, Statement | None, int]]:
    opcode, operands = statement.opcode, statement.operands
    if opcode.startswith(BARRIERS):
        yield "barrier", None, CAME
    if opcode.startswith("cp.async.wait"):
        yield "copy wait", None, SENSITIVE
        if operands:
            yield "copy wait", statement._replace(operands=(str(int(operands[0]) + 1),)), SENSITIVE
    if opcode.startswith("wgmma.wait_group"):
        yield "wgmma wait", None, SENSITIVE
        yield "wgmma wait", statement._replace(operands=(str(int(operands[0]) + 1),)), SENSITIVE
    if opcode.startswith("wgmma.fence"):
        yield "wgmma fence", None, SENSITIVE
    if opcode.startswith("fence.proxy"):
        yield "proxy fence", None, CAME
    for order in ("acq_rel", "acquire", "release"):
        if f".{order}" in opcode:
            yield "order", statement._replace(opcode=opcode.replace(f".{order}", ".relaxed")), CAME
    if opcode.startswith("shfl.sync") and operands[2].isdigit() and operands[2] != "0":
        yield "shuffle", statement._replace(operands=(*operands[:2], "0", *operands[3:])), SENSITIVE
    if statement.guard:
        yield "predicate", None, GUARD_TRUE  # never true
        if opcode.startswith(("ld.global", "st.global")):
            yield "predicate", statement._replace(guard="", negated=False), GUARD_FALSE  # always true
    off_by_one = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
    bound = re.fullmatch(r"setp\.(lt|le|gt|ge)\.([su]\d+)", opcode)
    if bound:
        yield "bound", statement._replace(opcode=f"setp.{off_by_one[bound[1]]}.{bound[2]}"), SENSITIVE
    if opcode.startswith(("selp.f32", "selp.b32")) and "0fFF800000" in operands:
        feels = TOOK_FIRST if operands[1] == "0fFF800000" else TOOK_SECOND
        other = statement._replace(operands=tuple("0f00000000" if o == "0fFF800000" else o for o in operands))
        yield "mask", other, feels


def changed(program: Program, *mutants: Mutant) -> Program:
    """The program with the changes, each of another statement; all else is lowered already."""
    other = copy(program)
    for name in ("code", "source", "pool", "constants", "slots"):
        setattr(other, name, getattr(program, name).copy())
    for mutant in mutants:
        statement = program.kernel.statements[mutant.at]
        rows = [row for row, source in enumerate(program.source) if source is statement]
        lowered: list[tuple] = []
        if mutant.statement:
            other._lower(lowered, mutant.statement)
        else:
            other._emit(lowered, Statement(statement.line, ":", ()), "LABEL")
        assert len(rows) == len(lowered) == 1, statement
        other.code[rows] = lowered
    other.operands = np.array(other.pool, dtype=np.int32)
    added = set(other.constants.items()) - set(program.constants.items())
    words = [word for (value, size), slot in added for word in (slot * 2 + (size == 8), value)]
    other.constant_words = np.append(program.constant_words, np.array(words, dtype=np.uint64))
    return other


RECORDED: dict[str, dict[str, list[Replay]]] = {}


def recorded(target: str, more: bool = True) -> dict[str, list[Replay]]:
    if target not in RECORDED:
        RECORDED[target] = by_build(cuda_launches() if target == "cuda" else launches(target, more), target)
    return RECORDED[target]


def feeling(replays: list[Replay], mutant: Mutant) -> list[Replay]:
    """The launches in which a change does anything, the shortest first."""
    line = replays[0].launched.program.kernel.statements[mutant.at].line
    return sorted((r for r in replays if r.happened[line] & mutant.feels), key=lambda r: r.steps)


class Trial(NamedTuple):
    """A change that a problem feels. code: its kernel's statements, hashed. steps: of all the launches that feel it."""

    target: str
    build: str
    code: str
    mutant: Mutant
    steps: int


def _start() -> None:
    """Of a process that examines: one thread, and no more memory than a fault that has no end may take."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30,) * 2)


def examine(trials: list[Trial]) -> list[str]:
    """How each of these changes of one build was caught, or nothing. In a process of its own.

    First alone, on the shortest launches that feel it; what is left then is for the most part what nothing notices,
    and tried together, which costs a launch once: where that shows nothing, none of them is noticed.
    """
    replays = recorded(trials[0].target)[trials[0].build]
    program = replays[0].launched.program
    feel = {trial: feeling(replays, trial.mutant) for trial in trials}
    found: dict[Trial, str] = {}
    for trial, felt in feel.items():
        for replay in felt if trial.mutant.operator in STRICT else felt[:ALONE]:
            if trial not in found:
                found |= noticed(program, replay, [trial])
    for replay in sorted(replays, key=lambda r: r.steps):
        left = [trial for trial, felt in feel.items() if trial not in found and replay in felt[ALONE:]]
        while left:
            together = list({trial.mutant.at: trial for trial in left}.values())
            found |= noticed(program, replay, together)
            left = [trial for trial in left if trial not in together]
    return [found.get(trial, "") for trial in trials]


def noticed(program: Program, replay: Replay, trials: list[Trial]) -> dict[Trial, str]:
    """Those of these changes of different statements that a launch notices, and how."""
    executable = Executable(changed(program, *(trial.mutant for trial in trials)))
    strict = any(trial.mutant.operator in STRICT for trial in trials)
    how = replay.caught(executable, SEEDS if strict else SEEDS[:1])
    if not how or len(trials) == 1:
        return {trial: how for trial in trials if how}
    half = len(trials) // 2
    return noticed(program, replay, trials[:half]) | noticed(program, replay, trials[half:])


class Journal:
    """What was found so far, a line of JSON for each change: a run that was stopped goes on from there.

    What was missed is tried again where other launches feel it by now.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.found = path, dict[str, tuple[int, str]]()
        if path and path.exists():
            for line in path.read_text().splitlines():
                key, steps, how = json.loads(line)
                self.found[key] = steps, how

    @staticmethod
    def key(trial: Trial) -> str:
        return f"{trial.code} {trial.mutant.at} {trial.mutant.operator} {trial.mutant.statement}"

    def known(self, trial: Trial) -> str | None:
        """How it was caught, "" where it was missed, None where it must be tried."""
        steps, how = self.found.get(self.key(trial), (0, ""))
        return how if how or steps == trial.steps else None

    def add(self, trials: list[Trial], hows: list[str]) -> None:
        if self.path:
            with self.path.open("a") as file:
                for trial, how in zip(trials, hows, strict=True):
                    file.write(json.dumps([self.key(trial), trial.steps, how]) + "\n")


class Survey(NamedTuple):
    """scores: how many changes of a target and an operator were OUTCOMES."""

    scores: Counter[tuple[str, str, str]]
    missed: list[str]
    unfelt: list[str]
    wrong: list[str]  # lines of the list about what was noticed
    idle: list[str]  # and about nothing

    def table(self) -> list[str]:
        return [self.row(*key) for key in sorted({key[:2] for key in self.scores})]

    def row(self, target: str, operator: str) -> str:
        """The score is of all sites but the equivalent ones; where not all were tried, with its 95 % interval."""
        noticed, missed, unfelt, equivalent, untried = (self.scores[target, operator, outcome] for outcome in OUTCOMES)
        tried, sites = noticed + missed, noticed + missed + unfelt + untried
        low, share, high = (100 * (noticed + untried * part) / max(sites, 1) for part in shares(noticed, tried))
        return (
            f"{target:6} {operator:12} {share:5.1f} %{f' ({low:.1f} to {high:.1f})' if untried else ''}: "
            f"noticed {noticed:5} of {tried:5} tried; not tried {untried}, felt by no problem {unfelt}; "
            f"equivalent {equivalent}"
        )


def shares(count: int, of: int) -> tuple[float, float, float]:
    """A share between the ends of its 95 % interval (Wilson's)."""
    if not of:
        return 0.0, 0.0, 1.0
    z, share = 1.96, count / of
    middle = (share + z * z / 2 / of) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / 4 / of**2)
    return middle - half, share, middle + half


def listed() -> list[tuple[int, re.Pattern, str]]:
    """The list of equivalent changes: the line, what it is about, and why."""
    rows = [(number, line.split(" | ")) for number, line in enumerate(LIST.read_text().splitlines(), 1)]
    return [(number, re.compile(" \\| ".join(row[:-1])), row[-1]) for number, row in rows if not row[0].startswith("#")]


def told(kernel: Kernel, mutant: Mutant) -> str:
    """A fence or a wait, whose text is always the same, with the first operands of the product that it is of.

    A branch with the source line of where it goes.
    """
    statement, product = kernel.statements[mutant.at], None
    if mutant.operator in ("wgmma wait", "wgmma fence", "proxy fence"):
        others = kernel.statements[mutant.at :: -1 if mutant.operator == "wgmma wait" else 1]
        product = next((s for s in others if s.opcode.startswith("wgmma.mma")), None)
    of = " ".join(["", "of", *(re.findall(r"%\w+", o)[0] for o in product.operands[:3])]) if product else ""
    if statement.opcode.startswith("bra"):
        label = next(i for i, s in enumerate(kernel.statements) if s.opcode == f"{statement.operands[0]}:")
        there = next(s for s in kernel.statements[label:] if not s.opcode.endswith(":"))
        of = f" to {'earlier ' if label < mutant.at else ''}{there.location}"
    return f"{kernel.name} | {mutant.operator} | {statement.location} | {statement}{of} -> {mutant.statement}"


def survey(
    targets, sample=0, seed=0, processes=1, operators=(), more=True, journal=None, seconds: float = math.inf
) -> Survey:
    """sample: how many are tried of each target, 0 for all. operators: of which ones, in this order, if not of all.

    more: on MORE_LAYERS too. seconds: after which no more are tried. Which ones are, is as the seed says.
    """
    journal, end = journal or Journal(), time.monotonic() + seconds
    outcomes: list[tuple[str, Kernel, Mutant, str]] = []
    for target in targets:
        kernels, trials = {}, []
        for build, replays in recorded(target, more).items():
            kernels[build] = kernel = replays[0].launched.program.kernel
            code = hashlib.sha256("\n".join(map(str, kernel.statements)).encode()).hexdigest()[:16]
            for mutant in mutants_of(kernel):
                if operators and mutant.operator not in operators:
                    continue
                if steps := sum(replay.steps for replay in feeling(replays, mutant)):
                    trials.append(Trial(target, build, code, mutant, steps))
                else:
                    outcomes.append((target, kernel, mutant, "unfelt"))
        random.Random(seed).shuffle(trials)
        found: dict[Trial, str | None] = {trial: journal.known(trial) for trial in trials[: sample or None]}
        jobs = grouped([trial for trial, how in found.items() if how is None], seed, operators) if seconds else []
        with ProcessPoolExecutor(processes, initializer=_start) as pool:
            for job, hows in zip(jobs, pool.map(examine, jobs), strict=True):
                found |= zip(job, hows, strict=True)
                journal.add(job, hows)
                if time.monotonic() > end:
                    break
            pool.shutdown(wait=False, cancel_futures=True)
        for trial in trials:
            how = found.get(trial)
            outcome = "untried" if how is None else "noticed" if how else "missed"
            outcomes.append((target, kernels[trial.build], trial.mutant, outcome))
        del RECORDED[target]  # gigabytes
    return summed(outcomes)


def grouped(trials: list[Trial], seed: int, operators) -> list[list[Trial]]:
    """Jobs for `examine`, those of the operators in their order, else in a random one."""
    groups = defaultdict(list)
    for trial in trials:
        groups[trial.target, trial.build, trial.mutant.operator].append(trial)
    jobs = [group[i : i + 256] for group in groups.values() for i in range(0, len(group), 256)]
    random.Random(seed).shuffle(jobs)
    return sorted(jobs, key=lambda job: list(operators).index(job[0].mutant.operator) if operators else 0)


def summed(outcomes: list[tuple[str, Kernel, Mutant, str]]) -> Survey:
    scores: Counter[tuple[str, str, str]] = Counter()
    reasons, needed, wrong = listed(), set(), []
    lost: dict[str, list[str]] = {"missed": [], "unfelt": []}
    for target, kernel, mutant, outcome in outcomes:
        change = told(kernel, mutant)
        lines = {number for number, pattern, _ in reasons if pattern.fullmatch(change)}
        if outcome == "noticed":
            wrong += [f"line {number}: it is about {change}, which was noticed" for number in lines]
        elif lines:
            needed.update(lines)
            outcome = "equivalent"
        if outcome in lost:
            lost[outcome].append(f"{target} | {change} | line {kernel.statements[mutant.at].line}")
        scores[target, mutant.operator, outcome] += 1
    idle = [f"line {number}: it is about nothing" for number, *_ in reasons if number not in needed]
    return Survey(scores, lost["missed"], lost["unfelt"], wrong, idle)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="sites to try of each target, chosen at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    targets = ["sm_80", "sm_90", *["cuda"] * (which("nvcc") is not None)]
    parser.add_argument("--target", nargs="+", default=targets, help="cuda: csrc/cuda, compiled by nvcc")
    parser.add_argument("--operator", nargs="+", default=[], help="only these, in this order")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--journal", type=Path, help="a file of what was found, which a later run goes on from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no more are tried; 0: sums up")
    options = parser.parse_args()
    result = survey(
        options.target, options.sample, options.seed, options.processes, options.operator,
        journal=Journal(options.journal), seconds=60 * options.minutes,
    )  # fmt: skip
    whole = set(options.target) == set(targets) and not options.operator
    print(*result.missed, *(f"{line} | unfelt" for line in result.unfelt), sep="\n")
    print(*(f"{LIST.name}, {line}" for line in result.wrong + result.idle * whole), *result.table(), sep="\n")
    return int(any(line.split(" | ")[2] in STRICT for line in result.missed))


if __name__ == "__main__":
    sys.exit(main())

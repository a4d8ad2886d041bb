"""Planted faults: every place where a fixed operator changes the compiled code, and whether the emulator notices.

python -m tests.compiled.mutants [--sample N] [--seed S] [--target T ...]

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
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from pathlib import Path
from shutil import which
from typing import NamedTuple

import numpy as np

from .emulator import CAME, GUARD_FALSE, GUARD_TRUE, SENSITIVE, TOOK_FIRST, TOOK_SECOND, Executable
from .lowering import Program
from .nothing import BARRIERS, Flow, always, either_way, guards, redundant, uses
from .problems import SEEDS, Replay, by_build, cuda_launches, launches
from .ptx import Kernel, Statement

LIST = Path(__file__).parent / "equivalent.txt"
OUTCOMES = ("noticed", "missed", "unfelt", "equivalent")
STRICT = ("copy wait", "wgmma wait", "wgmma fence", "proxy fence", "order")


class Mutant(NamedTuple):
    """feels: what must happen at the statement for the change to do anything (emulator.py: CAME and so on)."""

    operator: str
    at: int  # of the kernel's statements
    statement: Statement | None  # in its place
    feels: int = CAME


def mutants_of(kernel: Kernel) -> Iterator[Mutant]:
    guarding, used, true, flow = guards(kernel), uses(kernel), always(kernel), Flow(kernel)
    for at, statement in enumerate(kernel.statements):
        for operator, other, feels in changes(statement):
            if operator in ("barrier", "proxy fence", "wgmma fence", "wgmma wait") and redundant(flow, at):
                continue
            if operator == "bound":
                if either_way(statement, used[statement.operands[0]]):
                    continue
                if statement.operands[0] not in guarding:
                    operator = "comparison"
            if operator == "predicate" and other and statement.guard in true:
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
        yield "wgmma fence", None, CAME
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


def changed(program: Program, mutant: Mutant) -> Program:
    """The program with the change; all but the one statement is lowered already."""
    statement = program.kernel.statements[mutant.at]
    rows = [row for row, source in enumerate(program.source) if source is statement]
    other = copy(program)
    for name in ("code", "source", "pool", "constants", "slots"):
        setattr(other, name, getattr(program, name).copy())
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
    return sorted((r for r in replays if r.happened.get(line, 0) & mutant.feels), key=lambda r: r.steps)


def examine(target: str, build: str, mutants: list[Mutant]) -> list[str]:
    """For each mutant how it was caught, or nothing. In a process of its own."""
    replays = recorded(target)[build]
    program = replays[0].launched.program
    found = []
    for mutant in mutants:
        executable = Executable(changed(program, mutant))
        seeds = SEEDS if mutant.operator in STRICT else SEEDS[:1]
        found.append(
            next((how for replay in feeling(replays, mutant) if (how := replay.caught(executable, seeds))), "")
        )
    return found


class Survey(NamedTuple):
    """scores: how many changes of a target and an operator were OUTCOMES; of `unfelt` all, of the others the sample."""

    scores: Counter[tuple[str, str, str]]
    missed: list[str]
    wrong: list[str]  # what is to be said about lines of the list

    def table(self) -> list[str]:
        rows = []
        for target, operator in sorted({key[:2] for key in self.scores}):
            noticed, missed, unfelt, equivalent = (self.scores[target, operator, outcome] for outcome in OUTCOMES)
            rows.append(
                f"{target:6} {operator:12} noticed {noticed:5} of {noticed + missed:5} tried; "
                f"felt by no problem {unfelt:4}, equivalent {equivalent:4}"
            )
        return rows


def listed() -> list[tuple[int, re.Pattern, str]]:
    """The list of equivalent changes: the line, what it is about, and why."""
    rows = [(number, line.split(" | ")) for number, line in enumerate(LIST.read_text().splitlines(), 1)]
    return [(number, re.compile(" \\| ".join(row[:-1])), row[-1]) for number, row in rows if not row[0].startswith("#")]


def told(kernel: Kernel, mutant: Mutant) -> str:
    statement = kernel.statements[mutant.at]
    return f"{kernel.name} | {mutant.operator} | {statement.location} | {statement} -> {mutant.statement}"


def survey(targets, sample: int, seed: int, processes: int, operators=(), more=True) -> Survey:
    """sample: how many are tried, 0 for all. operators: of which ones, if not of all. more: on MORE_LAYERS too."""
    reasons = listed()
    needed: set[int] = set()
    scores: Counter[tuple[str, str, str]] = Counter()
    work, missed, wrong = [], [], []

    def lines_about(kernel: Kernel, mutant: Mutant) -> set[int]:
        return {number for number, pattern, _ in reasons if pattern.fullmatch(told(kernel, mutant))}

    def count(target: str, kernel: Kernel, mutant: Mutant, outcome: str) -> None:
        lines = lines_about(kernel, mutant)
        if outcome == "noticed":
            wrong.extend(f"line {number}: it is about {told(kernel, mutant)}, which was noticed" for number in lines)
        else:
            needed.update(lines)
            outcome = "equivalent" if lines else outcome
        if outcome == "missed":
            missed.append(f"{target} | {told(kernel, mutant)} | line {kernel.statements[mutant.at].line}")
        scores[target, mutant.operator, outcome] += 1

    for target in targets:
        for build, replays in recorded(target, more).items():
            kernel = replays[0].launched.program.kernel
            for mutant in mutants_of(kernel):
                if operators and mutant.operator not in operators:
                    continue
                if feeling(replays, mutant):
                    work.append((target, build, mutant))
                else:
                    count(target, kernel, mutant, "unfelt")
    if sample:
        work = random.Random(seed).sample(work, min(sample, len(work)))
        work.sort(key=lambda w: w[:2])
    chunks = [work[i : i + 8] for i in range(0, len(work), 8)]
    jobs = [
        (t, b, [w[2] for w in chunk if w[:2] == (t, b)])
        for chunk in chunks
        for t, b in dict.fromkeys(w[:2] for w in chunk)
    ]
    with ProcessPoolExecutor(processes) as pool:
        for (target, build, mutants), found in zip(jobs, pool.map(examine, *zip(*jobs, strict=True)), strict=True):
            kernel = recorded(target)[build][0].launched.program.kernel
            for mutant, how in zip(mutants, found, strict=True):
                count(target, kernel, mutant, "noticed" if how else "missed")
    if not sample and not operators:
        wrong += [f"line {number}: it is about nothing" for number, *_ in reasons if number not in needed]
    return Survey(scores, missed, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="sites to try, chosen at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    targets = ["sm_80", "sm_90", *["cuda"] * (which("nvcc") is not None)]
    parser.add_argument("--target", nargs="+", default=targets, help="cuda: csrc/cuda, compiled by nvcc")
    parser.add_argument("--operator", nargs="+", default=[], help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    result = survey(options.target, options.sample, options.seed, options.processes, options.operator)
    print(*result.missed, *(f"{LIST.name}, {line}" for line in result.wrong), *result.table(), sep="\n")
    return int(any(line.split(" | ")[2] in STRICT for line in result.missed))


if __name__ == "__main__":
    sys.exit(main())

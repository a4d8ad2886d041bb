"""Planted faults: every place where a fixed operator changes the compiled code, and whether the emulator notices.

python -m tests.compiled.mutants [--sample N] [--seed S] [--target T ...]

A change is caught when the emulator finds something wrong or a bit of a result differs from the unchanged code's, which
test_compiled.py holds to the reference. Not tried are changes that no problem feels: code that is not reached, a wait
that never had anything to wait for, a bound whose two sides are never equal, a guard that never hides anything, a
shuffle of equal values; nor, at all, what does nothing by the rules of `redundant` and `either_way`. equivalent.txt
lists others that do nothing, with the reason.

Exits 1 when a change of a kind in STRICT is not caught.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .emulator import CAME, GUARD_FALSE, GUARD_TRUE, SENSITIVE, TOOK_FIRST, TOOK_SECOND, Executable
from .lowering import Program
from .problems import Replay, by_build, launches
from .ptx import Kernel, Statement

LIST = Path(__file__).parent / "equivalent.txt"
BARRIERS = ("bar.sync", "barrier.sync")
ACCESSES = ("ld.global", "ld.shared", "st.", "atom", "cp.async", "ldmatrix", "stmatrix", "wgmma", "ld.acquire", "fence")
STRICT = ("copy wait", "wgmma wait", "wgmma fence", "proxy fence", "order")


class Mutant(NamedTuple):
    """feels: what must happen at the statement for the change to do anything (emulator.py: CAME and so on)."""

    operator: str
    at: int  # of the kernel's statements
    statement: Statement | None  # in its place
    feels: int = CAME


def mutants_of(kernel: Kernel) -> Iterator[Mutant]:
    guarding = guards(kernel)
    used = uses(kernel)
    for at, statement in enumerate(kernel.statements):
        for operator, other, feels in changes(statement):
            if operator in ("barrier", "proxy fence", "wgmma fence", "wgmma wait") and redundant(kernel, at):
                continue
            if operator == "bound":
                if either_way(statement, used[statement.operands[0]]):
                    continue
                if statement.operands[0] not in guarding:
                    operator = "comparison"
            yield Mutant(operator, at, other, feels)


def uses(kernel: Kernel) -> dict[str, list[Statement]]:
    """The statements that read a predicate or are guarded by it."""
    found = defaultdict(list)
    for s in kernel.statements:
        for register in {s.guard, *(r for o in s.operands[1:] for r in _registers(o))} - {""}:
            found[register].append(s)
    return found


def either_way(comparison: Statement, used: list[Statement]) -> bool:
    """Whether a comparison does nothing but choose between its two sides: where they are equal, either is right."""
    sides = set(comparison.operands[1:])
    return all(s.opcode.startswith("selp") and not s.guard and set(s.operands[1:3]) == sides for s in used)


def guards(kernel: Kernel) -> set[str]:
    """The predicates on which a branch or an access hangs, directly or through other predicates."""
    found = {s.guard for s in kernel.statements if s.guard}
    while True:
        made = {
            o for s in kernel.statements if s.opcode.endswith(".pred") and s.operands[0] in found for o in s.operands
        }
        if made <= found:
            return found
        found |= made


def redundant(kernel: Kernel, at: int) -> bool:
    """Whether a barrier, or a fence or a wait at wgmma, does nothing.

    A barrier: no access to memory lies between it and the next one, or between the one before and it.
    A proxy fence: another one lies before every wgmma that follows, or nothing was written to shared memory since
    another one. A wgmma fence: the next product adds to what the last one wrote, and nobody touched it in between. A
    wait: on every path another one lies before anything but a wgmma touches what the products under way write.
    """
    statements = kernel.statements
    opcode = statements[at].opcode
    if opcode.startswith(BARRIERS):
        barrier, access = _opcodes(*BARRIERS), _opcodes(*ACCESSES)
        return _first(kernel, at, 1, barrier, access) or _first(kernel, at, -1, barrier, access)
    if opcode.startswith("fence.proxy"):
        fence = _opcodes("fence.proxy")
        written = _opcodes("st.shared", "stmatrix", "cp.async.c", "cp.async.wait")
        return _first(kernel, at, 1, fence, _opcodes("wgmma.mma")) or _first(kernel, at, -1, fence, written)
    results: set[str] = set()

    def product(statement: Statement) -> bool:
        if statement.opcode.startswith("wgmma.mma"):
            results.update(_registers(statement.operands[0]))
        return False

    def touched(statement: Statement) -> bool:
        others = [r for operand in statement.operands for r in _registers(operand)]
        return not statement.opcode.startswith("wgmma.mma") and not results.isdisjoint(others)

    if opcode.startswith("wgmma.fence"):
        before = next((s for s in reversed(statements[:at]) if s.opcode.startswith(("wgmma.mma", "bra"))), None)
        after = next(s for s in statements[at:] if s.opcode.startswith("wgmma.mma"))
        if before is None or before.opcode != after.opcode or after.operands[1].startswith("{"):
            return False
        product(after)
        same = before.operands[0] == after.operands[0]
        return same and not any(touched(s) for s in statements[statements.index(before) : at])
    _first(kernel, at, -1, _opcodes("wgmma.wait"), product)
    return _first(kernel, at, 1, _opcodes("wgmma.wait"), touched)


def _registers(operand: str) -> list[str]:
    return re.findall(r"%\w+", operand)


def _opcodes(*starts: str) -> Callable[[Statement], bool]:
    return lambda statement: statement.opcode.startswith(starts)


def _first(kernel: Kernel, at: int, step: int, good: Callable, bad: Callable) -> bool:
    """Whether every path from a statement on (step 1) or back (-1) meets a good statement before a bad one."""
    statements = kernel.statements
    following: dict[int, list[int]] = defaultdict(list)
    labels = {s.opcode[:-1]: i for i, s in enumerate(statements) if s.opcode.endswith(":")}
    for i, s in enumerate(statements):
        targets = [labels[s.operands[0]]] if s.opcode.startswith("bra") else []
        if s.guard or s.opcode not in ("bra", "bra.uni", "ret", "exit"):
            targets.append(i + 1)
        for target in targets:
            following[i if step == 1 else target].append(target if step == 1 else i)
    todo, seen = list(following[at]), set()
    while todo:
        i = todo.pop()
        if i in seen or i >= len(statements):
            continue
        seen.add(i)
        if bad(statements[i]):
            return False
        if not good(statements[i]):
            todo += following[i]
    return True


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


def changed(kernel: Kernel, mutant: Mutant) -> Kernel:
    statements = list(kernel.statements)
    statements[mutant.at : mutant.at + 1] = [mutant.statement] if mutant.statement else []
    return kernel._replace(statements=tuple(statements))


RECORDED: dict[str, dict[str, list[Replay]]] = {}


def recorded(target: str) -> dict[str, list[Replay]]:
    if target not in RECORDED:
        RECORDED[target] = by_build(launches(target), target)
    return RECORDED[target]


def feeling(replays: list[Replay], mutant: Mutant) -> list[Replay]:
    """The launches in which a change does anything, the shortest first."""
    line = replays[0].launched.program.kernel.statements[mutant.at].line
    return sorted((r for r in replays if r.happened.get(line, 0) & mutant.feels), key=lambda r: r.steps)


def examine(target: str, build: str, mutants: list[Mutant]) -> list[str]:
    """For each mutant how it was caught, or nothing. In a process of its own."""
    replays = recorded(target)[build]
    kernel = replays[0].launched.program.kernel
    found = []
    for mutant in mutants:
        executable = Executable(Program(changed(kernel, mutant)))
        found.append(next((how for replay in feeling(replays, mutant) if (how := replay.caught(executable))), ""))
    return found


class Survey(NamedTuple):
    """By operator: changes tried, caught, not caught and listed as equivalent, and felt by no problem, so not tried."""

    tried: Counter
    caught: Counter
    equivalent: Counter
    unfelt: Counter
    survivors: list[str]  # that are not listed
    stale: set[int]  # lines of the list that no change needed


def listed() -> list[tuple[int, re.Pattern, str]]:
    """The list of equivalent changes: the line, what it is about, and why."""
    rows = [(number, line.split(" | ")) for number, line in enumerate(LIST.read_text().splitlines(), 1)]
    return [(number, re.compile(" \\| ".join(row[:-1])), row[-1]) for number, row in rows if not row[0].startswith("#")]


def told(kernel: Kernel, mutant: Mutant) -> str:
    statement = kernel.statements[mutant.at]
    return f"{kernel.name} | {mutant.operator} | {statement.location} | {statement} -> {mutant.statement}"


def survey(targets, sample: int, seed: int, processes: int, operators=()) -> Survey:
    """sample: how many are tried, 0 for all. operators: of which ones, if not of all."""
    reasons = listed()
    stale = {number for number, _, _ in reasons}
    work, unfelt, equivalent = [], Counter(), Counter()

    def known(kernel: Kernel, mutant: Mutant) -> bool:
        numbers = {number for number, pattern, _ in reasons if pattern.fullmatch(told(kernel, mutant))}
        stale.difference_update(numbers)
        equivalent[mutant.operator] += bool(numbers)
        return bool(numbers)

    for target in targets:
        for build, replays in recorded(target).items():
            kernel = replays[0].launched.program.kernel
            for mutant in mutants_of(kernel):
                if operators and mutant.operator not in operators:
                    continue
                if feeling(replays, mutant):
                    work.append((target, build, mutant))
                elif not known(kernel, mutant):
                    unfelt[mutant.operator] += 1
    if sample:
        work = random.Random(seed).sample(work, min(sample, len(work)))
        work.sort(key=lambda w: w[:2])
    chunks = [work[i : i + 8] for i in range(0, len(work), 8)]
    jobs = [
        (t, b, [w[2] for w in chunk if w[:2] == (t, b)])
        for chunk in chunks
        for t, b in dict.fromkeys(w[:2] for w in chunk)
    ]
    tried, caught, survivors = Counter(), Counter(), []
    with ProcessPoolExecutor(processes) as pool:
        for (target, build, mutants), found in zip(jobs, pool.map(examine, *zip(*jobs, strict=True)), strict=True):
            kernel = recorded(target)[build][0].launched.program.kernel
            for mutant, how in zip(mutants, found, strict=True):
                tried[mutant.operator] += 1
                caught[mutant.operator] += bool(how)
                if not how and not known(kernel, mutant):
                    survivors.append(f"{build} | {told(kernel, mutant)} | line {kernel.statements[mutant.at].line}")
    return Survey(tried, caught, equivalent, unfelt, survivors, stale)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="sites to try, chosen at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--operator", nargs="+", default=[], help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    result = survey(options.target, options.sample, options.seed, options.processes, options.operator)
    print("\n".join(result.survivors))
    for number in sorted(result.stale) if not options.sample and not options.operator else ():
        print(f"{LIST.name}, line {number}: it is about no change that was not caught")
    failed = False
    for operator in [*sorted(result.tried | result.unfelt), "all"]:
        tried, caught, equivalent, unfelt = (
            counter.total() if operator == "all" else counter[operator] for counter in result[:4]
        )
        print(f"{operator:12} {caught:5} of {tried:5} caught, {equivalent:4} equivalent, {unfelt:5} felt by no problem")
        failed |= operator in STRICT and caught < tried
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

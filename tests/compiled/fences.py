"""Reads of shared memory that lack a proxy fence, found in PTX by a dataflow over its basic blocks.

wgmma and tcgen05.mma read shared memory through the async proxy; st.shared, stmatrix and cp.async write it through the
generic one, and PTX asks for a fence.proxy.async between the two (PTX ISA, "Async proxy"). A write by cp.async happens
when its group is waited for, so the fence must come after that wait.

The scan does not follow addresses: a write anywhere in shared memory reaches every later read, on every path, unless a
fence lies between. It cannot miss an unfenced read for that, but it may name a pair that never meets in memory. It does
not check that barriers order the threads.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(r"(\$?\w+):(?!:)")
INSTRUCTION = re.compile(r"(@!?%?\w+\s+)?([a-z][\w.:]*)\s*([^;]*);?")
WRITE = re.compile(r"(st|red|atom)\.(\w+\.)*shared|stmatrix")
READ = re.compile(r"wgmma\.mma_async|tcgen05\.(mma|cp)")


class Writes(NamedTuple):
    """Line numbers of the writes that may reach a point: in flight by cp.async, or done and not yet fenced."""

    in_flight: frozenset = frozenset()
    unfenced: frozenset = frozenset()

    def joined(self, other: Writes) -> Writes:
        return Writes(self.in_flight | other.in_flight, self.unfenced | other.unfenced)


def unfenced_reads(ptx: str) -> dict[int, int]:
    """The line of every matrix instruction that an unfenced write reaches, and the first such write's line."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels: dict[str, list[int]] = {}  # those of inline assembly, in braces, recur
    for number, line in enumerate(lines):
        if match := LABEL.match(line):
            labels.setdefault(match[1], []).append(number)
    before: dict[int, Writes] = {0: Writes()}
    found: dict[int, int] = {}
    waiting = [0] if lines else []  # AMD builds have no PTX
    while waiting:
        number = waiting.pop()
        state, following = _step(lines[number], number, before[number], labels, found)
        for target in following:
            joined = state.joined(before.get(target, Writes()))
            if before.get(target) != joined and target < len(lines):
                before[target] = joined
                waiting.append(target)
    return {line + 1: write + 1 for line, write in sorted(found.items())}


def _step(line: str, number: int, state: Writes, labels: dict[str, list[int]], found: dict[int, int]):
    """The writes after a line, and the numbers of the lines that may follow it."""
    match = INSTRUCTION.match(line)
    if LABEL.match(line) or not match:
        return state, [number + 1]
    predicate, name, operands = match.groups()
    if name.startswith("bra"):
        target = min(labels[operands.strip()], key=lambda label: abs(label - number))
        return state, [target, number + 1] if predicate else [target]
    if name.startswith("brx"):
        raise ValueError(f"line {number + 1}: an indirect branch, {line!r}: the scan does not follow it")
    if name in ("ret", "exit", "trap") and not predicate:
        return state, []
    in_flight, unfenced = state
    if READ.match(name) and unfenced:
        found[number] = min(unfenced)
    elif name.startswith("fence.proxy.async") and not predicate:
        unfenced = frozenset()
    elif re.match(r"cp\.async\.c[ag]\.", name):
        in_flight = in_flight | {number}
    elif name.startswith(("cp.async.wait_group", "cp.async.wait_all")):
        unfenced = unfenced | in_flight
        in_flight = in_flight if name.endswith("wait_group") and operands.strip() != "0" else frozenset()
    elif WRITE.match(name):
        unfenced = unfenced | {number}
    return Writes(in_flight, unfenced), [number + 1]

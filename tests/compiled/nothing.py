"""Planted faults that do nothing, by rules on the compiled code alone. What no rule tells is in equivalent.txt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property

from .ptx import Kernel, Statement

BARRIERS = ("bar.sync", "barrier.sync")
ACCESSES = ("ld.global", "ld.shared", "st.", "atom", "cp.async", "ldmatrix", "stmatrix", "wgmma", "ld.acquire", "fence")


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


def always(kernel: Kernel) -> set[str]:
    """The predicates that nothing but `true` is ever written to: to take such a guard away changes nothing."""
    written = defaultdict(set)
    for s in kernel.statements:
        if (s.operands and s.opcode.startswith(("setp", "mov.pred"))) or s.opcode.endswith(".pred"):
            for register in _registers(s.operands[0]):
                written[register].add((s.opcode, *s.operands[1:], s.guard))
    return {register for register, ways in written.items() if ways == {("mov.pred", "-1", "")}}


def unread(kernel: Kernel) -> set[str]:
    """The registers that values are only loaded or moved to: a load of nothing else, left out, changes nothing."""
    written, read = set(), set()
    for s in kernel.statements:
        first, others = s.operands[:1], s.operands[1:]
        if s.opcode.startswith(("mov.", "ld.")):
            written.update(r for operand in first for r in _registers(operand))
        else:
            others = s.operands
        read.update([s.guard], (r for operand in others for r in _registers(operand)))
    return written - read


def idle(statement: Statement, unread: set[str]) -> bool:
    """Whether a statement is a plain load that nobody needs."""
    plain = statement.opcode.startswith(("ld.global", "ld.shared")) and "acquire" not in statement.opcode
    return plain and set(_registers(statement.operands[0])) <= unread


class Flow:
    """A kernel's statements and which of them may come next: from each on (step 1) and back (-1)."""

    def __init__(self, kernel: Kernel):
        self.statements = statements = kernel.statements
        self.next: dict[int, dict[int, list[int]]] = {1: defaultdict(list), -1: defaultdict(list)}
        labels = {s.opcode[:-1]: i for i, s in enumerate(statements) if s.opcode.endswith(":")}
        for i, s in enumerate(statements):
            targets = [labels[s.operands[0]]] if s.opcode.startswith("bra") else []
            if s.guard or s.opcode not in ("bra", "bra.uni", "ret", "exit"):
                targets.append(i + 1)
            for target in targets:
                self.next[1][i].append(target)
                self.next[-1][target].append(i)

    def first(self, at: int, step: int, good: Callable, bad: Callable) -> bool:
        """Whether every path from a statement meets a good statement before a bad one."""
        following = self.next[step]
        todo, seen = list(following[at]), set()
        while todo:
            i = todo.pop()
            if i in seen or i >= len(self.statements):
                continue
            seen.add(i)
            if bad(self.statements[i]):
                return False
            if not good(self.statements[i]):
                todo += following[i]
        return True

    @cached_property
    def below(self) -> dict[str, tuple[str, int]]:
        """The predicates that say, wherever they are read, whether a register that has one value is below a number."""
        written = defaultdict(list)
        for i, s in enumerate(self.statements):
            if s.operands and not s.opcode.startswith("st."):
                for register in _registers(s.operands[0]):
                    written[register].append(i)

        def once(register: str) -> bool:
            first, *others = written[register] or [-1, -1]
            return not others and self.first(first, 1, _opcodes(), lambda s: s is self.statements[first])

        return {
            s.operands[0]: (s.operands[1], int(s.operands[2]))
            for s in self.statements
            if s.opcode == "setp.lt.s32" and not s.guard and re.fullmatch(r"-?\d+", s.operands[2])
            if len(written[s.operands[0]]) == 1 and once(s.operands[1])
        }

    def preceded(self, at: int, good: Callable, bad: Callable) -> bool:
        """Whether every path to a statement has a good statement and no bad one behind it.

        No path goes where a register is below a number that a later branch of it finds it not to be below.
        """
        todo, seen = [(at, frozenset[tuple[str, int]]())], set()
        while todo:
            at, least = todo.pop()
            if not self.next[-1][at]:
                return False
            for i in self.next[-1][at]:
                s, known = self.statements[i], least
                if s.guard in self.below and s.opcode.startswith("bra") and len(set(self.next[1][i])) == 2:
                    register, number = self.below[s.guard]
                    if s.negated == (at == i + 1):
                        if any(register == r and number <= n for r, n in known):
                            continue
                    else:
                        known |= {(register, number)}
                if bad(s):
                    return False
                if not good(s) and (i, known) not in seen:
                    seen.add((i, known))
                    todo.append((i, known))
        return True


def redundant(flow: Flow, at: int) -> bool:
    """Whether a barrier, or a fence or a wait at wgmma, does nothing.

    A barrier: no access to memory lies between it and the next one, or between the one before and it, or on both sides
    nothing but copies into shared memory, of which no two go to the same place, and reads of global memory.
    A proxy fence: another one lies before every wgmma that follows, or nothing was written to shared memory since
    another one. A wgmma fence: on every path to it another one lies before it, and between the two nothing touches the
    registers of the products behind it but products of the same shape, which add to them. A wait: on every path another
    one lies before anything but a wgmma touches what the products under way write.
    """
    statements = flow.statements
    opcode = statements[at].opcode
    if opcode.startswith(BARRIERS):
        barrier, access = _opcodes(*BARRIERS), _opcodes(*ACCESSES)
        other = _opcodes(*(a for a in ACCESSES if a not in ("ld.global", "cp.async")))
        sides = (1, -1)
        return any(flow.first(at, side, barrier, access) for side in sides) or all(
            flow.first(at, side, barrier, other) for side in sides
        )
    if opcode.startswith("fence.proxy"):
        fence = _opcodes("fence.proxy")
        written = _opcodes("st.shared", "stmatrix", "cp.async.c", "cp.async.wait")
        return flow.first(at, 1, fence, _opcodes("wgmma.mma")) or flow.first(at, -1, fence, written)
    if opcode.startswith("wgmma.fence"):
        return _fenced_before(flow, at)
    results: set[str] = set()

    def product(statement: Statement) -> bool:
        if statement.opcode.startswith("wgmma.mma"):
            results.update(_registers(statement.operands[0]))
        return False

    def touched(statement: Statement) -> bool:
        others = [r for operand in statement.operands for r in _registers(operand)]
        return not statement.opcode.startswith("wgmma.mma") and not results.isdisjoint(others)

    flow.first(at, -1, _opcodes("wgmma.wait"), product)
    return flow.first(at, 1, _opcodes("wgmma.wait"), touched)


def _fenced_before(flow: Flow, at: int) -> bool:
    shapes: dict[str, str] = {}  # by register of the products that follow; "" where none may have touched it

    def product(s: Statement) -> bool:
        if s.opcode.startswith("wgmma.mma"):
            for register in _registers(s.operands[0]):
                shapes[register] = s.opcode if shapes.get(register, s.opcode) == s.opcode else ""
            shapes.update(dict.fromkeys(_fragments(s), ""))
        return False

    def touched(s: Statement) -> bool:
        if s.opcode.startswith("wgmma.mma"):
            sums = any(shapes.get(r, s.opcode) != s.opcode for r in _registers(s.operands[0]))
            return sums or not shapes.keys().isdisjoint(_fragments(s))
        return any(r in shapes for operand in s.operands for r in _registers(operand))

    fence = _opcodes("wgmma.fence")
    flow.first(at, 1, fence, product)
    return flow.preceded(at, fence, touched)


def _fragments(product: Statement) -> list[str]:
    """The registers of a product's first operand, if it is not in shared memory."""
    return _registers(product.operands[1]) if product.operands[1].startswith("{") else []


def _registers(operand: str) -> list[str]:
    return re.findall(r"%\w+", operand)


def _opcodes(*starts: str) -> Callable[[Statement], bool]:
    return lambda statement: statement.opcode.startswith(starts)

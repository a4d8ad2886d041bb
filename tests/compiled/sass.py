"""What a kernel's steady-state loop issues, read from the disassembly of NVIDIA machine code."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", re.MULTILINE)
BRANCH = re.compile(r"BRA(?:\.\w+)* 0x([0-9a-f]+)")
ISSUES_A_CLOCK = 4 * 32  # lanes: four schedulers issue one warp instruction each
EXPS_A_CLOCK = 16
MATRIX_A_CLOCK = {"sm_80": 1024, "sm_89": 512, "sm_90": 2048, "sm_100": 4096}  # 16-bit multiply-adds, dense


class Loop(NamedTuple):
    """Per score element of the loop's tile."""

    issues: float
    exps: float
    scalar_loads: int  # loads of less than 8 bytes from global memory
    edge_issues: float  # of the loop over the blocks that a mask or the diagonal splits


def steady_loop(code: str, elements_a_thread: float, online: bool) -> Loop | None:
    """The innermost loop with matrix products and exps that issues least, and what the one that issues most does.

    online: among those with a running maximum (FMNMX), an online softmax; else among those without.
    """
    instructions = [(int(m[1], 16), m[2].strip()) for m in INSTRUCTION.finditer(code)]
    found = {}  # (first address, last) -> instructions
    for address, text in instructions:
        branch = BRANCH.match(text)
        if not branch or int(branch[1], 16) >= address:
            continue
        body = [t for a, t in instructions if int(branch[1], 16) <= a <= address]
        kinds = Counter(t.split()[0] for t in body)
        attention = kinds["MUFU.EX2"] and any("MMA" in kind for kind in kinds)
        maximum = any(kind.startswith("FMNMX") for kind in kinds)
        if attention and maximum == online:
            found[int(branch[1], 16), address] = body
    if not found:
        return None
    loops = [body for span, body in found.items() if not any(_holds(span, other) for other in found)]
    best = min(loops, key=len)
    kinds = Counter(t.split()[0] for t in best)
    scalar = sum(n for kind, n in kinds.items() if re.fullmatch(r"LDG(\.E)?(\.U8|\.S8|\.U16)?", kind))
    edge = max(map(len, loops)) / elements_a_thread
    return Loop(len(best) / elements_a_thread, kinds["MUFU.EX2"] / elements_a_thread, scalar, edge)


def whole_program(code: str, elements_a_thread: float) -> Loop | None:
    """The same of a program without a loop, both ways of each of its branches."""
    kinds = Counter(m[2].split()[0] for m in INSTRUCTION.finditer(code))
    if not kinds:
        return None
    issues = kinds.total() / elements_a_thread
    return Loop(issues, kinds["MUFU.EX2"] / elements_a_thread, 0, issues)


def _holds(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and span[0] <= other[0] and other[1] <= span[1]

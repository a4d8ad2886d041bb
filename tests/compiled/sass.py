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
    issues: float  # a score
    exps: float  # a score
    scalar_loads: int  # loads of less than 8 bytes from global memory
    waits: float  # of wgmma, a product
    exps_between: float  # taken while a wgmma is under way, a product
    edge_issues: float  # a score, of the loop over the blocks that a mask or the diagonal splits


def steady_loop(code: str, elements_a_thread: float, online: bool, several: bool = False) -> Loop | None:
    """The innermost loop with matrix products and exps that issues least, and what the one that issues most does.

    online: among those with a running maximum (FMNMX), an online softmax; else among those without. several: a loop
    may take more tiles a step than one, as many as its exps tell.
    """
    found = {}  # (first address, last) -> instructions
    for span, body in _loops(code).items():
        kinds = Counter(t.split()[0] for t in body)
        attention = kinds["MUFU.EX2"] and any("MMA" in kind for kind in kinds)
        maximum = any(kind.startswith("FMNMX") for kind in kinds)
        if attention and maximum == online:
            found[span] = body
    if not found:
        return None
    loops = [body for span, body in found.items() if not any(_holds(span, other) for other in found)]
    by_issues = []
    for body in loops:
        exps = sum(text.startswith("MUFU.EX2") for text in body)
        elements = elements_a_thread * (round(exps / elements_a_thread) if several else 1)
        by_issues.append((len(body) / elements, exps / elements, body))
    issues, exps, best = min(by_issues)
    scalar = sum(bool(re.match(r"LDG(\.E)?(\.U8|\.S8|\.U16)? ", text)) for text in best)
    return Loop(issues, exps, scalar, *overlap(best), max(by_issues)[0])


def spills_in_loops(code: str) -> int:
    """Accesses of spilled registers in the loops with matrix products."""
    loops = [body for body in _loops(code).values() if any("MMA" in text.split()[0] for text in body)]
    return max((sum(text.startswith(("LDL", "STL")) for text in body) for body in loops), default=0)


def overlap(body: list[str]) -> tuple[float, float]:
    """Of a loop: waits for wgmma a product, and the exps taken, a product, between a wgmma and the wait for it."""
    products = sum(text.startswith("HGMMA") for text in body)
    under_way = False
    for _ in range(2):  # what the first turn leaves under way, the second one finds
        waits, exps = 0, 0
        for text in body:
            if text.startswith("HGMMA"):
                under_way = True
            elif text.startswith("WARPGROUP.DEPBAR"):
                waits += 1
                under_way &= not text.endswith("0x0")
            elif text.startswith("MUFU.EX2"):
                exps += under_way
    return (waits / products, exps / products) if products else (0.0, 0.0)


def whole_program(code: str, elements_a_thread: float) -> Loop | None:
    """The same of a program without a loop, both ways of each of its branches."""
    body = [m[2].strip() for m in INSTRUCTION.finditer(code)]
    if not body:
        return None
    issues, exps = len(body), sum(text.startswith("MUFU.EX2") for text in body)
    return Loop(issues / elements_a_thread, exps / elements_a_thread, 0, *overlap(body), issues / elements_a_thread)


def _loops(code: str) -> dict[tuple[int, int], list[str]]:
    """(first address, last) of each loop, inner and outer, and its instructions."""
    instructions = [(int(m[1], 16), m[2].strip()) for m in INSTRUCTION.finditer(code)]
    found = {}
    for address, text in instructions:
        branch = BRANCH.match(text)
        if branch and int(branch[1], 16) < address:
            body = [t for a, t in instructions if int(branch[1], 16) <= a <= address]
            if "EXIT" not in body:  # else it only comes back from behind the program
                found[int(branch[1], 16), address] = body
    return found


def _holds(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and span[0] <= other[0] and other[1] <= span[1]

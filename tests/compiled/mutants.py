"""Planted faults: every place where a fixed operator changes the compiled code, and whether the emulator notices.

python tests/compiled/mutants.py [--sample N] [--seed S] [--target T ...]

A change is caught when the emulator finds something wrong or a bit of a result differs from the unchanged code's, which
test_compiled.py holds to the reference. Code that no problem reaches is not changed, nor a wait that never had anything
to wait for, nor a fence or wait that is redundant by the rules of `redundant`.

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
from dataclasses import replace
from typing import NamedTuple

import torch
from emulator import Executable, Fault
from lowering import Program
from ptx import Kernel, Statement
from triton_launch import Launched, compiled

from eah_kernels import shared_map_attention
from support import Case, Inputs, exact, make, run

STRICT = ("copy wait", "wgmma wait", "wgmma fence", "proxy fence", "order")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# And, of each, lengths: their remainders fall into every part of a tile.
LAYERS = [
    (Case(heads=3, kv_heads=1, image="absent"), BRAIN, [(140, 140), (300, 300), (75, 75), (230, 230), (33, 161)]),
    (
        Case(heads=2, kv_heads=2, mask="left", image="absent"),
        HALF,
        [(140, 140), (300, 300), (75, 75), (102, 230), (1, 66)],
    ),
    (
        Case(heads=2, kv_heads=1, mask="bool_causal", causal=False, image="absent"),
        BRAIN,
        [(130, 200), (300, 300), (75, 236)],
    ),
    (Case(heads=2, kv_heads=1, sliding_window=100, dim=72, image="absent"), HALF, [(300, 390), (75, 150), (230, 230)]),
    (Case(heads=2, kv_heads=1, image="absent"), SINGLE, [(75, 75), (20, 130), (110, 110)]),
]
STEPS = [
    (Case(heads=4, kv_heads=2), BRAIN, [(1, 300), (2, 37)]),
    (Case(heads=4, kv_heads=2, mask="bool_heads"), HALF, [(3, 200), (2, 90)]),
]


class Mutant(NamedTuple):
    operator: str
    at: int  # of the kernel's statements
    statement: Statement | None  # in its place


def mutants_of(kernel: Kernel) -> Iterator[Mutant]:
    guarding = guards(kernel)
    for at, statement in enumerate(kernel.statements):
        for operator, other in changes(statement):
            if operator in ("proxy fence", "wgmma fence", "wgmma wait") and redundant(kernel, at):
                continue
            if operator == "bound" and statement.operands[0] not in guarding:
                operator = "comparison"
            yield Mutant(operator, at, other)


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
    """Whether a fence or a wait at wgmma does nothing.

    A proxy fence: another one lies before every wgmma that follows, or nothing was written to shared memory since
    another one. A wgmma fence: the next product adds to what the last one wrote, and nobody touched it in between. A
    wait: on every path another one lies before anything but a wgmma touches what the products under way write.
    """
    statements = kernel.statements
    opcode = statements[at].opcode
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


def changes(statement: Statement) -> Iterator[tuple[str, Statement | None]]:
    opcode, operands = statement.opcode, statement.operands
    if opcode in ("bar.sync", "barrier.sync", "bar.warp.sync"):
        yield "barrier", None
    if opcode.startswith("cp.async.wait"):
        yield "copy wait", None
        if operands:
            yield "copy wait", statement._replace(operands=(str(int(operands[0]) + 1),))
    if opcode.startswith("wgmma.wait_group"):
        yield "wgmma wait", None
        yield "wgmma wait", statement._replace(operands=(str(int(operands[0]) + 1),))
    if opcode.startswith("wgmma.fence"):
        yield "wgmma fence", None
    if opcode.startswith("fence.proxy"):
        yield "proxy fence", None
    for order in ("acq_rel", "acquire", "release"):
        if f".{order}" in opcode:
            yield "order", statement._replace(opcode=opcode.replace(f".{order}", ".relaxed"))
    if opcode.startswith("shfl.sync") and operands[2].isdigit() and operands[2] != "0":
        yield "shuffle", statement._replace(operands=(*operands[:2], "0", *operands[3:]))
    if statement.guard:
        yield "predicate", None  # never true
        if opcode.startswith(("ld.global", "st.global")):
            yield "predicate", statement._replace(guard="", negated=False)  # always true
    off_by_one = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
    bound = re.fullmatch(r"setp\.(lt|le|gt|ge)\.([su]\d+)", opcode)
    if bound:
        yield "bound", statement._replace(opcode=f"setp.{off_by_one[bound[1]]}.{bound[2]}")
    if opcode.startswith(("selp.f32", "selp.b32")) and "0fFF800000" in operands:
        yield "mask", statement._replace(operands=tuple("0f00000000" if o == "0fFF800000" else o for o in operands))


def spaced(inputs: Inputs) -> Inputs:
    """The same, each tensor with room around each of its rows that belongs to nobody: an access one too far shows."""

    def spread(tensor):
        if tensor is None:
            return None
        room = [n + 1 for n in tensor.shape[:-1]] + [tensor.shape[-1] + 16]
        wide = torch.full(room, torch.nan if tensor.is_floating_point() else 1, dtype=tensor.dtype)
        return wide[tuple(slice(n) for n in tensor.shape)].copy_(tensor)

    names = "query", "key", "value", "image_mask", "attention_mask"
    return replace(inputs, **{name: spread(getattr(inputs, name)) for name in names})


def changed(kernel: Kernel, mutant: Mutant) -> Kernel:
    statements = list(kernel.statements)
    statements[mutant.at : mutant.at + 1] = [mutant.statement] if mutant.statement else []
    return kernel._replace(statements=tuple(statements))


class Replay:
    """A launch that can be had again: the bytes of its tensors' memory before it, its results and how long it took."""

    def __init__(self, launched: Launched):
        self.launched = launched
        self.memory = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in launched.tensors}
        self.before = [s.clone() for s in self.memory.values()]
        self.steps, self.executed, self.results, self.reached = 0, 0, [], set()

    def run(self, executable: Executable, **options) -> list[torch.Tensor]:
        for storage, before in zip(self.memory.values(), self.before, strict=True):
            storage.copy_(before)
        self.executed = self.launched.execute(executable, **options)
        return [t.clone() for t in self.launched.tensors]

    def caught(self, kernel: Kernel) -> str:
        """How a changed kernel shows, or nothing."""
        executable = Executable(Program(kernel))
        for seed in (3, 0, 1):
            try:
                results = self.run(executable, seed=seed, limit=20 * self.steps + 10000)
            except Fault as fault:
                return str(fault)
            for want, got in zip(self.results, results, strict=True):
                if not torch.equal(want.contiguous().view(torch.uint8), got.contiguous().view(torch.uint8)):
                    return "another result"
        return ""


def every(rows) -> list[tuple[Case, torch.dtype]]:
    return [
        (replace(case, q_len=q_len, kv_len=kv_len), dtype) for case, dtype, sizes in rows for q_len, kv_len in sizes
    ]


def record(target: str) -> dict[str, list[Replay]]:
    """The launches of LAYERS and STEPS by the build they run; every build with all of its launches."""
    replays: list[Replay] = []
    with compiled(target, observe=lambda launched: replays.append(Replay(launched))) as driver:
        for case, dtype in every(LAYERS):
            inputs = spaced(make(case, dtype))
            run(inputs, exact(inputs)[-1], "triton")
        for case, dtype in every(STEPS):
            inputs = spaced(make(case, dtype))
            for head in ([case.heads - 1, -1], [-1, 0]):
                options = dict(attention_mask=inputs.attention_mask, backend="triton", **inputs.rules)
                tensors = inputs.query, inputs.key, inputs.value
                shared_map_attention(*tensors, torch.tensor(head, dtype=torch.int32), **options)
    builds: dict[int, list[Replay]] = defaultdict(list)
    for replay in replays:
        program = replay.launched.program
        executable = next(e for e in driver.executables.values() if e.program is program)
        replay.results, replay.reached = replay.run(executable, seed=3), executable.reached()
        replay.steps = replay.executed
        builds[id(program)].append(replay)
    return {f"{target} {number} {group[0].launched.name}": group for number, group in enumerate(builds.values())}


RECORDED: dict[str, dict[str, list[Replay]]] = {}


def examine(target: str, build: str, mutants: list[Mutant]) -> list[str]:
    """For each mutant how it was caught, or nothing. In a process of its own."""
    if target not in RECORDED:
        RECORDED[target] = record(target)
    replays = RECORDED[target][build]
    kernel = replays[0].launched.program.kernel
    found = []
    for mutant in mutants:
        other = changed(kernel, mutant)
        found.append(next((how for replay in replays if (how := replay.caught(other))), ""))
    return found


def survey(targets, sample: int, seed: int, processes: int) -> tuple[Counter, Counter, Counter, list[str]]:
    """By operator: changes tried, caught, and at code that no problem reaches, which are not tried; and the survivors.

    sample: how many are tried, 0 for all.
    """
    work, unreached = [], Counter()
    for target in targets:
        RECORDED[target] = record(target)
        for build, replays in RECORDED[target].items():
            kernel = replays[0].launched.program.kernel
            reached = set().union(*(replay.reached for replay in replays))
            for mutant in mutants_of(kernel):
                if kernel.statements[mutant.at].line in reached:
                    work.append((target, build, mutant))
                else:
                    unreached[mutant.operator] += 1
    if sample:
        work = random.Random(seed).sample(work, min(sample, len(work)))
        work.sort(key=lambda w: w[:2])
    chunks = [work[i : i + 8] for i in range(0, len(work), 8)]
    tried, caught, survivors = Counter(), Counter(), []
    jobs = [
        (t, b, [w[2] for w in chunk if w[:2] == (t, b)])
        for chunk in chunks
        for t, b in dict.fromkeys(w[:2] for w in chunk)
    ]
    with ProcessPoolExecutor(processes) as pool:
        for (target, build, mutants), found in zip(jobs, pool.map(examine, *zip(*jobs, strict=True)), strict=True):
            kernel = RECORDED[target][build][0].launched.program.kernel
            for mutant, how in zip(mutants, found, strict=True):
                statement = kernel.statements[mutant.at]
                tried[mutant.operator] += 1
                caught[mutant.operator] += bool(how)
                if not how:
                    place = f"{build} | {mutant.operator} | {statement.location} | line {statement.line}"
                    survivors.append(f"{place}: {statement} -> {mutant.statement or 'nothing'}")
    return tried, caught, unreached, survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="sites to try, chosen at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"])
    options = parser.parse_args()
    tried, caught, unreached, survivors = survey(options.target, options.sample, options.seed, os.cpu_count() or 1)
    print("\n".join(survivors))
    failed = False
    for operator in sorted(tried):
        print(f"{operator:12} {caught[operator]:5} of {tried[operator]:5} caught, {unreached[operator]:5} not reached")
        failed |= operator in STRICT and caught[operator] < tried[operator]
    print(f"{'all':12} {caught.total():5} of {tried.total():5} caught, {unreached.total():5} not reached")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Statements to the arrays that the interpreter runs: which instruction, which slots of the register file.

A form that forms.py and the functions below do not list is an error that names its line. Every operand is a slot: an
immediate gets one of its own, filled when a warp starts.
"""

from __future__ import annotations

import re
import struct
from collections import Counter

import numpy as np

from .forms import OPS, TABLE
from .ptx import Kernel, PTXError, Statement

SIGNED, CONSTANT, WIDE_ADDRESS, WIDE_REGISTER, ACQUIRE, RELEASE = 1, 2, 4, 8, 16, 32
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%ntid.x", "%laneid", "%envreg1", "%envreg2")
ZERO = {f"%{name}.{axis}": one for name, one in (("tid", 0), ("ctaid", 0), ("nctaid", 1), ("ntid", 1)) for axis in "yz"}
INSTRUCTION = np.dtype(
    [("op", "u2"), ("size", "u1"), ("count", "u1"), ("flags", "u1"), ("targets", "u1"), ("negated", "u1")]
    + [("unused", "u1"), ("guard", "i4"), ("operands", "i4"), ("number", "i4"), ("padding", "i4"), ("immediate", "i8")]
)
REGISTER = re.compile(r"%\w+")
TMA_LOAD = r"cp\.async\.bulk\.tensor\.[1-5]d\.shared::c(ta|luster)\.global(\.tile)?\.mbarrier::complete_tx::bytes"
BARRIERS = ("bar.sync", "barrier.sync")
MEMORY_WORDS = {"global", "gpu", "L1::no_allocate", "cg", "ca", "weak", "relaxed", "acquire", "release", "acq_rel"}


class Program:
    """A kernel, lowered: the arrays that emulator_program takes, and for each instruction its statement."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots: dict[str, int] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.next_slot = 0
        self.pool: list[int] = []
        self.source: list[Statement] = []
        self.mentions = Counter(
            r for s in kernel.statements for o in (*s.operands, s.guard) for r in REGISTER.findall(o)
        )
        rows: list[tuple] = []
        labels: dict[str, int] = {}
        branches: list[tuple[int, str]] = []
        tables: list[tuple[int, str]] = []
        for statement in kernel.statements:
            try:
                if statement.opcode.endswith(":"):
                    labels[statement.opcode[:-1]] = len(rows)
                    self._emit(rows, statement, "LABEL")
                    continue
                if statement.opcode in ("bra", "bra.uni"):
                    branches.append((len(rows), statement.operands[0]))
                    self._emit(rows, statement, "BRA")
                elif statement.opcode == "brx.idx":
                    index, *targets = statement.operands
                    self._emit(rows, statement, "BRANCH_INDEXED", [self._slot(index, 4)], immediate=len(targets))
                    tables += [(len(self.pool) + i, label) for i, label in enumerate(targets)]
                    self.pool += [0] * len(targets)  # behind the operand, where the labels lie
                else:
                    self._lower(rows, statement)
                if statement.opcode in ("bra", "brx.idx", *BARRIERS, "ret", "exit"):
                    self._emit(rows, Statement(statement.line, ":", ()), "LABEL")
            except (PTXError, KeyError, IndexError, ValueError) as error:
                reason = str(error) if isinstance(error, PTXError) else "not a form that the emulator knows"
                raise PTXError(f"{kernel.name}, line {statement.line}: {statement}: {reason}") from error
        self._emit(rows, Statement(0, "ret", ()), "RET")
        self.code = np.array(rows, dtype=INSTRUCTION)
        for at, label in branches:
            self.code["immediate"][at] = labels[label]
        for at, label in tables:
            self.pool[at] = labels[label]
        self.operands = np.array(self.pool, dtype=np.int32)
        filled = [word for (value, size), slot in self.constants.items() for word in (slot * 2 + (size == 8), value)]
        self.constant_words = np.array(filled, dtype=np.uint64)
        self.special = np.array([self.slots.get(name, -1) for name in SPECIAL], dtype=np.int32)
        self.wgmma = any(s.opcode.startswith("wgmma.mma") for s in kernel.statements)

    def _emit(self, rows, statement, op, operands=(), targets=0, immediate=0, size=0, count=0, flags=0) -> None:
        guard = self._slot(statement.guard, 0) if statement.guard else -1
        if set(operands[:targets]) & set(self.constants.values()):
            raise PTXError("a constant is no target")
        rows.append(
            (
                OPS[op],
                size,
                count,
                flags,
                targets,
                statement.negated,
                0,
                guard,
                len(self.pool),
                len(operands),
                0,
                immediate,
            )
        )
        self.pool.extend(operands)
        self.source.append(statement)

    def _new(self, size: int) -> int:
        self.next_slot += 2 if size == 8 else 1
        return self.next_slot - (2 if size == 8 else 1)

    def _register_size(self, name: str) -> int:
        return self.kernel.registers[name if "@" in name else re.sub(r"\d+$", "", name)]

    def _slot(self, operand: str, size: int) -> int:
        """A register's slot, or a constant's. size: bytes, 0 for a predicate."""
        if operand == "_":  # a result that nobody wants
            return self._new(size)
        if operand in self.slots:
            has = 4 if operand in SPECIAL else self._register_size(operand)
            if has != size and {has, size} != {2, 4}:
                raise PTXError(f"{operand} has {has} bytes where {size} are expected")
            return self.slots[operand]
        if operand in SPECIAL:
            self.slots[operand] = self._new(4)
            return self.slots[operand]
        if (operand.startswith("%") and operand not in ZERO) or "@" in operand:
            self.slots[operand] = self._new(self._register_size(operand))
            return self._slot(operand, size)
        value = self._constant(operand)
        if size == 0:
            value = 0xFFFFFFFF if value else 0
        value &= (1 << 8 * (size or 4)) - 1
        width = 8 if size == 8 else 4
        if (value, width) not in self.constants:
            self.constants[value, width] = self._new(width)
        return self.constants[value, width]

    def _constant(self, operand: str) -> int:
        if operand in ZERO:
            return ZERO[operand]
        if operand in self.kernel.params:
            return self.kernel.params[operand][0]
        if re.fullmatch(r"0f[0-9A-Fa-f]{8}", operand):
            return struct.unpack(">I", bytes.fromhex(operand[2:]))[0]
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            return int(operand.rstrip("U"), 0)
        if operand in self.kernel.shared:
            return 0
        raise PTXError(f"{operand} is no operand that the emulator knows")

    def _address(self, operand: str) -> tuple[int, int, bool]:
        """[base + offset]: the base's slot, the offset, whether the base has 64 bits."""
        base, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()
        wide = not base.startswith("%") or self._register_size(base) == 8
        return self._slot(base, 8 if wide else 4), int(offset or "0", 0), wide

    def _lower(self, rows, statement: Statement) -> None:
        opcode, operands = statement.opcode, statement.operands
        words = opcode.replace("shared::cta", "shared").split(".")
        if words[0] in ("ld", "st", "atom", "red") and not opcode.startswith("st.async"):
            self._lower_memory(rows, statement, words)
        elif opcode.startswith(("ldmatrix.sync.aligned.m8n8.", "stmatrix.sync.aligned.m8n8.")):
            self._lower_matrix(rows, statement, words)
        elif opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
            to, to_offset, to_wide = self._address(operands[0])
            source, source_offset, _ = self._address(operands[1])
            if to_wide:
                raise PTXError("a 64-bit address of shared memory")
            limit = [self._slot(operands[3], 4)] if len(operands) > 3 else []
            immediate = source_offset << 32 | (to_offset & 0xFFFFFFFF)
            self._emit(rows, statement, "CP_ASYNC", [to, source, *limit], 0, immediate, size=int(operands[2], 0))
        elif opcode == "cp.async.wait_group":
            self._emit(rows, statement, "CP_WAIT", immediate=int(operands[0], 0))
        elif opcode == "cp.async.wait_all":
            self._emit(rows, statement, "CP_WAIT", immediate=-1)
        elif opcode == "wgmma.wait_group.sync.aligned":
            self._emit(rows, statement, "WGMMA_WAIT", immediate=int(operands[0], 0))
        elif opcode.startswith("wgmma.mma_async.sync.aligned."):
            self._lower_wgmma(rows, statement)
        elif opcode in ("ret", "exit"):
            self._emit(rows, statement, "RET")
        elif opcode in BARRIERS:
            number, threads = (int(o, 0) for o in (*operands, "0")[:2])
            if number > 15 or threads % 32:
                raise PTXError("barriers are 0 to 15, for whole warps")
            self._emit(rows, statement, TABLE[opcode], immediate=threads << 8 | number)
        elif opcode.startswith("mbarrier."):
            self._lower_mbarrier(rows, statement)
        elif opcode.startswith("setmaxnreg."):
            self._emit(rows, statement, TABLE[opcode], immediate=int(operands[0], 0))
        elif re.fullmatch(TMA_LOAD, opcode):
            to, to_offset, _ = self._address(operands[0])
            barrier, barrier_offset, _ = self._address(operands[2])
            tensor_map, corner = re.fullmatch(r"\[(\S+), \{(.*)\}\]", operands[1]).groups()
            corner = [self._slot(c.strip(), 4) for c in corner.split(",")]
            if to_offset or barrier_offset:
                raise PTXError("an address with an offset")
            self._emit(rows, statement, "TMA_LOAD", [to, self._slot(tensor_map, 8), barrier, *corner])
        else:
            self._lower_function(rows, statement)

    def _lower_function(self, rows, statement: Statement) -> None:
        opcode, operands = statement.opcode, list(statement.operands)
        name = TABLE[opcode]
        targets = 1 if operands and opcode != "bar.warp.sync" else 0
        if name.startswith("MMA"):
            operands = [r for group in operands for r in _list(group)]
            self._emit(rows, statement, name, [self._slot(r, 4) for r in operands], 4)
            return
        if operands and "|" in operands[0]:
            operands[:1] = operands[0].split("|")
            targets = 2
        if name == "MOV_B32" and any(o.startswith("{") for o in operands):
            packs = operands[1].startswith("{")
            operands = [r for o in operands for r in _list(o)]
            slots = [self._slot(r, 2 if r.startswith("%rs") else 4) for r in operands]
            if len(slots) != 3:
                raise KeyError(opcode)
            self._emit(rows, statement, "PACK_B16" if packs else "UNPACK_B16", slots, 1 if packs else 2)
            return
        if name == "CVT_S64_S32" and self._register_size(operands[1]) == 8:
            name = "CVT_S64_LOW"
        sizes = _sizes(name, opcode, len(operands), targets)
        self._emit(rows, statement, name, [self._slot(o, s) for o, s in zip(operands, sizes, strict=True)], targets)

    def _lower_memory(self, rows, statement: Statement, words: list[str]) -> None:
        operands = statement.operands
        if words[0] == "red":  # an atomic whose result nobody wants
            words, operands = ["atom", *words[1:]], ("_", *operands)
        kind, space = words[0], next((w for w in words if w in ("shared", "param")), "global")
        count = next((int(w[1]) for w in words if w in ("v2", "v4")), 1)
        rest = set(words[1:-1]) - MEMORY_WORDS - {space, f"v{count}", "add"}
        if "nc" in rest and kind == "ld":
            rest.remove("nc")
        size = int(words[-1].lstrip("bsuf")) // 8
        if rest or (kind == "atom") != ("add" in words) or (kind == "atom" and words[-1] not in ("u32", "s32")):
            raise KeyError(statement.opcode)
        flags = SIGNED * (words[-1][0] == "s") | CONSTANT * ("nc" in words)
        flags |= ACQUIRE * bool({"acquire", "acq_rel"} & set(words)) | RELEASE * bool(
            {"release", "acq_rel"} & set(words)
        )
        if kind == "st":
            base, offset, wide = self._address(operands[0])
            values = _list(operands[1])
        else:
            base, offset, wide = self._address(operands[1])
            values = _list(operands[0])
        register = 8 if size == 8 or (values[0][0] == "%" and self._register_size(values[0]) == 8) else min(size * 2, 4)
        if size == 4:
            register = max(register, 4)
        slots = [self._slot(v, register) for v in values]
        flags |= WIDE_ADDRESS * wide | WIDE_REGISTER * (register == 8)
        if kind == "atom" or flags & ACQUIRE:
            addend = [self._slot(operands[2], 4)] if kind == "atom" else []
            op = "ATOM_ADD" if kind == "atom" else "LD_ACQUIRE"
            if count > 1 or size != 4 or space != "global":
                raise KeyError(statement.opcode)
            self._emit(rows, statement, op, [*slots, base, *addend], 1, offset, size, 1, flags)
        elif kind == "st":
            if flags & RELEASE:
                raise KeyError(statement.opcode)
            self._emit(rows, statement, f"ST_{space.upper()}", [base, *slots], 0, offset, size, count, flags)
        elif space == "shared" and any(self.mentions[v] == 1 for v in values):
            # A vector with gaps, filled by the compiler: what nobody reads need not have been written.
            for at, (value, slot) in enumerate(zip(values, slots, strict=True)):
                if self.mentions[value] > 1:
                    self._emit(rows, statement, "LD_SHARED", [slot, base], 1, offset + at * size, size, 1, flags)
        else:
            self._emit(rows, statement, f"LD_{space.upper()}", [*slots, base], count, offset, size, count, flags)

    def _lower_mbarrier(self, rows, statement: Statement) -> None:
        op, operands = TABLE[statement.opcode], list(statement.operands)
        targets = [self._slot(operands.pop(0), 0)] if op == "MBARRIER_WAIT" else []
        if op in ("MBARRIER_ARRIVE", "MBARRIER_EXPECT") and operands.pop(0) != "_":
            raise PTXError("the state of an mbarrier")
        base, offset, wide = self._address(operands[0])
        slots = [*targets, base, *(self._slot(o, 4) for o in operands[1:])]
        self._emit(rows, statement, op, slots, len(targets), offset, flags=WIDE_ADDRESS * wide)

    def _lower_matrix(self, rows, statement: Statement, words: list[str]) -> None:
        count = int(words[4][1])
        transposed = "trans" in words
        load = words[0] == "ldmatrix"
        wanted = [words[0], "sync", "aligned", "m8n8", f"x{count}", *(["trans"] if transposed else []), "shared", "b16"]
        if words != wanted:
            raise KeyError(statement.opcode)
        base, offset, wide = self._address(statement.operands[1 if load else 0])
        registers = [self._slot(r, 4) for r in _list(statement.operands[0 if load else 1])]
        op = ("LDMATRIX" if load else "STMATRIX") + ("_TRANS" if transposed else "")
        slots = [*registers, base] if load else [base, *registers]
        self._emit(rows, statement, op, slots, count if load else 0, offset, 2, count, WIDE_ADDRESS * wide)

    def _lower_wgmma(self, rows, statement: Statement) -> None:
        """{D}, {A} or a descriptor, a descriptor, scale-d, scale-a, scale-b; of 16 bits trans-a (unless {A}), b."""
        columns, kind = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16\.f32\.f16\.f16|16\.f32\.bf16\.bf16|8\.f32\.tf32\.tf32)",
            statement.opcode,
        ).groups()
        kind = kind.rsplit(".", 1)[1]
        results, a, b, scale_d, *numbers = statement.operands
        results, registers = _list(results), a.startswith("{")
        numbers = [int(n, 0) for n in numbers]
        transposes = numbers[2:]
        if numbers[:2] != [1, 1] or len(results) * 2 != int(columns):
            raise KeyError(statement.opcode)
        if len(transposes) != (0 if kind == "tf32" else 1 if registers else 2):
            raise KeyError(statement.opcode)
        bits = sum(bit << at for at, bit in zip((1,) if registers else (0, 1), transposes, strict=False))
        slots = [self._slot(r, 4) for r in results]
        slots += [self._slot(r, 4) for r in _list(a)] if registers else [self._slot(a, 8)]
        slots += [self._slot(b, 8), self._slot(scale_d, 0 if scale_d.startswith("%p") else 4)]
        self._emit(rows, statement, f"WGMMA_{kind.upper()}", slots, len(results), int(columns), bits)


def _list(operand: str) -> list[str]:
    return [o.strip() for o in operand.strip("{} ").split(",")]


def _sizes(name: str, opcode: str, number: int, targets: int) -> list[int]:
    """Bytes of the operands of a function, by the types in its name."""
    last = opcode.rsplit(".", 1)[-1]
    size = {"64": 8, "16": 2, "ed": 0}.get(last[-2:], 4)
    if name == "BALLOT":
        return [4, 0, 4]
    if name == "BAR_WARP":
        return [4]
    if name.startswith("SETP"):
        return [0] * targets + [size] * 2
    if name.startswith("SELP"):
        return [size, size, size, 0]
    if name.endswith("WIDE_U16"):
        return [4, 2, 2, 4][:number]
    if name.startswith(("MUL_WIDE", "MAD_WIDE")):
        return [8, 4, 4, 8][:number]
    if name.startswith("CVT"):
        into = name.split("_")[1]
        return [{"64": 8, "16": 2}.get(into[-2:], 4), *[8 if name.endswith(("64", "LOW")) else 4] * (number - 1)]
    sizes = [size] * number
    if name.startswith(("SHL", "SHR")):
        sizes[2] = 4
    if name.startswith("BFI_"):
        sizes[3:] = [4, 4]
    if name == "POPC_B64":
        sizes[0] = 4
    if targets == 2:
        sizes[1] = 0
    return sizes

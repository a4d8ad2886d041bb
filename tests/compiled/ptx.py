"""PTX text to statements: what the compiled code says, line by line, before it is made ready to run (lowering.py)."""

from __future__ import annotations

import re
from typing import NamedTuple

# Bytes of a type, by the bits in its name.
WIDTHS = {"pred": 0, "8": 1, "16": 2, "32": 4, "64": 8}
PARAM = re.compile(r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)(?:\s+\.(?:ptr|global|align \d+))*\s+([\w$]+)(?:\[(\d+)\])?")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class PTXError(ValueError):
    """PTX that the emulator does not know; the message names the line."""


class Statement(NamedTuple):
    """One instruction, or a label when opcode ends in a colon. location: the source line that the compiler names."""

    line: int  # of the PTX text, from 1
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False
    location: str = ""

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


class Kernel(NamedTuple):
    """params: name to (offset, bytes, type); registers: name without its number to bytes, predicates 0.

    shared: the names of the one array of shared memory. max_registers: a thread's, 0 where it is not said.
    """

    name: str
    threads: int
    params: dict[str, tuple[int, int, str]]
    param_bytes: int
    registers: dict[str, int]
    statements: tuple[Statement, ...]
    shared: tuple[str, ...]
    max_registers: int = 0


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by name."""
    lines = [re.sub(r"//.*", "", line).strip() for line in text.split("\n")]
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    shared = tuple(re.findall(r"\.extern \.shared .*?([\w$]+)\[\]", text))
    kernels, at = {}, 0
    while at < len(lines):
        entry = re.match(r"(?:\.visible |\.weak )?\.entry\s+([\w$]+)", lines[at])
        if entry:
            kernel, at = _kernel(entry[1], lines, at, files, shared)
            kernels[kernel.name] = kernel
        elif lines[at].startswith((".func", ".visible .func")):
            raise PTXError(f"line {at + 1}: functions are not executed: {lines[at]}")
        at += 1
    return kernels


def _kernel(name: str, lines: list[str], at: int, files: dict[str, str], shared: tuple[str, ...]) -> tuple[Kernel, int]:
    params, offset, threads, max_registers = {}, 0, 0, 0
    while lines[at] != "{":
        line = lines[at]
        param = PARAM.match(line)
        if param:
            size = WIDTHS[param[2][1:]] * int(param[4] or 1)
            align = int(param[1] or size)
            offset = (offset + align - 1) // align * align
            params[param[3]] = (offset, size, param[2])
            offset += size
        elif line.startswith((".reqntid", ".maxntid")):
            threads = int(re.search(r"\d+", line)[0])
        elif line.startswith(".maxnreg"):
            max_registers = int(line.split()[1])
        at += 1
    tables: dict[str, list[str]] = {}  # of an indirect branch: its labels
    registers: dict[str, int] = {}
    statements: list[Statement] = []
    depth, scopes, location = 1, [], ""
    while depth:
        at += 1
        for piece in re.findall(r"[^;]+;?", lines[at]):
            piece = piece.strip()
            while piece[:1] in ("{", "}") and piece:
                depth += 1 if piece[0] == "{" else -1
                if piece[0] == "{":
                    scopes.append({})
                elif scopes:
                    scopes.pop()
                piece = piece[1:].strip()
            place = re.match(r"\.loc\s+(\d+)\s+(\d+)", piece)
            if place:
                location = f"{files.get(place[1], '?').rsplit('/', 1)[-1]}:{place[2]}"
            declared = re.match(r"\.reg\s+\.(\w+)\s+(.*);", piece)
            if declared:
                size = WIDTHS[declared[1].lstrip("bsuf")] if declared[1] != "pred" else 0
                for register in declared[2].split(","):
                    register = register.strip()
                    counted = re.match(r"(.*)<\d+>", register)
                    if scopes and not counted:  # of an inline assembly: another register each time
                        scopes[-1][register] = f"{register}@{at}"
                        register = f"{register}@{at}"
                    registers[counted[1] if counted else register] = size
            label = re.match(r"([\w$]+):\s*", piece)
            if label:
                end = next((i for i in range(at, len(lines)) if ";" in lines[i]), at)
                follows = " ".join([piece[label.end() :], *lines[at + 1 : end + 1]]).split()
                if follows[:1] == [".branchtargets"]:
                    tables[label[1]] = [target.strip(",;") for target in follows[1:]]
                    at = end
                    continue
                if scopes:  # of an inline assembly: another label each time
                    scopes[-1][label[1]] = f"{label[1]}@{at}"
                place = f"{label[1]}@{at}" if scopes else label[1]
                statements.append(Statement(at + 1, f"{place}:", ()))
                piece = piece[label.end() :].strip()
            if not piece.endswith(";") or piece.startswith(".") or piece == ";":
                continue
            statement = _statement(piece[:-1], at + 1, location, scopes)
            if statement.opcode == "brx.idx":
                index, table = statement.operands
                statement = statement._replace(operands=(index, *tables[table]))
            statements.append(statement)
    return Kernel(name, threads, params, offset, registers, tuple(statements), shared, max_registers), at


def _statement(text: str, line: int, location: str, scopes: list[dict[str, str]]) -> Statement:
    for scope in scopes:
        for name, unique in scope.items():
            text = re.sub(rf"(?<![\w%.]){re.escape(name)}(?![\w@])", unique, text)
    negated, guard, opcode, rest = re.fullmatch(r"(?:@(!?)([%\w$@]+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
    operands = tuple(OPERAND.findall(rest))
    return Statement(line, opcode, operands, guard or "", bool(negated), location)

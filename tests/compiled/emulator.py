"""The interpreter (emulator/*.cpp), compiled once for this machine, and a launch of a program on tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .lowering import Program

SOURCES = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-Wall"]
CAME, SENSITIVE, GUARD_TRUE, GUARD_FALSE, TOOK_FIRST, TOOK_SECOND = 1, 2, 4, 8, 16, 32  # emulator/machine.h: Reached
LIMIT = 2 * 10**9  # instructions of a warp a launch may take, unless it is said otherwise


class Fault(RuntimeError):
    """What the emulator found wrong with the compiled code; the message names the PTX line and the source line."""


class _Launch(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("grid", "threads", "resident")],
        ("seed", ctypes.c_uint32),
        *[(name, ctypes.c_int32) for name in ("unfenced", "registers")],
        *[(name, ctypes.c_uint64) for name in ("shared_bytes", "param_bytes", "ranges")],
        ("params", ctypes.c_char_p),
        ("range", ctypes.c_void_p),
        ("limit", ctypes.c_uint64),
        ("special", ctypes.c_void_p),
        ("grid_barrier", ctypes.c_uint64),
    ]


def folder() -> Path:
    """Where what was built is kept between runs, under the temporary directory."""
    path = Path(tempfile.gettempdir()) / f"eah-compiled-{os.getuid()}"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


@cache
def library() -> ctypes.CDLL:
    """The interpreter; its file is named by the hash of its source."""
    files = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    built = folder() / f"emulator-{digest}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), *FLAGS, "-o", partial, *(f for f in files if f.suffix == ".cpp")]
        subprocess.run(command, check=True)
        partial.replace(built)
    loaded = ctypes.CDLL(built)
    loaded.emulator_program.restype = ctypes.c_void_p
    loaded.emulator_launch.restype = ctypes.c_int64
    loaded.emulator_reached.restype = ctypes.POINTER(ctypes.c_uint8)
    return loaded


class Executable:
    """A program in the interpreter's memory."""

    def __init__(self, program: Program):
        self.program = program
        arrays = []
        for array in (program.code, program.operands, program.constant_words):
            arrays += [ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(len(array))]
        slots, wgmma = program.next_slot, int(program.wgmma)
        self.handle = ctypes.c_void_p(library().emulator_program(*arrays, slots, wgmma))

    def reached(self) -> np.ndarray:
        """By PTX line, what happened there in the launches so far: a sum of CAME and so on."""
        flags = library().emulator_reached(self.handle)
        happened = np.zeros(self.program.kernel.statements[-1].line + 1, dtype=np.uint8)
        for step, flag in zip(self.program.source, flags, strict=False):
            if flag and step.opcode != ":":
                happened[step.line] = flag
        return happened

    def __del__(self):
        library().emulator_free(self.handle)

    def launch(
        self, grid, params: bytes, shared_bytes, ranges, *, seed=0, resident=0, unfenced=0, limit=LIMIT, barrier=0
    ) -> int:
        """Runs it; ranges as `element_ranges` makes them. Returns the instructions executed. Raises Fault."""
        table = (ctypes.c_uint64 * (3 * len(ranges)))()
        for i, (begin, belongs) in enumerate(ranges):
            table[3 * i : 3 * i + 3] = [begin, len(belongs), belongs.ctypes.data]
        program = self.program
        launch = _Launch(
            grid, program.kernel.threads, resident, seed, unfenced, program.kernel.max_registers, shared_bytes,
            len(params), len(ranges), params, ctypes.addressof(table), limit, program.special.ctypes.data, barrier,
        )  # fmt: skip
        error, at = ctypes.create_string_buffer(512), ctypes.c_int32(-1)
        told = error, ctypes.c_uint64(len(error)), ctypes.byref(at)
        executed = library().emulator_launch(self.handle, ctypes.byref(launch), *told)
        if executed < 0:
            where = ""
            if at.value >= 0:
                statement = program.source[at.value]
                where = f", line {statement.line} ({statement.location}): {statement}"
            raise Fault(f"{error.value.decode()}; {program.kernel.name}{where}")
        return executed


def element_ranges(tensors) -> list[tuple[int, np.ndarray]]:
    """For each storage among the tensors, its address and, for each of its bytes, whether it is part of an element."""
    found: dict[int, np.ndarray] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            continue
        if begin not in found:
            found[begin] = np.zeros(size, dtype=np.uint8)
        flags = torch.from_numpy(found[begin])
        width = tensor.element_size()
        strides = [s * width for s in tensor.stride()]
        flags.as_strided((*tensor.shape, width), (*strides, 1), tensor.storage_offset() * width).fill_(1)
    return list(found.items())

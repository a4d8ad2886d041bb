"""csrc/cuda as nvcc compiles it: host code, bindings and launcher as they are, the kernels' PTX on the emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from eah_kernels.native import cuda as native_cuda

from . import ptx
from .emulator import Executable, element_ranges
from .lowering import Program

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX", "c++").split()[0]
NAMES = ("prefill", "few_rows")
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)


class Launched:
    """One launch: what was run, and on what. The last of the tensors is what the barrier of the grid counts in."""

    def __init__(self, name: str, program: Program, grid: int, params: bytes, shared_bytes: int, tensors: list):
        self.name, self.program, self.grid, self.params = name, program, grid, params
        self.shared_bytes, self.tensors = shared_bytes, tensors

    def execute(self, executable: Executable, **options) -> int:
        options |= dict(resident=self.grid, barrier=self.tensors[-1].data_ptr())
        return executable.launch(self.grid, self.params, self.shared_bytes, element_ranges(self.tensors), **options)


class CompiledCuda:
    """The two kernels built for one target; `calls` runs the package's functions on them."""

    def __init__(self, folder: Path, target: str = "compute_80"):
        commands = [
            ["nvcc", "-c", "-std=c++17", "-O3", "-lineinfo", f"-gencode=arch={target},code={target}"]
            + ["-Xcompiler", "-fPIC", "--keep", "--keep-dir", ".", "-o", f"{name}.o", ROOT / f"csrc/cuda/{name}.cu"]
            for name in NAMES
        ]
        includes = ["-isystem", TORCH / "include", "-isystem", sysconfig.get_paths()["include"]]
        defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
        defines += ["-DEAH_OPS=eah_kernels_compiled", "-DEAH_DISPATCH_KEY=CPU"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
        commands += [[CXX, *flags, *defines, *includes, "-c", ROOT / "csrc/cuda/bindings.cpp", "-o", "bindings.o"]]
        commands += [[CXX, *flags, "-c", Path(__file__).with_name("cuda_runtime.cpp"), "-o", "runtime.o"]]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda command: _run(command, folder), commands))
        objects = [f"{name}.o" for name in (*NAMES, "bindings", "runtime")]
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
        _run([CXX, "-shared", "-Wl,-Bsymbolic", "-o", "compiled.so", *objects, *libraries], folder)
        torch.ops.load_library(folder / "compiled.so")
        self.library = ctypes.CDLL(folder / "compiled.so")
        self.kernels = {}
        for name in NAMES:
            self.kernels |= ptx.parse((folder / f"{name}.ptx").read_text())
        self.executables: dict[str, Executable] = {}
        self.tensors: list[torch.Tensor] = []
        self.seed, self.problem = 0, None
        self.observe: Callable[[Launched], object] | None = None  # called with every launch; whether it has executed it
        self.callback = CALLBACK(self._launch)

    @contextmanager
    def calls(self, blocks: int, seed: int):
        """native_cuda's functions on CPU tensors, `blocks` of a kernel at once, in the order that the seed gives."""
        self.seed, self.problem = seed, None
        self.library.eah_compiled(self.callback, blocks)
        try:
            with mock.patch.object(native_cuda, "OPS", self):
                yield
        except RuntimeError:
            raise self.problem or RuntimeError("no kernel was launched") from None

    def __getattr__(self, name):
        """An op; it notes the tensors that it is given."""
        op = getattr(torch.ops.eah_kernels_compiled, name)

        def call(*arguments):
            self.tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            return op(*arguments)

        return call

    def _launch(self, kernel: bytes, grid: int, threads: int, params: int, shared_bytes: int) -> int:
        name = kernel.decode()
        barrier = torch.zeros(4, dtype=torch.int32)  # what cooperative groups keep for the barrier of the grid
        try:
            if name not in self.executables:
                self.executables[name] = Executable(Program(self.kernels[name]))
            executable = self.executables[name]
            program = executable.program
            assert program.kernel.threads == threads
            given = ctypes.string_at(params, program.kernel.param_bytes)
            launched = Launched(name, program, grid, given, shared_bytes, [*self.tensors, barrier])
            if not (self.observe and self.observe(launched)):
                launched.execute(executable, seed=self.seed)
        except Exception as problem:
            self.problem = problem
            return 1
        return 0


def _run(command, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

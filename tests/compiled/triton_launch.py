"""Triton's own launcher, but that a kernel it has compiled is executed by the emulator, on CPU tensors.

The specialisation (what is divisible by 16, what is 1) and the choice of the build are Triton's; only its last step,
which loads machine code and calls the driver, is replaced, and the machine code is not made.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from eah_kernels import backends
from eah_kernels.triton import launch as launching

from . import ptx, tensor_maps
from .emulator import Executable, element_ranges, folder
from .lowering import Program

UNFENCED = backends._triton() < (3, 7, 1)  # these put no proxy fence behind asynchronous copies: README.md
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
FORMATS = {"u64": "Q", "b64": "Q", "u32": "i", "s32": "i", "b32": "i", "f32": "f", "u16": "h", "u8": "b", "s64": "q"}


class TensorMap(NamedTuple):
    """A tensor that TMA reads: tensor_maps.encode's arguments."""

    tensor: torch.Tensor
    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int


def flat(arguments, signature, forms=()) -> list:
    """The arguments that the compiled kernel takes: of tuples their members, and no constants.

    forms: what the compiler says of each descriptor, of which the kernel takes the map, its shape and its strides.
    """
    given, forms = [], iter(forms)
    for argument, kind in zip(arguments, signature, strict=True):
        if isinstance(kind, tuple):
            given += flat(argument, kind, forms)
        elif kind.startswith("tensordesc"):
            form, shape, strides = next(forms), argument.shape, argument.strides
            given += [TensorMap(argument.base, shape, strides, form["block_size"], form["swizzle"]), *shape, *strides]
        elif kind != "constexpr":
            given.append(argument)
    return given


class Launched:
    """One launch: what was run, and on what. Tensors as they are now."""

    def __init__(self, name, program: Program, grid: int, arguments: list, shared_bytes: int):
        self.name, self.program, self.grid, self.arguments = name, program, grid, arguments
        self.shared_bytes = shared_bytes

    @property
    def tensors(self) -> list[torch.Tensor]:
        tensors = [a.tensor if isinstance(a, TensorMap) else a for a in self.arguments]
        return [t for t in tensors if isinstance(t, torch.Tensor)]

    def execute(self, executable: Executable, **options) -> int:
        kernel = executable.program.kernel
        params = bytearray(kernel.param_bytes)
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.arguments]
        values += [0] * (len(kernel.params) - len(values))  # scratch memory, which these kernels do not use
        for (offset, _, kind), value in zip(kernel.params.values(), values, strict=True):
            if isinstance(value, TensorMap):
                params[offset : offset + 128] = tensor_maps.encode(*value)
            else:
                struct.pack_into(f"<{FORMATS[kind]}", params, offset, value)
        ranges = element_ranges(self.tensors)
        return executable.launch(self.grid, bytes(params), self.shared_bytes, ranges, unfenced=UNFENCED, **options)


class Driver:
    """What Triton asks of a driver, for a GPU that is not there."""

    def __init__(self, target: str, options: dict, observe: Callable | None):
        self.target, self.options, self.observe = target, options, observe
        self.utils = SimpleNamespace(load_binary=self.load_binary, get_device_properties=self.get_device_properties)
        self.executables: dict[str, Executable] = {}

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", int(self.target[3:]), 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES[self.target]}

    def load_binary(self, name, kernel, shared_bytes, device):
        return None, kernel.decode(), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        assert metadata.global_scratch_size == 0 and metadata.num_ctas == 1
        signature, forms = list(source.signature.values()), metadata.tensordesc_meta or ()

        def launch(grid_x, grid_y, grid_z, stream, text, packed, launch_metadata, enter_hook, exit_hook, *arguments):
            assert grid_y == grid_z == 1
            if text not in self.executables:
                (kernel,) = ptx.parse(text).values()
                self.executables[text] = Executable(Program(kernel))
            executable = self.executables[text]
            launched = Launched(
                metadata.name, executable.program, grid_x, flat(arguments, signature, forms), metadata.shared
            )
            if not (self.observe and self.observe(launched)):
                launched.execute(executable, **self.options)

        return launch


DRIVERS: dict[str, Driver] = {}  # Triton keeps what it compiled for a device, and with it the driver


@contextmanager
def compiled(target: str, *, seed: int = 0, observe: Callable[[Launched], object] | None = None, gluon: bool = False):
    """backend="triton" on CPU tensors executes the PTX compiled for `target`: "sm_80", "sm_89", "sm_90".

    seed: the order of blocks and warps. observe: called with every launch; what it returns is whether it has
    executed it. gluon: with the Gluon kernels.
    """
    if os.environ.get("TRITON_INTERPRET") != "0":
        raise RuntimeError("Triton's interpreter would run the kernels; start the process with TRITON_INTERPRET=0")
    driver = DRIVERS.setdefault(target, Driver(target, {}, None))
    driver.options, driver.observe = dict(seed=seed), observe
    with (
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder() / "triton")),  # what it keeps has no machine code
        mock.patch.object(CUDABackend, "make_cubin", lambda self, source, *rest: source.encode()),
        mock.patch.object(launching, "device_target", lambda device: target),
        mock.patch.object(backends, "why_not_triton", lambda call: None),
        mock.patch.object(backends, "has_gluon", lambda device: gluon),
    ):
        triton.runtime.driver.set_active(driver)
        yield driver

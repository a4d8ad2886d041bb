"""A call's launches without Triton's binder, which costs more than all else on the host.

Triton chooses the build of a kernel by the form of its arguments: dtypes, whether an address and which numbers are
divisible by 16, which numbers are 1 or need 64 bits. Of two calls of one form it chooses the same builds. So a plan is
kept by form: the first call launches by Triton's own way, later ones hand their arguments straight to the builds it
took. Nothing of a call is kept but the builds: tensors, lengths, grids and streams are those of the call.

A hook on launches (profilers), Triton's debug or instrumentation, ROCm (whose builds depend on more), the interpreter
and a Triton that was not tested, since its builds may be run otherwise, get Triton's own way every time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from eah_kernels.backends import knows_triton
from eah_kernels.triton.launch import Launch, Problem

PLANS = 256  # kept; a layer needs one for a prompt and one or two for its steps


class Plan:
    def __init__(self) -> None:
        self.builds: dict[tuple, Any] = {}  # by kernel (its function, whose hash is cheap), tile and Launch.form

    def launch(self, *launches: Launch) -> None:
        stream = None
        for launch in launches:
            key = launch.kernel.fn, launch.tile, launch.form
            build = self.builds.get(key)
            if build is None or launch.kernel.pre_run_hooks:
                self.builds[key] = launch.run()
                continue
            if stream is None:
                driver = triton.runtime.driver.active
                stream = driver.get_current_stream(driver.get_current_device())
            arguments = launch.arguments | launch.tile.options
            ordered = [arguments[name] for name in launch.kernel.arg_names]
            # Grid, stream, function, metadata, metadata of the launch for hooks, hooks before and after.
            build.run(launch.programs, 1, 1, stream, build.function, build.packed_metadata, None, None, None, *ordered)


def plan_of(function: str, problem: Problem, value_dim: int, *tensors: Tensor | None) -> Plan:
    """The plan for a call of that form. tensors: beside the problem's own, all whose strides its launches pass."""
    if not knows_triton():
        return Plan()
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    if hooked or runtime.debug or triton.knobs.compilation.instrumentation_mode or torch.version.hip:
        return Plan()
    query, key, mask = problem.query, problem.key, problem.mask
    shapes = *query.shape[:2], key.shape[1], value_dim, mask is not None and mask.shape[:2]
    forms = [None if t is None else form(t) for t in (query, key, mask, *tensors)]
    return _kept(function, query.device, problem.target, problem.rules, problem.fast, shapes, *forms)


def form(tensor: Tensor) -> tuple:
    """Of a tensor, what a build may depend on beside its shape: dtype, alignment, and of each stride whether it is 0
    or 1, divisible by 16, and how many bits it needs."""
    return tensor.dtype, tensor.data_ptr() % 16 == 0, _forms(tensor.stride())


@lru_cache(1024)  # the layers of a model have the same strides
def _forms(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if n < 2 else 2 + (n % 16 == 0) + 2 * min(n >> 30, 2) for n in strides)


@lru_cache(PLANS)
def _kept(*key: Any) -> Plan:
    return Plan()

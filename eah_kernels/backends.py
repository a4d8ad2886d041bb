"""The backends, one row each, and which one runs: the named one, or for "auto" the fastest that can."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from eah_kernels.masks import Scoring
from eah_kernels.native import cpu, cuda

TRITONS = ((3, 6), (3, 7), (3, 8), (3, 9))  # compiled kernels of a release of each were executed: docs/install.md


class Call(NamedTuple):
    """What is asked of a backend: one of its functions, and on what. Of the tensors no value is read."""

    function: str  # "eah_attention", "eah_attention_varlen", "sink_statistics" or "shared_map_attention"
    query: Tensor
    key: Tensor
    value: Tensor | None  # None: "sink_statistics"
    scoring: Scoring


class Backend(NamedTuple):
    module: str | None  # imported when it first runs; None: called without an op
    why_not: Callable[[Call], str | None]  # why it cannot run a call, or None


def choose_backend(backend: str, call: Call) -> str:
    """The backend that runs a call: the named one, or for "auto" the fastest there is.

    For float16, bfloat16 and float32 "auto" takes "triton" on a CUDA or ROCm device where Triton is installed and
    "native" on the CPU where the extension is built; in every other case "torch". "reference" is never chosen for you,
    nor is "native" on a CUDA device: no measurement shows it ahead yet. The same holds of the Gluon kernels, which
    "triton" by name takes on a device of compute capability 9.0: then "gluon" is returned.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run the call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        fastest = "triton" if call.query.device.type == "cuda" else "native"
        return "torch" if ROWS[fastest].why_not(call) else fastest
    missing = ROWS[backend].why_not(call)
    if missing:
        raise ValueError(f'backend="{backend}" cannot be used: {missing}')
    return "gluon" if backend == "triton" and has_gluon(call.query.device) else backend


def why_not_native(call: Call) -> str | None:
    """Why the native kernels cannot run a call, or None."""
    device = call.query.device
    if call.query.dtype == torch.float64:
        return "float64 has no native kernel; accepted are float16, bfloat16 and float32"
    if device.type == "cuda":
        return cuda.why_not() or cuda.why_not_these(*call)
    if device.type != "cpu":
        return f"it runs on CPUs and CUDA devices; the device here is {device}"
    return cpu.why_not()


def why_not_triton(call: Call) -> str | None:
    """Why the Triton kernels cannot run a call, or None."""
    device, dtype = call.query.device, call.query.dtype
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "float64 has no Triton kernel; accepted are float16, bfloat16 and float32"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" and not interpreted:
        return _why_unfenced(device)
    if not interpreted:
        return (
            "it runs on CUDA and ROCm devices, and with TRITON_INTERPRET=1 (Triton's slow interpreter) on CPUs; the "
            f"device here is {device}"
        )
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; accepted there are float16 and float32"
    return None


def has_gluon(device: torch.device) -> bool:
    """Whether the Gluon kernels run on a device."""
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0) and knows_triton()


def gluon_kernels(device: torch.device | str) -> list[str]:
    """The Gluon kernels that backend="triton", by name, launches on a device where they suit; none is measured yet."""
    if not has_gluon(torch.device(device)):
        return []
    from eah_kernels.triton.tiles import FAST

    return list(FAST)


def _why_unfenced(device: torch.device) -> str | None:
    """tcgen05 reads shared memory beside the threads' own path to it, and triton before 3.7.1 puts no fence between."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 10 or _triton() >= (3, 7, 1):
        return None
    return f"on {device}, compute capability 10, it needs triton >= 3.7.1: older ones compile data races there"


def knows_triton() -> bool:
    """Whether the Triton that is installed is of a version that was tested. Of any other one only the public interface
    is relied on: its own launcher, and no Gluon kernel."""
    return _triton()[:2] in TRITONS


def untested_triton() -> str | None:
    """What is to be said of the Triton that is installed, None if it was tested or there is none."""
    if find_spec("triton") is None or knows_triton():
        return None
    numbers, tested = (".".join(map(str, numbers)) for numbers in (_triton(), TRITONS[-1]))
    return (
        f"untested with triton {numbers}: the newest version tested is {tested}; kernels take Triton's own launcher, "
        "which is slower, and no Gluon kernel is used"
    )


@cache
def _triton() -> tuple[int, ...]:
    version = import_module("triton").__version__
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in native/cpu.py

ROWS = {
    "reference": Backend(None, lambda call: None),
    "torch": Backend("eah_kernels.torch_blocked", lambda call: None),
    "triton": Backend("eah_kernels.triton", lambda call: why_not_triton(call)),
    "native": Backend("eah_kernels.native", why_not_native),
    "gluon": Backend("eah_kernels.triton.hopper", lambda call: why_not_triton(call)),  # "triton", by name
}
BACKENDS = ("auto", "reference", "torch", "triton", "native")

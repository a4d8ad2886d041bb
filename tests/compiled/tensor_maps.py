"""What stands for a CUtensorMap, how TMA reads a tensor: in a form of our own (emulator/bulk.h), not the driver's.

Refuses what cuTensorMapEncodeTiled refuses: its limits are documented.
"""

from __future__ import annotations

import struct

import torch

MAGIC = 0x70616D726F736E65
SWIZZLES = (0, 32, 64, 128)  # bytes, by Triton's number


def encode(tensor: torch.Tensor, shape, strides, box, swizzle: int) -> bytes:
    """shape, strides, box: in elements, outermost first; swizzle: Triton's number. 128 bytes."""
    size, width = tensor.element_size(), SWIZZLES[swizzle]
    steps = [stride * size for stride in strides]
    if tensor.data_ptr() % 16:
        raise ValueError("the address of a tensor map is not aligned to 16 bytes")
    if strides[-1] != 1 or any(step % 16 or not 0 <= step < 2**40 for step in steps[:-1]):
        raise ValueError(f"strides of a tensor map: {strides}")
    if not all(1 <= extent <= 2**32 for extent in shape) or not all(1 <= extent <= 256 for extent in box):
        raise ValueError(f"a tensor map of shape {shape}, in boxes of {box}")
    if box[-1] * size % 16 or (width and box[-1] * size > width) or shape[-1] * size % 16:
        raise ValueError(f"a box of {box} elements of {size} bytes, swizzled in lines of {width}")
    rest = [1] * (5 - len(shape))
    packed = struct.pack(
        "<QQIIII5I5I4Q",
        MAGIC, tensor.data_ptr(), len(shape), size, width, 0,
        *reversed(shape), *rest, *reversed(box), *rest, *reversed(steps[:-1]), *([0] * (5 - len(shape))),
    )  # fmt: skip
    return packed.ljust(128, b"\0")

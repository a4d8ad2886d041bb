"""When an output counts as right: the one tolerance of this repository's tests, benchmarks and commands."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = {2: 1, 4: 16, 8: 256}  # of the largest value, by bytes an entry; in float64 `expected` rounds as much


def agrees(output: Tensor, expected: Tensor, plain: Tensor, value: Tensor | None = None) -> bool:
    """Whether an attention output is as right as its dtype allows, given the head whose map was used.

    The rule is FlashAttention's (its tests/test_flash_attn.py): the largest error may be twice that of the eager
    computation in the same dtype, plus twice the rounding near the expected output. It may be five times in float32:
    no rounding of operands hides there that kernels round scores in two passes, the log-sum-exp between them, and the
    eager form in one.

    Args:
        output: what is judged, of any shape.
        expected: the same in float64, of backend "reference" with float64 operands.
        plain: the same of the eager computation, in output's dtype.
        value: the values of a small problem, where the eager form may happen to round nothing; the error may then be
            some roundings of the largest value instead of those near the expected output.

    Returns:
        False also where the shapes or the dtypes differ and where output holds NaN. An empty output agrees.
    """
    if output.shape != expected.shape or output.dtype != plain.dtype or output.isnan().any():
        return False
    return not output.numel() or largest_error(output, expected) <= allowed_error(expected, plain, value)


def largest_error(output: Tensor, expected: Tensor) -> float:
    return (output.double() - expected).abs().max().item()


def allowed_error(expected: Tensor, plain: Tensor, value: Tensor | None = None) -> float:
    size = plain.dtype.itemsize
    if value is None and size < 8:
        rounded = expected.to(plain.dtype)
        rounding = 2 * largest_error(rounded + 0.3 - 0.3, rounded.double())
    else:
        largest = (expected if value is None else value).abs().max().item()
        rounding = ROUNDINGS[size] * torch.finfo(plain.dtype).eps * largest
    return (2 if size == 2 else 5) * largest_error(plain, expected) + rounding

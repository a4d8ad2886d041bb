"""The tolerance: what agrees and what does not."""

import pytest
import torch

from eah_kernels.testing import agrees, allowed_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(dtype):
    """expected, plain: the mean of 40 values, and the same with a rounding more."""
    expected = torch.randn(40, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mean(0)
    return expected, expected.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_up_to_a_few_roundings(dtype):
    expected, plain = problem(dtype)
    assert agrees(plain, expected, plain)
    allowed = allowed_error(expected, plain)
    assert 0 < allowed <= {2: 4, 4: 16, 8: 256}[dtype.itemsize] * torch.finfo(dtype).eps
    off = plain.clone()
    off[3, 4] += 2 * allowed
    assert not agrees(off, expected, plain)


def test_nan_and_other_shapes_and_dtypes_do_not_agree():
    expected, plain = problem(torch.float32)
    assert not agrees(plain.masked_fill(plain == plain.max(), torch.nan), expected, plain)
    assert not agrees(plain.masked_fill(plain == plain.max(), torch.inf), expected, plain)
    assert not agrees(plain[:1], expected, plain) and not agrees(plain.half(), expected, plain)


def test_nothing_agrees_with_nothing():
    assert agrees(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.float64), torch.empty(0, 8))


def test_of_two_values_that_cancel_the_eager_form_may_round_nothing():
    """Which a kernel, that adds them in another order, need not."""
    value = torch.tensor([100.0, -100.0])
    expected, plain, output = torch.zeros(1, dtype=torch.float64), torch.zeros(1), torch.tensor([1e-5])
    assert not agrees(output, expected, plain) and agrees(output, expected, plain, value)
    assert not agrees(torch.tensor([1e-3]), expected, plain, value)

"""csrc/cuda as nvcc compiles it, executed on the CPU; the problems of tests/test_cuda_emulated.py."""

import shutil

import pytest
import torch
from cuda_launch import CompiledCuda

import test_cuda_emulated as problems
from eah_kernels import native_cuda, reference
from support import assert_close, exact, make

ORDERS = [(3, 0), (1, 1), (7, 2)]  # blocks, seed


@pytest.fixture(scope="session")
def compiled_cuda(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    return CompiledCuda(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("dtype", problems.HALF)
@pytest.mark.parametrize("case", problems.PREFILL, ids=str)
def test_prefill(compiled_cuda, case, dtype):
    inputs = make(case, dtype)
    output, head, counts, _, _, threshold = exact(inputs)
    tensors = inputs.query, inputs.key, inputs.value
    results = []
    for blocks, seed in ORDERS:
        with compiled_cuda.calls(blocks, seed):
            results.append(native_cuda.eah_attention(*tensors, inputs.image_mask, threshold, 0.0, inputs.scoring))
    assert torch.equal(results[0][2], counts) and torch.equal(results[0][1], head)
    assert_close(results[0][0], output, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [*problems.HALF, torch.float32])
@pytest.mark.parametrize("case", problems.DECODE, ids=str)
def test_decode(compiled_cuda, case, dtype):
    inputs = make(case, dtype)
    tensors = inputs.query, inputs.key, inputs.value
    head = torch.tensor([-1, case.heads - 1, 0][: case.batch], dtype=torch.int32)
    results = []
    for blocks, seed in ORDERS:
        with compiled_cuda.calls(blocks, seed):
            results.append(native_cuda.shared_map_attention(*tensors, head, inputs.scoring))
    wide = (t.double() for t in tensors)
    ref = reference.shared_map_attention(*wide, head, inputs.scoring, torch.float64)
    assert_close(results[0], ref, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))
    assert all(torch.equal(other, results[0]) for other in results)

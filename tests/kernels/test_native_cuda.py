"""backend="native" on CUDA: what it refuses, and what its bindings use. The problems that its kernels are tested on.

tests/compiled/test_compiled_cuda.py executes the compiled kernels on the CPU, tests/gpu/test_native.py is for a GPU.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from eah_kernels.masks import Scoring
from eah_kernels.native import cuda as native_cuda

from ..support.cases import Case

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX", "c++").split()[0]
HALF = [torch.float16, torch.bfloat16]

PREFILL = [
    Case(q_len=1, batch=1, image="all"),
    Case(q_len=3, heads=4, kv_heads=1, image="all", dim=128),
    Case(q_len=63, mask="left"),
    Case(q_len=64, dim=128, mask="right", heads=7, kv_heads=1, image="first"),
    Case(q_len=113, heads=7, kv_heads=1, image="absent", mask="left", layout="bhsd"),
    Case(q_len=113, heads=4, kv_heads=1, dim=128, image="scattered"),
    Case(q_len=200, heads=4, kv_heads=1, image="last", mask="right", scale=-0.1),
    Case(q_len=200, heads=2, kv_heads=2, image="middle", layout="expanded", mask="left"),
]
DECODE = [
    Case(q_len=1, kv_len=1, batch=2),
    Case(q_len=1, kv_len=63, heads=7, kv_heads=1, mask="left", batch=3),
    Case(q_len=1, kv_len=200, heads=8, kv_heads=8, dim=128, batch=3),
    Case(q_len=1, kv_len=300, heads=8, kv_heads=2, dim=128, mask="right", batch=3, layout="bhsd"),
    Case(q_len=1, kv_len=129, heads=6, kv_heads=6, causal=False, layout="expanded", batch=2),
]


def refusal(query=None, key=None, value=None, scoring=None, function="eah_attention"):
    x = torch.randn(1, 2, 20, 64, dtype=torch.float16)
    tensors = (x if t is None else t for t in (query, key, value))
    return native_cuda.why_not_these(function, *tensors, scoring or Scoring())


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(query=torch.zeros(1, 2, 20, 64)), "query's dtype: got torch.float32, accepted: float16 and bfloat16"),
        (dict(query=half(1, 2, 1, 64)), "key's length: got 20, accepted: query's length, 1"),
        (dict(query=half(1, 2, 1025, 64), key=half(1, 2, 1025, 64)), "query's length: got 1025, accepted: 1..1024"),
        (dict(value=half(1, 2, 20, 80)), "head dims of key and value: got .64, 80., accepted: 64 and 64, 128 and 128"),
        (dict(key=half(1, 2, 20, 67)[..., :64]), "key's strides modulo 16 bytes: got .8, 6."),
        (dict(key=half(1, 2, 64, 20).mT), "key's last stride: got 20, accepted: 1"),
        (dict(query=half(129, 2, 20, 64)), "query's batch: got 129, accepted: 1..128"),
        (dict(scoring=Scoring(causal=False)), "causal: got False"),
        (dict(scoring=Scoring(sliding_window=5)), "sliding_window: got 5, accepted: None"),
        (dict(scoring=Scoring(softcap=5.0)), "softcap: got 5.0, accepted: None"),
        (dict(scoring=Scoring(half(1, 1, 20, 20))), "attention_mask: got 4-D torch.float16"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(arguments, named):
    assert re.search(named, refusal(**arguments))


def test_decoding_takes_one_row_and_statistics_are_refused():
    assert "query's length: got 20, accepted: 1, a decoding step" in refusal(function="shared_map_attention")
    assert "no statistics of their own" in refusal(function="sink_statistics")
    assert refusal() is None


def test_an_address_between_boundaries_is_refused_where_the_kernel_would_run():
    x, image_mask = half(2 * 20 * 64 + 4)[4:].view(1, 2, 20, 64), torch.ones(1, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'backend="native" cannot be used: .*query.s address modulo 16 bytes: got 8'):
        native_cuda.eah_attention(x, x, x, image_mask, 0.002, 0.0, Scoring())


def test_the_bindings_use_the_stable_abi_alone(tmp_path):
    if shutil.which(CXX) is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    includes = ["-isystem", TORCH / "include", "-isystem", sysconfig.get_paths()["include"]]
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror"]
    command = [CXX, *flags, *defines, *includes, "-c", ROOT / "csrc/cuda/bindings.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run(["nm", "-C", "-u", tmp_path / "bindings.o"], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in said.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    used = {name for name in names if "torch" in name or "at::" in name or "c10" in name}
    assert all(name.startswith("aoti_torch_") or name == "torch_library_impl" for name in used), used

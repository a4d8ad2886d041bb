"""What is the native backend's own: threads, CPU capabilities, mask layouts, and why it is missing.

That it computes what the reference defines is in test_backends.py and test_hidden.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eah_kernels import eah_attention, native, native_parts, shared_map_attention, sink_statistics
from eah_kernels.backends import Call, choose_backend
from eah_kernels.masks import Scoring
from eah_kernels.native import cuda as native_cuda

from ..support.cases import NATIVE, WHY_NOT_NATIVE, Case, exact, make

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(WHY_NOT_NATIVE is not None, reason=str(WHY_NOT_NATIVE))


def attend(inputs, backend="native", **changes):
    options = dict(threshold=0.002, attention_mask=inputs.attention_mask, backend=backend, **inputs.rules) | changes
    return eah_attention(inputs.query, inputs.key, inputs.value, inputs.image_mask, **options)


@needs_native
@pytest.mark.parametrize("lengths", [(300, 300), (3, 1500)], ids=["prefill", "few_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype, lengths):
    q_len, kv_len = lengths
    inputs = make(Case(q_len=q_len, kv_len=kv_len, heads=8, kv_heads=2, image="absent", mask="left"), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            mean = sink_statistics(inputs.query, inputs.key, inputs.image_mask, return_column_mean=True).column_mean
            results.append((*attend(inputs, threshold=exact(inputs)[-1]), mean))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


CONFORMANCE = """
import sys, torch
from dataclasses import replace
sys.path[:0] = [{package!r}, {root!r}]
from tests.support.cases import Case, check
assert torch.backends.cpu.get_cpu_capability() == {capability!r}
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in (Case(q_len=113, heads=7, kv_heads=1, dim=80), Case(mask="bias", softcap=5.0, dim=40, value_dim=24)):
        for few in (case, replace(case, q_len=5, kv_len=300)):
            check(few, "native", dtype)
"""


@needs_native
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_older_processors(capability):
    """The builds for processors without AVX-512, and without oneDNN's products where torch has none for them."""
    if capability != "DEFAULT" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has no {capability}")
    package = Path(native.__file__).parents[2]
    code = CONFORMANCE.format(root=str(ROOT), package=str(package), capability=capability)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability.lower()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_additive_mask_in_another_dtype(dtype):
    inputs = make(Case(mask="bias_min", q_len=70, heads=8, kv_heads=2))
    mask = inputs.attention_mask
    hidden = mask == torch.finfo(torch.float32).min
    inputs.attention_mask = mask.to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
    torch.testing.assert_close(attend(inputs).output, attend(inputs, "reference").output)


@needs_native
def test_a_mask_of_any_layout():
    inputs = make(Case(mask="bool", q_len=70))
    mask = inputs.attention_mask
    expected = attend(inputs)
    wide = mask.new_ones(2, 1, 70, 143)
    wide[..., 3::2] = mask
    for same in (mask.mT.contiguous().mT, wide[..., 3::2], mask.expand(2, 4, 70, 70)):
        assert torch.equal(attend(inputs, attention_mask=same).output, expected.output)
    keys = torch.arange(70).expand(2, 70) > 9
    rows = keys[:, None, None].expand(2, 1, 70, 70)
    assert torch.equal(attend(inputs, attention_mask=keys).output, attend(inputs, attention_mask=rows).output)


@needs_native
def test_a_head_that_does_not_exist_is_refused():
    inputs = make(Case(q_len=9))
    with pytest.raises(ValueError, match="head must be -1 or one of 4 query heads, got 4"):
        shared_map_attention(inputs.query, inputs.key, inputs.value, torch.tensor([0, 4], dtype=torch.int32))


@needs_native
def test_a_window_wider_than_everything_is_none():
    inputs = make(Case(q_len=70))
    assert torch.equal(attend(inputs, sliding_window=2**62).output, attend(inputs).output)


@needs_native
def test_without_onednn():
    inputs = make(Case(q_len=70), torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = attend(inputs)
    torch.testing.assert_close(plain.output, attend(inputs).output, rtol=2e-2, atol=2e-2)


def call_on(tensor):
    return Call("eah_attention", tensor, tensor, tensor, Scoring())


class OnCuda:
    """A tensor as it would be on a CUDA device: nothing of it is read before the kernels are launched."""

    device = torch.device("cuda")

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize("backend", [NATIVE])
def test_auto_takes_it_on_the_cpu(backend):
    assert choose_backend("auto", call_on(torch.zeros(1, 1, 1, 64))) == backend
    assert choose_backend("auto", call_on(torch.zeros(1, 1, 1, 64, dtype=torch.float64))) == "torch"


def test_on_cuda_it_is_used_when_named_and_not_by_auto(monkeypatch):
    call = call_on(OnCuda(torch.zeros(1, 2, 20, 64, dtype=torch.float16)))
    monkeypatch.setitem(sys.modules, "eah_kernels._cuda", None)
    native_cuda._load.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"eah_kernels\._cuda is not built.*nvcc"):
            choose_backend("native", call)
        assert "not built" in native_parts()["cuda"]
    finally:
        native_cuda._load.cache_clear()
    monkeypatch.setattr(native_cuda, "_load", lambda: None)
    assert choose_backend("native", call) == "native"
    assert choose_backend("auto", call) != "native"
    for refused, why in (
        (call_on(OnCuda(torch.zeros(1, 2, 20, 64, dtype=torch.float64))), "float64"),
        (call._replace(scoring=Scoring(softcap=5.0)), "softcap: got 5.0, accepted: None"),
        (call._replace(function="sink_statistics"), "no statistics of their own"),
    ):
        with pytest.raises(ValueError, match=f'backend="native" cannot be used: .*{why}'):
            choose_backend("native", refused)


def test_a_missing_extension_says_why(monkeypatch):
    inputs = make(Case(q_len=9))
    with pytest.raises(ValueError, match=r'backend="native".*float64'):
        attend(inputs.widened())
    monkeypatch.setitem(sys.modules, "eah_kernels._C", None)
    native.cpu._load.cache_clear()
    try:
        with pytest.raises(ValueError, match=r'backend="native".*eah_kernels\._C is not built'):
            attend(inputs)
        assert choose_backend("auto", call_on(inputs.query)) == "torch"
    finally:
        native.cpu._load.cache_clear()


@needs_native
def test_a_build_for_another_torch_is_refused():
    code = "import torch; torch.__version__ = '2.1.0'; from eah_kernels.native import cpu; print(cpu.why_not())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "built for torch" in done.stdout and "2.1.0" in done.stdout

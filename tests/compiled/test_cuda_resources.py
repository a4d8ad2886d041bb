"""`make resources` tells what ptxas says of the native CUDA kernels, and fails on local memory."""

from . import cuda_resources
from .cuda_resources import Cost

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3eah4cuda14prefill_kernelINS0_8BFloat16ELi128EEEvNS0_7PrefillE' for 'sm_80'
ptxas info    : Function properties for _ZN3eah4cuda1_14prefill_kernelINS0_8BFloat16ELi128EEEvNS0_7PrefillE
    136 bytes stack frame, 172 bytes spill stores, 392 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 136 bytes cumulative stack size, 592 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN3eah4cuda1_15few_rows_kernelIfLi64EEEvNS1_9ArgumentsE' for 'sm_80'
ptxas info    : Function properties for _ZN3eah4cuda1_15few_rows_kernelIfLi64EEEvNS1_9ArgumentsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 568 bytes cmem[0]
"""


def test_what_ptxas_says_is_read():
    assert cuda_resources.costs(SAID) == [
        Cost("few_rows", "float", 64, 0, 0, 96),
        Cost("prefill", "BFloat16", 128, 136, 172, 168),
    ]


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert cuda_resources.main() == 0
    assert "nvcc is not on the PATH" in capsys.readouterr().out


def test_local_memory_fails(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(cuda_resources, "shared_bytes", lambda _: {64: 1024, 128: 50 * 1024})
    for local, status in ((0, 0), (8, 1)):
        found = {"prefill": [Cost("prefill", "Half", 128, local, 0, 100)] * 4}
        found["few_rows"] = [Cost("few_rows", "Half", 64, 0, 0, 64)] * 6
        monkeypatch.setattr(cuda_resources, "compile_for", lambda job, found=found: found[job[0]])
        assert cuda_resources.main() == status
    assert "local memory" in capsys.readouterr().out

import os

# Under pytest-xdist each of its processes has its share of the cores, and so have the processes that a test starts.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = max(1, min(2, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # read when torch is first imported

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin give NaN (largest integers) instead of what was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


BUILT_ONCE = {"ranks", "alone", "emulator", "saved_model"}  # fixtures that take seconds


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On a GPU machine the kernel tests are gpu tests too; elsewhere gpu tests are skipped, with the reason.

    A file's tests that use BUILT_ONCE run in one process of pytest-xdist's, by --dist loadgroup.
    """
    for item in items:
        if BUILT_ONCE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if not torch.cuda.is_available() and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device: torch.cuda.is_available() is False"))
        if torch.cuda.is_available() and "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def kernel_device(request):
    """Where the backend under test runs: native on the CPU, Triton on the GPU or on the CPU by its interpreter."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") == "native":
        return "cpu"
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    from .support.interpreter import replace_once_a_launch

    replace_once_a_launch()
    return "cpu"

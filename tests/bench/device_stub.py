"""A CUDA device that is none, for dry runs of bench/: tensors live on the CPU, events read the host's clock.

What it keeps of the real thing is what would break a run: a CUDA graph is not captured when a call reads the host,
flash attention takes no mask, cuDNN's attention is refused, and there is an L2 cache to rotate through.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

PROPERTIES = SimpleNamespace(
    name="Stub GPU", multi_processor_count=132, total_memory=80 * 2**30, L2_cache_size=2**12, major=9, minor=0
)
READS_THE_HOST = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__}


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, on_cpu(device))


class Event:
    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other) -> float:
        return 1e3 * max(other.time - self.time, 1e-6)


class Graph:
    def replay(self):
        pass


class Stub(TorchFunctionMode):
    """Everything asked for on "cuda" is made on the CPU. captures: how many CUDA graphs were begun."""

    def __init__(self):
        super().__init__()
        self.capturing, self.captures = False, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.capturing and func in READS_THE_HOST:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        args = [on_cpu(argument) for argument in args]
        kwargs = {name: on_cpu(argument) for name, argument in (kwargs or {}).items()}
        if func is F.scaled_dot_product_attention:
            return attention(func, args, kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def capture(self, graph):
        self.capturing, self.captures = True, self.captures + 1
        try:
            yield
        finally:
            self.capturing = False


def attention(func, args, kwargs):
    """On the CPU, but by the backends that the device would have."""
    if torch.backends.cuda.math_sdp_enabled():
        return func(*args, **kwargs)
    if torch.backends.cuda.flash_sdp_enabled() and kwargs.get("attn_mask") is not None:
        raise RuntimeError("No available kernel. Aborting execution.")
    if torch.backends.cuda.mem_efficient_sdp_enabled():
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def on_cpu(argument):
    is_cuda = isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")
    return torch.device("cpu") if is_cuda else argument


@contextlib.contextmanager
def stub_device(monkeypatch):
    """Inside, torch.cuda is a Hopper-like device; yields the Stub."""
    stub = Stub()
    fakes = dict(
        is_available=lambda: True,
        get_device_name=lambda *_: PROPERTIES.name,
        get_device_properties=lambda *_: PROPERTIES,
        get_device_capability=lambda *_: (9, 0),
        synchronize=lambda *_: None,
        current_stream=lambda *_: "the stream",
        set_stream=lambda stream: None,
        empty_cache=lambda: None,
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        reset_peak_memory_stats=lambda *_: None,
        Event=Event,
        CUDAGraph=Graph,
        graph=stub.capture,
    )
    with monkeypatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch, "Generator", Generator)
        with stub:
            yield stub

"""A call's launches the second time (eah_kernels/triton/plan.py): the same builds as Triton's own way, without it.

Builds are counted, not made: what Triton would compile is asked for by its key. At the end some are executed.
"""

import random
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import accumulate, count
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from eah_kernels import backends, eah_attention, eah_attention_varlen, shared_map_attention, sink_statistics
from eah_kernels.triton import few_rows, plan
from eah_kernels.triton import launch as launching

from .triton_launch import compiled

H, D = 4, 64
IMAGE = torch.zeros(2, 4096, dtype=torch.bool)
IMAGE[:, 5:30] = True


class Build:
    """In the place of what Triton compiles: nothing is, and a launch is noted."""

    packed_metadata, function = (), 0

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def launch_metadata(self, grid, stream, *arguments):
        return SimpleNamespace(name=self.kernel.fn.__name__)

    def run(self, grid, y, z, stream, function, packed, metadata, enter, exit_hook, *arguments):
        if enter is not None:
            enter(metadata)
        self.launched.append((self, grid, stream, arguments))


class Gpu:
    """A GPU that is not there; `builds` were asked for and `launched` would have run."""

    stream = 0
    numbers = count(1000)  # Triton keeps builds by device: no two of these are the same one

    def __init__(self):
        self.builds, self.launched, self.number = Counter(), [], next(self.numbers)
        self.fused = set()  # whether products and sums are one instruction

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu():
    there = Gpu()

    def compile_nothing(kernel, key, signature, device, constexprs, options, attrs, warmup):
        there.builds[kernel.fn.__name__] += 1
        there.fused.add(options.enable_fp_fusion)
        return kernel.device_caches[device][0].setdefault(key, Build(kernel, there.launched))

    plan._kept.cache_clear()
    before = triton.runtime.driver._active
    with (
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
        mock.patch.object(launching, "device_target", lambda device: "sm_90"),
        mock.patch.object(backends, "why_not_triton", lambda call: None),
    ):
        triton.runtime.driver.set_active(there)
        yield there
    triton.runtime.driver._active = before
    plan._kept.cache_clear()


def rows(length, heads=H, dim=D, batch=2):
    return torch.zeros(batch, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2)


def masks(q_len, kv_len=None):
    """Of every form, none larger than it must be."""
    kv_len = kv_len or q_len
    seen = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool)
    return [None, seen[:, 0, 0].contiguous(), seen, seen.to(torch.bfloat16)]


def prompt(length, mask=None, query=None, key=None):
    query = rows(length) if query is None else query
    key = rows(length, 2) if key is None else key
    return eah_attention(query, key, key, IMAGE[:, :length], attention_mask=mask, backend="triton")


def step(length, mask=None, q_len=1, key=None):
    key = rows(length, 2) if key is None else key
    head = torch.zeros(2, dtype=torch.int32)
    return shared_map_attention(rows(q_len), key, key, head, attention_mask=mask, backend="triton")


@pytest.mark.parametrize("form", range(4), ids=["none", "2-D", "boolean", "additive"])
def test_a_new_length_compiles_nothing(form, gpu):
    """Multiples of 16 and others, and a new number of rows and of parts at decoding."""
    for length in range(640, 673):
        prompt(length, masks(length)[form])
    assert gpu.builds and max(gpu.builds.values()) == 1, gpu.builds
    gpu.builds.clear()
    for length in (40, 48, 64, 641, 4000, 4096, 20000):
        for q_len in (1, 2, 16):
            step(length, masks(q_len, length)[form], q_len)
    assert max(gpu.builds.values(), default=0) <= 1, gpu.builds
    gpu.builds.clear()
    for length in (640, 641, 648, 656):
        sink_statistics(
            rows(length), rows(length, 2), IMAGE[:, :length], attention_mask=masks(length)[form],
            return_column_mean=True, backend="triton",
        )  # fmt: skip
    assert gpu.builds and max(gpu.builds.values()) == 1, gpu.builds


def test_how_an_additive_mask_lies_compiles_nothing(gpu):
    """Addresses, strides and what is expanded; what is not aligned is copied, and no more than once for all heads."""
    wide = torch.zeros(2, H, 64, 99, dtype=torch.bfloat16)
    masks = [wide[..., :64], wide[:, :1, :, 3:67], wide[:1, :, :, 35:].transpose(2, 3), wide[:, :, :, :64].contiguous()]
    masks += [wide[:, :, :1, 9:73].expand(-1, -1, 64, -1), wide[:, :1, :, 1:65].expand(-1, H, -1, -1)]
    for mask in masks:
        prompt(64, mask)
        lies = launching.aligned(mask)
        assert torch.equal(lies, mask) and lies.untyped_storage().nbytes() <= wide.nbytes
    assert max(gpu.builds.values()) == 1, gpu.builds
    assert launching.aligned(masks[3]) is masks[3] and launching.aligned(masks[5]).stride(1) == 0


def test_the_launches_of_a_call(gpu):
    """Three for a prompt, two for a short one without a 4-D mask; a mask costs one more."""
    for length, launches in ((100, (2, 3, 4, 4)), (1000, (3, 4, 4, 4))):
        for mask, number in zip(masks(length), launches, strict=True):
            gpu.launched.clear()
            prompt(length, mask)
            assert len(gpu.launched) == number


def odd(tensor, rng):
    """The same shape, at another address and of other strides."""
    kind = rng.randrange(5)
    if kind == 0:  # an address that 16 does not divide
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    if kind == 1:
        return tensor.contiguous()
    if kind == 2:  # strides that 16 does not divide
        wide = torch.zeros(*tensor.shape[:3], tensor.shape[3] + rng.choice([1, 8]), dtype=tensor.dtype)
        return wide[..., : tensor.shape[3]]
    if kind == 3:
        return tensor[:, :1].expand_as(tensor)
    return tensor.clone()


@contextmanager
def beside_triton():
    """Of each launch from a plan, the build that Triton's own way takes is asked for. Yields their names."""
    taken = []

    def checked(self, *launches):
        for one in launches:
            build = self.builds.get((one.kernel.fn, one.tile, one.form))
            if build is not None:
                taken.append(one.kernel.fn.__name__)
                own = one.kernel.warmup(grid=(one.programs,), **one.arguments, **one.tile.options)
                assert build is own, (one.kernel.fn.__name__, one.arguments)
        return launch(self, *launches)

    launch = plan.Plan.launch
    with mock.patch.object(plan.Plan, "launch", checked):
        yield taken


def test_a_plan_takes_the_build_that_triton_would(gpu):
    """Random lengths, dimensions, strides, addresses and masks; each problem's own way is asked for beside the plan."""
    lengths = random.Random(0)
    with beside_triton() as taken:
        for number in range(160):
            rng = random.Random(number % 40)  # every form four times, most with other lengths
            length, dim, heads = lengths.choice([17, 18, 32, 33, 48]), rng.choice([16, 24, 64]), rng.choice([1, 2])
            query, key = (odd(rows(length, heads, dim), rng) for _ in range(2))
            mask = rng.choice([*masks(length)[:2], odd(masks(length)[2], rng), odd(masks(length)[3], rng)])
            if mask is not None and mask.dim() == 4 and rng.random() < 0.3:
                mask = mask[:1]
            image = IMAGE[:, :length] if rng.random() < 0.5 else IMAGE[:1, :length].expand(2, -1)
            head = torch.zeros(2, dtype=torch.int32)
            options = dict(attention_mask=mask, backend="triton")
            eah_attention(query, key, key, image, **options)
            few = query[:, :, :1]
            short = mask if mask is None or mask.dim() == 2 else mask[:, :, -1:]
            shared_map_attention(few, key, key, head, attention_mask=short, backend="triton")
            shared_map_attention(query, key, odd(key, rng), head, **options)
            sink_statistics(query, key, image, return_column_mean=rng.random() < 0.5, **options)
    assert len(taken) > 500


def step_of(lengths, rng=None):
    """Packed sequences, of which the first has an image."""
    tokens, bounds = sum(lengths), [0, *accumulate(lengths)]
    query, key, out = rows(tokens, batch=1), rows(tokens, 2, batch=1), None
    cu_seqlens = torch.tensor([*bounds, 0], dtype=torch.int32)[:-1]
    options = {}
    if rng is not None:
        query, key = odd(query, rng), odd(key, rng)
        out = rng.choice([None, torch.zeros(tokens, 2 * H, D, dtype=torch.bfloat16)[:, ::2]])
        cu_seqlens = rng.choice([cu_seqlens, torch.tensor([0, *bounds], dtype=torch.int32)[1:]])
        options = dict(broadcast_to=rng.choice(["all", 2]), sliding_window=rng.choice([None, 9]))
    query, key = (tensor[0].transpose(0, 1) for tensor in (query, key))
    image = IMAGE[0, :tokens]
    return eah_attention_varlen(query, key, key, image, cu_seqlens, max(lengths), out=out, backend="triton", **options)


def test_packed_sequences(gpu):
    """One launch of each kernel whatever their number, and a new step of as many compiles nothing."""
    for launches, steps in ((2, ([40, 16, 0], [33, 1, 48])), (3, ([900, 1, 7], [100, 1000, 17]))):
        gpu.builds.clear()
        for lengths in steps:
            gpu.launched.clear()
            step_of(lengths)
            assert len(gpu.launched) == launches
        assert gpu.builds.total() == launches, gpu.builds
    with beside_triton() as taken:
        for number in range(60):
            lengths = [random.Random(number).choice([0, 16, 17, 40, 64]) for _ in range(3)]
            step_of([*lengths, 5], random.Random(number % 15))
    assert len(taken) > 60


def calls_of(function):
    """How many Python functions ran, and how many tensors were allocated from Python."""
    functions, tensors = 0, 0

    def count(frame, event, argument):
        nonlocal functions, tensors
        functions += event == "call"
        tensors += event == "c_call" and argument.__name__ in ("new_empty", "new_zeros", "new_full", "empty", "zeros")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return functions, tensors


@pytest.mark.tritons
def test_the_second_time_triton_binds_nothing(gpu):
    """Python functions and allocations are what a call costs the host; a 2-D mask adds one launch and one tensor."""
    prompt(100)
    prompt(100, masks(100)[1])
    step(100)
    query, key, value, head = rows(101), rows(101, 2), rows(113, 2), torch.zeros(2, dtype=torch.int32)
    image, shown, last = IMAGE[:, :101].contiguous(), masks(101)[1], rows(1)
    calls = {
        "plain": lambda: eah_attention(query, key, key, image, backend="triton"),
        "2-D mask": lambda: eah_attention(query, key, key, image, attention_mask=shown, backend="triton"),
        "step": lambda: shared_map_attention(last, value, value, head, backend="triton"),
    }
    cost = {}
    with mock.patch.object(JITFunction, "run", side_effect=AssertionError("Triton's own way")):
        for name, call in calls.items():
            call()  # of layers of one shape the first
            gpu.launched.clear()
            functions, tensors = calls_of(call)
            cost[name] = functions, tensors, len(gpu.launched)
    bounds = {"plain": (137, 6, 2), "2-D mask": (155, 7, 3), "step": (99, 3, 2)}
    for name, bound in bounds.items():
        assert all(spent <= most for spent, most in zip(cost[name], bound, strict=True)), cost


def test_it_is_bounded_and_follows_the_stream(gpu):
    for length in range(17, 17 + 20):
        prompt(length)
    assert plan._kept.cache_info().maxsize == plan.PLANS and plan._kept.cache_info().currsize <= 2
    gpu.stream = 7
    gpu.launched.clear()
    prompt(40)
    assert {stream for _, _, stream, _ in gpu.launched} == {7}


@pytest.mark.tritons
def test_hooks_see_every_launch(gpu):
    prompt(100)
    seen = []

    def hook(metadata):
        seen.append(metadata.name)

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        prompt(100)
        prompt(100)
    finally:
        hooks.remove(hook)
    prompt(100)
    assert seen == ["_one_pass_kernel", "_attend_kernel"] * 2


@pytest.mark.tritons
def test_a_triton_that_was_not_tested_is_asked_every_time(gpu, monkeypatch):
    """Another one may run its builds otherwise, and say otherwise whether somebody listens to launches."""
    monkeypatch.setattr(backends, "_triton", lambda: (3, 10, 0))
    monkeypatch.setattr(triton, "knobs", None)
    for _ in range(2):
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as own:
            prompt(100)
            step(100)
        assert own.call_count == 4
    assert len(gpu.launched) == 8


@pytest.mark.tritons
def test_products_and_sums_are_fused_whatever_the_default(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # as Triton 3.10 has it
    prompt(1000, masks(1000)[1])
    step(100)
    assert gpu.fused == {True}


def test_a_step_keeps_all_multiprocessors_busy_to_the_end():
    """Of one resident program each, on sm_90: blocks of keys walked where most are, by those walked on average."""
    slots, block_n = 132, 32
    for kv_len in (4096, 16384):
        for programs in (8, 1, 2, 4, 16, 64):  # of a stretch: 32 KV heads four at a time, 4 KV heads, more batch rows
            walk = kv_len // block_n
            stretches = few_rows.split(walk, programs, slots)
            longest, number = -(-walk // stretches), programs * stretches
            turns = -(-number // slots)
            busy = walk * programs / (turns * longest * slots)
            assert busy >= 0.9 or (programs < 4 and kv_len == 4096), (kv_len, programs, stretches, busy)
            assert longest >= 8 or turns == 1, (kv_len, programs, stretches)
    assert few_rows.split(128, 8, slots) == 16 and few_rows.split(512, 8, slots) == 16


@contextmanager
def own_way():
    with mock.patch.object(plan, "_kept", lambda *key: plan.Plan()):
        yield


@pytest.mark.parametrize("mask", [None, pytest.param("left", marks=pytest.mark.tritons)])
def test_what_it_launches_computes_the_same(mask):
    """Executed: the first and later times, with other addresses, alignment, strides and lengths, as by Triton's way."""
    generator = torch.Generator().manual_seed(1)

    def problem(length, offset=0, contiguous=False):
        flat = torch.randn(offset + 3 * length * 2 * 64, generator=generator).bfloat16()[offset:]
        tensors = flat.view(3, 1, length, 2, 64).transpose(2, 3).unbind()
        return [tensor.contiguous() for tensor in tensors] if contiguous else tensors

    def results(query, key, value):
        length = query.shape[2]
        shown = None if mask is None else torch.arange(length)[None] >= 7
        options = dict(attention_mask=shown, backend="triton")
        head = torch.tensor([1], dtype=torch.int32)
        return (
            *eah_attention(query, key, value, IMAGE[:1, :length].clone(), threshold=0.02, **options),
            shared_map_attention(query[:, :, -1:], key, value, head, **options),
        )

    plan._kept.cache_clear()
    kinds = [dict(length=70), dict(length=70), dict(length=70, offset=1), dict(length=80), dict(length=70)]
    kinds += [dict(length=70, contiguous=True)]
    ran = Counter()
    with compiled("sm_80", observe=lambda launched: ran.update([launched.name])):
        for kind in kinds:
            tensors = problem(**kind)
            got = results(*tensors)
            with own_way():
                want = results(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), kind
    assert plan._kept.cache_info().hits >= 4 and ran["_attend_kernel"] == 2 * len(kinds)

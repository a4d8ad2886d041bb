"""The CUDA kernels' source, compiled by a C++ compiler and run by an emulation of the GPU on the CPU.

tests/cuda_emulator/ stands in for csrc/cuda/ptx.cuh and the CUDA built-ins; kernels and bindings are the shipped ones.
That shows what they compute, that no result depends on the grid or the order of the threads, and barriers that are
missing where an order tells. It is no run on a GPU: memory consistency, speed and what nvcc makes of the source are
not in it. tests/test_gpu_native.py is for a GPU.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eah_kernels import native_cuda, reference
from eah_kernels.masks import Scoring
from support import Case, assert_close, exact, make

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
EMULATOR = ROOT / "tests/cuda_emulator"
CXX = os.environ.get("CXX", "c++").split()[0]
HALF = [torch.float16, torch.bfloat16]
GRIDS = [(3, 0), (1, 1), (7, 2), (4, 3)]  # blocks, order of the threads: emulator.cpp

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


def compile_all(folder, commands):
    def run(command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def compile_bindings(*defines):
    includes = ["-isystem", TORCH / "include", "-isystem", sysconfig.get_paths()["include"], f"-I{ROOT / 'csrc'}"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Werror"]
    limited = "-DPy_LIMITED_API=0x030a0000"
    return [CXX, "-std=c++17", *flags, limited, *defines, *includes, "-c", ROOT / "csrc/bindings_cuda.cpp"]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The emulation, built; its ops are torch.ops.eah_kernels_emulated."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX} is not on the PATH")
    folder = tmp_path_factory.mktemp("cuda_emulated")
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", f"-I{EMULATOR}"]
    kernels = [ROOT / f"csrc/cuda/{name}.cu" for name in ("prefill", "decode")]
    commands = [[CXX, *flags, "-Wall", "-Werror", "-x", "c++", "-c", source] for source in kernels]
    commands += [[CXX, *flags, "-c", EMULATOR / "emulator.cpp"]]
    commands += [compile_bindings("-DEAH_OPS=eah_kernels_emulated", "-DEAH_DISPATCH_KEY=CPU")]
    compile_all(folder, commands)
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    objects = sorted(folder.glob("*.o"))
    compile_all(folder, [[CXX, "-shared", "-o", "emulated.so", *objects, *libraries]])
    torch.ops.load_library(folder / "emulated.so")
    return ctypes.CDLL(folder / "emulated.so")


@pytest.fixture
def emulated(emulator, monkeypatch):
    """Calls one of native_cuda's functions once per grid and order; the results must be the same bits."""
    monkeypatch.setattr(native_cuda, "OPS", torch.ops.eah_kernels_emulated)

    def call(function, *arguments, grids=GRIDS):
        results = []
        for blocks, order in grids:
            emulator.eah_emulate(blocks, order)
            results.append(function(*arguments))
        for other in results[1:]:
            pairs = zip(other, results[0], strict=True) if isinstance(other, tuple) else [(other, results[0])]
            assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)
        return results[0]

    return call


def prefill(emulated, inputs, threshold, min_density=0.0, **options):
    tensors = inputs.query, inputs.key, inputs.value, inputs.image_mask
    return emulated(native_cuda.eah_attention, *tensors, threshold, min_density, inputs.scoring, **options)


def check_prefill(emulated, inputs, threshold=None, **options):
    output, head, counts, _, _, threshold = exact(inputs, threshold)
    result = prefill(emulated, inputs, threshold, **options)
    assert torch.equal(result[2], counts) and torch.equal(result[1], head)
    dtype = inputs.query.dtype
    tensors = inputs.query, inputs.key, inputs.value
    assert_close(result[0], output, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))
    return result


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill(emulated, case, dtype):
    check_prefill(emulated, make(case, dtype), grids=GRIDS[:: 1 if dtype == torch.float16 else 2])


def test_prefill_of_a_whole_image(emulated):
    """648 tokens, 11 row blocks; a row without a choice beside one with."""
    inputs = make(Case(q_len=648, heads=3, kv_heads=1, image="absent", dim=64), torch.bfloat16)
    _, head, _ = check_prefill(emulated, inputs, grids=GRIDS[2:3])
    assert head[0] == -1 and head[1] >= 0


def test_no_sink(emulated):
    inputs = make(Case(q_len=113, heads=8, kv_heads=2), HALF[0])
    _, head, counts = check_prefill(emulated, inputs, threshold=1.0, grids=GRIDS[2:])
    assert head.eq(-1).all() and counts.eq(0).all()


def test_ties_go_to_the_lower_head_and_head_0_may_win(emulated):
    inputs = make(Case(q_len=70, heads=4, kv_heads=1), HALF[0])
    inputs.query[:, 3] = inputs.query[:, 1]
    inputs.query[:, 0] = inputs.query[:, 2] = 0
    _, head, counts = check_prefill(emulated, inputs, threshold=0.03, grids=GRIDS[:1])
    assert torch.equal(counts[:, 1], counts[:, 3]) and head.eq(1).all()
    inputs.query[0, 0], inputs.query[0, 1] = inputs.query[0, 1].clone(), 0
    _, head, _ = check_prefill(emulated, inputs, threshold=0.03, grids=GRIDS[1:2])
    assert head.tolist() == [0, 1]


def test_density_gate(emulated):
    """Image tokens at hidden keys count in the denominator."""
    inputs = make(Case(q_len=70, mask="left"), HALF[1])
    threshold = exact(inputs)[-1]
    _, head, counts = prefill(emulated, inputs, threshold, grids=GRIDS[:1])
    for b in range(2):
        density = counts[b].max().item() / inputs.image_mask[b].sum().item()
        assert prefill(emulated, inputs, threshold, density * 0.999, grids=GRIDS[:1])[1][b] == head[b] >= 0
        assert prefill(emulated, inputs, threshold, density * 1.001, grids=GRIDS[:1])[1][b] == -1


@pytest.mark.parametrize("mask", ["left", "right"])
def test_what_padding_holds_reaches_nothing(emulated, mask):
    inputs = make(Case(q_len=113, mask=mask, heads=4, kv_heads=2), HALF[0])
    threshold = exact(inputs)[-1]
    clean = prefill(emulated, inputs, threshold, grids=GRIDS[:1])
    padding = ~inputs.attention_mask[:, None, :, None]
    inputs.key.masked_fill_(padding, torch.nan)
    inputs.value.masked_fill_(padding, torch.inf)
    dirty = prefill(emulated, inputs, threshold, grids=GRIDS[:2])
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    blind = inputs.attention_mask.cumsum(-1) == 0
    assert clean[0].transpose(1, 2)[blind].eq(0).all() and blind.any() == (mask == "left")
    inputs.query.masked_fill_(padding, torch.nan)
    dirty = prefill(emulated, inputs, threshold, grids=GRIDS[:1])
    assert torch.equal(clean[1], dirty[1]) and torch.equal(clean[2], dirty[2])
    real = inputs.attention_mask[:, None, :, None].expand_as(clean[0])
    assert torch.equal(clean[0][real], dirty[0][real])


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(emulated, case, dtype):
    inputs = make(case, dtype)
    tensors = inputs.query, inputs.key, inputs.value
    for head in ([-1, 0, case.heads - 1], [case.heads // 2, -1, 1]):
        head = torch.tensor(head[: case.batch], dtype=torch.int32)
        out = emulated(native_cuda.shared_map_attention, *tensors, head, inputs.scoring)
        wide = (t.double() for t in tensors)
        ref = reference.shared_map_attention(*wide, head, inputs.scoring, torch.float64)
        assert_close(out, ref, reference.shared_map_attention(*tensors, head, inputs.scoring, dtype))


@pytest.mark.parametrize(("heads", "kv_len"), [(3, 513), (4, 200), (2, 200)])
def test_decode_with_so_much_work_that_it_is_cut_otherwise(emulated, heads, kv_len):
    """128 batch rows: of 3 heads, spans of several tiles; of 4 and 2, blocks of as many values. NaN at hidden keys."""
    inputs = make(Case(q_len=1, kv_len=kv_len, heads=heads, kv_heads=heads, batch=128, mask="left"), HALF[0])
    tensors = inputs.query, inputs.key, inputs.value
    head = torch.arange(128, dtype=torch.int32) % (heads + 1) - 1
    ref = reference.shared_map_attention(*(t.double() for t in tensors), head, inputs.scoring, torch.float64)
    plain = reference.shared_map_attention(*tensors, head, inputs.scoring, HALF[0])
    inputs.key.masked_fill_(~inputs.attention_mask[:, None, :, None], torch.nan)
    inputs.value.masked_fill_(~inputs.attention_mask[:, None, :, None], torch.nan)
    out = emulated(native_cuda.shared_map_attention, *tensors, head, inputs.scoring, grids=[(5, 1)])
    assert_close(out, ref, plain)


def test_decode_with_every_key_hidden(emulated):
    inputs = make(Case(q_len=1, kv_len=140, mask="left"), HALF[0])
    inputs.attention_mask[:] = False
    head = torch.tensor([-1, 2], dtype=torch.int32)
    tensors = inputs.query, inputs.key, inputs.value
    assert emulated(native_cuda.shared_map_attention, *tensors, head, inputs.scoring).eq(0).all()


def attention(query=None, key=None, value=None, scoring=None):
    x = torch.randn(1, 2, 20, 64, dtype=torch.float16)
    image_mask = torch.ones(1, 20, dtype=torch.bool)
    tensors = (x if t is None else t for t in (query, key, value))
    return native_cuda.eah_attention(*tensors, image_mask, 0.002, 0.0, scoring or Scoring())


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(query=torch.zeros(1, 2, 20, 64)), "query's dtype: got torch.float32, accepted: float16 and bfloat16"),
        (dict(query=half(1, 2, 1, 64)), "key's length: got 20, accepted: query's length, 1"),
        (dict(query=half(1, 2, 1025, 64), key=half(1, 2, 1025, 64)), "query's length: got 1025, accepted: 1..1024"),
        (dict(value=half(1, 2, 20, 80)), "head dims of key and value: got .64, 80., accepted: 64 and 64, 128 and 128"),
        (dict(key=half(1, 2, 20, 67)[..., :64]), "key's address and strides modulo 16 bytes: got .0, 8, 6."),
        (dict(key=half(1, 2, 64, 20).mT), "key's last stride: got 20, accepted: 1"),
        (dict(query=half(129, 2, 20, 64)), "query's batch: got 129, accepted: 1..128"),
        (dict(scoring=Scoring(causal=False)), "causal: got False"),
        (dict(scoring=Scoring(sliding_window=5)), "sliding_window: got 5, accepted: None"),
        (dict(scoring=Scoring(softcap=5.0)), "softcap: got 5.0, accepted: None"),
        (dict(scoring=Scoring(half(1, 1, 20, 20))), "attention_mask: got 4-D torch.float16"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(arguments, named):
    with pytest.raises(ValueError, match=f'backend="native" cannot be used: .*{named}'):
        attention(**arguments)


def test_decoding_takes_one_row_and_statistics_are_refused():
    x = half(1, 2, 20, 64)
    with pytest.raises(ValueError, match="query's length: got 20, accepted: 1, a decoding step"):
        native_cuda.shared_map_attention(x, x, x, torch.zeros(1, dtype=torch.int32), Scoring())
    with pytest.raises(ValueError, match="no statistics of their own"):
        native_cuda.sink_statistics()


def test_the_bindings_use_the_stable_abi_alone(tmp_path):
    if shutil.which(CXX) is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    compile_all(tmp_path, [compile_bindings()])
    said = subprocess.run(["nm", "-C", "-u", tmp_path / "bindings_cuda.o"], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in said.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in names
    used = {name for name in names if "torch" in name or "at::" in name or "c10" in name}
    assert all(name.startswith("aoti_torch_") or name == "torch_library_impl" for name in used), used


RACE = """
#include <ptx.cuh>
struct Sums {{ float* out; }};
static __global__ void sums(const Sums p) {{
  float* shared = &eah::cuda::shared_memory<float>();
  shared[threadIdx.x] = threadIdx.x;
  {barrier}
  p.out[threadIdx.x] = shared[(threadIdx.x + 33) % 64];
}}
extern "C" __attribute__((visibility("default"))) const char* run(float* out) {{
  return eah::cuda::launch_cooperative(sums, 1, 64, 256, Sums{{out}}, nullptr);
}}
"""


def test_the_emulation_shows_a_missing_barrier(tmp_path):
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX} is not on the PATH")
    wrong = {}
    for name, barrier in {"with": "__syncthreads();", "without": ""}.items():
        (tmp_path / f"{name}.cpp").write_text(RACE.format(barrier=barrier))
        stub = "-Wl,--unresolved-symbols=ignore-all"
        sources = [f"{name}.cpp", EMULATOR / "emulator.cpp"]
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{EMULATOR}", stub]
        compile_all(tmp_path, [[CXX, *flags, "-o", f"{name}.so", *sources]])
        library = ctypes.CDLL(tmp_path / f"{name}.so")
        library.run.restype = ctypes.c_char_p
        wrong[name] = 0
        for order in range(4):
            library.eah_emulate(1, order)
            out = torch.zeros(64)
            assert library.run(ctypes.c_void_p(out.data_ptr())) is None
            wrong[name] += not torch.equal(out, (torch.arange(64.0) + 33) % 64)
    assert wrong["with"] == 0 and wrong["without"] > 0

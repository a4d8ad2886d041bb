"""The ops as torch sees them: opcheck, fakes, torch.compile, gradients; and how much memory the torch backend takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from eah_kernels import eah_attention, ops, sink_statistics

from ..support.cases import NATIVE, Case, exact, make

BACKENDS = ["torch", "triton", NATIVE]
CASES = [Case(q_len=20, heads=4, kv_heads=2, dim=16), Case(q_len=9, kv_len=20, mask="bool", layout="bhsd", dim=16)]


def tensors(inputs):
    return inputs.query, inputs.key, inputs.value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, backend, kernel_device):
    inputs = make(case, device=kernel_device)
    rules = (*inputs.scoring, backend)
    query, key, value = tensors(inputs)
    head = torch.tensor([1, -1], dtype=torch.int32, device=kernel_device)
    for op, arguments in {
        ops.eah_attention: (query, key, value, inputs.image_mask, 0.02, 0.0, *rules),
        ops.sink_statistics: (query, key, inputs.image_mask, 0.02, True, *rules),
        ops.shared_map_attention: (query, key, value, head, *rules),
    }.items():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, kernel_device):
    inputs = make(CASES[0], device=kernel_device)
    threshold = exact(inputs)[-1]

    def layer(query, key, value, image_mask):
        result = eah_attention(query, key, value, image_mask, threshold=threshold, backend=backend)
        return result.output.transpose(1, 2).flatten(2) * 2, result.head

    expected, head = layer(*tensors(inputs), inputs.image_mask)
    output, chosen = torch.compile(layer, fullgraph=True)(*tensors(inputs), inputs.image_mask)
    assert torch.equal(chosen, head)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_layout_is_what_transformers_wants_next(backend, kernel_device):
    inputs = make(CASES[0], device=kernel_device)
    output = eah_attention(*tensors(inputs), inputs.image_mask, backend=backend).output
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_that_require_grad_are_refused(backend, name, kernel_device):
    inputs = make(CASES[0], device=kernel_device)
    getattr(inputs, name).requires_grad_()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        eah_attention(*tensors(inputs), inputs.image_mask, backend=backend)
    with torch.no_grad():
        eah_attention(*tensors(inputs), inputs.image_mask, backend=backend)
    eah_attention(*tensors(inputs), inputs.image_mask, backend="reference").output.sum().backward()
    assert getattr(inputs, name).grad is not None


def test_other_derivatives_are_refused_or_right():
    """functorch's gradients and forward mode, of which torch tells an op nothing."""
    inputs = make(CASES[0])
    tangent = torch.ones_like(inputs.query)

    def attention(query, backend="torch"):
        return eah_attention(query, inputs.key, inputs.value, inputs.image_mask, backend=backend).output

    def lse(query):
        return sink_statistics(query, inputs.key, inputs.image_mask, backend="torch").lse

    with pytest.raises(RuntimeError, match='requires grad: use backend="reference"'):
        torch.func.grad(lambda query: attention(query).sum())(inputs.query)
    for function in (attention, lse):
        with pytest.raises(RuntimeError, match='tangent of forward-mode differentiation: use backend="reference"'):
            torch.func.jvp(function, (inputs.query,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
        attention(forward_ad.make_dual(inputs.query, tangent))
    gradient = torch.func.grad(lambda query: attention(query, "reference").sum())(inputs.query)
    _, along = torch.func.jvp(lambda query: attention(query, "reference").sum(), (inputs.query,), (tangent,))
    torch.testing.assert_close(gradient.sum(), along)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_on_the_meta_device(backend):
    """Which has no autocast to leave."""
    inputs = make(CASES[0])
    query, key, value, image = (t.to("meta") for t in (*tensors(inputs), inputs.image_mask))
    result = eah_attention(query, key, value, image, backend=backend)
    assert [(t.shape, t.device.type) for t in result] == [((2, 4, 20, 16), "meta"), ((2,), "meta"), ((2, 4), "meta")]
    assert sink_statistics(query, key, image, backend=backend).lse.shape == (2, 4, 20)


def test_compiles_with_numbers_that_change():
    inputs = make(CASES[0])
    arguments = *tensors(inputs), inputs.image_mask

    def layer(query, key, value, image_mask, **numbers):
        return eah_attention(query, key, value, image_mask, backend="torch", **numbers).output

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for numbers in (dict(threshold=0.02, scale=0.3), dict(threshold=0.05, scale=-0.2)):
        torch.testing.assert_close(compiled(*arguments, **numbers), layer(*arguments, **numbers))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend, kernel_device):
    inputs = make(Case(q_len=113, heads=4, kv_heads=1, image="scattered"), device=kernel_device)
    runs = [eah_attention(*tensors(inputs), inputs.image_mask, backend=backend) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


MEASURE = """
import resource, torch
from eah_kernels import eah_attention, torch_blocked
torch.set_num_threads(2)
S, H, D = 4096, 2, 64
q, k, v = (torch.randn(1, H, S, D) for _ in range(3))
image = torch.arange(S)[None] < 600
eah_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256], image[:, :256], backend="torch")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
eah_attention(q, k, v, image, threshold=1e-4, backend="torch")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, torch_blocked.ROWS * S * 4, q.nbytes)
"""


def test_the_torch_backend_needs_one_block_of_rows():
    """At S = 4096 one map is 64 MiB; the peak of a fresh process rises by the output and a few blocks of rows."""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True, check=True)
    rise, block, output = map(int, run.stdout.split())
    assert rise < output + 8 * block < 64 * 2**20 // 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_alone_without_column_means(backend, kernel_device):
    inputs = make(CASES[0], device=kernel_device)
    assert sink_statistics(inputs.query, inputs.key, inputs.image_mask, backend=backend).column_mean is None


def test_results_print_as_shapes():
    x, image_mask = torch.zeros(1, 2, 8, 16), torch.ones(1, 8, dtype=torch.bool)
    assert repr(eah_attention(x, x, x, image_mask)) == (
        "EAHResult(output=(1, 2, 8, 16) torch.float32 on cpu, head=(1,) torch.int32 on cpu, "
        "sink_counts=(1, 2) torch.int32 on cpu)"
    )
    assert str(sink_statistics(x, x, image_mask)) == (
        "SinkStatistics(sink_counts=(1, 2) torch.int32 on cpu, lse=(1, 2, 8) torch.float32 on cpu, column_mean=None)"
    )

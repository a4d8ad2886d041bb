"""Bad arguments get an error that names the argument; odd but valid ones work."""

import sys
from types import SimpleNamespace

import pytest
import torch

from eah_kernels import (
    backends,
    eah_attention,
    heads_by_row,
    receiving_heads,
    seeing_rows,
    select_head,
    shared_map_attention,
    sink_statistics,
)
from eah_kernels.masks import Scoring

from ..support.cases import NATIVE

B, H, S, D = 2, 4, 5, 8


def arguments(**changes):
    base = dict(
        query=torch.randn(B, H, S, D),
        key=torch.randn(B, 2, S, D),
        value=torch.randn(B, 2, S, D),
        image_mask=torch.ones(B, S, dtype=torch.bool),
        backend="torch",
    )
    return base | changes


def floats(*shape, dtype=torch.float32):
    return torch.zeros(*shape).to(dtype)


BAD = [
    ("query", ValueError, dict(query=floats(H, S, D))),
    ("query", TypeError, dict(query=[[1.0]])),
    ("query", ValueError, dict(query=floats(B, 0, S, D))),
    ("query.*torch.sparse_coo", TypeError, dict(query=floats(B, H, S, D).to_sparse())),
    ("attention_mask.*torch.sparse_coo", TypeError, dict(attention_mask=floats(B, 1, S, S).to_sparse())),
    ("query.*nested", TypeError, dict(query=torch.nested.nested_tensor([torch.zeros(H, S, D)] * B))),
    ("query", TypeError, dict(query=floats(B, H, S, D, dtype=torch.int32))),
    ("query", TypeError, dict(query=floats(B, H, S, D, dtype=torch.float8_e4m3fn))),
    ("query", ValueError, dict(query=floats(B, H, S, 257), key=floats(B, 2, S, 257))),
    ("query", ValueError, dict(query=floats(B, H, S, 0), key=floats(B, 2, S, 0))),
    ("key", ValueError, dict(key=floats(B, 2, S))),
    ("key", ValueError, dict(key=floats(B + 1, 2, S, D))),
    ("key", ValueError, dict(key=floats(B, 3, S, D))),
    ("key", ValueError, dict(key=floats(B, 0, S, D))),
    ("key", ValueError, dict(key=floats(B, 2, S, D + 1))),
    ("key", TypeError, dict(key=floats(B, 2, S, D, dtype=torch.float16))),
    ("key", ValueError, dict(key=torch.zeros(B, 2, S, D, device="meta"))),
    ("key", ValueError, dict(key=floats(B, 2, S - 1, D), value=floats(B, 2, S - 1, D))),
    ("value", ValueError, dict(value=floats(B, 2, S + 1, D))),
    ("value", ValueError, dict(value=floats(B, 4, S, D))),
    ("value", ValueError, dict(value=floats(B, 2, S, 257))),
    ("value", ValueError, dict(value=floats(B, 2, S, 0))),
    ("value", TypeError, dict(value=floats(B, 2, S, D, dtype=torch.bfloat16))),
    ("value", TypeError, dict(value=None)),
    ("image_mask", TypeError, dict(image_mask=torch.ones(B, S))),
    ("image_mask", TypeError, dict(image_mask=None)),
    ("image_mask", ValueError, dict(image_mask=torch.ones(B, S + 1, dtype=torch.bool))),
    ("image_mask", ValueError, dict(image_mask=torch.ones(S, dtype=torch.bool))),
    ("image_mask", ValueError, dict(image_mask=torch.ones(B, S, dtype=torch.bool, device="meta"))),
    ("attention_mask", TypeError, dict(attention_mask=torch.ones(B, S))),
    ("attention_mask", TypeError, dict(attention_mask=torch.ones(B, 1, S, S, dtype=torch.int64))),
    ("attention_mask", ValueError, dict(attention_mask=torch.ones(B, S + 1, dtype=torch.bool))),
    ("attention_mask", ValueError, dict(attention_mask=torch.ones(B, 2, S, S, dtype=torch.bool))),
    ("attention_mask", ValueError, dict(attention_mask=torch.ones(B, S, S, dtype=torch.bool))),
    ("attention_mask", ValueError, dict(attention_mask=torch.ones(B, S, dtype=torch.bool, device="meta"))),
    ("attention_mask", TypeError, dict(attention_mask="causal")),
    ("threshold", ValueError, dict(threshold=-0.001)),
    ("threshold", ValueError, dict(threshold=float("nan"))),
    ("threshold", ValueError, dict(threshold="0.002")),
    ("min_density", ValueError, dict(min_density=-0.1)),
    ("min_density", ValueError, dict(min_density=1.5)),
    ("min_density", ValueError, dict(min_density=float("nan"))),
    ("broadcast_to", ValueError, dict(broadcast_to=0)),
    ("broadcast_to", ValueError, dict(broadcast_to=H + 1)),
    ("broadcast_to", ValueError, dict(broadcast_to=True)),
    ("broadcast_to", ValueError, dict(broadcast_to="some")),
    ("causal", TypeError, dict(causal=1)),
    ("scale", ValueError, dict(scale=float("inf"))),
    ("scale", ValueError, dict(scale=-1e39)),
    ("scale", ValueError, dict(scale=10**400)),
    ("sliding_window", ValueError, dict(sliding_window=0)),
    ("sliding_window", ValueError, dict(sliding_window=2.0)),
    ("softcap", ValueError, dict(softcap=0.0)),
    ("softcap", ValueError, dict(softcap=float("nan"))),
    ("softcap", ValueError, dict(softcap=1e31)),
    ("softcap", ValueError, dict(softcap=1e-31)),
    ("backend", ValueError, dict(backend="cuda")),
]


@pytest.mark.parametrize(("name", "error", "changes"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_argument(name, error, changes):
    with pytest.raises(error, match=name):
        eah_attention(**arguments(**changes))


def test_the_other_functions_check_too():
    good = arguments()
    image = good["image_mask"]
    with pytest.raises(ValueError, match="threshold"):
        sink_statistics(good["query"], good["key"], image, threshold=-1.0)
    counts = torch.zeros(B, H, dtype=torch.int32)
    for name, call in {
        "head": lambda: shared_map_attention(good["query"], good["key"], good["value"], counts),
        "receives": lambda: shared_map_attention(
            good["query"], good["key"], good["value"], counts[:, 0].contiguous(), receives=counts
        ),
        "broadcast_to": lambda: receiving_heads(counts, counts[:, 0], H + 1),
        "sink_counts": lambda: select_head(counts.float(), image),
        "image_mask": lambda: select_head(counts, image[:1]),
        "min_density": lambda: select_head(counts, image, 2.0),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


def test_an_unavailable_backend_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'backend="triton".*TRITON_INTERPRET=1'):
        eah_attention(**arguments(backend="triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.bfloat16, torch.float64):
        tensors = {name: arguments()[name].to(dtype) for name in ("query", "key", "value")}
        with pytest.raises(ValueError, match=str(dtype)[6:]):
            eah_attention(**arguments(backend="triton", **tensors))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        eah_attention(**arguments(backend="triton"))


@pytest.mark.parametrize(
    ("capability", "release", "usable"),
    [((10, 0), (3, 7, 0), False), ((10, 3), (3, 6, 0), False), ((10, 0), (3, 7, 1), True), ((9, 0), (3, 6, 0), True)],
)
def test_a_triton_that_compiles_races_is_refused(monkeypatch, capability, release, usable):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_triton", lambda: release)
    tensor = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    reason = backends.why_not_triton(backends.Call("eah_attention", tensor, tensor, tensor, Scoring()))
    assert (reason is None) == usable and (usable or "3.7.1" in reason)


def test_of_a_triton_that_was_not_tested_no_gluon_kernel_is_used(monkeypatch):
    """Gluon is experimental: 3.9 took away a name that 3.6 to 3.8 have."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.knows_triton() and backends.untested_triton() is None
    for release, known in (((3, 6, 0), True), ((3, 9, 4), True), ((3, 10, 0), False), ((4, 0, 0), False)):
        monkeypatch.setattr(backends, "_triton", lambda: release)  # noqa: B023
        assert backends.has_gluon(torch.device("cuda")) is known
        note = backends.untested_triton()
        assert note is None if known else note.startswith(f"untested with triton {release[0]}.{release[1]}.0: ")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
@pytest.mark.parametrize("shape", [(0, H, S, S), (B, H, 0, 0), (B, H, 0, S), (B, H, 1, 1), (B, 1, S, S)], ids=str)
def test_valid_edges(backend, shape, kernel_device):
    batch, heads, q_len, kv_len = shape
    result = eah_attention(
        torch.randn(batch, heads, q_len, D, device=kernel_device),
        torch.randn(batch, 1, kv_len, D, device=kernel_device),
        torch.randn(batch, 1, kv_len, 3, device=kernel_device),
        torch.zeros(batch, kv_len, dtype=torch.bool, device=kernel_device),
        backend=backend,
    )
    assert result.output.shape == (batch, heads, q_len, 3)
    assert not result.output.isnan().any()
    assert result.head.tolist() == [-1] * batch
    assert result.sink_counts.tolist() == [[0] * heads] * batch


@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
def test_no_keys(backend):
    empty = torch.zeros(B, H, 0, D)
    image = torch.zeros(B, 0, dtype=torch.bool)
    result = eah_attention(torch.randn(B, H, S, D), empty, empty, image, causal=False, backend=backend)
    assert result.output.eq(0).all() and result.head.tolist() == [-1] * B
    statistics = sink_statistics(torch.randn(B, H, S, D), empty, image, causal=False, backend=backend)
    assert statistics.lse.eq(-torch.inf).all() and statistics.column_mean is None


@pytest.mark.parametrize("form", [None, "key", "bool", "bias"])
@pytest.mark.parametrize("batch, rows, keys", [(0, 1, 1), (1, 0, 1), (1, 0, 0), (2, 1, 0), (2, 3, 0)])
def test_nothing_to_attend_to(batch, rows, keys, form):
    query, key = torch.randn(batch, H, rows, D), torch.randn(batch, 2, keys, D)
    mask = {"key": (batch, keys), "bool": (batch, 1, rows, keys), "bias": (batch, 1, rows, keys)}.get(form)
    mask = mask and torch.ones(mask, dtype=torch.float32 if form == "bias" else torch.bool)
    rules = dict(attention_mask=mask, causal=False)
    assert seeing_rows(query, key, **rules).tolist() == torch.zeros(batch, H, keys).tolist()
    image, head = torch.ones(batch, keys, dtype=torch.bool), torch.zeros(batch, dtype=torch.int32)
    assert not shared_map_attention(query, key, key, head, **rules).any()
    if keys >= rows:
        sums, seen = torch.zeros(batch, H, keys), torch.zeros(batch, 1, keys, dtype=torch.int32)
        assert heads_by_row(query, key, image, sums, seen, **rules).head.shape == (batch, rows)


def test_threshold_may_be_infinite():
    result = eah_attention(**arguments(threshold=float("inf")))
    assert result.head.tolist() == [-1] * B


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", NATIVE])
def test_the_widest_softcap_is_none_and_the_narrowest_makes_attention_uniform(backend, kernel_device):
    """The ends of what is accepted: nothing overflows, nothing is divided by zero."""
    given = arguments(backend=backend)
    given |= {name: t.to(kernel_device) for name, t in given.items() if isinstance(t, torch.Tensor)}
    plain, uniform = eah_attention(**given), eah_attention(**given, scale=0.0)
    torch.testing.assert_close(eah_attention(**given, softcap=1e30).output, plain.output)
    torch.testing.assert_close(eah_attention(**given, softcap=1e-30).output, uniform.output)

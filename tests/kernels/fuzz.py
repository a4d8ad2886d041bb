"""Random problems over every axis at once, each public function of eah_kernels against the float64 reference.

    python -m tests.kernels.fuzz --minutes 1 --seed 7 --backends torch native triton

Every operand has a layout of its own, among NaN; keys that no row sees may hold NaN. The seed, new in every run unless
given, is printed and decides all problems in order. The first one that fails is made as simple as it can be, printed
and saved as a script; so is one that kills the process, as it is. Exits 1 then. Triton runs in its interpreter.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch

import eah_kernels
from eah_kernels import backends, reference
from eah_kernels.masks import Scoring

from ..support.cases import LAYOUTS, Case, Inputs, assert_close, assert_statistics_close, exact, laid_out, make

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported, with the first problem
ROOT = Path(__file__).parents[2]
LONG = 3000  # from so many keys on they overlap in memory: key n begins at entry n
DTYPES = {
    "torch": ["float32", "float16", "bfloat16", "float64"],
    "native": ["float32", "float16", "bfloat16"],
    "triton": ["float32", "float16"],
}
FUNCTIONS = ["eah_attention", "sink_statistics", "shared_map_attention"]
FUNCTIONS += ["eah_attention_varlen", "seeing_rows", "receiving_heads"]
MASKS = [None, "left", "right", "bool", "bool_heads", "bool_all", "bool_causal"]
MASKS += ["bias", "bias_heads", "bias_min", "bias_rows", "bias_causal", "bias_few"]
OPERANDS = ["query", "key", "value", "image_mask", "attention_mask", "head", "receives"]
SCRIPT = """import sys
sys.path[:0] = [{root!r}]
from tests.kernels.fuzz import Problem, failure
print(failure({problem}))
"""


@dataclass(frozen=True)
class Problem:
    """The first value of each field's list in `draw` is the simplest, and the default here."""

    backend: str = "torch"
    function: str = "eah_attention"
    dtype: str = "float32"
    q_len: int = 1
    more_keys: int = 0  # than query rows
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    dim: int = 1
    value_dim: int = 1
    image: str = "all"
    mask: str | None = None
    mask_dtype: str | None = None
    causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    threshold: float | None = None  # None: between two columns' means
    min_density: float = 0.0
    broadcast_to: int | str = "all"
    layouts: tuple[str, ...] = ("plain",) * len(OPERANDS)
    poison: bool = False
    lengths: tuple[int, ...] = (1,)  # of packed sequences, to which all that is said of rows, keys and masks is nothing
    seed: int = 0


def draw(rng: random.Random, names: list[str]) -> Problem:
    backend = rng.choice(names)
    small = backend == "triton"
    kv_heads, group = rng.choice([1, 1, 2] if small else [1, 2, 3, 8]), rng.choice([1, 2] if small else [1, 2, 4, 7])
    causal = rng.random() < 0.6
    q_len = rng.choice(
        [0, 1, 1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65] + [70] * small + [113, 129, 193] * (not small)
    )
    more = rng.choice([0, 0, 0, 1, 5, 40, 64, 131])
    if rng.random() < 0.02:
        q_len, more, kv_heads, group = rng.choice([1, 3]), LONG if small else 50 * LONG, 1, 2
    elif not causal and rng.random() < 0.3:
        more = -rng.randint(0, q_len)
    mask = rng.choice(MASKS)
    image = rng.choice(["all", "first", "middle", "last", "scattered", "absent"])
    return Problem(
        backend=backend,
        function=rng.choice(FUNCTIONS[:3] * 3 + FUNCTIONS[3:]),
        dtype=rng.choice(DTYPES[backend]),
        q_len=q_len,
        more_keys=more,
        batch=rng.choice([1, 2, 2, 3] if rng.random() < 0.98 else [0]),
        kv_heads=kv_heads,
        group=group,
        dim=rng.choice([1, 3, 8, 16, 17, 24, 40, 64, 72, 80, 96, 128, 192, 256]),
        value_dim=rng.choice([1, 3, 8, 16, 17, 24, 40, 64, 72, 128, 160, 256]),
        image=image,
        mask=mask,
        mask_dtype=rng.choice([None, None, "float32", "float16", "bfloat16", "float64"]),
        causal=causal,
        sliding_window=rng.choice([None, None, 1, 2, 9, 40, 64, 100, 2**40]),
        softcap=rng.choice([None, None, 3.0, 30.0, 1000.0]),
        scale=rng.choice([None, None, 0.05, -0.1, 0.0]),
        threshold=rng.choice([None, None, None, 0.0, 0.002, 1.0]),
        min_density=rng.choice([0.0, 0.0, 0.1, 0.5, 1.0]),
        broadcast_to=rng.choice(["all", "all", rng.randint(1, kv_heads * group)]),
        layouts=tuple(rng.choice(["plain", *LAYOUTS]) for _ in OPERANDS),
        poison=rng.random() < 0.3,
        lengths=tuple(rng.choice([0, 1, 2, 16, 17, 33, 64, 65, 130]) for _ in range(rng.choice([1, 2, 3, 5]))),
        seed=rng.randrange(1 << 30),
    )


def operands(p: Problem):
    """support.Inputs without the margins, layouts and poison of the problem; head; receives."""
    torch.manual_seed(p.seed)
    heads, kv_len = p.kv_heads * p.group, p.q_len + p.more_keys
    long = kv_len >= LONG
    dtype, mask_dtype = getattr(torch, p.dtype), p.mask_dtype and getattr(torch, p.mask_dtype)
    dims = dict(dim=1, value_dim=1) if long else dict(dim=p.dim, value_dim=p.value_dim)
    names = "image", "mask", "causal", "sliding_window", "softcap", "scale", "kv_heads"
    case = Case(
        q_len=max(p.q_len, 1),
        kv_len=max(kv_len, 1),
        batch=max(p.batch, 1),
        heads=heads,
        mask_dtype=mask_dtype,
        **dims,
        **{name: getattr(p, name) for name in names},
    )
    made = make(case, dtype, seed=p.seed)
    if long:
        sizes = dict(
            query=(heads, p.q_len, p.dim), key=(p.kv_heads, kv_len, p.dim), value=(p.kv_heads, kv_len, p.value_dim)
        )
        for name, (number, length, dim) in sizes.items():
            overlapping = torch.randn(length + dim).to(dtype).as_strided((p.batch, number, length, dim), (0, 0, 1, 1))
            setattr(made, name, overlapping)
    for name, lengths in {"query": p.q_len, "key": kv_len, "value": kv_len}.items():
        setattr(made, name, getattr(made, name)[: p.batch, :, :lengths])
    made.image_mask = made.image_mask[: p.batch, :kv_len].contiguous()
    if made.attention_mask is not None:
        inside = (slice(None), slice(p.q_len)) if made.attention_mask.dim() == 4 else ()
        made.attention_mask = made.attention_mask[(slice(p.batch), *inside, slice(kv_len))].contiguous()
    head = torch.randint(-1, heads, (p.batch,), dtype=torch.int32)
    receives = torch.rand(p.batch, heads) < 0.5
    for name, layout in zip(OPERANDS, p.layouts, strict=True):  # "expanded": the first batch row stands for all
        tensor = {"head": head, "receives": receives}.get(name, getattr(made, name, None))
        if layout == "expanded" and tensor is not None and len(tensor) and not long:
            tensor.copy_(tensor[:1].clone().expand_as(tensor))
    return made, head, receives


def failure(p: Problem) -> str | None:
    """What is wrong with the answer to the problem, or None."""
    try:
        check(p)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}"
    return None


def check(p: Problem) -> None:
    if p.function == "eah_attention_varlen":
        return check_packed(p)
    made, head, receives = operands(p)
    heads, kv_len = p.kv_heads * p.group, p.q_len + p.more_keys
    clean = dict(vars(made), head=head, receives=receives)
    placed = {name: clean[name] for name in OPERANDS}
    long = kv_len >= LONG
    if p.poison and not long and p.q_len and kv_len and p.batch:
        _, _, visible = reference.attention_maps(made.query.double(), made.key.double(), made.scoring, torch.float64)
        hidden = ~visible.any(-2).any(1).expand(p.batch, kv_len)[:, None, :, None]
        if "expanded" in (p.layouts[1], p.layouts[2]):
            hidden = hidden.all(0, keepdim=True)
        placed |= {name: clean[name].masked_fill(hidden, torch.nan) for name in ("key", "value")}
    for name, layout in zip(OPERANDS, p.layouts, strict=True):
        tensor = placed[name]
        if tensor is not None and layout != "plain" and len(tensor) and not long:
            placed[name] = laid_out(tensor, layout)
    tensors = [placed[name] for name in ("query", "key", "value")]
    rules = dict(attention_mask=placed["attention_mask"], **made.rules)
    if p.function == "receiving_heads":
        return check_choice(p, heads, placed)
    if p.function == "seeing_rows":
        rules = {name: rules[name] for name in ("attention_mask", "causal", "sliding_window")}
        return check_seeing_rows(made, eah_kernels.seeing_rows(*tensors[:2], **rules))
    if not (p.q_len and kv_len and p.batch):
        return check_empty(p, tensors, placed, rules)
    _, _, _, lse, mean, threshold = exact(made, p.threshold)
    rules["backend"] = p.backend
    if p.function == "sink_statistics":
        got = eah_kernels.sink_statistics(
            *tensors[:2], placed["image_mask"], threshold=threshold, return_column_mean=True, **rules
        )
        check_counts(got.sink_counts, mean, threshold, made.image_mask)
        assert_statistics_close(got.lse, got.column_mean, lse, mean)
        return None
    if p.function == "eah_attention":
        output, head, counts = eah_kernels.eah_attention(
            *tensors, placed["image_mask"], threshold=threshold, min_density=p.min_density,
            broadcast_to=p.broadcast_to, **rules,
        )  # fmt: skip
        check_counts(counts, mean, threshold, made.image_mask)
        assert torch.equal(head, reference.select_head(counts, made.image_mask, p.min_density)), (head, counts)
        receives = None
        if p.broadcast_to != "all":
            receives = reference.receiving_heads(counts, head, p.broadcast_to)
    else:
        receives = receives if p.broadcast_to != "all" else None
        options = {} if receives is None else dict(receives=placed["receives"])
        output = eah_kernels.shared_map_attention(*tensors, placed["head"], **options, **rules)
    check_output(output, made, head, receives)


def check_packed(p: Problem) -> None:
    """Each sequence by itself, causal and without a mask."""
    torch.manual_seed(p.seed)
    heads, tokens, bounds = p.kv_heads * p.group, sum(p.lengths), [0, *accumulate(p.lengths)]
    shapes = (heads, p.dim), (p.kv_heads, p.dim), (p.kv_heads, p.value_dim)
    operands = [torch.randn(tokens, *shape).to(getattr(torch, p.dtype)) for shape in shapes]
    operands += [torch.rand(tokens) < {"all": 1, "absent": 0}.get(p.image, 0.4), torch.tensor(bounds).int()]
    out = operands[0].new_zeros(tokens, heads, p.value_dim)
    placed = [
        laid_out(tensor, layout) if tokens and layout not in ("plain", "expanded") else tensor
        for tensor, layout in zip([*operands, out], p.layouts, strict=False)
    ]
    rules = dict(sliding_window=p.sliding_window, softcap=p.softcap, scale=p.scale)
    sequences = [
        Inputs(*(t[first:end].transpose(0, 1)[None] for t in operands[:3]), operands[3][None, first:end], None,
               dict(causal=True, **rules))
        for first, end in pairwise(bounds)
    ]  # fmt: skip
    threshold = next((exact(one, p.threshold)[-1] for one in sequences if one.query.numel()), 0.0)
    output, head, counts = eah_kernels.eah_attention_varlen(
        *placed[:5], max(p.lengths) + p.more_keys**2, threshold=threshold, min_density=p.min_density,
        broadcast_to=p.broadcast_to, out=None if p.layouts[5] == "negated" else placed[5], backend=p.backend, **rules,
    )  # fmt: skip
    assert output.shape == out.shape and counts.shape == (len(p.lengths), heads)
    for n, one in enumerate(sequences):
        if not p.lengths[n]:
            assert head[n] == -1 and not counts[n].any()
            continue
        row = slice(n, n + 1)
        check_counts(counts[row], exact(one, threshold)[4], threshold, one.image_mask)
        assert torch.equal(head[row], reference.select_head(counts[row], one.image_mask, p.min_density)), (head, counts)
        receives = (
            None if p.broadcast_to == "all" else reference.receiving_heads(counts[row], head[row], p.broadcast_to)
        )
        check_output(output[bounds[n] : bounds[n + 1]].transpose(0, 1)[None], one, head[row], receives)


def check_counts(counts, mean, threshold: float, image) -> None:
    """Exactly the reference's, but for columns within rounding of the threshold."""
    near = ((mean - threshold).abs() <= 1e-4 * mean + 1e-6) & image[:, None]
    near &= (mean > 0) | (threshold > 0)  # 0 is exact
    off = (counts - (mean > threshold).sum(-1)).abs()
    assert (off <= near.sum(-1)).all(), (
        f"sinks {counts.tolist()}, {(mean > threshold).sum(-1).tolist()} in the reference"
    )


def check_output(output, made, head, receives) -> None:
    wide, dtype = made.widened(), made.query.dtype
    ref = reference.shared_map_attention(wide.query, wide.key, wide.value, head, wide.scoring, torch.float64, receives)
    plain = reference.shared_map_attention(made.query, made.key, made.value, head, made.scoring, dtype, receives)
    assert_close(output, ref, plain, made.value)


def check_choice(p: Problem, heads: int, placed) -> None:
    counts = torch.randint(0, 4, (p.batch, heads), dtype=torch.int32)
    spread = laid_out(counts, p.layouts[0]) if p.batch and p.layouts[0] not in ("plain", "expanded") else counts
    head = eah_kernels.select_head(spread, placed["image_mask"], p.min_density)
    receiving = eah_kernels.receiving_heads(spread, head, p.broadcast_to)
    number = heads if p.broadcast_to == "all" else p.broadcast_to
    for b, row in enumerate(counts.tolist()):
        most, image = max(row), int(placed["image_mask"][b].sum())
        chosen = row.index(most) if most and most / max(image, 1) >= p.min_density else -1
        takes = sorted(range(heads), key=lambda h, row=row: (row[h], -h))[: number if chosen >= 0 else 0]
        assert head[b] == chosen and receiving[b].nonzero().flatten().tolist() == sorted(takes), (row, image)


def check_seeing_rows(made, got) -> None:
    q_len, kv_len = made.query.shape[2], made.key.shape[2]
    everything = slice(None)
    visible = made.scoring.visible(q_len, kv_len, made.query.device, everything, everything)
    own = torch.arange(q_len)[:, None] + kv_len - q_len
    pairs = visible & (torch.arange(kv_len) != own)
    counts = (visible & (torch.arange(kv_len) == own)).any(-1, keepdim=True)
    assert torch.equal(got, (pairs & counts).sum(-2).int().expand_as(got))


def check_empty(p: Problem, tensors, placed, rules) -> None:
    result = eah_kernels.eah_attention(*tensors, placed["image_mask"], backend=p.backend, **rules)
    assert result.output.shape == (*tensors[0].shape[:3], p.value_dim) and not result.output.any()
    assert result.head.tolist() == [-1] * p.batch and not result.sink_counts.any()
    statistics = eah_kernels.sink_statistics(
        *tensors[:2], placed["image_mask"], return_column_mean=True, backend=p.backend, **rules
    )
    assert statistics.lse.eq(-torch.inf).all() and not statistics.column_mean.any()
    lent = eah_kernels.shared_map_attention(*tensors, placed["head"], backend=p.backend, **rules)
    assert lent.shape == result.output.shape and not lent.any()


def simplest(p: Problem, seconds: float = 60) -> Problem:
    """A problem that fails too, and in which no field alone can be made simpler."""
    end, plain, changed = time.monotonic() + seconds, Problem(backend=p.backend), True
    while changed and time.monotonic() < end:
        changed = False
        for field in fields(Problem):
            value = getattr(p, field.name)
            simpler = [getattr(plain, field.name)]
            if isinstance(value, int) and not isinstance(value, bool) and field.name != "seed":
                simpler += [value // 2, value - 1]
            if field.name == "lengths":
                simpler += [(*value[:i], *value[i + 1 :]) for i in range(len(value)) if len(value) > 1]
            if field.name == "layouts":
                simpler += [(*value[:i], "plain", *value[i + 1 :]) for i in range(len(value))]
            for candidate in simpler:
                tried = replace(p, **{field.name: candidate})
                if candidate != value and valid(tried) and failure(tried):
                    p, changed = tried, True
                    break
    return p


def valid(p: Problem) -> bool:
    fits = isinstance(p.broadcast_to, str) or 1 <= p.broadcast_to <= p.kv_heads * p.group
    lengths = p.q_len + p.more_keys >= 0 and (p.more_keys >= 0 or not p.causal)
    return fits and lengths and min(p.kv_heads, p.group, p.dim, p.value_dim) > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--backends", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--save", type=Path, default=Path("fuzz_failure.py"), help="where a failing problem is written")
    asked = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if asked.seed is None else asked.seed
    why_not = {"native": backends.why_not_native, "triton": backends.why_not_triton}
    tensor = torch.zeros(1, 1, 1, 1)
    call = backends.Call("eah_attention", tensor, tensor, tensor, Scoring())
    missing = {name: why_not[name](call) for name in asked.backends if name in why_not}
    names = [name for name in asked.backends if not missing.get(name)]
    if "triton" in names:
        from ..support.interpreter import replace_once_a_launch

        replace_once_a_launch()
    print(
        f"seed {seed}, backends {', '.join(names)}", *(f"without {n}: {w}" for n, w in missing.items() if w), sep="\n"
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    rng, tried, end = random.Random(seed), Counter(), time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end:
        p = draw(rng, names)
        save(asked.save, p)
        if failure(p):
            p = simplest(p)
            save(asked.save, p)
            print(f"problem {tried.total()} of seed {seed} fails: {failure(p)}\n\n{asked.save.read_text()}")
            return 1
        tried[p.backend] += 1
    asked.save.unlink(missing_ok=True)
    print(
        f"seed {seed}: {tried.total()} problems, 0 failures: "
        + ", ".join(f"{name} {n}" for name, n in sorted(tried.items()))
    )
    return 0


def save(path: Path, p: Problem) -> None:
    changed = {k: v for k, v in asdict(p).items() if v != getattr(Problem(), k)}
    text = "Problem(" + ", ".join(f"{k}={v!r}" for k, v in changed.items()) + ")"
    path.write_text(SCRIPT.format(root=str(ROOT), problem=text))


if __name__ == "__main__":
    sys.exit(main())

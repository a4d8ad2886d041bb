"""What each process of test_parallel.py runs; the test itself runs the same in one process.

    python -m tests.transformers.processes RANK PROCESSES FOLDER THRESHOLD

It runs on the models saved in FOLDER, and its results go to FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import eah

from ..support.family_models import prompt as family_prompt
from ..support.tiny_models import attention_of, prompt

MIXED = ["abIcdefghi", "abcIde", "abcdef", "kIxIl"]
SHARES = [["abIcdefghi", "abcIde"], ["abcdef", "kIxIl"]]  # what each process is given, data parallel
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "hold": {"decode": "hold"},
}


def load(path: Path, attn: str = "sdpa", **how):
    import transformers

    model = transformers.AutoModelForImageTextToText
    return model.from_pretrained(path, dtype=torch.float32, attn_implementation=attn, **how).eval()


def forward(model, inputs, **knobs):
    """Logits, and the report of the enabled layer."""
    with torch.no_grad(), eah.enable(model, **knobs) as handle:
        return model(**inputs).logits, handle.report().layers[0]


def generated(model, inputs, threshold, decode="off", **how):
    with eah.enable(model, threshold=threshold, decode=decode) as handle:
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, **how)
    return tokens, handle.report().layers[0]


def compiled(model, inputs, threshold):
    inputs = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}  # the model breaks there
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), eah.enable(model, threshold=threshold) as handle:
        return run(**inputs).logits, handle.report().layers[0]


def gradients(model, inputs, threshold):
    """Logits, the gradients of the layer's projections (the whole of them), and its report."""
    with eah.enable(model, threshold=threshold) as handle:
        logits = model(**inputs).logits
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * target)[inputs["attention_mask"].bool()].sum().backward()
    layer = attention_of(model, 1)
    grads = [getattr(layer, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return logits.detach(), *grads, handle.report().layers[0]


def maps(model, inputs, threshold):
    with torch.no_grad(), eah.enable(model, threshold=threshold) as handle:
        out = model(**inputs, output_attentions=True)
    return out.logits, out.attentions[1], handle.report().layers[0]


def ways(path: Path, threshold: float, **how) -> dict:
    """The results of every way of running LLaVA; `how` goes to from_pretrained."""
    model, inputs = load(path, **how), prompt("llava", MIXED)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    del embeds["input_ids"]
    padding = inputs["attention_mask"].bool()
    visible = torch.ones(padding.shape[1], padding.shape[1], dtype=torch.bool).tril() & padding[:, None, None]
    return {
        "logits": forward(model, inputs, threshold=threshold),
        "ties": forward(model, inputs, threshold=0.0),
        "min_density": forward(model, inputs, threshold=threshold, min_density=0.75),
        "broadcast_to": forward(model, inputs, threshold=threshold, broadcast_to=3),
        "no sink": forward(model, inputs, threshold=1.0),
        "embeddings": forward(model, embeds, threshold=threshold),
        "mask of the caller": forward(model, {**inputs, "attention_mask": visible}, threshold=threshold),
        **{name: generated(model, inputs, threshold, **options) for name, options in WAYS.items()},
        "compiled": compiled(model, inputs, threshold),
        "gradients": gradients(model, inputs, threshold),
        "maps": maps(load(path, "eager", **how), inputs, threshold),
    }


def reductions(model, inputs, threshold) -> int:
    """How many all_reduce of its own EAH enters in a generation: a prefill and two steps."""
    entered, all_reduce = [], dist.all_reduce

    def counting(*args, **kwargs):
        entered[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    try:
        entered.append(0)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        entered.append(0)
        with eah.enable(model, threshold=threshold):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    finally:
        dist.all_reduce = all_reduce
    return entered[1] - entered[0]


def masks_per_head(model, inputs, threshold):
    """Logits as they are and as an enabled model gives them, and the report."""
    length = inputs["input_ids"].shape[1]
    visible = torch.ones(len(inputs["input_ids"]), 4, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        plain = model(**{**inputs, "attention_mask": visible}).logits
    return plain, *forward(model, {**inputs, "attention_mask": visible}, threshold=threshold)


def tensor_parallel(folder: Path, threshold: float) -> dict:
    llava, replicated = (load(folder / family, tp_plan="auto") for family in ("llava", "qwen3_vl"))
    inputs, others = prompt("llava", MIXED), family_prompt("qwen3_vl", MIXED)
    return {
        "sharded": ways(folder / "llava", threshold, tp_plan="auto"),
        "replicated": forward(replicated, others, threshold=threshold),
        "reductions": (reductions(llava, inputs, threshold), reductions(replicated, others, threshold)),
        "masks per head": masks_per_head(llava, inputs, threshold),
        "track": generated(llava, inputs, threshold, decode="track"),
    }


def data_parallel(folder: Path, rank: int, threshold: float) -> dict:
    """accelerate wraps the model in DistributedDataParallel; enabled before it is wrapped, or after."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    share = prompt("llava", SHARES[rank])
    model = load(folder / "llava")
    with eah.enable(model, threshold=threshold) as handle, torch.no_grad():
        wrapped = accelerator.prepare(model)
        before = wrapped(**share).logits, handle.report().layers[0]
    unwrapped = accelerator.unwrap_model(wrapped)
    with eah.enable(unwrapped, threshold=threshold) as handle:
        with torch.no_grad():
            after = wrapped(**share).logits, handle.report().layers[0]
        tokens = unwrapped.generate(**share, max_new_tokens=6, do_sample=False), handle.report().layers[0]
    return {"class": type(wrapped).__name__, "before": before, "after": after, "tokens": tokens}


def main(rank: int, processes: int, folder: Path, threshold: float) -> None:
    torch.set_num_threads(1)
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(number) for name, number in known.items()}
    store = f"file://{folder / 'store'}"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=limit)
    results = {**tensor_parallel(folder, threshold), "data parallel": data_parallel(folder, rank, threshold)}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))

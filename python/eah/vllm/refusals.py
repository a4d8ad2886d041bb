"""What EAH cannot do in vLLM, said at the start: each refusal is a ValueError that begins with "eah:".

Nothing of vLLM is imported: the configurations are read by their attributes' names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from eah.method import DefaultLayers
from eah.vllm.settings import SCHEDULER, TESTED, WORKER
from eah_kernels import MAX_HEAD_DIM

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32", "half", "float")


def refuse(why: str | None) -> None:
    if why is not None:
        raise ValueError(f"eah: {why}")


def name_of(owner: Any, name: str) -> Any:
    """An attribute of vLLM's that EAH relies on.

    Raises:
        ValueError: this vLLM has no such name.
    """
    missing = object()
    value = getattr(owner, name, missing)
    if value is missing:
        kind = owner if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner)
        refuse(f"this vLLM has no {name} on {kind.__module__}.{kind.__name__}; tested is vLLM {TESTED}")
    return value


def check_engine(config: Any, layers: tuple[int, ...]) -> None:
    """Refuses what an engine's configuration shows, before anything is loaded."""
    refuse(next(_of_engine(config, layers), None))


def _of_engine(config: Any, layers: tuple[int, ...]) -> Iterator[str]:
    parallel, scheduler, model, cache = (
        name_of(config, f"{part}_config") for part in ("parallel", "scheduler", "model", "cache")
    )
    whole = "an enhanced prompt must be whole in one step and out of the prefix cache, which the scheduler sees to"
    if _named(parallel.worker_cls) != WORKER:
        yield (
            f"--scheduler-cls {SCHEDULER} needs --worker-cls {WORKER}, got {_named(parallel.worker_cls)}: the worker "
            "chooses the heads"
        )
    if _named(scheduler.scheduler_cls) != SCHEDULER:
        yield (
            f"--worker-cls {WORKER} needs --scheduler-cls {SCHEDULER}, got {_named(scheduler.scheduler_cls)}: {whole}"
        )
    if name_of(config, "use_v2_model_runner"):
        yield "the V2 model runner has other seams: set the environment variable VLLM_USE_V2_MODEL_RUNNER=0"
    for flag in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        if name_of(parallel, flag) > 1:
            yield f"--{flag.replace('_', '-')} {getattr(parallel, flag)} spreads a prompt or its layers; accepted is 1"
    if name_of(parallel, "enable_dbo") or getattr(parallel, "use_ubatching", False):
        yield "--enable-dbo computes a step in two halves: leave it out"
    for flag in ("kv_transfer_config", "ec_transfer_config"):
        if name_of(config, flag) is not None:
            yield f"--{flag.replace('_', '-')}: a connector brings what was computed elsewhere; leave it out"
    if name_of(config, "is_mm_encoder_only"):
        yield "--mm-encoder-only: there is no decoder"
    where = f"layer {', '.join(map(str, layers))} cannot be enhanced"
    for wanted, names in (True, NEEDED), (False, MODEL):
        for name, why in names.items():
            if bool(name_of(model, name)) != wanted:
                yield f"{where}: {why} ({name})"
    if name_of(cache, "cache_dtype") not in PLAIN_CACHES:
        yield f"{where}: its KV cache is {cache.cache_dtype} (--kv-cache-dtype); accepted are {', '.join(PLAIN_CACHES)}"


NEEDED = {
    "is_multimodal_model": "the model is text-only",
    "supports_multimodal_inputs": "no prompt may have an image, by --language-model-only or --limit-mm-per-prompt",
}
MODEL = {
    "is_encoder_decoder": "the model is an encoder-decoder",
    "use_mla": "multi-head latent attention (MLA) has no heads with keys of their own",
    "is_mm_prefix_lm": "image tokens see each other both ways",
    "is_diffusion": "tokens are written in any order",
    "rswa_window": "its sliding window leaves the prompt in sight",
}


def _named(cls: Any) -> str:
    """The name by which a class was given; the module that a class of ours is in is not told."""
    if not isinstance(cls, type):
        return str(cls)
    named = f"{cls.__module__}.{cls.__qualname__}"
    return {"eah.vllm.worker.Worker": WORKER, "eah.vllm.scheduler.Scheduler": SCHEDULER}.get(named, named)


def check_budgets(scheduler: Any) -> None:
    """Refuses a scheduler whose steps cannot hold every prompt whole."""
    refuse(next(_of_budgets(scheduler), None))


def _of_budgets(scheduler: Any) -> Iterator[str]:
    config, longest = scheduler.scheduler_config, name_of(scheduler, "max_model_len")
    drafts = scheduler.vllm_config.speculative_config
    slots = 0 if drafts is None else name_of(drafts, "max_num_new_slots_for_drafting")
    step = min(name_of(scheduler, "max_num_scheduled_tokens"), name_of(config, "max_num_batched_tokens") - slots)
    whole = f"max_model_len {longest}, and every prompt must fit into one step: set"
    if step < longest:
        yield (
            f"a step holds {step} tokens (max_num_batched_tokens {config.max_num_batched_tokens}), less than {whole} "
            f"--max-num-batched-tokens {longest + slots} or more, or a --max-model-len of at most {step}"
        )
    images = min(
        name_of(scheduler, "max_num_encoder_input_tokens"), name_of(scheduler.encoder_cache_manager, "cache_size")
    )
    if images < longest:
        yield (
            f"the encoder's budget is {images} image tokens a step, less than {whole} --max-num-batched-tokens "
            f"{longest} or more"
        )
    threshold = name_of(config, "long_prefill_token_threshold")
    if 0 < threshold < longest:
        yield (
            f"--long-prefill-token-threshold {threshold} cuts prompts of up to {whole} it to 0, or to {longest} or more"
        )
    if name_of(scheduler, "need_mamba_block_aligned_split"):
        yield f"mamba_cache_mode align cuts prompts of up to {whole} --no-enable-prefix-caching"


def check_graphs(compilation: Any, decode: str) -> None:
    """Refuses CUDA graphs in which a prompt's attention would be replayed, or with decode="hold" a later row's, and
    an attention that is fused with what follows it.
    """
    if name_of(name_of(compilation, "pass_config"), "fuse_attn_quant"):
        refuse("the attention's output is quantized within it (fuse_attn_quant): set it to false in the pass_config")
    mode = name_of(compilation, "cudagraph_mode")
    if not mode:
        return
    advice = (
        'in a replayed graph EAH would not run: set --compilation-config \'{"cudagraph_mode":"FULL_AND_PIECEWISE"}\''
    )
    if mode.mixed_mode().name == "FULL":
        refuse(f"cudagraph_mode {mode} captures prompts with their attention, and {advice}")
    if decode == "hold" and mode.decode_mode().name == "FULL":
        refuse(f'cudagraph_mode {mode} captures decoding, and with decode="hold" EAH takes part in it: set PIECEWISE')
    if mode.requires_piecewise_compilation() and not compilation.splitting_ops_contain_attention():
        refuse(f"splitting_ops {compilation.splitting_ops} lack attention, and {advice}, with splitting_ops unset")


def usable_layers(found: dict[int, list[Any]], layers: tuple[int, ...], count: int) -> dict[int, Any]:
    """The attention module of each of `layers`, of those `found` by the index of their decoder layer, of `count`.

    Layers that nobody named may move to the first usable one, as in `eah.enable`.
    """
    single = {index: modules[0] for index, modules in found.items() if len(modules) == 1}
    reasons = {index: why for index, module in single.items() if (why := why_not_layer(module))}
    usable = {index: module for index, module in single.items() if index not in reasons}
    if not usable:
        why = "".join(f"; layer {index}: {reason}" for index, reason in sorted(reasons.items())[:3])
        refuse(f"no layer has an attention map that can be lent{why}")
    first = min((index for index in usable if index >= 1), default=min(usable))
    if isinstance(layers, DefaultLayers):
        layers = tuple(layer if layer in usable else first for layer in layers)
    for layer in layers:
        if not 0 <= layer < count:
            refuse(f"layers must be within 0..{count - 1}, got {layer}; the first usable layer is {first}")
        if layer not in usable:
            why = f" ({reasons[layer]})" if layer in reasons else ""
            refuse(f"layer {layer} has no attention map that can be lent{why}; the first usable layer is {first}")
    return {layer: usable[layer] for layer in layers}


def check_sharing(layer: Any, found: dict[int, list[Any]]) -> None:
    """Refuses decode="hold" in a layer whose cache others read: it holds another head's keys."""
    for index, modules in found.items():
        if any(module.kv_sharing_target_layer_name == layer.layer_name for module in modules):
            refuse(f'KV sharing: layer {index} reads the keys of {layer.layer_name}, and decode="hold" changes them')


def why_not_layer(layer: Any) -> str | None:
    """Why a layer's attention cannot be lent a map, or None."""
    impl = name_of(layer, "impl")
    if type(layer).__name__ != "Attention":
        return f"its attention is a {type(layer).__name__}, whose rows see other keys than all before them"
    if name_of(layer, "attn_type") != "decoder":  # an enum of strings
        return f"its attention is of type {layer.attn_type}, not decoder"
    if name_of(layer, "kv_sharing_target_layer_name") is not None:
        return f"KV sharing: it has no keys of its own but those of {layer.kv_sharing_target_layer_name}"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "ALiBi adds a position bias"
    if getattr(impl, "chunk_lookback", -1) > -1:
        return "its rows see chunks of the keys (chunk_lookback)"
    if name_of(layer, "has_sink") or getattr(impl, "sinks", None) is not None:
        return "its attention has sinks of its own"
    if name_of(layer, "kv_cache_dtype") not in PLAIN_CACHES:
        return f"its KV cache is {layer.kv_cache_dtype}"
    if max(name_of(layer, "head_size"), name_of(layer, "head_size_v")) > MAX_HEAD_DIM:
        return f"its head dim is {max(layer.head_size, layer.head_size_v)}, the largest possible is {MAX_HEAD_DIM}"
    return None

"""Every refusal at the start, on configurations that stand for vLLM's; test_vllm_names.py reads vLLM's own."""

import enum
from types import SimpleNamespace

import pytest

from eah.method import DEFAULT_LAYERS
from eah.vllm.refusals import (
    MODEL,
    NEEDED,
    PLAIN_CACHES,
    check_budgets,
    check_engine,
    check_graphs,
    check_sharing,
    name_of,
    usable_layers,
)
from eah.vllm.settings import SCHEDULER, WORKER


def config(**changes):
    """A configuration that is accepted, but for `changes`: "part.name" or "name"."""
    parts = {
        "parallel": dict(
            worker_cls=WORKER,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            enable_dbo=False,
        ),
        "scheduler": dict(scheduler_cls=SCHEDULER),
        "model": {**dict.fromkeys(NEEDED, True), **dict.fromkeys(MODEL, False), "rswa_window": None},
        "cache": dict(cache_dtype="auto"),
    }
    top = dict(kv_transfer_config=None, ec_transfer_config=None, is_mm_encoder_only=False, use_v2_model_runner=False)
    for name, value in changes.items():
        part, _, attribute = name.rpartition("__")
        (parts[part] if part else top)[attribute] = value
    return SimpleNamespace(**{f"{part}_config": SimpleNamespace(**values) for part, values in parts.items()}, **top)


def test_what_is_accepted():
    check_engine(config(), (1,))
    ours = type("Scheduler", (), {"__module__": "eah.vllm.scheduler"})  # as vLLM resolves it
    check_engine(config(scheduler__scheduler_cls=ours), (1,))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"scheduler__scheduler_cls": None}, ["--scheduler-cls eah.vllm.Scheduler, got None", "whole in one step"]),
        ({"scheduler__scheduler_cls": dict}, ["--scheduler-cls eah.vllm.Scheduler, got builtins.dict"]),
        ({"parallel__worker_cls": "auto"}, ["--worker-cls eah.vllm.Worker, got auto", "chooses the heads"]),
        ({"use_v2_model_runner": True}, ["VLLM_USE_V2_MODEL_RUNNER=0"]),
        ({"parallel__decode_context_parallel_size": 2}, ["--decode-context-parallel-size 2"]),
        ({"parallel__prefill_context_parallel_size": 2}, ["--prefill-context-parallel-size 2"]),
        ({"parallel__pipeline_parallel_size": 2}, ["--pipeline-parallel-size 2"]),
        ({"parallel__enable_dbo": True}, ["--enable-dbo"]),
        ({"kv_transfer_config": 1}, ["--kv-transfer-config"]),
        ({"ec_transfer_config": 1}, ["--ec-transfer-config"]),
        ({"is_mm_encoder_only": True}, ["--mm-encoder-only"]),
        ({"model__is_multimodal_model": False}, ["text-only", "layer 1"]),
        ({"model__is_encoder_decoder": True}, ["encoder-decoder", "layer 1"]),
        ({"model__use_mla": True}, ["MLA", "layer 1"]),
        ({"model__is_mm_prefix_lm": True}, ["is_mm_prefix_lm", "layer 1"]),
        ({"model__supports_multimodal_inputs": False}, ["--language-model-only", "--limit-mm-per-prompt", "layer 1"]),
        ({"model__is_diffusion": True}, ["is_diffusion", "layer 1"]),
        ({"model__rswa_window": 128}, ["rswa_window", "layer 1"]),
        ({"cache__cache_dtype": "fp8"}, ["KV cache is fp8", "--kv-cache-dtype", "layer 1"]),
    ],
    ids=str,
)
def test_an_engine_is_refused(change, messages):
    with pytest.raises(ValueError, match=r"^eah: ") as told:
        check_engine(config(**change), (1,))
    assert all(message in str(told.value) for message in messages), told.value


def test_a_name_that_this_vllm_lacks_is_told():
    without = config()
    del without.use_v2_model_runner
    with pytest.raises(ValueError, match=r"^eah: this vLLM has no use_v2_model_runner on types\.SimpleNamespace"):
        check_engine(without, (1,))
    with pytest.raises(ValueError, match=r"^eah: this vLLM has no nothing on builtins\.dict"):
        name_of(dict, "nothing")


def scheduler(**changes):
    values = dict(batched=128, scheduled=128, longest=128, slots=0, images=128, cached=128, threshold=0, mamba=False)
    values |= changes
    speculation = SimpleNamespace(max_num_new_slots_for_drafting=values["slots"]) if values["slots"] else None
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=values["batched"], long_prefill_token_threshold=values["threshold"]
        ),
        vllm_config=SimpleNamespace(speculative_config=speculation),
        max_model_len=values["longest"],
        max_num_scheduled_tokens=values["scheduled"],
        max_num_encoder_input_tokens=values["images"],
        encoder_cache_manager=SimpleNamespace(cache_size=values["cached"]),
        need_mamba_block_aligned_split=values["mamba"],
    )


def test_budgets_that_hold_every_prompt():
    check_budgets(scheduler())
    check_budgets(scheduler(threshold=128))
    check_budgets(scheduler(batched=130, slots=2))


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"batched": 100, "scheduled": 100}, ["holds 100 tokens", "max_model_len 128", "--max-num-batched-tokens 128"]),
        ({"scheduled": 100}, ["holds 100 tokens", "max_model_len 128"]),
        ({"slots": 2}, ["holds 126 tokens", "max_model_len 128", "--max-num-batched-tokens 130"]),
        ({"images": 64}, ["64 image tokens", "max_model_len 128", "--max-num-batched-tokens"]),
        ({"cached": 32}, ["32 image tokens", "max_model_len 128", "--max-num-batched-tokens"]),
        ({"threshold": 16}, ["--long-prefill-token-threshold 16", "max_model_len 128"]),
        ({"mamba": True}, ["mamba_cache_mode", "--no-enable-prefix-caching"]),
    ],
    ids=str,
)
def test_budgets_that_would_cut_a_prompt(change, messages):
    with pytest.raises(ValueError, match=r"^eah: ") as told:
        check_budgets(scheduler(**change))
    assert all(message in str(told.value) for message in messages), told.value


class Mode(enum.Enum):
    NONE, PIECEWISE, FULL, FULL_DECODE_ONLY, FULL_AND_PIECEWISE = range(5)

    def __bool__(self):
        return self is not Mode.NONE

    def mixed_mode(self):
        return {Mode.FULL_DECODE_ONLY: Mode.NONE, Mode.FULL_AND_PIECEWISE: Mode.PIECEWISE}.get(self, self)

    def decode_mode(self):
        return Mode.FULL if self in (Mode.FULL_DECODE_ONLY, Mode.FULL_AND_PIECEWISE) else self

    def requires_piecewise_compilation(self):
        return self in (Mode.PIECEWISE, Mode.FULL_AND_PIECEWISE)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("split", [True, False])
def test_cuda_graphs_in_which_eah_would_not_run(mode, split):
    passes = SimpleNamespace(fuse_attn_quant=False)
    compilation = SimpleNamespace(
        cudagraph_mode=mode, splitting_ops=[], splitting_ops_contain_attention=lambda: split, pass_config=passes
    )
    if mode is Mode.FULL or (not split and mode in (Mode.PIECEWISE, Mode.FULL_AND_PIECEWISE)):
        with pytest.raises(ValueError, match=r"^eah: .*FULL_AND_PIECEWISE"):
            check_graphs(compilation, "off")
    else:
        check_graphs(compilation, "off")
        if mode in (Mode.FULL_DECODE_ONLY, Mode.FULL_AND_PIECEWISE):
            with pytest.raises(ValueError, match=r"^eah: .*captures decoding.* set PIECEWISE"):
                check_graphs(compilation, "hold")
        else:
            check_graphs(compilation, "hold")
    passes.fuse_attn_quant = True
    with pytest.raises(ValueError, match=r"^eah: .*\(fuse_attn_quant\): set it to false"):
        check_graphs(compilation, "off")


class Attention:
    attn_type, kv_sharing_target_layer_name, has_sink, kv_cache_dtype = "decoder", None, False, "auto"
    head_size = head_size_v = 64

    def __init__(self, **changes):
        given = {name: changes.pop(name) for name in ("alibi_slopes", "chunk_lookback") if name in changes}
        self.impl = SimpleNamespace(**given)
        self.__dict__.update(changes)


class ChunkedLocalAttention(Attention):
    pass


UNUSABLE = {
    "a ChunkedLocalAttention": ChunkedLocalAttention(),
    "type encoder_only": Attention(attn_type="encoder_only"),
    "those of model.layers.0.attn": Attention(kv_sharing_target_layer_name="model.layers.0.attn"),
    "ALiBi": Attention(alibi_slopes=[0.5]),
    "chunk_lookback": Attention(chunk_lookback=1),
    "sinks of its own": Attention(has_sink=True),
    "KV cache is fp8_e4m3": Attention(kv_cache_dtype="fp8_e4m3"),
    "head dim is 512": Attention(head_size=512),
}


@pytest.mark.parametrize("why", UNUSABLE)
def test_a_layer_that_cannot_be_lent_a_map(why):
    found = {0: [Attention()], 1: [UNUSABLE[why]], 2: [Attention()]}
    with pytest.raises(ValueError, match=r"^eah: layer 1 has no attention map") as told:
        usable_layers(found, (1,), 3)
    assert why in str(told.value) and "the first usable layer is 2" in str(told.value)
    assert usable_layers(found, DEFAULT_LAYERS, 3) == {2: found[2][0]}
    with pytest.raises(ValueError, match=r"^eah: no layer has an attention map") as told:
        usable_layers({1: [UNUSABLE[why]]}, DEFAULT_LAYERS, 3)
    assert why in str(told.value) and "layer 1" in str(told.value)


def test_a_layer_that_is_not_there():
    found = {0: [Attention()], 2: [Attention()], 3: [Attention(), Attention()]}
    for layer in (1, 3):  # linear attention; two attentions in one layer
        with pytest.raises(ValueError, match=rf"^eah: layer {layer} has no attention map .*first usable layer is 2"):
            usable_layers(found, (layer,), 4)
    for layer in (4, -1):
        with pytest.raises(ValueError, match=rf"^eah: layers must be within 0\.\.3, got {layer}"):
            usable_layers(found, (layer,), 4)
    assert list(usable_layers(found, (2, 0), 4)) == [2, 0]


def test_holding_in_a_layer_whose_keys_others_read():
    layer = Attention(layer_name="layers.1")
    check_sharing(layer, {0: [Attention()], 1: [layer], 2: [Attention()]})
    with pytest.raises(ValueError, match=r"^eah: KV sharing: layer 2 reads the keys of layers\.1"):
        check_sharing(layer, {1: [layer], 2: [Attention(kv_sharing_target_layer_name="layers.1")]})


def test_plain_caches_are_accepted():
    for dtype in PLAIN_CACHES:
        assert usable_layers({0: [Attention(kv_cache_dtype=dtype)]}, (0,), 1)

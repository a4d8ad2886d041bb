"""One engine of vLLM's, in a process of its own: what it answered to its requests, saved as JSON.

python -m tests.vllm.engine NAME MODEL_FOLDER RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .asks import MIXED, THRESHOLD, TWICE, Ask, letters

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
BASE = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
MULTIMODAL = {"limit_mm_per_prompt": {"image": 2, "video": 0}}


class Engine(NamedTuple):
    """`batches`: each is answered before the next one is asked. `text`: changes to the model's text config."""

    options: dict[str, Any]
    batches: list[list[Ask]]
    family: str = "llava"
    text: Mapping[str, Any] = MappingProxyType({})
    plugin: bool = True
    knobs: Mapping[str, Any] = MappingProxyType({})
    beams: int = 0  # of a beam search for the first ask's prompt, in the end


N3 = Ask("abIcdefgh", (0,), options={"n": 3, "temperature": 1.0, "seed": 5})
LOGPROBS = Ask("abIcdefgh", (0,), options={"prompt_logprobs": 1, "logprobs": 1})
STRUCTURED = Ask("abIcdefgh", (0,), options={"structured_outputs": {"regex": "[xyz]{8,40}"}})
CROWD = [
    ask
    for i in range(7)
    for ask in (
        Ask(letters(80, i), tokens=40),
        Ask(letters(30, i) + "I" + letters(20, i), (i,), tokens=40),
        Ask("I" + letters(20, i), (i,), "off", tokens=40),
    )
]
LORA = [ask._replace(lora=True) for ask in MIXED[:5]]
CROWDED = {"max_model_len": 128, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 7, "block_size": 32}
OUT = [ask._replace(eah="off", options={"logprobs": 1}) for ask in MIXED]
ON = [ask._replace(eah="on") for ask in MIXED]
LATER = [ask._replace(tokens=24) for ask in MIXED]
ENGINES = {
    "plain": Engine(
        {}, [MIXED, TWICE, TWICE, [N3, LOGPROBS, STRUCTURED], [MIXED[0]._replace(eah="maybe")], OUT], beams=2
    ),
    "without": Engine({}, [OUT], plugin=False, beams=2),
    "default off": Engine({}, [MIXED, ON], knobs={"default": "off", "layers": [0, 2], "broadcast_to": 2}),
    "crowded": Engine(CROWDED, [CROWD]),
    "priority": Engine(
        {"max_model_len": 128, "max_num_batched_tokens": 128, "scheduling_policy": "priority", "max_num_seqs": 4},
        [[ask._replace(priority=i % 3) for i, ask in enumerate(CROWD)]],
    ),
    "synchronous": Engine({"async_scheduling": False}, [MIXED]),
    "compiled": Engine({"enforce_eager": False}, [MIXED]),
    "speculation": Engine(
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
        [LATER],
    ),
    "tensor parallel": Engine({"tensor_parallel_size": 2}, [MIXED]),
    "hold": Engine(CROWDED, [CROWD[:15]], knobs={"decode": "hold"}),
    "hold, tensor parallel": Engine({"tensor_parallel_size": 2}, [LATER], knobs={"decode": "hold", "layers": [0, 1]}),
    "sliding window": Engine({}, [MIXED], text={"model_type": "mistral", "sliding_window": 16}),
    # not in one batch: vllm-cpu 0.32 gives all requests of a batch the adapter, with EAH and without
    "lora": Engine({"enable_lora": True, "max_lora_rank": 8}, [LORA, MIXED[:5]]),
    "internvl": Engine({}, [MIXED], "internvl"),
    "qwen2_5_vl": Engine({}, [MIXED], "qwen2_5_vl"),
    "qwen3_vl": Engine({}, [MIXED], "qwen3_vl"),
}


def prompt_of(ask: Ask, placeholder: str) -> dict[str, Any]:
    from .models import picture

    prompt: dict[str, Any] = {"prompt": ask.text.replace("I", placeholder)}
    if ask.seeds:
        prompt["multi_modal_data"] = {"image": [picture(seed) for seed in ask.seeds]}
    return prompt


def parameters_of(ask: Ask):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = {"temperature": 0.0, "max_tokens": ask.tokens, "ignore_eos": True, **ask.options}
    if "structured_outputs" in options:
        options |= {"structured_outputs": StructuredOutputsParams(**options["structured_outputs"]), "ignore_eos": False}
    return SamplingParams(**options, extra_args=None if ask.eah is None else {"eah": ask.eah})


def answers(llm, batch: list[Ask], placeholder: str, folder: Path) -> list[dict[str, Any]]:
    """Of each request: the prompt's tokens, the answers', and how many tokens came out of the prefix cache."""
    from vllm.lora.request import LoRARequest

    adapter = [LoRARequest("adapter", 1, str(folder / "adapter")) if ask.lora else None for ask in batch]
    policy = llm.llm_engine.vllm_config.scheduler_config.policy
    done = llm.generate(
        [prompt_of(ask, placeholder) for ask in batch],
        [parameters_of(ask) for ask in batch],
        use_tqdm=False,
        lora_request=adapter if any(adapter) else None,
        **({"priority": [ask.priority for ask in batch]} if policy == "priority" else {}),
    )
    return [
        {
            "request_id": output.request_id,
            "prompt": list(output.prompt_token_ids),
            "tokens": [list(one.token_ids) for one in output.outputs],
            "text": [one.text for one in output.outputs],
            "cached": output.num_cached_tokens,
            "logprobs": [
                [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
                for one in output.outputs
                if one.logprobs
            ],
            "prompt_logprobs": None
            if output.prompt_logprobs is None
            else [
                None if step is None else step[token].logprob
                for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
            ],
        }
        for output in done
    ]


def run(name: str, folder: Path) -> dict[str, Any]:
    from vllm import LLM

    from eah.vllm import engine_args

    from ..support.processors import PROCESSORS

    engine = ENGINES[name]
    plugin = engine_args(**{"threshold": THRESHOLD, **engine.knobs}) if engine.plugin else {}
    llm = LLM(model=str(folder), **{**BASE, **MULTIMODAL, **engine.options}, **plugin)
    preempted = count_preemptions(llm)
    placeholder = PROCESSORS[engine.family][4]
    batches = [answers(llm, batch, placeholder, folder) for batch in engine.batches]
    beams = searched(llm, prompt_of(engine.batches[0][0], placeholder), engine.beams) if engine.beams else None
    report = llm.collective_rpc("eah_report") if engine.plugin else None
    return {"batches": batches, "beams": beams, "report": report, "preempted": preempted}


def searched(llm, prompt: dict[str, Any], width: int) -> list[list[int]]:
    from vllm.sampling_params import BeamSearchParams

    (found,) = llm.beam_search([prompt], BeamSearchParams(beam_width=width, max_tokens=3, ignore_eos=True))
    return [sequence.tokens for sequence in found.sequences]


def count_preemptions(llm) -> list[str]:
    """The ids of the requests that were preempted, from now on; empty where the scheduler is in another process."""
    preempted: list[str] = []
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:
        original = core.scheduler._preempt_request

        def preempt(request, *args, **kwargs):
            preempted.append(request.request_id)
            return original(request, *args, **kwargs)

        core.scheduler._preempt_request = preempt
    return preempted


if __name__ == "__main__":
    name, folder, result = sys.argv[1:]
    os.environ.update({**ENVIRONMENT, **({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if "parallel" in name else {})})
    Path(result).write_text(json.dumps(run(name, Path(folder))))

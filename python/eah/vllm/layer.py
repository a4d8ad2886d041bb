"""One attention layer of vLLM's, its prompts enhanced: a function in the place of `layer.impl.forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eah.method import Call, Choice, HeadBlock, Knobs, attend, lend, select
from eah.reasons import Filled, Reason
from eah.vllm.plan import Run
from eah.vllm.refusals import name_of
from eah.vllm.report import Tally
from eah_kernels import Scoring, eah_attention_varlen

PLAN = "eah_plan"  # where a step's plan stands on its attention metadata


class EnhancedLayer:
    """`index`: of the decoder layer. The keys and values of a planned prompt are all in the step: no page is read."""

    def __init__(self, index: int, layer: Any, knobs: Knobs, block: HeadBlock | None, tally: Tally):
        self.index, self.knobs, self.block, self.tally = index, knobs, block, tally
        self.impl = impl = layer.impl
        softcap = getattr(impl, "logits_soft_cap", None) or None
        self.scoring = Scoring(None, True, float(name_of(impl, "scale")), layer.sliding_window, softcap)
        self.writes_cache = name_of(layer.attn_backend, "forward_includes_kv_cache_update")
        self.original = name_of(impl, "forward")
        impl.forward = self.forward

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        plan = getattr(attn_metadata, PLAN, None)
        runs = [] if plan is None else plan.runs
        alone = not self.writes_cache and sum(len(run.image_mask) for run in runs) == len(output)
        if runs and alone and self._enhance(query, key, value, output, runs) is not None:
            return output
        self.original(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if runs and not alone:
            self._enhance(query, key, value, output, runs)
        return output

    def _enhance(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, output: Tensor, runs: list[Run]
    ) -> list[Tensor] | None:
        """The heads of each run, (N,), or None where nothing was done. Nothing is raised: that would end the engine."""
        prompts = [prompt for run in runs for prompt in run.prompts]
        if key is None or value is None:
            self.tally.aside(prompts, Reason.FUSED_WRITE)
            return None
        try:
            done = [self._enhanced(query, key, value, output, run) for run in runs]
        except Exception as error:
            self.tally.failed(prompts, Filled(Reason.FAILED, (self.index, type(error).__name__)))
            return None
        for run, (head, sink_counts) in zip(runs, done, strict=True):
            self.tally.acted(run.prompts, self.index, head, sink_counts)
        return [head for head, _ in done]

    def _enhanced(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Writes the run's rows of output; returns head (N,) and sink counts (N, heads of all processes)."""
        packed = query[run.rows], key[run.rows], value[run.rows]
        if self.block is None:
            rules: dict[str, Any] = {**self.scoring._asdict(), **self.knobs._asdict()}
            del rules["attention_mask"], rules["causal"]
            lengths = run.cu_seqlens, run.max_seqlen
            result = eah_attention_varlen(*packed, run.image_mask, *lengths, **rules, out=output[run.rows])
            return result.head, result.sink_counts
        head, sink_counts, first = [], [], 0
        for prompt in run.prompts:
            tokens = slice(first, first := first + prompt.length)
            q, k, v = (flat[tokens].transpose(0, 1)[None] for flat in packed)
            call = Call(q, k, v, self.scoring)
            selection = select(call, run.image_mask[None, tokens], self.knobs, self.block)
            output[run.rows][tokens] = lend(selection.choice, self._ordinary, q, k, v, None, self.block)[0][0]
            head.append(selection.choice.head)
            sink_counts.append(selection.sink_counts)
        return torch.cat(head), torch.cat(sink_counts)

    def _ordinary(self, query: Tensor, key: Tensor, value: Tensor, _) -> tuple[Tensor, None]:
        none = Choice(torch.full((len(query),), -1, dtype=torch.int32, device=query.device))
        return attend(Call(query, key, value, self.scoring), none, self.knobs.backend).transpose(1, 2), None

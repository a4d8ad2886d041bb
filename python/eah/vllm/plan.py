"""Which rows of a step are prompts to enhance."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eah.reasons import Reason, Why
from eah.vllm.requests import asked, image_spans, options, why_aside
from eah.vllm.settings import Settings

OPTED_OUT = "opted_out"


class Prompt(NamedTuple):
    """A whole prompt."""

    request_id: str
    length: int
    image_tokens: int


class Run(NamedTuple):
    """Prompts that follow one another in the flat batch, as `eah_attention_varlen` takes them.

    rows of the batch; image_mask (T,) bool and cu_seqlens (N + 1,) int32 on the device; max_seqlen.
    """

    prompts: list[Prompt]
    rows: slice
    image_mask: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class Plan(NamedTuple):
    """One step: the prompts that are enhanced, and what became of the others that end in it.

    `others`: request -> OPTED_OUT or why it stands aside. `misread`: request -> its "eah" that says neither on nor off.
    `spans`, with decode="hold": requests that hold a head or choose one now, each with all its rows of the batch.
    """

    runs: list[Run]
    others: dict[str, str | Why]
    misread: dict[str, Any]
    spans: list[tuple[str, slice]]


def no_plan() -> Plan:
    return Plan([], {}, {}, [])


def plan_step(
    runner: Any, common: Any, scheduled: Mapping[str, int], settings: Settings, held: Container[str] = ()
) -> Plan:
    """The plan of a step, of vLLM's V1 runner, its `CommonAttentionMetadata` and the tokens scheduled per request.

    A request's rows that are no prompt's (generated before it was preempted) are in no run. `held`: requests that hold
    a head.
    """
    plan = no_plan()
    if common.is_prefilling is None:
        return plan
    batch, starts = runner.input_batch, common.query_start_loc_cpu
    whole: list[tuple[int, Prompt, Tensor]] = []  # with the first row and the image mask
    for row in common.is_prefilling.nonzero().flatten().tolist():
        request_id = batch.req_ids[row]
        state, first, computed = runner.requests[request_id], int(starts[row]), int(batch.num_computed_tokens_cpu[row])
        rows, length = scheduled[request_id], state.num_prompt_tokens
        said, understood = asked(state, settings)
        why = OPTED_OUT if said == "off" else why_aside(state, settings)
        if why is None and (computed > 0 or rows < length):
            why = Reason.CUT
        elif why is not None and computed + rows < length:
            continue  # the prompt ends in a later step
        if not understood:
            plan.misread[request_id] = options(state)["eah"]
        if why is not None:
            plan.others[request_id] = why
            continue
        mask = torch.zeros(length, dtype=torch.bool)
        for start, last in image_spans(state.mm_features, settings):
            mask[start : last + 1] = True
        whole.append((first, Prompt(request_id, length, int(mask.sum())), mask))
    plan.runs.extend(_runs(whole, runner.device))
    if settings.decode == "hold":
        choosing = {prompt.request_id for _, prompt, _ in whole}
        for row, request_id in enumerate(batch.req_ids):
            if request_id in choosing or request_id in held:
                plan.spans.append((request_id, slice(int(starts[row]), int(starts[row + 1]))))
    return plan


def _runs(whole: list[tuple[int, Prompt, Tensor]], device: torch.device) -> Iterator[Run]:
    """The prompts, each with its first row and its image mask, by where one begins right after another."""
    begins = [n for n, (first, _, _) in enumerate(whole) if n == 0 or first != _end(whole[n - 1])]
    for start, stop in pairwise([*begins, len(whole)]):
        together = whole[start:stop]
        lengths = [prompt.length for _, prompt, _ in together]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        rows = slice(together[0][0], _end(together[-1]))
        mask = torch.cat([mask for _, _, mask in together])
        yield Run(
            [prompt for _, prompt, _ in together],
            rows,
            mask.to(device, non_blocking=True),
            bounds.to(device, non_blocking=True),
            max(lengths),
        )


def _end(prompt: tuple[int, Prompt, Tensor]) -> int:
    return prompt[0] + prompt[1].length

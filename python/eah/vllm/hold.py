"""decode="hold" in vLLM: the head chosen for a prompt keeps lending its map to the later rows of its request."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from eah.method import Choice, lend
from eah.reasons import Filled, Reason
from eah.vllm.layer import PLAN, EnhancedLayer
from eah.vllm.refusals import name_of


class HoldingLayer(EnhancedLayer):
    """No kernel of its own: this layer's cache holds the chosen head's key in the place of every KV head's, and every
    head of a later row gets the chosen head's query. The backend's attention on them is the lent map.
    """

    def __init__(self, *arguments, slots: Callable[[str], Tensor]):
        """slots: of a layer's name, where the step's rows are in its cache."""
        super().__init__(*arguments)
        self.slots = slots
        self.heads: dict[str, Tensor] = {}  # request -> (1,) int32 on the device, -1 = none
        if not self.writes_cache:
            name_of(self.impl, "do_kv_cache_update")

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.heads.pop(request_id, None)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        plan = getattr(attn_metadata, PLAN, None)
        runs, spans = ([], []) if plan is None else (plan.runs, plan.spans)
        enhanced = torch.empty_like(output) if runs else output
        heads = self._enhance(query, key, value, enhanced, runs) if runs else None
        done = list(zip(runs, heads or [], strict=False))  # all of them or none
        for run, head in done:
            self.heads |= {prompt.request_id: head[n : n + 1] for n, prompt in enumerate(run.prompts)}
        query, key = self._lent(layer, query, key, value, kv_cache, spans)
        self.original(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        for run, _ in done:
            output[run.rows] = enhanced[run.rows]
        return output

    def _lent(self, layer, query: Tensor, key: Tensor | None, value, kv_cache, spans) -> tuple[Tensor, Tensor | None]:
        """Query and key of the step with the held heads' in their rows; the cache gets the keys, too."""
        held = [(request_id, rows) for request_id, rows in spans if request_id in self.heads]
        if not held or key is None:
            self.forget(request_id for request_id, _ in held)
            return query, key
        try:
            rows = torch.cat([torch.arange(rows.start, rows.stop) for _, rows in held]).to(query.device)
            head = torch.cat([self.heads[request_id].expand(rows.stop - rows.start) for request_id, rows in held])
            one_row = query[rows][:, :, None], key[rows][:, :, None]
            lent_query, lent_key = lend(Choice(head), lambda q, k, v, _: (q, k), *one_row, one_row[1], None, self.block)
            assert lent_key is not None
            if not self.writes_cache:
                places = self.slots(layer.layer_name)[rows]
                self.impl.do_kv_cache_update(layer, lent_key[:, :, 0].contiguous(), value[rows], kv_cache, places)
            return query.index_copy(0, rows, lent_query[:, :, 0]), key.index_copy(0, rows, lent_key[:, :, 0])
        except Exception as error:  # it would end the engine
            self.forget(request_id for request_id, _ in held)
            self.tally.failed((), Filled(Reason.FAILED, (self.index, type(error).__name__)))
            return query, key

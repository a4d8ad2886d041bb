"""vLLM's scheduler, in which an enhanced prompt is whole in one step, and neither reads the prefix cache nor fills it.

All other requests keep chunked prefill and prefix caching.
"""

from __future__ import annotations

from copy import copy
from typing import Any
from uuid import uuid4
from weakref import WeakSet

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from eah.vllm.refusals import check_budgets, check_engine, name_of
from eah.vllm.requests import STREAMED, enhances
from eah.vllm.settings import engine_settings


class Scheduler(AsyncScheduler):
    """Right with async scheduling off, too: then each step's output is known before the next is planned."""

    def __init__(self, vllm_config, *args, **kwargs):
        self._eah_settings = engine_settings(vllm_config.additional_config)
        check_engine(vllm_config, self._eah_settings.layers)
        super().__init__(vllm_config, *args, **kwargs)
        check_budgets(self)
        self._eah_whole: WeakSet[Any] = WeakSet()  # the requests whose prompt must be whole
        self._eah_allocate = name_of(self.kv_cache_manager, "allocate_slots")
        self.kv_cache_manager.allocate_slots = self._allocate_whole

    def add_request(self, request) -> None:
        if request.resumable and request.sampling_params is not None:  # of a later chunk the session takes them
            request.sampling_params = copy(request.sampling_params)
            request.sampling_params.extra_args = {**(request.sampling_params.extra_args or {}), "eah": STREAMED}
        if request.request_id not in self.requests:
            self._set_apart(request)
        super().add_request(request)

    def _set_apart(self, request) -> None:
        """A request that is enhanced gets blocks of its own: rows before the image change, too."""
        if not enhances(request, self._eah_settings):
            return
        self._eah_whole.add(request)
        request.skip_reading_prefix_cache = True
        request.cache_salt = f"eah:{uuid4().hex}"
        request.block_hashes = []
        request.update_block_hashes()

    def _allocate_whole(self, request, num_new_tokens, *args, **kwargs):
        """None, as where blocks are lacking, for a step that would cut a prompt: the request stays first in line.

        With nothing else running, waiting would not help: the prompt is then cut, and the worker says so.
        """
        cut = request.num_computed_tokens == 0 and num_new_tokens < request.num_prompt_tokens
        if cut and self.running and request in self._eah_whole:
            return None
        return self._eah_allocate(request, num_new_tokens, *args, **kwargs)

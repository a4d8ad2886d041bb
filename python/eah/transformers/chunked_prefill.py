"""A prompt that generate(prefill_chunk_size=...) feeds piece by piece: its first piece looks like a whole prompt.

The choice of the head depends on all rows of the prompt, so no piece is enhanced. The only sign of it is the
generation config that generate() hands to the model's `_prefill`: a stand-in for that method passes it on. Pieces that
are fed otherwise, or past a base model that alone was enabled, are told by the cached tokens before them: all but the
first.
"""

from __future__ import annotations

import inspect

from eah.transformers.stand_in import StandIn


class ChunkedPrefill(StandIn):
    name = "_prefill"

    def __init__(self, model, tokens):
        super().__init__(model)
        self.tokens = tokens  # the model's ImageTokens

    def __call__(self, *args, **kwargs):
        arguments = inspect.signature(type(self.model)._prefill).bind(self.model, *args, **kwargs).arguments
        size = arguments["generation_config"].prefill_chunk_size
        if size is None or arguments["input_ids"].shape[1] <= size:
            return self.original(*args, **kwargs)
        with self.tokens.chunked():
            return self.original(*args, **kwargs)

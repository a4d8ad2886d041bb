"""A prompt that generate(prefill_chunk_size=...) feeds piece by piece: its first piece looks like a whole prompt.

The choice of the head depends on all rows of the prompt, so no piece is enhanced. The only sign of it is the
generation config that generate() hands to the model's `_prefill`: a stand-in for that method passes it on. Pieces that
are fed otherwise, or past a base model that alone was enabled, are told by the cached tokens before them: all but the
first.
"""

from __future__ import annotations

import inspect


class ChunkedPrefill:
    """Stands in for `model._prefill` as an attribute of the model; copied and pickled with it."""

    def __init__(self, model, tokens):
        self.model = model
        self.tokens = tokens  # the model's ImageTokens

    def attach(self) -> None:
        self.model._prefill = self

    def detach(self) -> None:
        del self.model._prefill

    def __call__(self, *args, **kwargs):
        prefill = type(self.model)._prefill
        arguments = inspect.signature(prefill).bind(self.model, *args, **kwargs).arguments
        size = arguments["generation_config"].prefill_chunk_size
        if size is None or arguments["input_ids"].shape[1] <= size:
            return prefill(self.model, *args, **kwargs)
        with self.tokens.chunked():
            return prefill(self.model, *args, **kwargs)

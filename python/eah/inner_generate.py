"""Models whose generate() calls the generate() of the language model inside, past the model's own forward.

Where the image tokens are is known only on the outside: a stand-in for the model's generate() passes it on.
"""

from __future__ import annotations

import inspect

import torch

from eah.stand_in import StandIn


class InnerGenerate(StandIn):
    """`inner`: the model whose forward is then called with less than is needed to find the image tokens."""

    name = "generate"

    def __init__(self, model, inner: str, tokens):
        super().__init__(model)
        self.inner = model.get_submodule(inner)
        self.tokens = tokens  # the model's ImageTokens

    def __call__(self, *args, **kwargs):
        signature = inspect.signature(type(self.model).generate)
        with self.tokens.given(self._image_mask(signature.bind(self.model, *args, **kwargs))):
            return self.original(*args, **kwargs)

    def _image_mask(self, bound: inspect.BoundArguments) -> torch.Tensor:
        arguments = bound.arguments
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is None and embeds is None:  # the model then makes a prompt of its image tokens and a start token
            frames = arguments["pixel_values"].shape[1:-3].numel()  # of a video
            length = self.model.config.num_query_tokens * frames
            return torch.arange(length + 1)[None] < length
        return self.tokens.find(self.model, ids, embeds if ids is None else ids, arguments)

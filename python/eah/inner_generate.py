"""Models whose generate() calls the generate() of the language model inside, past the model's own forward.

Where the image tokens are is known only on the outside: a stand-in for the model's generate() passes it on.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn


class InnerGenerate:
    """Stands in for `model.generate` as an attribute of the model; copied and pickled with it."""

    def __init__(self, model, inner: str, tokens):
        self.model = model
        self.inner = inner
        self.tokens = tokens  # the model's ImageTokens

    def attach(self) -> nn.Module:
        """Returns the inner model, whose forward is then called with less than is needed to find the image tokens."""
        self.model.generate = self
        return self.model.get_submodule(self.inner)

    def detach(self) -> None:
        del self.model.generate

    def __call__(self, *args, **kwargs):
        generate = type(self.model).generate
        with self.tokens.given(self._image_mask(inspect.signature(generate).bind(self.model, *args, **kwargs))):
            return generate(self.model, *args, **kwargs)

    def _image_mask(self, bound: inspect.BoundArguments) -> torch.Tensor:
        arguments = bound.arguments
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is None and embeds is None:  # the model then makes a prompt of its image tokens and a start token
            frames = arguments["pixel_values"].shape[1:-3].numel()  # of a video
            length = self.model.config.num_query_tokens * frames
            return torch.arange(length + 1)[None] < length
        return self.tokens.find(self.model, ids, embeds if ids is None else ids, arguments)

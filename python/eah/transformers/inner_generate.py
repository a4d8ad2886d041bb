"""Models whose generate() calls the generate() of the language model inside, past the model's own forward.

Where the image tokens are is known only on the outside: a stand-in for the model's generate() passes it on.
"""

from __future__ import annotations

import inspect

import torch

from eah.transformers.stand_in import StandIn

UNKNOWN = (
    "generate() must be given input_ids, inputs_embeds or pixel_values as tensors, which tell where the image tokens "
    "are; handle.image_mask(mask) says it otherwise"
)


class InnerGenerate(StandIn):
    """`inner`: the model whose forward is then called with less than is needed to find the image tokens."""

    name = "generate"

    def __init__(self, model, inner: str, tokens):
        super().__init__(model)
        self.inner = model.get_submodule(inner)
        self.tokens = tokens  # the model's ImageTokens

    def __call__(self, *args, **kwargs):
        if self.tokens.given_mask() is not None:  # handle.image_mask says it
            return self.original(*args, **kwargs)
        with self.tokens.given(self._image_mask(args, kwargs)):
            return self.original(*args, **kwargs)

    def _image_mask(self, args, kwargs) -> torch.Tensor:
        try:
            arguments = inspect.signature(type(self.model).generate).bind(self.model, *args, **kwargs).arguments
        except TypeError:  # of an owner's generate() with other arguments, or the model's own would raise it
            arguments = {}
        ids, pixels = arguments.get("input_ids"), arguments.get("pixel_values")
        tokens = arguments.get("inputs_embeds") if ids is None else ids
        if isinstance(tokens, torch.Tensor):
            return self.tokens.find(self.model, ids, tokens, arguments)
        if tokens is not None or not isinstance(pixels, torch.Tensor) or self.tokens.position_mask is not None:
            raise TypeError(UNKNOWN)
        # The model makes a prompt of its image tokens and a start token.
        frames = pixels.shape[1:-3].numel()  # of a video
        length = self.model.config.num_query_tokens * frames
        return torch.arange(length + 1)[None] < length

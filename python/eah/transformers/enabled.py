"""What an enabled model carries: the hook on its base model, and all that undoing takes."""

from __future__ import annotations

import torch

from eah.transformers.chunked_prefill import ChunkedPrefill
from eah.transformers.families import Differs
from eah.transformers.inner_generate import InnerGenerate
from eah.transformers.layer import SwappedLayer
from eah.transformers.prompt import ImageTokens


class EnabledModel(ImageTokens):
    """The hook on an enabled model's base model, and all that undoing takes; copied and pickled with the model."""

    def __init__(self, model, differs: Differs, token_ids, layers: tuple[SwappedLayer, ...], notes: tuple[str, ...]):
        later = layers[0].settings.decode == "track"
        super().__init__(model.base_model, token_ids, differs.position_mask, layers[0].index, later)
        self.layers = layers
        self.notes = notes
        inner = differs.inner_generate if model.can_generate() else None
        self.inner_generate = InnerGenerate(model, inner, self) if inner else None
        prefilling = model.get_submodule(inner) if inner else model  # the one whose generate() calls its forward
        self.chunked_prefill = ChunkedPrefill(prefilling, self) if hasattr(prefilling, "_prefill") else None
        self.base = model.base_model
        below = getattr(model, differs.inner_forward or "", None)
        inside = self.inner_generate.inner if self.inner_generate else None
        self.hooked = [module for module in (self.base, inside, below) if module is not None]
        self.removals: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """All of it or, where a part of it raises, nothing."""
        try:
            for module in self.hooked:
                self.removals.append(module.register_forward_pre_hook(self, with_kwargs=True))
            for part in self.parts():
                part.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        for removal in self.removals:
            removal.remove()
        for part in self.parts():
            part.detach()

    def parts(self) -> list:
        return [part for part in (self.inner_generate, self.chunked_prefill, *self.layers) if part is not None]


def enabled_on(model) -> EnabledModel | None:
    hooks = model.base_model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, EnabledModel)), None)

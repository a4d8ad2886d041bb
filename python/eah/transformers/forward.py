"""One call of a swapped layer's attention function, taken apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from eah.reasons import Reason
from eah.transformers import cache
from eah.transformers.find import attention_namespace
from eah.transformers.prompt import PROMPT, Aside, Continued, Prompt

if TYPE_CHECKING:
    from eah.transformers.layer import SwappedLayer

CACHE = "eah_cache"  # the keywords that carry what transformers does not hand on to the attention function
MAPS = "eah_output_attentions"
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
HANDLED = ("sdpa", "eager", *FLASH, "flex_attention")  # implementations whose masks are understood
NO_PROMPT, STEP = Aside(Reason.NO_IMAGE_MASK), Continued()


class ModuleView:
    """An attention module seen with its original config: what a base implementation is given as the module."""

    def __init__(self, layer: SwappedLayer):
        self.module = layer.module
        self.config = layer.config

    def __getattr__(self, name):
        return getattr(self.module, name)


@dataclass
class Forward:
    """query (B, Hq, S, D), key (B, Hkv, Skv, D) and value (B, Hkv, Skv, Dv) as they arrived; B, Hq and Hkv are this
    process's."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any  # a tensor, a BlockMask or None: in the form that the layer's own implementation takes
    keywords: dict[str, Any]  # of that implementation
    implementation: str
    base: Callable
    view: ModuleView
    prompt: Prompt | Continued | Aside
    has_cache: bool
    kept: Any  # the object that holds the layer's cached keys, where later steps need something of the prompt; or None

    @classmethod
    def of(cls, layer: SwappedLayer, query, key, value, mask, keywords: dict[str, Any]) -> Forward:
        prompt = keywords.pop(PROMPT, None) or NO_PROMPT
        if query.shape[2] <= 1 and not isinstance(prompt, Continued):
            prompt = STEP
        kept, maps = keywords.pop(CACHE, None), keywords.pop(MAPS, None)
        has_cache = kept is not None
        kept = None if layer.settings.decode == "off" else cache.layer_of(kept, layer.index)
        implementation = layer.config._attn_implementation
        if maps is not None and implementation == "eager":
            keywords["output_attentions"] = maps
        namespace = attention_namespace(type(layer.module))
        functions = namespace["ALL_ATTENTION_FUNCTIONS"]
        base = functions.get_interface(implementation, namespace["eager_attention_forward"])
        # Flash kernels from the hub go by their repository's name.
        if implementation not in HANDLED and base is functions["flash_attention_2"]:
            implementation = "flash_attention_2"
        view = ModuleView(layer)
        return cls(query, key, value, mask, keywords, implementation, base, view, prompt, has_cache, kept)

    @property
    def later(self) -> bool:
        """A decoding step, or several tokens on a cache."""
        return isinstance(self.prompt, Continued)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor | None]:
        """The layer's own: (B, S, Hq, Dv) and the maps, or None in their place."""
        return self.base(self.view, query, key, value, mask, **self.keywords)

    def wants_the_base(self, layer: SwappedLayer) -> bool:
        """Derivatives and attention maps come from the base implementation, run on the chosen head's query and key.

        transformers skips a layer that returns None for its maps: the maps of the next would be taken for this one's.
        """
        arrived = [a for a in (self.query, self.key, self.value, self.mask) if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(a.requires_grad for a in arrived):
            return True
        if any(unpack_dual(a).tangent is not None for a in arrived):  # of forward-mode differentiation
            return True
        if self.implementation != "eager":
            return False
        return bool(self.keywords.get("output_attentions", getattr(layer.config, "output_attentions", False)))

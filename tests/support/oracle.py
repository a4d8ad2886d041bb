"""An EAH oracle for any family: an eager copy of the model, layers of which compute `eah_kernels.reference`.

It knows nothing of `eah`: the test says where the image tokens are, and the mask is the eager one that arrives.
"""

from __future__ import annotations

import copy
import itertools
import sys

import torch

from eah_kernels import reference
from eah_kernels.masks import Scoring

from .family_models import attention_of


class Oracle:
    """`image_mask` (B, S) is of the prompt. Forwards of several tokens on an empty cache are computed by the reference.

    Of the last one each layer's head, counts and column means are kept by its number, and `dims`: the query heads and
    the head dims of key and value. `number` of the heads receive the map; None: all.
    """

    def __init__(self, model, image_mask, layers=(1,), threshold=0.002, min_density=0.0, number=None):
        from transformers import AttentionInterface

        AttentionInterface.register("oracle", _forward)
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.image_mask, self.threshold, self.min_density, self.number = image_mask, threshold, min_density, number
        self.head, self.counts, self.means, self.dims = {}, {}, {}, {}
        for layer in layers:
            module = attention_of(self.model, layer)
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = "oracle"
            module.oracle = self

    def __call__(self, **inputs):
        with torch.no_grad():
            return self.model(**inputs).logits

    def tune(self, inputs, layer: int = 1) -> None:
        """Sets the lowest threshold well amid two column means at which heads other than 0 win clearly."""
        self(**inputs)
        means = self.means[layer]
        levels = means[self.image_mask[:, None].expand_as(means)].unique().tolist()
        gaps = [(above - below, (below + above) / 2) for below, above in itertools.pairwise(levels)]
        for gap, threshold in sorted(gaps, key=lambda each: (each[0] < 1e-3, each[1])):
            counts = (means > threshold).sum(-1)[self.image_mask.any(-1)]
            best = counts.sort(-1, descending=True).values
            if gap > 1e-4 and (best[:, 0] > best[:, 1]).all() and (counts.argmax(-1) > 0).any():
                self.threshold = threshold
                self(**inputs)
                return
        raise AssertionError("no threshold separates the heads of this model: choose another seed")


def _forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    oracle, layer, q_len = module.oracle, module.layer_idx, query.shape[2]
    if q_len == 1 or key.shape[2] != q_len:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs)
    oracle.dims[layer] = query.shape[1], key.shape[-1], value.shape[-1]
    image = oracle.image_mask.repeat_interleave(len(query) // len(oracle.image_mask), 0)
    image = torch.nn.functional.pad(image, (0, q_len - image.shape[1]))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(attention_mask, False, scale, softcap=softcap)
    output, oracle.head[layer], oracle.counts[layer] = reference.eah_attention(
        query, key, value, image, oracle.threshold, oracle.min_density, scoring, torch.float32, oracle.number
    )
    oracle.means[layer] = reference.sink_statistics(query, key, image, 0.0, scoring)[2]
    return output.transpose(1, 2).contiguous(), None

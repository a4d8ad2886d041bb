"""An EAH oracle for any family: an eager copy of the model, one layer of which computes `eah_kernels.reference`.

It knows nothing of `eah`: the test says where the image tokens are, and the mask is the eager one that arrives.
"""

from __future__ import annotations

import copy
import sys

import torch

from eah_kernels import reference
from eah_kernels.masks import Scoring


class Oracle:
    """`attention(model)` finds the layer's attention module. The last prefill's head, counts and means are kept,
    and `dims`: the query heads, the head dims of key and value."""

    def __init__(self, model, attention, image_mask, threshold=0.002):
        from transformers import AttentionInterface

        AttentionInterface.register("oracle", _forward)
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.image_mask, self.threshold = image_mask, threshold
        self.head = self.counts = self.means = self.dims = None
        module = attention(self.model)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = "oracle"
        module.oracle = self

    def __call__(self, **inputs):
        with torch.no_grad():
            return self.model(**inputs).logits

    def tune(self, inputs) -> None:
        """Sets the threshold amid the widest gap between column means at which heads other than 0 win clearly."""
        self(**inputs)
        image = self.image_mask[:, None].expand_as(self.means)
        levels = self.means[image].unique()
        gaps, order = levels.diff().sort(descending=True)
        for gap, place in zip(gaps.tolist(), order.tolist(), strict=True):
            threshold = (levels[place] + levels[place + 1]).item() / 2
            counts = (self.means > threshold).sum(-1)[self.image_mask.any(-1)]
            best = counts.sort(-1, descending=True).values
            if gap > 1e-4 and (best[:, 0] > best[:, 1]).all() and (counts.argmax(-1) > 0).any():
                self.threshold = threshold
                self(**inputs)
                return
        raise AssertionError("no threshold separates the heads of this model: choose another seed")


def _forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    oracle, q_len = module.oracle, query.shape[2]
    if q_len == 1 or key.shape[2] != q_len:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs)
    oracle.dims = query.shape[1], key.shape[-1], value.shape[-1]
    image = oracle.image_mask.repeat_interleave(len(query) // len(oracle.image_mask), 0)
    image = torch.nn.functional.pad(image, (0, q_len - image.shape[1]))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(attention_mask, False, scale, softcap=softcap)
    output, oracle.head, oracle.counts = reference.eah_attention(
        query, key, value, image, oracle.threshold, 0.0, scoring, torch.float32
    )
    oracle.means = reference.sink_statistics(query, key, image, 0.0, scoring)[2]
    return output.transpose(1, 2).contiguous(), None

"""decode="hold" and "track" in families whose attention or cache is of its own kind, against an eager recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import pad

import eah
from eah_kernels import reference
from eah_kernels.masks import Scoring

from ..support.family_models import FAMILIES as TINY
from ..support.family_models import attention_of, prompt
from ..support.tiny_models import IMAGE
from .test_families import built

transformers = pytest.importorskip("transformers")

FAMILIES = {
    "blip-2": "the language model's own generate",
    "chameleon": "query and key norms",
    "gemma3": "image tokens see each other; sliding window",
    "gemma3n": "layers that share keys",
    "gemma4": "image tokens see each other; layers that share keys",
    "kimi_k25": "values narrower than keys",
    "instructblipvideo": "the language model's own generate",
    "kosmos-2": "image tokens by position",
    "kosmos-2.5": "image tokens by position",
    "lfm2_vl": "a cache of convolutions and full attention layers",
    "llama4": "chunked attention",
    "paligemma": "the prompt sees itself in both directions",
    "qwen2_5_vl": "three-dimensional positions",
    "qwen3_5": "a cache of linear and full attention layers",
    "molmo2": "image tokens see each other",
}


WINDOWS = ("gemma3", "gemma3n", "gemma4", "llama4")  # recomputed with a cache that drops nothing


class Recomputation:
    """An eager copy of the model. Queries and mask rows of all forwards are kept: a batch must keep its order."""

    def __init__(self, family, model, image_mask, mode, threshold):
        from transformers import AttentionInterface

        AttentionInterface.register("recomputation", _forward)
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.image_mask, self.mode, self.threshold = image_mask, mode, threshold
        self.queries, self.masks, self.means = [], [], []
        module = attention_of(self.model, TINY[family].layer)
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = "recomputation"
        module.recomputation = self

    def choose(self, key, image, scale, softcap, rows):
        query = torch.cat(self.queries, 2)[:, :, :rows]
        mask = torch.cat([pad(mask, (0, rows - mask.shape[3]), value=-torch.inf) for mask in self.masks], 2)
        scoring = Scoring(mask, False, scale, softcap=softcap)
        counts, _, means = reference.sink_statistics(query, key[:, :, :rows], image[:, :rows], self.threshold, scoring)
        self.means.append(means.masked_fill(~image[:, None, :rows], torch.nan))
        return reference.select_head(counts, image[:, :rows], 0.0)


def _forward(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    self, q_len, kv_len = module.recomputation, query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    image = pad(self.image_mask, (0, kv_len - self.image_mask.shape[1]))
    if q_len == kv_len:
        self.queries, self.masks, self.means = [], [], []
    if q_len == kv_len or self.mode == "track":
        self.queries.append(query)
        self.masks.append(attention_mask.expand(len(query), -1, -1, -1))
        self.head = self.choose(key, image, scale, softcap, kv_len)
    scoring = Scoring(attention_mask, False, scale, softcap=softcap)
    output = reference.shared_map_attention(query, key, value, self.head, scoring)
    return output.transpose(1, 2).contiguous(), None


def generated(model, inputs, **how):
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)


@pytest.mark.parametrize("mode", ["hold", "track"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens(family, mode):
    model, inputs = built(family), prompt(family, ["abIcdefghi", "abcIde", "abcdefghijkl"])
    image = inputs["input_ids"] == IMAGE

    def recomputed(mode, threshold):
        whole = {"past_key_values": transformers.DynamicCache()} if family in WINDOWS else {}
        oracle = Recomputation(family, model, image, mode, threshold)
        return oracle, generated(oracle.model, inputs, **whole)

    first, _ = recomputed("track", 0.0)
    thresholds = torch.linspace(0.01, 0.2, 191).tolist()
    near = [min((mean - t).abs().nan_to_num(1.0).min() for mean in first.means) for t in thresholds]
    won = [(first.means[0][:2] > t).sum(-1).argmax(-1).max() for t in thresholds]
    threshold = next(t for t, n, w in zip(thresholds, near, won, strict=True) if n > 1e-4 and w > 0)
    _, want = recomputed(mode, threshold)
    with eah.enable(model, layers=(TINY[family].layer,), threshold=threshold, decode=mode) as handle:
        got = generated(model, inputs)
    layer = handle.report().layers[0]
    assert layer.rows and layer.afterwards is None
    assert torch.equal(got, want)

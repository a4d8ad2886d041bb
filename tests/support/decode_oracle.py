"""An oracle for decode="hold" and "track": at every step the statistics of all rows so far, from their definition.

It keeps every row's query beside its value in the cache, so whatever happens to the cache happens to it.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import pad

from eah_kernels import reference
from eah_kernels.masks import Scoring

from .tiny_models import IMAGE, attention_of, cache_in, rotated


class DecodeOracle:
    """An eager copy of the model; layer 1 computes `eah_kernels.reference` over all rows for each new row.

    Rows of the prompt use the choice over the prompt, as at any prefill. `heads` and `means` of the rows after it are
    kept, `heads` of the prompt first. Call with a DynamicCache() of full layers, or none.
    """

    def __init__(self, model, inputs, mode, threshold=0.0, window=None, more_images=None, receivers=None):
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.image, self.real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
        self.image = self.image if more_images is None else torch.cat([self.image, more_images], 1)
        self.length, self.mode, self.threshold, self.window = self.real.shape[1], mode, threshold, window
        self.receivers = receivers
        self.heads, self.means = [], []
        attention = attention_of(self.model, 1)
        attention.forward = self._forward(attention)

    def _forward(self, attention):
        def forward(hidden_states, position_embeddings=None, **kwargs):
            cache = cache_in(kwargs)
            batch, new, _ = hidden_states.shape
            shape = (batch, new, -1, attention.head_dim)
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = (projection(hidden_states).view(shape).transpose(1, 2) for projection in projections)
            q, k = rotated(attention, q, k, position_embeddings)
            group, dim = q.shape[1] // k.shape[1], q.shape[3]
            beside = q.unflatten(1, (-1, group)).transpose(2, 3).flatten(3)
            k, both = cache.update(k, torch.cat([v, beside], -1), attention.layer_idx)
            v, beside = both.split([dim, group * dim], -1)
            q = beside.unflatten(3, (group, dim)).transpose(2, 3).flatten(1, 2)
            output = self.attend(q, k, v, new, attention.scaling)
            return attention.o_proj(output.transpose(1, 2).reshape(batch, new, -1)), None

        return forward

    def attend(self, q, k, v, new, scale):
        total, repeats = q.shape[2], len(q) // len(self.real)
        real, image = (t.repeat_interleave(repeats, 0) for t in (self.real, self.image))
        real = pad(real, (0, total - self.length), value=True)
        image = pad(image, (0, max(0, total - image.shape[1])))[:, :total]
        scoring = Scoring(real, True, scale, self.window)
        rows = [self.length] if new == total else range(total - new + 1, total + 1)
        outputs = []
        for row in rows:
            last = self.length if self.mode == "hold" else row
            mean, head, counts = self.choose(q[:, :, :last], k[:, :, :last], image[:, :last], scoring, real[:, :last])
            if self.mode == "off" and new < total:
                head = torch.full_like(head, -1)
            self.heads.append(head)
            self.means.append(mean)
            first = 0 if new == total else row - 1
            rules = scoring._replace(attention_mask=real[:, :row])
            receives = None if self.receivers is None else reference.receiving_heads(counts, head, self.receivers)
            tensors = (tensor[:, :, :row] for tensor in (q, k, v))
            out = reference.shared_map_attention(*tensors, head, rules, receives=receives)
            outputs.append(out[:, :, first:])
        return torch.cat(outputs, 2)

    def choose(self, q, k, image, scoring, real):
        scoring = scoring._replace(attention_mask=real)
        counts, _, mean = reference.sink_statistics(q, k, image, self.threshold, scoring)
        return mean.masked_fill(~image[:, None], torch.nan), reference.select_head(counts, image, 0.0), counts

    def tune(self, changes: bool) -> float:
        """A threshold that no mean of any step is near, at which heads other than 0 win; `changes`: not always one."""
        for threshold in torch.linspace(0.01, 0.3, 291).tolist():
            heads = torch.stack([(mean > threshold).sum(-1).argmax(-1) for mean in self.means])
            near = min((mean - threshold).abs().nan_to_num(1.0).min() for mean in self.means)
            if near > 2e-5 and (heads > 0).any() and (not changes or (heads != heads[0]).any()):
                return threshold
        raise AssertionError("no threshold separates the heads of this model: choose another seed")

"""Contrastive decoding together with EAH: VCD's noisy picture and ICD's misleading prompt, in a small random LLaVA."""

import torch
from transformers import LogitsProcessor

import eah
from eah.cli.samples import load_picture, small_llava


class Contrast(LogitsProcessor):
    """(1 + alpha) log p - alpha log p', p' after a disturbed prompt, of tokens with p >= beta times the largest."""

    def __init__(self, model, disturbed, alpha=1.0, beta=0.1):
        self.model, self.inputs, self.alpha, self.beta, self.cache = model, dict(disturbed), alpha, beta, None

    def __call__(self, ids, scores):
        if self.cache is not None:
            seen = self.inputs["attention_mask"]
            seen = torch.cat([seen, seen.new_ones(len(ids), 1)], -1)
            self.inputs = {"input_ids": ids[:, -1:], "attention_mask": seen}
        output = self.model(**self.inputs, past_key_values=self.cache, use_cache=True)
        self.cache, other = output.past_key_values, output.logits[:, -1].log_softmax(-1)
        own = scores.log_softmax(-1)
        plausible = own >= own.max(-1, keepdim=True).values + torch.tensor(self.beta).log()
        return ((1 + self.alpha) * own - self.alpha * other).masked_fill(~plausible, -torch.inf)


if __name__ == "__main__":
    (processor, model), (picture, _) = small_llava(), load_picture(None)
    prompt, misleading = "USER: <image>\nWhat is there?", "USER: <image>\nYou see what is not there. What is there?"
    inputs, misled = (processor(images=picture, text=text, return_tensors="pt") for text in (prompt, misleading))
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}
    for name, disturbed in (("VCD", noisy), ("ICD", misled)):
        with eah.enable(model, history=2) as handle:  # the second prompt is a prefill too, and enhanced like the first
            options = {"logits_processor": [Contrast(model, disturbed)], "max_new_tokens": 8, "do_sample": False}
            tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
            heads = [prefill.layers[0].rows[0].head for prefill in handle.history]
        print(f"{name}: heads of the two prompts {heads}; new tokens {tokens}")

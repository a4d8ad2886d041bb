"""What transformers answers, with EAH by `eah.enable` or as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import eah

from ..support.processors import image_processor_of
from ..support.tiny_models import IMAGE
from .asks import THRESHOLD, Ask
from .models import adapt, picture

NEAR_TIE = 3e-3  # between the two best logits: two implementations may differ from there on


class Answer(NamedTuple):
    """tokens: up to the first step at which the two best logits are a near tie, that step left out."""

    tokens: list[int]
    rows: dict[int, Any]  # layer -> RowReport of the prompt


class Reference:
    def __init__(self, family: str, folder: Path, adapter: Path | None = None):
        self.family = family
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        if adapter is not None:
            adapt(self.model, adapter)
        self._answers: dict[Any, Answer] = {}

    def answer(self, ask: Ask, prompt: list[int], on: bool, **knobs) -> Answer:
        key = (tuple(prompt), ask.seeds, ask.tokens, on, str(sorted(knobs.items())))
        if key not in self._answers:
            self._answers[key] = self._answer(ask, prompt, on, **{"threshold": THRESHOLD, **knobs})
        return self._answers[key]

    def _answer(self, ask: Ask, prompt: list[int], on: bool, **knobs) -> Answer:
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if ask.seeds:
            pixels = image_processor_of(self.family)([picture(seed) for seed in ask.seeds], return_tensors="pt")
            inputs |= {name: tensor for name, tensor in pixels.items() if name != "num_patches"}  # of InternVL's
        if "qwen" in self.family:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        how = {"max_new_tokens": ask.tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        if not on:
            return Answer(_certain(self.model.generate(**inputs, **how), len(prompt)), {})
        with eah.enable(self.model, **knobs) as handle:
            done = self.model.generate(**inputs, **how)
            rows = {layer.layer: layer.rows[0] for layer in handle.report().layers if layer.rows}
        return Answer(_certain(done, len(prompt)), rows)


def _certain(done, prompt: int) -> list[int]:
    tokens = done.sequences[0, prompt:].tolist()
    for step, logits in enumerate(done.logits):
        best, second = logits[0].topk(2).values.tolist()
        if best - second < NEAR_TIE:
            return tokens[:step]
    return tokens

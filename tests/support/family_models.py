"""A tiny random model of every family: its Config classes filled with the smallest numbers that fit; and prompts."""

from __future__ import annotations

import inspect
import re

import torch

from .family_parts import TIMM
from .family_rows import FAMILIES
from .tiny_models import TEXT


def build(family: str, attn: str | None = None, vision: dict | None = None, top: dict | None = None, **changes):
    """The model, its heads peaked and unlike each other. `changes` are made to the row's text config, `vision` to that
    of its encoder and `top` to the outer one.
    """
    import transformers as hf

    row = FAMILIES[family]
    text = {**TEXT, **row.text, **changes}
    sub = dict(text) if row.flat else {"text_config": text}
    if row.vision and row.vision is not TIMM:
        sub["vision_config"] = {**row.vision, **(vision or {})}
    kind = getattr(hf, row.config)
    known = {*dir(kind), *kind.attribute_map, *inspect.signature(kind).parameters}
    ids = {name: token for name, token in row.ids.items() if name in known}
    config = kind(**{**sub, **ids, **row.top, **(top or {})})
    if row.vision is TIMM:  # the tower is one of timm, which is not installed: another takes its place
        config.__dict__["vision_config"] = hf.SiglipVisionConfig(**TIMM)
    config._attn_implementation = attn or row.attn
    torch.manual_seed(row.seed)
    model = getattr(hf, row.model)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        attention = attention_of(model, row.layer)
        for name, parameter in attention.named_parameters():
            if parameter.dim() > 1 and re.match("q|k|att_proj", name):
                parameter *= 2.5
            elif re.match("(q|k|query|key)_(layer)?norm.weight", name):
                parameter += 1.0
    return model


def attention_of(model, layer: int) -> torch.nn.Module:
    """The text decoder's attention module of this layer."""
    found = [
        module
        for module in model.get_decoder().modules()
        if getattr(module, "layer_idx", None) == layer and type(module).__name__.endswith("Attention")
    ]
    assert len(found) == 1, [type(module).__name__ for module in found]
    return found[0]


def prompt(family: str, rows: list[str], padding: str = "left", seed: int = 1) -> dict:
    """Model inputs from rows such as "abIcd": a letter is a text token, I an image. Padded to the longest row."""
    row = FAMILIES[family]
    ids = [[token for c in text for token in (row.image if c == "I" else [ord(c) % 64 + 1])] for text in rows]
    longest = max(map(len, ids))
    fill = [[0] * (longest - len(tokens)) for tokens in ids]
    left = padding == "left"
    real = [f + [1] * len(tokens) if left else [1] * len(tokens) + f for tokens, f in zip(ids, fill, strict=True)]
    padded = [f + tokens if left else tokens + f for tokens, f in zip(ids, fill, strict=True)]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(real)}
    inputs |= row.inputs(inputs["input_ids"])
    images = sum(text.count("I") for text in rows)
    torch.manual_seed(seed)
    if images:
        inputs |= row.pixels(images)
    return inputs

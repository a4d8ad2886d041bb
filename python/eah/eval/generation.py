"""A batch of questions and pictures to answers, with the same answers that each would get alone."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

import eah
from eah.eval.benchmark import Item
from eah.eval.variants import Variant
from eah.transformers.inputs import Prompts

SUFFIXES = {
    "none": "",
    "llava": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
}
OWN = {  # of transformers' generation settings, those that are not for --generation, and why
    "max_new_tokens": "--max-new-tokens is its option",
    "max_length": "--max-new-tokens is its option",
    "num_return_sequences": "a question has one answer",
    "return_dict_in_generate": "the answers alone are wanted",
    "stop_strings": "an answer ends at its end token or at the largest number of tokens",
    "assistant_early_exit": "transformers cannot do it with a model of pictures",
    "dola_layers": "DoLa is code on the hub, and nothing is downloaded",
    "penalty_alpha": "contrastive search is code on the hub, and nothing is downloaded",
    "num_beam_groups": "group beam search is code on the hub, and nothing is downloaded",
    "diversity_penalty": "group beam search is code on the hub, and nothing is downloaded",
    "constraints": "constrained beam search is code on the hub, and nothing is downloaded",
    "force_words_ids": "constrained beam search is code on the hub, and nothing is downloaded",
}
TEXTS = ("cache_implementation", "early_stopping")  # the settings that may be text


def check_changes(changes: dict[str, Any]) -> None:
    """Raises ValueError for a setting that transformers does not know or ignores, or that is not the user's here."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    known = {name for name in vars(GenerationConfig()) if name != "transformers_version" and not name.startswith("_")}
    for key, value in changes.items():
        if key in OWN:
            raise ValueError(f"--generation {key}: {OWN[key]}")
        if key not in known:
            raise ValueError(f"--generation {key}: transformers has no such setting")
        if isinstance(value, str) and key not in TEXTS:
            raise ValueError(f"--generation {key} must be true, a number, a list or the like, got the text {value!r}")
        if key == "do_sample" and not isinstance(value, bool):
            raise ValueError(f"--generation do_sample must be true or false, got {value!r}")
        if key == "num_beams" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"--generation num_beams must be an int >= 1, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--generation {key} must be finite, got {value!r}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error here
    try:
        GenerationConfig(**{"do_sample": False, "num_beams": 1, **changes}).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--generation: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def neutral_config(model, max_new_tokens: int, changes: dict[str, Any]):
    """Greedy decoding whatever the model's folder says, with its special tokens, and then the changes."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = own.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else (eos[0] if isinstance(eos, list) else eos)
    tokens = {"bos_token_id": own.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    return GenerationConfig(**{**tokens, **greedy, **changes})


@contextlib.contextmanager
def generating_by(model, config) -> Iterator[None]:
    """Within it the model, and the models inside it, know of no other generation settings.

    generate() fills what a config leaves open from the model's own, a folder's repetition penalty for instance.
    """
    owners = [module for module in model.modules() if getattr(module, "generation_config", None) is not None]
    before = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = config
    try:
        yield
    finally:
        for module, own in zip(owners, before, strict=True):
            module.generation_config = own


def answer_batch(
    model, prompts: Prompts, config, variant: Variant | None, items: Sequence[Item], pictures
) -> list[dict]:
    """The records of answers/*.jsonl, one an item. variant None: the model as it is. pictures: PIL images in RGB."""
    texts = [prompts.text(item.prompt) for item in items]
    inputs = prompts.inputs(texts, pictures).to(model.device, model.dtype)
    heads = None
    if variant is None:
        output = model.generate(**inputs, generation_config=config)
    else:
        # Enabled for each batch: the first report of its history is then of this batch's first prefill, also where
        # a second branch of the decoding has prefills of its own.
        with eah.enable(model, history=2 * config.max_new_tokens + 2, **asdict(variant)) as handle:
            output = model.generate(**inputs, generation_config=config)
            heads = chosen_heads(handle.history, len(items))
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    records = []
    for row, (item, text, tokens) in enumerate(zip(items, texts, answers, strict=True)):
        kept = before_eos(tokens, config.eos_token_id)
        record = {
            "id": item.id,
            "image": item.image,
            "prompt": text,
            "answer": prompts.processor.tokenizer.decode(kept, skip_special_tokens=True).strip(),
            "tokens": len(kept),
            "stopped": "eos" if len(kept) < len(tokens) else "length",
        }
        records.append(record if heads is None else record | {"heads": heads[row]})
    return records


def chosen_heads(history, batch: int) -> list[dict[str, int | None]]:
    """Of each row the head by layer, in the first prefill; with beams, of each row's first beam."""
    found: list[dict[str, int | None]] = [{} for _ in range(batch)]
    for layer in history[0].layers if history else ():
        each = len(layer.rows) // batch
        for row, heads in enumerate(found):
            heads[str(layer.layer)] = layer.rows[row * each].head if each else None
    return found


def before_eos(tokens: list[int], eos: int | list[int] | None) -> list[int]:
    ends = set(eos) if isinstance(eos, list) else {eos}
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]


def seed_batch(seed: int, batch: int) -> None:
    """Sampling in a batch depends on nothing but these two: a resumed run equals an uninterrupted one."""
    digest = hashlib.sha256(f"{seed} {batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

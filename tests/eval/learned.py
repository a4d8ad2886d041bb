"""A LLaVA of 0.8 million parameters that learns to name the objects of tests/eval/scenes.py, in minutes of one CPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from . import scenes

WORDS = ["user", "assistant", "is", "there", "a", "?", ",", ".", ":", "and", "describe", "the", "image", "yes", "no"]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER : {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %} "
    "{% endif %}{% endfor %}ASSISTANT :"
)
PATCH = 8
PATCHES = scenes.SIDE // PATCH  # a side
BATCH = 32
QUESTIONS = 7  # in a row
VISION_STEPS, STEPS, WARM_UP, STEADY = 300, 500, 30, 0.6
WORD_STD = 0.2  # of the words' embeddings, which are not trained: pictures are learnt to look like them
FAST, SLOW = 1.5e-3, 3e-4  # rates of learning; where tokens look is roughly right from the start
GOOD = 0.985  # accuracy on scenes that were not seen, at which the training ends
IGNORED = -100
# Kinds of labels: words; yes or no to a question; to one that the row had before; and before the answer is due, from
# the question's object on, where it is learnt first.
WORD, NEW, AGAIN, EARLY = range(4)
HINTS = 3  # tokens between the object and the answer


def processor():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *scenes.OBJECTS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    half = [0.5] * 3
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=half, image_std=half),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def untrained(tokenizer):
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=scenes.SIDE,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow: what is alike stays so at a distance
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=WORD_STD)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            # A token looks for those that are like it. Then what is asked for is found within a hundred steps, and
            # otherwise not within three hundred.
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            key.copy_(query.normal_(std=query.shape[1] ** -0.5))
            for projection in (layer.self_attn.v_proj, layer.self_attn.o_proj):
                projection.weight.normal_(std=WORD_STD / 4)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pixels_of(batch: list[scenes.Scene]) -> torch.Tensor:
    pixels = np.stack([one.pixels() for one in batch]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


def features(model, pixels: torch.Tensor) -> torch.Tensor:
    """(B, patches, width) what the language model is given for the picture."""
    seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(seen)


def learn_to_see(model, tokenizer, chance: random.Random) -> float:
    """Tower and projector: each patch's output near the word of the object in its cell. The last batches' accuracy."""
    embedding = model.get_input_embeddings().weight.detach()
    nothing = tokenizer.convert_tokens_to_ids("<unk>")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in scenes.OBJECTS}
    classes = torch.tensor([*ids.values(), nothing])
    words = F.normalize(embedding[classes], dim=-1)
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    right = []
    for _ in range(VISION_STEPS):
        batch = [scenes.scene(chance) for _ in range(BATCH)]
        output = features(model, pixels_of(batch))
        target = torch.stack([_patch_classes(one) for one in batch])
        cosine = F.normalize(output, dim=-1) @ words.T
        loss = F.cross_entropy(12 * cosine.flatten(0, 1), target.flatten())
        loss = loss + 1 - cosine.gather(-1, target[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        there = target < len(ids)
        right.append((cosine.argmax(-1) == target)[there].float().mean().item())
    with torch.no_grad():  # as long as words are, and with something that no word has: what is seen is not what is said
        last = model.model.multi_modal_projector.linear_2
        scale = embedding[classes].norm(dim=-1).mean() / output[there].norm(dim=-1).mean()
        last.weight *= scale
        last.bias.mul_(scale).add_(torch.randn_like(last.bias), alpha=WORD_STD / 2)
    return float(np.mean(right[-20:]))


def _patch_classes(one: scenes.Scene) -> torch.Tensor:
    classes = torch.full((PATCHES, PATCHES), len(scenes.OBJECTS))
    each = scenes.CELL // PATCH
    for cell, name in one.cells.items():
        top, left = each * (cell // scenes.GRID), each * (cell % scenes.GRID)
        classes[top : top + each, left : left + each] = scenes.OBJECTS.index(name)
    return classes.flatten()


def row(one: scenes.Scene, tokenizer, chance: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Questions or a caption: tokens, labels (IGNORED where nothing is learnt), and the kind of each label."""
    image = " ".join(["<image>"] * PATCHES**2)
    turns, asked = [], set()
    if chance.random() < 0.25:
        turns.append((f"USER : {image} {scenes.DESCRIBE} ASSISTANT :", one.caption(), WORD))
    absent = [name for name in scenes.OBJECTS if name not in one.objects]
    for number in range(0 if turns else QUESTIONS):
        there = chance.random() < 0.5
        name = chance.choice(one.objects if there else absent)
        question = f"USER : {image if number == 0 else ''} Is there a {name}? ASSISTANT :"
        turns.append((question, "yes" if there else "no", AGAIN if name in asked else NEW))
        asked.add(name)
    ids, labels, kinds = [], [], []
    for question, answer, kind in turns:
        given, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
        said = [*said, tokenizer.eos_token_id]
        ids += given + said
        early = 0 if kind == WORD else HINTS
        labels += [IGNORED] * (len(given) - early) + said[:1] * early + said
        kinds += [WORD] * (len(given) - early) + [EARLY] * early + [kind] * (len(said) - 1) + [WORD]
    return ids, labels, kinds


def batch_of(batch: list[scenes.Scene], tokenizer, chance: random.Random) -> tuple[torch.Tensor, ...]:
    """ids, attention mask, labels, their kinds: (B, longest), padded on the right."""
    rows = [row(one, tokenizer, chance) for one in batch]
    longest = max(len(ids) for ids, *_ in rows)

    def padded(at: int, fill) -> torch.Tensor:
        return torch.tensor([[*one[at], *[fill] * (longest - len(one[at]))] for one in rows])

    ids = padded(0, tokenizer.pad_token_id)
    lengths = torch.tensor([len(one[0]) for one in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long(), padded(1, IGNORED), padded(2, WORD)


def learn_to_answer(model, tokenizer, chance: random.Random) -> float:
    """The language model, the rest frozen; until `GOOD`, at the latest after `STEPS`. The last accuracy."""
    for frozen in (model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings()):
        frozen.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    looking = [p for layer in model.get_decoder().layers for p in layer.self_attn.parameters() if p.requires_grad]
    others = [p for p in parameters if all(p is not one for one in looking)]
    groups = [{"params": looking, "lr": SLOW}, {"params": others, "lr": FAST}]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    unseen = random.Random(12345)
    held_out = [scenes.scene(unseen) for _ in range(2 * BATCH)]
    accuracy = 0.0
    for step in range(1, STEPS + 1):
        logits, labels, kinds = _forward(model, [scenes.scene(chance) for _ in range(BATCH)], tokenizer, chance)
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        loss = each[kinds != WORD].mean() + each[(kinds == WORD) & (labels != IGNORED)].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            with torch.no_grad():
                logits, labels, kinds = _forward(model, held_out, tokenizer, random.Random(7))
            right = logits.argmax(-1) == labels
            accuracy = right[kinds == NEW].float().mean().item()
            words = right[(kinds == WORD) & (labels != IGNORED)].float().mean().item()
            say(f"step {step}: loss {loss:.2f}, questions {accuracy:.3f}, words {words:.3f}")
            if accuracy >= GOOD and words >= 0.97:
                break
    return accuracy


def rate(step: int) -> float:
    """Of the learning: it warms up, stays, and falls to nothing."""
    return min(1.0, (step + 1) / WARM_UP, (STEPS - step) / (STEPS * (1 - STEADY)))


def _forward(model, batch: list[scenes.Scene], tokenizer, chance: random.Random):
    """Logits of each next token, its label and the label's kind."""
    ids, mask, labels, kinds = batch_of(batch, tokenizer, chance)
    with torch.no_grad():
        seen = features(model, pixels_of(batch))
        image = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids).masked_scatter(image[..., None], seen)
    hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    return model.lm_head(hidden[:, :-1]), labels[:, 1:], kinds[:, 1:]


def train(folder: Path, seed: int = 0) -> None:
    """Writes the model and its processor. One thread: so small products gain nothing from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    own, chance = processor(), random.Random(seed)
    model = untrained(own.tokenizer)
    begin = time.process_time()
    say(f"patches named: {learn_to_see(model, own.tokenizer, chance):.3f} ({time.process_time() - begin:.0f} s of CPU)")
    learn_to_answer(model, own.tokenizer, chance)
    say(f"trained in {time.process_time() - begin:.0f} s of CPU")
    beside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.eval().save_pretrained(beside)
    own.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    torch.set_num_threads(threads)


def cached(folder: Path) -> Path:
    """The trained model's folder below `folder`; trained where it is not there, or was by another source or version."""
    source = b"".join(Path(module.__file__).read_bytes() for module in (scenes, sys.modules[__name__]))
    packages = "".join(importlib.metadata.version(name) for name in ("torch", "transformers"))
    name = hashlib.sha256(source + packages.encode()).hexdigest()[:12]
    if not (folder / name / "config.json").exists():
        say("training a small model: two to three minutes on a quiet core")
        folder.mkdir(parents=True, exist_ok=True)
        train(folder / name)
    return folder / name


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)

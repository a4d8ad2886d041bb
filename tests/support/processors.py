"""The families' own processors, with a tokenizer of letters: real pixels and text to model inputs.

Some processors need torchvision. Without it, their image processor does its part and the text is expanded here.
"""

from __future__ import annotations

import pytest
import transformers

from .tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, VOCAB

SIDE = {"height": 12, "width": 12}
SQUARE = {"size": SIDE, "crop_size": SIDE}
QWEN = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 144, "longest_edge": 144}}
QWEN_TOKENS = {
    "image_token": ("<|image_pad|>", IMAGE),
    "video_token": ("<|video_pad|>", VIDEO),
    "vision_start_token": ("<|vision_start|>", VISION_START),
    "vision_end_token": ("<|vision_end|>", VISION_END),
}
QWEN_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
IDEFICS_TOKENS = {
    "image_token": ("<image>", IMAGE),
    "fake_image_token": ("<fake_token_around_image>", 90),
    "end_of_utterance_token": ("<end_of_utterance>", 89),
    "global_image_token": ("<global-img>", 88),
}
NEED_TORCHVISION = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "mistral3", "smolvlm"}
EXPANDED = {  # what they make of the placeholder of a 12 x 12 image
    "<|vision_start|><|image_pad|><|vision_end|>": f"<|vision_start|>{'<|image_pad|>' * 9}<|vision_end|>",
    "<|vision_start|><|image|><|vision_end|>": f"<|vision_start|>{'<|image|>' * 9}<|vision_end|>",
    "<IMG_CONTEXT>": f"<img>{'<IMG_CONTEXT>' * 9}</img>",
    "[IMG]": "[IMG][IMG][IMG][IMG_BREAK]" * 2 + "[IMG][IMG][IMG][IMG_END]",
    "<image>": f"<fake_token_around_image><global-img>{'<image>' * 9}<fake_token_around_image>",
}
LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
# processor, image processor, its settings, special tokens, what stands for an image in the text, processor's settings
PROCESSORS = {
    "llava": ("Llava", "Llava", {**SQUARE, "do_pad": False}, {"image_token": ("<image>", IMAGE)}, "<image>", LLAVA),
    "llava_next": (
        "LlavaNext",
        "LlavaNext",
        {**SQUARE, "size": {"shortest_edge": 12}, "image_grid_pinpoints": [[12, 12]]},
        {"image_token": ("<image>", IMAGE)},
        "<image>",
        LLAVA,
    ),
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", QWEN, QWEN_TOKENS, QWEN_TEXT, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", QWEN, QWEN_TOKENS, QWEN_TEXT, {}),
    "qwen3_vl": ("Qwen3VL", "Qwen2VL", QWEN, QWEN_TOKENS, QWEN_TEXT, {}),
    "glm4v": (
        "Glm4v",
        "Glm4v",
        {**QWEN, "size": {"shortest_edge": 288, "longest_edge": 288}},
        {**QWEN_TOKENS, "image_token": ("<|image|>", IMAGE), "video_token": ("<|video|>", VIDEO)},
        "<|vision_start|><|image|><|vision_end|>",
        {},
    ),
    "internvl": (
        "InternVL",
        "GotOcr2",
        {"size": SIDE, "crop_to_patches": False},
        {
            "start_image_token": ("<img>", VISION_START),
            "end_image_token": ("</img>", VISION_END),
            "context_image_token": ("<IMG_CONTEXT>", IMAGE),
            "video_token": ("<video>", VIDEO),
        },
        "<IMG_CONTEXT>",
        {"image_seq_length": 9},
    ),
    "mistral3": (
        "Pixtral",
        "Pixtral",
        {"patch_size": 2, "size": {"longest_edge": 12}},
        {"image_token": ("[IMG]", IMAGE), "break_token": ("[IMG_BREAK]", 90), "end_token": ("[IMG_END]", 89)},
        "[IMG]",
        {"patch_size": 2, "spatial_merge_size": 2},
    ),
    "idefics3": (
        "Idefics3",
        "Idefics3",
        {"do_image_splitting": False, "size": {"longest_edge": 12}, "max_image_size": {"longest_edge": 12}},
        IDEFICS_TOKENS,
        "<image>",
        {"image_seq_len": 9},
    ),
    "smolvlm": (
        "SmolVLM",
        "SmolVLM",
        {"do_image_splitting": False, "size": {"longest_edge": 12}, "max_image_size": {"longest_edge": 12}},
        IDEFICS_TOKENS,
        "<image>",
        {"image_seq_len": 9, "video_processor": None},
    ),
    "gemma3": (
        "Gemma3",
        "Gemma3",
        {"size": SIDE},
        {
            "image_token": ("<image_soft_token>", IMAGE),
            "boi_token": ("<start_of_image>", VISION_START),
            "eoi_token": ("<end_of_image>", VISION_END),
        },
        "<start_of_image>",
        {"image_seq_length": 9},
    ),
    "paligemma": ("PaliGemma", "Siglip", {"size": SIDE}, {"image_token": ("<image>", IMAGE)}, "<image>", {}),
}


def tokenizer(special: dict):
    """One token per character; the special tokens as attributes, with the ids that the models expect."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = {chr(ord("a") + number): 34 + number for number in range(26)}
    taken = {**letters, **dict(special.values())}
    fill = {f"<{number}>": number for number in range(VOCAB) if number not in taken.values()}
    words = Tokenizer(models.WordLevel({**taken, **fill}, unk_token="<1>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<0>",
        unk_token="<1>",
        bos_token="<2>",
        padding_side="left",
        extra_special_tokens={name: token for name, (token, _) in special.items()},
    )


def image_processor_of(family, **changes):
    """`changes` are made to the row's settings; `kind` names another image processor."""
    _, image_processor, settings, *_ = PROCESSORS[family]
    image_processor = changes.pop("kind", image_processor)
    name = f"{image_processor}ImageProcessor"
    try:
        kind = (
            getattr(transformers, f"{name}Pil") if hasattr(transformers, f"{name}Pil") else getattr(transformers, name)
        )
        images = kind(**{**settings, **changes})  # transformers 5.3 has one of PIL and one with Fast to its name
    except ImportError:  # Idefics3 and SmolVLM in transformers 5.17
        pytest.skip(f"{image_processor}ImageProcessorPil of transformers {transformers.__version__} needs torchvision")
    if family == "paligemma":
        images.image_seq_length = 9
    return images


def processor_of(family, images=None, tokens=None, **changes):
    """`images` is an image processor in the place of the row's, `tokens` are special tokens beside the row's and
    `changes` are made to the processor's settings.
    """
    processor, _, _, special, _, more = PROCESSORS[family]
    images = image_processor_of(family) if images is None else images
    text = tokenizer({**special, **(tokens or {})})
    return getattr(transformers, f"{processor}Processor")(images, text, **{**more, **changes})


def processed(family, pictures, texts):
    """Model inputs; `texts` follow an image each."""
    _, _, _, special, placeholder, _ = PROCESSORS[family]
    if family in NEED_TORCHVISION and not transformers.utils.is_torchvision_available():
        texts = [EXPANDED[placeholder] + text for text in texts]
        inputs = tokenizer(special)(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        inputs.update(image_processor_of(family)(pictures, return_tensors="pt"))
        if "qwen" in family or "glm" in family:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs
    texts = [placeholder + text for text in texts]
    return processor_of(family)(images=pictures, text=texts, padding=True, return_tensors="pt")

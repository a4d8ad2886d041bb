"""What needs no download: a photograph, a small LLaVA with random weights, the inputs of one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from eah.cli.doctor import why_no_enable
from eah.pictures import read_picture

IMAGE_SIZE, PATCH = 336, 14  # LLaVA-1.5's: 576 image tokens


def load_picture(image_file: str | None):
    """A PIL image in RGB, upright, and its name; None: matplotlib's photograph."""
    if image_file is not None:
        return read_picture(image_file, upright=True), image_file
    try:
        from matplotlib.cbook import get_sample_data
    except ModuleNotFoundError as missing:
        raise ImportError(
            "the demo's picture comes with matplotlib: pip install matplotlib, or name another picture with --image"
        ) from missing
    photograph = get_sample_data("grace_hopper.jpg", asfileobj=False)
    return read_picture(photograph, upright=True), "grace_hopper.jpg (from matplotlib)"


def small_llava():
    """A LLaVA of LLaVA-1.5's form (CLIP at 336 pixels, Llama) with 4 narrow layers, and a processor for it.

    The weights are random. Query and key projections are drawn wider for later heads, so that the heads' maps differ in
    sharpness, as those of a trained model do.
    """
    problem = why_no_enable()
    if problem:
        raise ImportError(problem)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer = byte_tokenizer()
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                heads = projection.weight.unflatten(0, (8, -1))
                heads.normal_().mul_(torch.linspace(0.02, 0.12, 8)[:, None, None])
    return processor, model


def byte_tokenizer():
    """Every byte a token, and LLaVA's special tokens: a tokenizer that needs no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "</s>", "<pad>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def layer_inputs(
    device: str, dtype: torch.dtype, length: int = 648, heads: int = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value (1, heads, length, 128) and the mask of an image from token 35 on, as in LLaVA-1.5's prompt."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 128, generator=generator) for _ in range(3))
    query *= torch.linspace(0.5, 2, heads)[:, None, None]
    image_mask = torch.zeros(1, length, dtype=torch.bool)
    image_mask[:, 35 : length * 611 // 648] = True
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype), image_mask.to(device)

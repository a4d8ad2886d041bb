"""PAI's contrast with the prompt that has no picture, together with EAH: by transformers' guidance_scale."""

import eah
from eah.cli.samples import load_picture, small_llava

processor, model = small_llava()
picture, _ = load_picture(None)
inputs = processor(images=picture, text="USER: <image>\nWhat is there? ASSISTANT:", return_tensors="pt")
blind = processor.tokenizer("USER: What is there? ASSISTANT:", return_tensors="pt").input_ids
guidance = {"guidance_scale": 1.1, "negative_prompt_ids": blind}  # 1.1 log p(y | picture) - 0.1 log p(y | no picture)
with eah.enable(model, history=2) as handle:
    tokens = model.generate(**inputs, **guidance, max_new_tokens=8, do_sample=False)
    with_picture, without = (prefill.layers[0].rows[0] for prefill in handle.history)
print(f"head {with_picture.head} lends its map in the prompt; in the one without a picture none: {without.why_none}")
print("new tokens:", tokens[0, inputs["input_ids"].shape[1] :].tolist())

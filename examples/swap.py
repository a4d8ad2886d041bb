"""EAH in a model of your own: `python examples/swap.py [MODEL_FOLDER IMAGE]`; alone, in a small random LLaVA."""

import sys

import eah
from eah.cli.samples import load_picture, small_llava


def main(model_folder=None, image_file=None):
    if model_folder:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(model_folder)
        model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype="auto").eval()
    else:
        processor, model = small_llava()
    picture, _ = load_picture(image_file)
    prompt = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device, model.dtype)
    with eah.enable(model, layers=(1,)) as handle:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        print(handle.report())
    print("new tokens:", tokens[0, inputs["input_ids"].shape[1] :].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])

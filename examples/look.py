"""Where the lent map looks: the attention that each image token receives, as a picture of characters.

`python examples/look.py [IMAGE]` on a small LLaVA with random weights; with trained weights the same lines show the
vision sinks of a real model.
"""

import sys

import torch

import eah
from eah.cli.samples import load_picture, small_llava

SHADES = " .:-=+*#%@"


def main(image_file=None):
    processor, model = small_llava()
    model.set_attn_implementation("eager")  # the one implementation that hands out its maps
    picture, name = load_picture(image_file)
    inputs = processor(images=picture, text="<image>\nWhat is this?", return_tensors="pt")
    with torch.no_grad(), eah.enable(model, layers=(1,)) as handle:
        maps = model(**inputs, output_attentions=True).attentions[1]  # (B, heads, tokens, tokens), all heads alike
        (layer,) = handle.report().layers
    image = inputs["input_ids"][0] == model.config.image_token_id
    rows_after = torch.arange(len(image) - 1, -1, -1)
    received = (maps[0, 0].tril(-1).sum(0) / rows_after)[image]  # the mean attention of the rows after each image token
    side = int(len(received) ** 0.5)
    print(f"{name}: head {layer.rows[0].head} lends its map; {max(layer.rows[0].sinks)} of {side * side} are sinks")
    level = (received.argsort().argsort() * len(SHADES) // len(received)).view(side, side)
    for line in level.tolist():
        print("".join(2 * SHADES[shade] for shade in line))


if __name__ == "__main__":
    main(*sys.argv[1:])

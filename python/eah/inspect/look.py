"""`look`: one prefill of a model, and what every head of every layer attends to in the picture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eah.inspect.maps import averaged_map
from eah.patches import Grid, grids
from eah.pictures import in_rgb
from eah.transformers.enable import check_pretrained
from eah.transformers.inputs import Prompts
from eah.transformers.observe import Seen, observed
from eah.uniform import sight_of, uniform_means
from eah_kernels import select_head, sink_statistics


@dataclass(frozen=True, eq=False)
class LayerLook:
    """What the heads of one layer attend to. Everything lies on the CPU.

    column_mean (Hq, N) float32: c_h[j], the mean attention that image token j gets from head h, over the rows that
    count (docs/definition.md, step 2). uniform (N,) float32: u_j, what it would get if every row spread its attention
    evenly; the mean over the heads where they see different keys. maps: by head, see `averaged_map`.
    lent: the head that lent its map in this prefill, where EAH is enabled and one was chosen.
    """

    layer: int
    column_mean: Tensor
    uniform: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    lent: int | None = None

    def counts(self, threshold: float) -> Tensor:
        """(Hq,) int32: the vision sinks of each head."""
        return (self.column_mean > threshold).sum(-1, dtype=torch.int32)

    def head(self, threshold: float, min_density: float = 0.0) -> int | None:
        """The head that EAH chooses, None where it chooses none."""
        counts, image = self.counts(threshold)[None], torch.ones(1, self.column_mean.shape[1], dtype=torch.bool)
        head = int(select_head(counts, image, min_density))
        return None if head < 0 else head

    def shown(self, threshold: float) -> tuple[int, int | None, int | None]:
        """The heads worth a picture: the one with most sinks, the runner-up, and the sparsest of the others.

        Without any sink the first is the head with the largest mean. None where there are too few heads.
        """
        counts = self.counts(threshold).tolist()
        largest = self.column_mean.amax(-1).tolist()
        order = sorted(range(len(counts)), key=lambda h: (-counts[h], -largest[h] if not max(counts) else 0, h))
        rest = order[2:]
        sparsest = min(rest, key=lambda h: (counts[h], -h)) if rest else None
        return order[0], order[1] if len(order) > 1 else None, sparsest


@dataclass(frozen=True, eq=False)
class Look:
    """One prompt as the layers of a model saw it.

    tokens: S, the prompt's length. positions: where in it the N image tokens stand. layers: those that have a map.
    without_map: why the others have none, by layer. image: a PIL image in RGB, upright. inputs: the model's.
    grids: where in the picture the image tokens come from, or why that is not known.
    next_token (V,) float32: logits after the prompt; None of a model without a head on top.
    """

    image: Any
    prompt: str
    threshold: float
    tokens: int
    positions: tuple[int, ...]
    layers: tuple[LayerLook, ...]
    without_map: dict[int, str]
    inputs: Any
    next_token: Tensor | None
    grids: tuple[Grid, ...] = ()

    def layer(self, number: int) -> LayerLook:
        return next(layer for layer in self.layers if layer.layer == number)


def look(
    model, processor, image, prompt: str, *, threshold: float = 0.002, pictured: tuple[int, ...] | None = None
) -> Look:
    """Reads one prompt and keeps c_h[j] of every layer with a map: the sinks at any threshold follow from it.

    The model's output is what it is without a look, bit for bit, and so is the model afterwards. Where EAH is enabled
    on it, EAH acts. Kept are layers x heads x image tokens floats and, for each layer that is pictured, two maps of at
    most 256 x 256; nothing S x S exists at any time.

    Args:
        model, processor: of transformers, a family that `eah models` lists or one with an image token; compiled or not.
        image: a PIL image; an orientation in its EXIF data is applied.
        prompt: a question, put into the processor's chat template, or a whole prompt that has the image token.
        threshold: mean attention above which an image token is a sink, >= 0; it decides which heads' maps are kept.
        pictured: the layers of which maps are kept. None: all.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a model that is being looked at already.
        UnsupportedModelError: a model without image token or attention maps.
    """
    check_pretrained(model)
    image = upright(image)
    check_threshold(threshold)
    inputs = inputs_of(processor, image, prompt).to(model.device, model.dtype)
    places = tuple(grids(processor, inputs, image, model.config))
    return replace(look_at(model, inputs, image, prompt, threshold, pictured), grids=places)


@torch.no_grad()
def look_at(
    model, inputs, image, prompt: str, threshold: float, pictured: tuple[int, ...] | None, also=lambda seen: None
) -> Look:
    """`look` at inputs that are there already. also: is called with what each layer is given, too."""
    layers: dict[int, LayerLook] = {}
    masks: dict[int, Tensor] = {}

    def see(seen: Seen) -> None:
        masks[seen.layer] = seen.image_mask[0].cpu()
        if masks[seen.layer].any():
            maps = pictured is None or seen.layer in pictured
            layers[seen.layer] = measured(seen, threshold, maps)
            also(seen)

    # A compiled model runs as it is written: what is looked at is read from the device layer by layer.
    with observed(model, see) as without_map, torch.compiler.set_stance("force_eager"):
        logits = getattr(model(**inputs), "logits", None)
    if not masks:
        raise ValueError(
            f"no layer has an attention map in this forward: {'; '.join(sorted(set(without_map.values())))}"
        )
    if not layers:
        raise ValueError("the prompt has no image token: nothing of the picture reached the language model")
    mask = next(iter(masks.values()))
    return Look(
        image=image,
        prompt=prompt,
        threshold=threshold,
        tokens=len(mask),
        positions=tuple(mask.nonzero().flatten().tolist()),
        layers=tuple(layer for _, layer in sorted(layers.items())),
        without_map=without_map,
        inputs=inputs,
        next_token=None if logits is None else logits[0, -1].float().cpu(),
    )


def measured(seen: Seen, threshold: float, maps: bool) -> LayerLook:
    """What is kept of the first row of a layer's part in a prompt."""
    call, image = seen.call, seen.image_mask
    scoring = call.scoring
    statistics = sink_statistics(
        call.query, call.key, image, threshold=threshold, return_column_mean=True, **scoring._asdict()
    )
    assert statistics.column_mean is not None
    if not statistics.column_mean[0].isfinite().all():
        raise ValueError(
            f"the attention of layer {seen.layer} is NaN: the weights or the dtype do not bear this prompt"
        )
    uniform = uniform_means(sight_of(image, scoring), image)[0]
    layer = LayerLook(
        seen.layer,
        statistics.column_mean[0][:, image[0]].cpu(),
        uniform[:, image[0]].mean(0).cpu(),
        lent=None if seen.head is None or seen.head[0] < 0 else int(seen.head[0]),
    )
    if maps:
        first, _, sparsest = layer.shown(threshold)
        for head in (first, sparsest):
            if head is not None:
                layer.maps[head] = averaged_map(call, head).cpu()
    return layer


def inputs_of(processor, image, prompt: str):
    """Model inputs for one upright picture and a prompt; a prompt that has the image token is taken as it stands."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a str, got {type(prompt).__name__}")
    prompts, token = Prompts(processor), getattr(processor, "image_token", None)
    whole = isinstance(token, str) and token in prompt
    return prompts.inputs([prompt if whole else prompts.text(prompt)], [image])


def upright(image):
    """A PIL image in RGB, its EXIF orientation applied."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as missing:
        raise ImportError("looking at a picture needs Pillow: pip install pillow") from missing
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
    return in_rgb(ImageOps.exif_transpose(image))


def check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold must be a finite number >= 0, got {threshold!r}")

"""Each image token's box, against a vision encoder whose tokens see their own patch alone.

The output projections of the encoder's attention and MLP are set to zero. Then a rectangle of the original picture is
changed, and the tokens whose features change are those whose boxes meet it.
"""

from __future__ import annotations

import io
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import transformers
from PIL import Image, ImageOps

from eah.patches import grids
from eah.patches.layouts import LAYOUTS, WITHOUT

from ..support.family_models import FAMILIES, build
from ..support.tiny_models import IMAGE
from .patch_cases import CASES, RELATIVES, noise, processed

ENDS = re.compile(r"\b(blocks|layers?)\.\d+\..*\b(out_proj|o_proj|proj|projection_layer|fc2|down_proj)\.(weight|bias)$")


def blind(model):
    """Its vision encoder's tokens see their own patch alone."""
    base = getattr(model, "model", model) if not hasattr(model, "visual") else model
    names = ("vision_tower", "visual", "vision_model", "vision_encoder")
    encoder = next(getattr(base, name) for name in names if hasattr(base, name))
    ends = [value for name, value in encoder.named_parameters() if ENDS.search(name)]
    assert len(ends) >= 4  # of two layers
    for value in ends:
        value.detach().zero_()
    return model


def features(model, inputs):
    """(image tokens, width) of all pictures, in order."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask")
    base = model.model if hasattr(model.model, "get_image_features") else model
    with torch.no_grad():
        out = base.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    out = getattr(out, "pooler_output", out)
    return torch.cat([tokens.flatten(0, -2) for tokens in ([out] if isinstance(out, torch.Tensor) else out)])


def changed(picture, rectangle):
    """The picture with this rectangle turned into its opposite."""
    other = picture.copy()
    other.paste(ImageOps.invert(picture.crop(rectangle)).point(lambda value: 255 * (value > 127)), rectangle[:2])
    return other


def rectangles(size, seed, count=4):
    """Rectangles within a picture, some across its edges."""
    draw = random.Random(seed)
    for _ in range(count):
        spans = [sorted(draw.sample(range(side + 1), 2)) for side in size]
        yield (spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def check(case, model, before, after, found, where, rectangle):
    """The tokens that changed between the features `before` and the inputs `after` are those of picture `where` whose
    boxes meet the rectangle.
    """
    moved = (before != features(model, after)).any(1)
    assert len(moved) == sum(len(grid.positions) for grid in found)
    decided = {True: 0, False: 0}
    place = 0
    for grid in found:
        margins = kernel_margins(case, grid)
        for box, kind, tile in zip(grid.boxes, grid.kinds, grid.tiles, strict=True):
            smear = case.smear if kind == "patch" and "global" in grid.kinds else 0
            must = must_change(box, rectangle, margins.get(tile), smear) if grid.image == where else False
            if kind == "global" and box is None:
                must = None
            if must is not None:
                assert bool(moved[place]) == must, (grid.image, place, box, kind, rectangle)
                decided[must] += 1
            place += 1
    return decided


def kernel_margins(case, grid):
    """By tile: how many pixels of the picture a token sees beyond its box, and how many make one of the encoder's."""
    margins = {}
    for tile in set(grid.tiles):
        boxes = [box for box, its in zip(grid.boxes, grid.tiles, strict=True) if box and its == tile]
        if boxes:
            scales = [max(box[axis + 2] - box[axis] for box in boxes) / case.token for axis in (0, 1)]
            if "padding" in grid.kinds:  # there may be no whole token along the shorter side
                scales = [max(scales)] * 2
            margins[tile] = [(case.reach * max(1.0, scale) + 1, scale) for scale in scales]
    return margins


def must_change(box, rectangle, margins, smear):
    """True or False as the box says; None: the resize's kernel reaches from one into the other."""
    if box is None:
        return False
    inside = True
    for axis, (margin, scale) in enumerate(margins):
        low, high = box[axis], box[axis + 2]
        beyond = margin + smear * scale
        if rectangle[axis] >= high + beyond or rectangle[axis + 2] <= low - beyond:
            return False
        overlap = min(rectangle[axis + 2], high - margin) - max(rectangle[axis], low + margin)
        inside = inside and overlap >= max(1.0, scale)
    return True if inside else None


@pytest.fixture(scope="module")
def models():
    made = {}

    def model_of(name):
        if name not in made:
            made[name] = blind(build(CASES[name].family, vision=CASES[name].vision, top=CASES[name].top))
        return made[name]

    return model_of


@pytest.mark.seam
@pytest.mark.parametrize("name", CASES)
def test_the_tokens_that_change_are_those_whose_boxes_meet_what_changed(name, models):
    """Two rows, left padding; two pictures in the first."""
    prove(CASES[name], models(name), ((0, 0), (2, 0), (4, 2), (1, 1)), least=15)


@pytest.mark.seam
@pytest.mark.parametrize("family", RELATIVES)
def test_a_family_that_places_its_tokens_as_another(family):
    if not hasattr(transformers, FAMILIES[family].config):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    case = RELATIVES[family]
    case = replace(case, family=family, like=case.like or case.family)
    prove(case, blind(build(family, vision=case.vision, top=case.top)), ((4, 1),), least=3)


def prove(case, model, runs, least):
    """Runs are the first of the case's sizes that is taken, and in which of the three pictures something changes."""
    decided = {True: 0, False: 0}
    for start, where in runs:
        pictures = [noise(case.sizes[(start + i) % len(case.sizes)], start + i) for i in range(3)]
        processor, inputs = processed(case, [pictures[:2], pictures[2:]], ["IabcdeIf", "Ia"])
        found = grids(processor, inputs, [pictures[:2], pictures[2:]], model.config)
        assert {grid.reason for grid in found} == {None}
        assert [(grid.image, grid.row, grid.size) for grid in found] == [
            (image, row, pictures[image].size) for image, row in enumerate((0, 0, 1))
        ]
        mask = inputs["input_ids"] == IMAGE
        assert [place for grid in found for place in grid.positions] == mask.nonzero()[:, 1].tolist()
        before = features(model, inputs)
        for rectangle in rectangles(pictures[where].size, start, 5):
            others = list(pictures)
            others[where] = changed(pictures[where], rectangle)
            _, after = processed(case, [others[:2], others[2:]], ["IabcdeIf", "Ia"])
            for must, count in check(case, model, before, after, found, where, rectangle).items():
                decided[must] += count
    assert min(decided.values()) >= least, decided


TURNS = dict(enumerate(["TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"], 5))
TURNS |= {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}


def stored(picture, orientation, kind="PNG"):
    """The picture as a file holds it with this EXIF orientation."""
    if orientation in TURNS:
        picture = picture.transpose(getattr(Image.Transpose, TURNS[orientation]))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, kind, exif=exif)
    return Image.open(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_in_the_upright_picture(orientation, models):
    """A processor sees a picture as it is stored, whatever EXIF says."""
    case, model, picture = CASES["llava padded"], models("llava padded"), noise((150, 80), 1)
    processor, inputs = processed(case, [[stored(picture, orientation)]], ["Ia"])
    (grid,) = found = grids(processor, inputs, stored(picture, orientation), model.config)
    assert grid.size == ImageOps.exif_transpose(stored(picture, orientation)).size == picture.size
    for rectangle in rectangles(picture.size, orientation, 6):
        _, after = processed(case, [[stored(changed(picture, rectangle), orientation)]], ["Ia"])
        check(case, model, features(model, inputs), after, found, 0, rectangle)


def test_a_picture_that_pil_turns_upright_is_not_turned_again(models):
    """Of a TIFF, when its pixels are read."""
    case, model, picture = CASES["llava padded"], models("llava padded"), noise((150, 80), 1)
    processor, inputs = processed(case, [[picture]], ["Ia"])
    assert grids(processor, inputs, stored(picture, 6, "TIFF"), model.config) == grids(
        processor, inputs, picture, model.config
    )


def test_every_family_with_boxes_is_proved_and_documented():
    """Those without are documented."""
    assert set(LAYOUTS) == {case.family for case in CASES.values()} | set(RELATIVES)
    page = (Path(__file__).parents[2] / "docs/inspect.md").read_text()
    section = page.split("## Where a token comes from")[1].split("\n## ")[0]
    assert {*LAYOUTS, *WITHOUT} <= set(re.findall(r"[\w.-]*\w", section))

"""Each image token's box, against a vision encoder whose tokens see their own patch alone.

The output projections of the encoder's attention and MLP are set to zero. Then a rectangle of the original picture is
changed, and the tokens whose features change are those whose boxes meet it.
"""

from __future__ import annotations

import io
import random
import re
from dataclasses import dataclass, field
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import transformers
from PIL import Image, ImageOps

from eah.patches import grids

from ..support.family_models import build
from ..support.processors import PROCESSORS, image_processor_of, processor_of, tokenizer
from ..support.tiny_models import IMAGE

BILINEAR, BICUBIC, LANCZOS = 1, 2, 3  # pixels to each side that a resize's kernel reaches, of the coarser picture
ENDS = re.compile(r"\b(blocks|layers?)\.\d+\..*\b(out_proj|o_proj|proj|projection_layer|fc2|down_proj)\.(weight|bias)$")


@dataclass(frozen=True)
class Case:
    family: str
    images: dict  # settings of the image processor
    vision: dict = field(default_factory=lambda: {"image_size": 42, "patch_size": 14})
    settings: dict = field(default_factory=dict)  # of the processor
    top: dict = field(default_factory=dict)  # of the model's config
    token: int = 14  # pixels of a token's side
    reach: int = BICUBIC
    like: str = ""  # the row of PROCESSORS, where it is another family's
    smear: int = 0  # pixels that a token sees of its neighbours'
    call: dict = field(default_factory=dict)  # what the processor is asked for
    sizes: tuple = ((150, 90), (64, 111), (400, 50), (42, 42), (39, 170))


SIDE = {"height": 42, "width": 42}
CLIP = {"patch_size": 14}
QWEN = {"patch_size": 14, "size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}}
GLM = {"patch_size": 14, "size": {"shortest_edge": 28 * 28 * 8, "longest_edge": 28 * 28 * 40}}
GRID = [[42, 42], [42, 84], [84, 42], [84, 84], [42, 126], [126, 42]]
NEXT = {"size": {"shortest_edge": 42}, "crop_size": SIDE, "image_grid_pinpoints": GRID}
REST = {"height": 45, "width": 45}  # three patches and 3 pixels
REST_GRID = [[side // 42 * 45 for side in pair] for pair in GRID]
IDEFICS = {"size": {"longest_edge": 250}, "max_image_size": {"longest_edge": 84}, "do_image_splitting": True}
MERGED = {"image_size": 84, "patch_size": 14}
PIXTRAL = {"patch_size": 28, "size": {"longest_edge": 140}}
TILES = {"size": REST | {"height": 84, "width": 84}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
LONG = ((620, 300), (270, 560), (300, 300), (1300, 270), (310, 330))
CASES = {
    "llava cropped": Case("llava", {"kind": "CLIP", "size": {"shortest_edge": 42}, "crop_size": SIDE}, settings=CLIP),
    "llava padded": Case("llava", {"size": SIDE, "crop_size": SIDE, "do_pad": True}, settings=CLIP),
    "llava squashed": Case("llava", {"kind": "Siglip", "size": SIDE}, settings=CLIP),
    "llava small crop": Case("llava", {"size": {"shortest_edge": 33}, "crop_size": SIDE}, settings=CLIP),
    "paligemma": Case("paligemma", {"size": SIDE}),
    "llava_next": Case("llava_next", NEXT, settings=CLIP, top={"image_grid_pinpoints": GRID}),
    "llava_next, a rest": Case(
        "llava_next",
        {"size": {"shortest_edge": 45}, "crop_size": REST, "image_grid_pinpoints": REST_GRID},
        {"image_size": 45, "patch_size": 14},
        CLIP,
        {"image_grid_pinpoints": REST_GRID},
    ),
    "llava_onevision": Case(
        "llava_onevision",
        {"kind": "LlavaOnevision", "size": REST, "crop_size": None, "do_pad": True, "image_grid_pinpoints": REST_GRID},
        {"image_size": 45, "patch_size": 14},
        top={"image_grid_pinpoints": REST_GRID, "vision_aspect_ratio": "anyres_max_2"},
        like="llava",
        smear=14 + 3,
    ),
    "qwen2_vl": Case("qwen2_vl", QWEN, {"patch_size": 14}, token=28),
    "qwen2_5_vl": Case("qwen2_5_vl", QWEN, {"patch_size": 14, "window_size": 56}, token=28),
    "qwen3_vl": Case("qwen3_vl", QWEN, {"patch_size": 14}, token=28),
    "glm4v": Case("glm4v", GLM, {"patch_size": 14, "image_size": 84}, token=28),
    "internvl": Case("internvl", TILES, {"image_size": [84, 84], "patch_size": [14, 14]}, token=28),
    "internvl uncut": Case(
        "internvl", {**TILES, "crop_to_patches": False}, {"image_size": [84, 84], "patch_size": [14, 14]}, token=28
    ),
    "gemma3": Case("gemma3", {"size": {"height": 84, "width": 84}}, MERGED, token=28, reach=BILINEAR),
    "gemma3 pan and scan": Case(
        "gemma3",
        {"size": {"height": 84, "width": 84}},
        MERGED,
        token=28,
        reach=BILINEAR,
        call={"do_pan_and_scan": True},
        sizes=LONG,
    ),
    "idefics3": Case("idefics3", IDEFICS, MERGED, token=28, reach=2 * LANCZOS),
    "idefics3 uncut": Case("idefics3", {**IDEFICS, "do_image_splitting": False}, MERGED, token=28, reach=2 * LANCZOS),
    "smolvlm": Case("smolvlm", IDEFICS, MERGED, token=28, reach=2 * LANCZOS),
    "mistral3": Case("mistral3", PIXTRAL, {"patch_size": 14, "image_size": 140}, token=28),
}
TAGS = {
    f"row_{tag}": (f"<row_{tag}>", 60 + number)
    for number, tag in enumerate(f"{i}_col_{j}" for i in "123" for j in "123")
}


def processed(case, pictures, texts):
    """The processor that `grids` is given, and the model inputs. An I of the texts is an image."""
    row = case.like or case.family
    _, _, _, special, placeholder, _ = PROCESSORS[row]
    images = image_processor_of(row, **case.images)
    if case.family not in EXPANDED:
        processor = processor_of(case.family, images, TAGS, **case.settings)
        texts = [text.replace("I", placeholder) for text in texts]
        return processor, processor(images=pictures, text=texts, padding=True, return_tensors="pt", **case.call)
    more = {"return_row_col_info": True} if case.family == "smolvlm" else {}
    outputs = images(pictures, return_tensors="pt", **more)
    counts = iter(EXPANDED[case.family](images, outputs))
    texts = ["".join(next(counts) if c == "I" else c for c in text) for text in texts]
    text = tokenizer({**special, **TAGS})
    inputs = text(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return SimpleNamespace(image_processor=images, tokenizer=text), {**inputs, **outputs}


def qwen_text(images, outputs, image="<|image_pad|>"):
    for grid in outputs["image_grid_thw"]:
        yield f"<|vision_start|>{image * int(grid.prod() // images.merge_size**2)}<|vision_end|>"


def glm_text(images, outputs):
    return qwen_text(images, outputs, "<|image|>")


def internvl_text(images, outputs):
    for tiles in outputs["num_patches"]:
        yield f"<img>{'<IMG_CONTEXT>' * int(9 * tiles)}</img>"


def mistral3_text(images, outputs):
    for height, width in outputs["image_sizes"]:
        lines = [int(width) // 28 * "[IMG]"] * (int(height) // 28)
        yield "[IMG_BREAK]".join(lines) + "[IMG_END]"


def onevision_text(images, outputs):
    counter = transformers.LlavaOnevisionProcessor.__new__(transformers.LlavaOnevisionProcessor)
    counter.image_processor, counter.num_image_tokens, counter.vision_aspect_ratio = images, 9, "anyres_max_2"
    alone = [count == 1 for count in map(int, outputs["batch_num_images"]) for _ in range(count)]
    for cut, (height, width) in zip(alone, outputs["image_sizes"].tolist(), strict=True):
        yield "<image>" * (counter._get_number_of_features(height, width, 45, 45) if cut else 10)


def smolvlm_text(images, outputs):
    around, tokens = "<fake_token_around_image>", "<image>" * 9
    for rows, columns in zip(chain(*outputs["rows"]), chain(*outputs["cols"]), strict=True):
        tags = [f"<row_{row + 1}_col_{column + 1}>" for row in range(rows) for column in range(columns)]
        yield "".join(f"{around}{tag}{tokens}" for tag in [*tags, "<global-img>"]) + around


EXPANDED = {  # in place of processors that need torchvision
    "llava_onevision": onevision_text,
    "qwen2_vl": qwen_text,
    "qwen2_5_vl": qwen_text,
    "qwen3_vl": qwen_text,
    "glm4v": glm_text,
    "internvl": internvl_text,
    "mistral3": mistral3_text,
    "smolvlm": smolvlm_text,
}


def blind(model):
    """Its vision encoder's tokens see their own patch alone."""
    encoder = next(
        getattr(model.model, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(model.model, name)
    )
    ends = [value for name, value in encoder.named_parameters() if ENDS.search(name)]
    assert len(ends) >= 4  # of two layers
    for value in ends:
        value.detach().zero_()
    return model


def features(model, inputs):
    """(image tokens, width) of all pictures, in order."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask")
    with torch.no_grad():
        out = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    out = getattr(out, "pooler_output", out)
    return torch.cat([tokens.flatten(0, -2) for tokens in out])


def noise(size, seed):
    """Random blocks, upright."""
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


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
            must = must_change(box, rectangle, margins.get(tile), case.smear) if grid.image == where else False
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
    case, model = CASES[name], models(name)
    decided = {True: 0, False: 0}
    for start in (0, 2, 4):
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
        where = start // 2
        for rectangle in rectangles(pictures[where].size, start, 6):
            others = list(pictures)
            others[where] = changed(pictures[where], rectangle)
            _, after = processed(case, [others[:2], others[2:]], ["IabcdeIf", "Ia"])
            for must, count in check(case, model, before, after, found, where, rectangle).items():
                decided[must] += count
    assert min(decided.values()) >= 15, decided


TURNS = dict(enumerate(["TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"], 5))
TURNS |= {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}


def stored(picture, orientation):
    """The picture as a file holds it with this EXIF orientation."""
    if orientation in TURNS:
        picture = picture.transpose(getattr(Image.Transpose, TURNS[orientation]))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, "PNG", exif=exif)
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


def reading_order(found, mask, why):
    """Every grid says why it has no boxes; together they have the mask's tokens in order."""
    assert [(grid.row, place) for grid in found for place in grid.positions] == [
        tuple(at) for at in mask.nonzero().tolist()
    ]
    for grid in found:
        assert why in grid.reason
        assert set(grid.boxes) == {None} and set(grid.kinds) == {"unplaced"}
        assert len(grid.boxes) == len(grid.kinds) == len(grid.tiles) == len(grid.positions)


@pytest.fixture
def llava(models):
    """A processor, model inputs of two rows with a picture each, the pictures, and the config."""
    pictures = [noise((60, 40), 1), noise((30, 70), 2)]
    processor, inputs = processed(CASES["llava squashed"], [[picture] for picture in pictures], ["abcI", "I"])
    return processor, inputs, pictures, models("llava squashed").config


def test_reading_order_where_the_tokens_are_not_as_many_as_they_should_be(llava):
    processor, inputs, pictures, config = llava
    mask = inputs["input_ids"] == IMAGE
    inputs["input_ids"][1, -1] = IMAGE + 1
    reading_order(
        grids(processor, inputs, pictures, config), inputs["input_ids"] == IMAGE, "18 tokens, the prompt has 17"
    )
    inputs["input_ids"][1, -1] = IMAGE
    found = grids(processor, inputs, pictures[:1], config)
    reading_order(found, mask, "inputs have 2 of pixel_values, images are 1")
    assert [grid.image for grid in found] == [0, 0] and found[0].size == (60, 40)
    found = grids(processor, inputs, [], config)
    reading_order(found, mask, "the pictures have 0 tokens, the prompt has 18")
    assert [grid.image for grid in found] == [None, None]


def test_reading_order_where_the_family_or_the_image_processor_is_not_known(llava):
    processor, inputs, pictures, config = llava
    mask = inputs["input_ids"] == IMAGE

    class MineImageProcessor(type(processor.image_processor)):
        pass

    mine = SimpleNamespace(image_processor=MineImageProcessor(), tokenizer=processor.tokenizer)
    reading_order(grids(mine, inputs, pictures, config), mask, "what MineImageProcessor does to a picture is not known")
    named = SimpleNamespace(model_type="new_vl", image_token_id=IMAGE)
    reading_order(
        grids(processor, inputs, pictures, named), mask, "family new_vl: where its image tokens come from is not known"
    )
    processor.image_processor.size = {"longest_edge": 42}
    reading_order(
        grids(processor, inputs, pictures, config),
        mask,
        "SiglipImageProcessor resizes to {'longest_edge': 42} is not known",
    )
    processor.image_processor.size = {"height": 40, "width": 40}
    reading_order(grids(processor, inputs, pictures, config), mask, "the pixels are 42 x 42, but SiglipImageProcessor")


def test_tokens_of_a_video_belong_to_no_picture():
    case, pictures = CASES["qwen2_vl"], [noise((60, 40), 1)]
    processor, inputs = processed(case, [pictures], ["abIcd"])
    config = SimpleNamespace(
        model_type="qwen2_vl",
        image_token_id=IMAGE,
        video_token_id=34,
        vision_config=SimpleNamespace(spatial_merge_size=2),
    )
    video, image = sorted(grids(processor, inputs, pictures, config), key=lambda grid: grid.reason is None)
    assert video.positions == (0,) and video.image is None and "video" in video.reason
    assert image.reason is None and image.positions == tuple((inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist())


def test_an_argument_that_does_not_fit_is_named(llava):
    processor, inputs, pictures, config = llava
    with pytest.raises(TypeError, match=r"^processor must be a processor of transformers, .* got TokenizersBackend"):
        grids(processor.tokenizer, inputs, pictures, config)
    with pytest.raises(ValueError, match=r"^inputs must be what the processor returns, .*input_ids"):
        grids(processor, {"input_ids": [[1, 2]]}, pictures, config)
    with pytest.raises(ValueError, match=r"^inputs must be what the processor returns"):
        grids(processor, "a prompt", pictures, config)
    with pytest.raises(TypeError, match=r"^images must be PIL pictures, .* got str"):
        grids(processor, inputs, ["picture.png"], config)
    with pytest.raises(TypeError, match=r"^config must be a model's config, got dict"):
        grids(processor, inputs, pictures, {})
    with pytest.raises(ValueError, match=r"^config \(model_type 'llama'\) has no image token"):
        grids(processor, inputs, pictures, SimpleNamespace(model_type="llama"))

"""Where image tokens cannot be placed they are left in reading order, with the reason; bad arguments are named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from eah.patches import grids

from ..support.family_models import build, prompt
from ..support.processors import image_processor_of, processor_of
from ..support.tiny_models import IMAGE
from .patch_cases import CASES, noise, processed


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
def llava():
    """A processor, model inputs of two rows with a picture each, the pictures, and the config."""
    pictures = [noise((60, 40), 1), noise((30, 70), 2)]
    processor, inputs = processed(CASES["llava squashed"], [[picture] for picture in pictures], ["abcI", "I"])
    return processor, inputs, pictures, build("llava", vision=CASES["llava squashed"].vision).config


def test_reading_order_where_the_tokens_are_not_as_many_as_they_should_be(llava):
    processor, inputs, pictures, config = llava
    mask = inputs["input_ids"] == IMAGE
    inputs["input_ids"][1, -1] = IMAGE + 1
    why = "the pictures have 9 + 9 tokens, the rows of the prompts 9 + 8"
    reading_order(grids(processor, inputs, pictures, config), inputs["input_ids"] == IMAGE, why)
    inputs["input_ids"][1, -1] = IMAGE
    found = grids(processor, inputs, pictures[:1], config)
    reading_order(found, mask, "inputs have 2 of pixel_values, images are 1")
    assert [(grid.image, grid.size) for grid in found] == [(None, None)] * 2
    found = grids(processor, inputs, [], config)
    reading_order(found, mask, "the pictures have no tokens, the rows of the prompts 9 + 9")
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


def test_reading_order_where_the_pixels_are_of_another_picture_or_of_other_settings(llava):
    """Nothing but the pixels tells, where every picture has as many tokens."""
    processor, inputs, pictures, config = llava
    mask, why = inputs["input_ids"] == IMAGE, "are not those that SiglipImageProcessor with its settings makes of it"
    reading_order(grids(processor, inputs, pictures[::-1], config), mask, f"the pixels of picture 0 {why}")
    others = processor(images=pictures, text=["<image>"] * 2, return_tensors="pt", do_normalize=False)
    inputs["pixel_values"] = others["pixel_values"]
    reading_order(grids(processor, inputs, pictures, config), mask, why)


def test_half_precision_makes_no_difference(llava):
    processor, inputs, pictures, config = llava
    expected = grids(processor, inputs, pictures, config)
    for dtype in (torch.float16, torch.bfloat16):
        assert grids(processor, inputs.to(dtype), pictures, config) == expected
    assert {grid.reason for grid in expected} == {None}


@pytest.mark.parametrize("family", ["blip-2", "idefics2", "kosmos-2"])
def test_learned_queries_have_no_place(family):
    model, inputs = build(family, "eager"), prompt(family, ["abIcd", "I"])
    processor = SimpleNamespace(image_processor=None, tokenizer=None)
    found = grids(processor, inputs, [[noise((60, 40), 1)], [noise((60, 40), 2)]], model.config)
    mask = inputs.get("image_embeds_position_mask", inputs["input_ids"] == IMAGE)
    reading_order(found, mask.bool(), f"family {family}: its image tokens are learned queries")


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


def looked_at(name, pictures, image=None, **changes):
    """`grids` of a prompt for each picture. `image` changes the image processor's settings after it was called."""
    case = replace(CASES[name], **changes)
    processor, inputs = processed(case, [[picture] for picture in pictures], ["Ia"] * len(pictures))
    for setting, value in (image or {}).items():
        setattr(processor.image_processor, setting, value)
    config = build(case.family, vision=case.vision, top=case.top).config
    return grids(processor, inputs, pictures, config), inputs["input_ids"] == IMAGE


LONG = [noise((400, 120), 1), noise((120, 400), 2)]


def test_reading_order_where_a_picture_was_cut_in_another_number_of_tiles():
    found, mask = looked_at("internvl", LONG, {"max_patches": 2})
    reading_order(found, mask, "the pictures make 6 tiles, inputs have 8")
    small = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 50}
    found, mask = looked_at("gemma3", LONG, call=small)
    reading_order(found, mask, "the pictures make 2 tiles, inputs have 8")
    ((grid,), _) = looked_at("gemma3", LONG[:1], call=small)  # here there is but one way
    assert grid.reason is None and max(grid.tiles) == 3 and grid.kinds[0] == "global"


def test_reading_order_where_the_prompt_does_not_say_which_tile_is_which():
    """A tokenizer without the tags: they are unknown characters."""
    case = CASES["idefics3"]
    config = build("idefics3", vision=case.vision).config
    processor = processor_of("idefics3", image_processor_of("idefics3", **case.images))
    inputs = processor(images=[LONG[:1]], text=["<image>a"], return_tensors="pt")
    found = grids(processor, inputs, LONG[0], config)
    reading_order(found, inputs["input_ids"] == IMAGE, "9 image tokens, where a tile has 9, after the text")
    processor.image_processor.max_image_size = {"longest_edge": 42}
    found = grids(processor, inputs, LONG[0], config)
    reading_order(found, inputs["input_ids"] == IMAGE, "are not of the image processor's max_image_size")


def test_reading_order_where_tiles_are_not_as_the_settings_say():
    reading_order(*looked_at("llava_next", LONG, {"size": {"shortest_edge": 40}}), "tiles of 42 x 42 pixels do not fit")
    reading_order(*looked_at("llava_next", LONG, {"image_grid_pinpoints": [[42, 42]]}), "image_grid_pinpoints of the")
    case = CASES["llava_next"]
    processor, inputs = processed(case, [[picture] for picture in LONG], ["Ia"] * 2)
    found = grids(processor, inputs, LONG[::-1], build("llava_next", vision=case.vision, top=case.top).config)
    reading_order(found, inputs["input_ids"] == IMAGE, "picture 0 is 120 x 400, inputs are of one of 400 x 120")

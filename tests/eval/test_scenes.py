"""The pictures and files of the demonstration, and what its model is taught; `make eval-demo` trains it."""

import random

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from eah.eval.chair import Chair
from eah.eval.pope import Pope

from . import learned, scenes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, chance = tmp_path_factory.mktemp("scenes"), random.Random(1)
    made = [scenes.scene(chance) for _ in range(20)]
    scenes.write(folder, made, noise=0, seed=0)
    return folder, made


def test_questions_are_balanced_and_true(written):
    folder, made = written
    pope = Pope([str(folder / f"scenes_pope_{part}.json") for part in ("random", "popular", "adversarial")])
    for items in pope.parts.values():
        assert (
            sum(item.label == "yes" for item in items) == len(items) // 2 == sum(min(3, len(s.objects)) for s in made)
        )
        for item in items:
            name, one = item.prompt.removeprefix("Is there a ").rstrip("?"), made[int(item.image[6:10]) - 1]
            assert (name in one.objects) == (item.label == "yes")


def test_a_scenes_caption_is_free_of_hallucination_and_complete(written):
    folder, made = written
    chair = Chair([str(folder)], words="builtin")
    for item, one in zip(chair.parts["all"], made, strict=True):
        counts = chair.judge(item, one.caption()).counts
        assert counts["hallucinated"] == 0 and counts["named"] == counts["true"] == len(one.objects)


def test_pictures(written):
    folder, made = written
    assert len({glyph.tobytes() for glyph in scenes.GLYPHS.values()}) == len(scenes.OBJECTS)
    picture = np.asarray(Image.open(folder / "images/scene_0001.png"))
    assert np.array_equal(picture, made[0].pixels())
    shared = [len({scenes.OBJECTS.index(name) // 4 for name in one.objects}) < len(one.objects) for one in made]
    assert np.mean(shared) > 0.5  # most have two objects of one room


def test_what_is_taught():
    """A row asks what the processor would be given; labels are true and stand where the answers are."""
    tokenizer, chance = learned.processor().tokenizer, random.Random(2)
    for _ in range(40):
        one = scenes.scene(chance)
        ids, labels, kinds = learned.row(one, tokenizer, chance)
        assert tokenizer.unk_token_id not in ids and ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 36
        for at, kind in enumerate(kinds):
            if kind in (learned.NEW, learned.AGAIN):
                assert set(labels[at - 3 : at]) == {ids[at]}
                asked = tokenizer.decode(ids[at - 4])
                assert ids[at] == labels[at] and tokenizer.decode(ids[at]) == ("yes" if asked in one.objects else "no")
                assert (kind == learned.AGAIN) == (ids[at - 4] in ids[: at - 4])

"""CHAIR's rules, each case worked by hand, with the builtin word rules."""

import json

import pytest

pytest.importorskip("numpy")

from eah.eval.answers import read_answers
from eah.eval.chair import Chair, merge, synonym_table

from . import coco


@pytest.fixture
def chair(tmp_path):
    coco.write(tmp_path, [["dog", "person"], ["chair"], []], [(1, "Two dogs by a train."), (2, "A wooden stool")])
    return Chair([str(tmp_path)], words="builtin")


@pytest.mark.parametrize(
    ("tokens", "merged"),
    [
        ("a motor bike", ["a", "motor bike"]),
        ("baby bear cub", ["bear", "cub"]),  # from left to right
        ("baby baby bear", ["baby", "bear"]),
        ("passenger train track", ["train", "track"]),
        ("train track", ["train track"]),
        ("adult animal", ["animal"]),
        ("passenger jet", ["jet"]),
        ("bow tie", ["tie"]),
        ("toilet seat", ["toilet"]),
        ("wine glas", ["wine glass"]),
        ("stove top oven", ["stove", "top", "oven"]),  # three words never are a pair
        ("laptop computer", ["laptop computer"]),
        ("hot hot dog", ["hot", "hot dog"]),
        ("cell", ["cell"]),
        ("", []),
    ],
)
def test_pairs_merge_from_left_to_right(tokens, merged):
    assert merge(tokens.split()) == merged


@pytest.mark.parametrize(
    ("caption", "objects", "length"),
    [
        ("A dog and a puppy.", ["dog", "dog"], 6),  # the full stop is a token
        ("DOGS", ["dog"], 1),
        ("A motor bike", [], 2),  # the table has " motor bike"
        ("A motorbike", ["motorcycle"], 2),
        ("cheesecake pancake", ["cake"], 2),
        ("An iPhone and a phone", ["cell phone"], 5),  # lower case never is iPhone
        ("a cell phone", ["cell phone"], 2),
        ("two wine glasses", ["wine glass"], 2),
        ("a man wearing a bow tie", ["person", "tie"], 5),
        ("the toilet seat", ["toilet"], 2),
        ("the seat of the toilet", ["toilet"], 5),  # a seat is none where a toilet is; the length keeps it
        ("a seat", ["chair"], 2),
        ("a baby bear", ["bear"], 2),
        ("a baby", [], 2),
        ("passenger train", ["train"], 1),
        ("home plate, train track", [], 3),
        ("a hot dog", [], 2),  # merged, and not in this table
        ("knives", ["knife"], 1),  # knive is in the table: less s comes first
        ("mice and geese", ["mouse", "bird"], 3),
        ("men", ["person"], 1),
        ("bisons", ["cow"], 1),  # the table's line is stripped
        ("", [], 0),
        ("Ein Hündchen, 狗!", [], 7),  # letters beyond A to Z are tokens of their own
    ],
)
def test_the_objects_of_a_caption(chair, caption, objects, length):
    assert chair.parse(caption) == (objects, length)


def test_of_a_word_in_several_lines_the_last_counts(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text("person, baby, person\n\ndog, pup\nbear, pup,  cub, dog\n")
    table = synonym_table(path)
    assert table == {"person": "person", "baby": "person", "dog": "bear", "pup": "bear", "bear": "bear", " cub": "bear"}


def test_true_objects_are_those_of_instances_and_of_human_captions(chair):
    assert [chair.truth(image) for image in (1, 2, 3)] == [{"dog", "person", "train"}, {"chair"}, frozenset()]


def judged(chair, *answers):
    verdicts = [chair.judge(item, answer) for item, answer in zip(chair.parts["all"], answers, strict=False)]
    sums = {name: sum(v.counts[name] for v in verdicts) for name in chair.counted}
    return verdicts, {k: None if v != v else float(v) for k, v in chair.metrics(sums).items()}


def test_the_metrics(chair):
    verdicts, metrics = judged(chair, "A dog, a dog and a cake on a chair, a cake.", "A stool", "A man.")
    assert verdicts[0].detail == {
        "image_id": 1,
        "objects": ["dog", "dog", "cake", "chair", "cake"],
        "hallucinated": ["cake", "chair", "cake"],
    }
    assert metrics == {
        "chair_s": 2 / 3,  # of captions
        "chair_i": 4 / 7,  # of mentions, repeats counted
        "recall": 2 / 4,  # dog once, chair
        "length": (15 + 2 + 3) / 3,
    }


def test_an_empty_prompt_is_a_prompt(tmp_path):
    coco.write(tmp_path, [["dog"]])
    prompts = {
        given: Chair([str(tmp_path)], words="builtin", prompt=given).parts["all"][0].prompt for given in ("", "a", None)
    }
    assert prompts == {"": "", "a": "a", None: "Please describe this image in detail."}


def test_without_mentions_chair_i_is_undefined(chair):
    assert judged(chair, "", "", "")[1] == {"chair_s": 0, "chair_i": None, "recall": 0, "length": 0}


@pytest.mark.parametrize(
    ("caption", "objects"), [("A dog. A cake", ["dog"]), ("A dog", []), ("A dog. A cake.", ["dog", "cake"]), (".", [])]
)
def test_unfinished_sentences_are_dropped_on_demand(tmp_path, caption, objects):
    chair = Chair([str(coco.write(tmp_path, [["dog"]]))], words="builtin", unfinished="drop")
    assert judged(chair, caption)[0][0].detail["objects"] == objects


def test_the_train_split_counts_where_it_is_there(tmp_path):
    coco.write(tmp_path, [["dog"]])
    coco.write(tmp_path, [["bear"]], [(7, "a phone")], split="train2014", first=7)
    chair = Chair([str(tmp_path)], words="builtin")
    assert [item.image for item in chair.parts["all"]] == [
        "COCO_val2014_000000000001.jpg",
        "COCO_train2014_000000000007.jpg",
    ]
    assert chair.truth(7) == {"bear", "cell phone"}


def test_answers_of_others_and_ours(tmp_path, chair):
    for records in ([{"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "a"}], [{"id": 1, "answer": "a"}]):
        path = tmp_path / "answers.json"
        path.write_text(json.dumps(records))
        read = read_answers(str(path), chair, "all")
        assert [(item.id, answer.text) for item, answer in read] == [(1, "a"), (2, "b")][: len(records)]


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([{"image_id": 99, "caption": ""}], "answers image_id 99, which .* does not have"),
        ([{"image_id": 1, "caption": ""}] * 2, "has image_id 1 twice"),
        ([{"image_id": 1}], "'caption' must be str"),
    ],
)
def test_answers_that_do_not_fit(tmp_path, chair, records, error):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=error):
        read_answers(str(path), chair, "all")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("synonyms.txt", "no table of synonyms .*synonyms.txt: it is data/synonyms.txt of CHAIR's repository"),
        ("instances_val2014.json", "there is no file .*instances_val2014.json"),
        ("captions_val2014.json", "there is no file .*captions_val2014.json"),
    ],
)
def test_a_missing_file(tmp_path, name, error):
    coco.write(tmp_path, [["dog"]])
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=error):
        Chair([str(tmp_path)], words="builtin")


INSTANCES = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "categories": [{"id": 3, "name": "dog"}],
    "annotations": [{"image_id": 1, "category_id": 3}],
}
CAPTIONS = {"annotations": [{"image_id": 1, "caption": "A dog."}]}


@pytest.mark.parametrize(
    ("kind", "content", "error"),
    [
        ("instances", [], "must be an object with a list of objects 'images'"),
        ("instances", {}, "must be an object with a list of objects 'images'"),
        ("instances", INSTANCES | {"images": ["1.jpg"]}, "must be an object with a list of objects 'images'"),
        ("instances", INSTANCES | {"images": [{"id": 1}]}, "images, record 1: 'file_name' must be str, got None"),
        ("instances", INSTANCES | {"annotations": [{}]}, "annotations, record 1: 'image_id' must be int or str"),
        (
            "instances",
            INSTANCES | {"annotations": [{"image_id": 1, "category_id": 9}]},
            "annotations, record 1: category_id 9 is of no category",
        ),
        ("captions", None, "must be an object with a list of objects 'annotations'"),
        ("captions", {"annotations": {}}, "must be an object with a list of objects 'annotations'"),
        (
            "captions",
            {"annotations": [*CAPTIONS["annotations"], {"image_id": 1, "caption": None}]},
            "annotations, record 2: 'caption' must be str, got None",
        ),
    ],
)
def test_annotations_of_another_form(tmp_path, kind, content, error):
    coco.write(tmp_path, [])
    given = {"instances": INSTANCES, "captions": CAPTIONS} | {kind: content}
    for name, what in given.items():
        (tmp_path / f"{name}_val2014.json").write_text(json.dumps(what))
    with pytest.raises(ValueError, match=f"{kind}_val2014.json.*{error}"):
        Chair([str(tmp_path)], words="builtin").truth(1)


def test_a_category_that_the_table_does_not_have(tmp_path):
    coco.write(tmp_path, [["dog"]])
    (tmp_path / "synonyms.txt").write_text("cat, kitten\n")
    chair = Chair([str(tmp_path)], words="builtin")
    with pytest.raises(ValueError, match="the category 'dog', which the table of synonyms does not have"):
        chair.truth(1)

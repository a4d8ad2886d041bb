"""MMHal's judge file by the rules of its script, worked by hand."""

import json

import pytest

pytest.importorskip("numpy")

from eah.eval.answers import read_answers
from eah.eval.benchmark import Answer
from eah.eval.mmhal import Mmhal


@pytest.fixture
def mmhal(tmp_path):
    path = tmp_path / "response_template.json"
    records = [{"image_src": f"https://host/a/{n}.jpg", "question": f"{n}?", "gt_answer": "g"} for n in range(9)]
    path.write_text(json.dumps(records))
    return Mmhal([str(path)])


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("Rating: 6, very informative", 6),
        ("rating: 0", 0),
        ("I think.\nRATING: 3", 3),
        ("rating: 2 or rating: 3", 0),  # not exactly one
        ("rating: 2, I repeat: rating: 2", 2),
        ("rating:4", 0),
        ("rating: 7", 0),
        ("rating: 10", 1),  # the script looks for "rating: 1"
        ("", 0),
    ],
)
def test_a_rating(mmhal, said, rating):
    verdict = mmhal.judge(mmhal.parts["all"][0], said)
    assert verdict.detail == {"id": 0, "parsed": rating, "label": None}
    assert verdict.counts["hallucinated"] == int(rating < 3)


def judged(path, said):
    path.write_text(json.dumps([{"choices": [{"message": {"content": text}}]} for text in said]))
    return str(path)


def test_the_metrics(tmp_path, mmhal):
    said = [f"Rating: {n}" for n in (6, 5, 4, 3, 2, 1, 0, 3, 1)]
    pairs = read_answers(judged(tmp_path / "judge.json", said), mmhal, "all")
    counts = [mmhal.judge(item, answer.text).counts for item, answer in pairs]
    metrics = mmhal.metrics({name: sum(c.get(name, 0) for c in counts) for name in mmhal.counted})
    assert metrics["rating"] == 25 / 9 and metrics["hallucination"] == 4 / 9
    assert metrics["rating_0"] == 3.5 and metrics["rating_7"] == 3  # the ninth question is of the first kind again


def test_the_response_file(mmhal):
    items = mmhal.parts["all"]
    responses = mmhal.responses([(item, Answer(f"a{item.id}")) for item in items])
    assert items[3].image == "3.jpg" and items[3].prompt == "3?"
    assert responses[3] == mmhal.template[3] | {"model_answer": "a3"}


def test_the_response_file_of_some(mmhal):
    """--limit: the judge gets what was answered, and `score` with the same limit reads it."""
    some = mmhal.parts["all"][2:5]
    responses = mmhal.responses([(item, Answer(f"a{item.id}")) for item in some])
    assert responses == [mmhal.template[n] | {"model_answer": f"a{n}"} for n in (2, 3, 4)]


def test_a_judge_file_that_does_not_fit(tmp_path, mmhal):
    with pytest.raises(ValueError, match="has 2 ratings, and part all 9 answers"):
        read_answers(judged(tmp_path / "j.json", ["", ""]), mmhal, "all")
    mmhal.parts = {"1": mmhal.parts["all"][:2], "2": mmhal.parts["all"][2:4]}  # --limit 2 --subsets 2
    pairs = read_answers(judged(tmp_path / "j.json", ["rating: 3", ""]), mmhal, "2")
    assert [(item.id, answer.text) for item, answer in pairs] == [(2, "rating: 3"), (3, "")]
    with pytest.raises(ValueError, match="has 3 ratings, and part 2 2 answers"):
        read_answers(judged(tmp_path / "j.json", [""] * 3), mmhal, "2")


def test_a_record_that_holds_no_rating(tmp_path, mmhal):
    (tmp_path / "k.json").write_text(json.dumps([{"choices": []}] * 9))
    with pytest.raises(ValueError, match=r"record 1 has no choices\[0\].message.content"):
        read_answers(str(tmp_path / "k.json"), mmhal, "all")

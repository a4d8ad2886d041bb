"""POPE's rules, each case worked by hand."""

import json

import pytest

pytest.importorskip("numpy")

from eah.eval import yes_no
from eah.eval.answers import read_answers
from eah.eval.pope import Pope


@pytest.mark.parametrize(
    ("answer", "official", "opera", "first_word"),
    [
        ("yes", "yes", "yes", "yes"),
        ("Yes, there is.", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("No.", "no", "no", "no"),
        ("No, there is none", "no", "no", "no"),
        ("", "yes", "yes", None),
        ("NO", "yes", "no", "no"),
        ("NO.", "yes", "no", "no"),
        ("no\n", "yes", "yes", "no"),  # the word is "no\n", which is not no
        ("no\tcat", "yes", "yes", "no"),
        ("Not", "yes", "yes", None),
        ("There is not a cat.", "no", "no", None),
        ("It isn't there", "yes", "no", None),
        ("isn't, no", "no", "no", None),
        ("Yes. There is no dog", "yes", "no", "yes"),  # only the first sentence counts
        (". no", "yes", "no", "no"),
        ("n,o", "no", "no", None),  # commas are removed before the words are split
        ("n.o", "yes", "no", None),
        ("No!", "yes", "yes", "no"),
        ("(no)", "yes", "yes", "no"),
        ("yes no", "no", "no", "yes"),
        ("Nope", "yes", "yes", None),
        ("I know", "yes", "yes", None),
        ("no  cat", "no", "no", "no"),  # two spaces: an empty word between
        ("n't", "yes", "no", None),
        ("нет", "yes", "yes", None),
        ("…no", "yes", "yes", "no"),
    ],
)
def test_yes_or_no(answer, official, opera, first_word):
    assert yes_no.pope_official(answer) == official
    assert yes_no.opera(answer) == opera
    assert yes_no.first_word(answer) == first_word


@pytest.mark.parametrize(
    ("answer", "unparsed"),
    [
        ("", True),
        ("Maybe", True),
        ("It isn't", True),
        ("NO", False),
        ("no\n", False),
        ("A cat, yes", False),
        ("Not", False),
    ],
)
def test_unparsed_is_what_says_neither_whatever_the_rule(answer, unparsed):
    assert yes_no.unparsed(answer) == unparsed


def questions(folder, name="coco_pope_random", labels=("yes", "no", "yes", "no")):
    path = folder / f"{name}.json"
    lines = [
        {"question_id": n, "image": f"{n // 3}.jpg", "text": f"Is there a {n}?", "label": label}
        for n, label in enumerate(labels, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def metrics(benchmark, answers):
    items = benchmark.parts["random"]
    counts = [benchmark.judge(item, answer).counts for item, answer in zip(items, answers, strict=True)]
    sums = {name: sum(c[name] for c in counts) for name in benchmark.counted}
    return {name: None if value != value else float(value) for name, value in benchmark.metrics(sums).items()}


def test_the_metrics(tmp_path):
    pope = Pope([str(questions(tmp_path, labels=["yes"] * 3 + ["no"] * 2))])
    assert metrics(pope, ["yes", "yes", "no", "yes", "no"]) == {
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes_ratio": 3 / 5,
    }


def test_without_any_yes_precision_is_undefined(tmp_path):
    found = metrics(Pope([str(questions(tmp_path))]), ["no"] * 4)
    assert found == {"accuracy": 0.5, "precision": None, "recall": 0.0, "f1": None, "yes_ratio": 0.0}


def test_without_any_true_yes_recall_is_undefined(tmp_path):
    found = metrics(Pope([str(questions(tmp_path, labels=["no", "no"]))]), ["yes", "no"])
    assert found == {"accuracy": 0.5, "precision": 0.0, "recall": None, "f1": None, "yes_ratio": 0.5}


def test_all_wrong_has_no_f1(tmp_path):
    found = metrics(Pope([str(questions(tmp_path))]), ["no", "yes", "no", "yes"])
    assert found == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": None, "yes_ratio": 0.5}


def test_by_the_first_word_what_is_neither_is_wrong_either_way(tmp_path):
    found = metrics(Pope([str(questions(tmp_path))], rule="first-word"), ["Maybe", "Maybe", "yes", "no"])
    assert found == {"accuracy": 0.5, "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "yes_ratio": 0.25}


def test_parts_are_the_last_words_of_the_stems(tmp_path):
    names = ("coco_pope_random", "coco_pope_popular", "adversarial")
    pope = Pope([str(questions(tmp_path, name)) for name in names])
    assert list(pope.parts) == ["random", "popular", "adversarial"]
    with pytest.raises(ValueError, match="part 'random' twice"):
        Pope([str(questions(tmp_path)), str(questions(tmp_path, "gqa_pope_random"))])


def answers(folder, records, ends="\n"):
    path = folder / "answers.json"
    path.write_text(ends.join(json.dumps(record) for record in records) + ends, newline="")
    return path


def test_answers_in_the_order_of_the_questions(tmp_path):
    pope = Pope([str(questions(tmp_path))])
    records = [{"question": f"Is there a {n}?", "answer": f"{n}"} for n in range(1, 5)]
    for form in (records, json.dumps(records)):
        path = tmp_path / "list.json" if form is not records else answers(tmp_path, records, "\r\n")
        if form is not records:
            path.write_text(form)
        read = read_answers(str(path), pope, "random")
        assert [(item.id, answer.text) for item, answer in read] == [(n, f"{n}") for n in range(1, 5)]


@pytest.mark.parametrize("key", ["question_id", "id"])
def test_answers_by_id_come_in_any_order(tmp_path, key):
    pope = Pope([str(questions(tmp_path))])
    path = answers(tmp_path, [{key: n, "answer": f"{n}"} for n in (3, 1, 4, 2)])
    assert [answer.text for _, answer in read_answers(str(path), pope, "random")] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("records", "error"),
    [
        ([{"question": "Is there a 1?", "answer": ""}], "has 1 answers, and part random has 4 questions"),
        ([{"question": f"Is there a {n}?", "answer": ""} for n in (2, 1, 3, 4)], "record 1 answers 'Is there a 2"),
        ([{"id": n, "answer": ""} for n in (1, 2, 3)], "answers 3 of the 4 items of part random: 4 is missing"),
        ([{"id": n, "answer": ""} for n in (1, 2, 3, 9)], "answers id 9, which part random does not have"),
        ([{"id": n, "answer": ""} for n in (1, 2, 2, 4)], "has id 2 twice"),
        ([{"id": n, "answer": None} for n in (1, 2, 3, 4)], "record 1: 'answer' must be str, got None"),
        ([{"text": ""}], "a record must have 'question_id' and 'answer' or"),
        ([{"id": True, "answer": ""}], "record 1: 'id' must be int or str, got True"),
        ([{"id": 1, "answer": "", "heads": [3]}], r"record 1: 'heads' must be dict, got \[3\]"),
        ([{"id": 1, "answer": "", "stopped": 1}], "record 1: 'stopped' must be str, got 1"),
    ],
)
def test_answers_that_do_not_fit_the_questions(tmp_path, records, error):
    pope = Pope([str(questions(tmp_path))])
    with pytest.raises(ValueError, match=error):
        read_answers(str(answers(tmp_path, records)), pope, "random")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is empty"),
        (b"[]", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"id": 1, "answer": "a"}\n{"id": 2, "ans', "line 2 is no JSON, or torn"),
        (b'{"id": 1, "answer": "a"}\n\0\0\0', "line 2 is no JSON, or torn"),
        (b"[1]", "must be a list of objects"),
        (b"7\n", "line 1 must be an object, got '7'"),
        (b'[{"id": 1', "is no JSON"),
        (b"[" * 100_000, "broken.jsonl is no JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "line 1 is no JSON"),
        (b"\xff\xfe", "is not UTF-8: byte 0"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, error):
    pope = Pope([str(questions(tmp_path))])
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_answers(str(path), pope, "random")


def test_line_ends_within_a_string_do_not_end_the_line(tmp_path):
    pope = Pope([str(questions(tmp_path, labels=["yes"]))])
    path = tmp_path / "answers.jsonl"
    path.write_text('\ufeff{"id": 1, "answer": "a\u2028b\x85c"}\n', encoding="utf-8")
    [(_, answer)] = read_answers(str(path), pope, "random")
    assert answer.text == "a\u2028b\x85c"


@pytest.mark.parametrize("id", [None, [1], True, 1.5])
def test_a_question_id_is_a_number_or_text(tmp_path, id):
    path = questions(tmp_path)
    path.write_text(json.dumps([{"question_id": id, "image": "1.jpg", "text": "q", "label": "no"}]))
    with pytest.raises(ValueError, match="record 1: 'question_id' must be int or str, got"):
        Pope([str(path)])


def test_a_label_is_yes_or_no(tmp_path):
    with pytest.raises(ValueError, match="record 1: label must be yes or no, got 'maybe'"):
        Pope([str(questions(tmp_path, labels=["maybe"]))])

"""AMBER's rules, each case worked by hand, with the builtin word rules."""

import json
import math

import pytest

pytest.importorskip("numpy")

from eah.eval.amber import Amber
from eah.eval.answers import read_answers

RELATION = {
    "dog": ["puppy", "hound"],
    "cat": ["kitten", "puppy"],
    "tree": ["forest", "branch"],
    "car": ["road"],
    "sea": ["beach"],
    "Sky": [],
}
GENERATIVE = {"id": 1, "type": "generative", "truth": ["dog", "tree"], "hallu": ["cat", "car"]}
VECTORS = """\
dog 1 0 0
wolf 0.95 0.05 0
branch 0 1 0
beach 0 0.99 0.1
road 0 0 1
car 0.1 0 0.9
"""


def folder(path, annotations=(GENERATIVE,), safe="picture\nscene\n"):
    (path / "query").mkdir(parents=True)
    (path / "annotations.json").write_text(json.dumps(list(annotations)))
    (path / "relation.json").write_text(json.dumps(RELATION))
    (path / "safe_words.txt").write_text(safe)
    queries = [{"id": a["id"], "image": f"AMBER_{a['id']}.jpg", "query": "Describe"} for a in annotations]
    (path / "query/query_all.json").write_text(json.dumps(queries))
    return path


def load(path, **options):
    return Amber([str(path)], **{"words": "builtin", "vectors": "none", **options})


def judge(amber, *answers):
    verdicts = [amber.judge(item, answer) for item, answer in zip(amber.parts["all"], answers, strict=True)]
    sums = {name: sum(v.counts.get(name, 0) for v in verdicts) for name in amber.counted}
    metrics = {name: None if value != value else float(value) for name, value in amber.metrics(sums).items()}
    return verdicts, metrics, amber.official(sums)


@pytest.mark.parametrize(
    ("response", "nouns", "hallucinated", "covered", "cog"),
    [
        ("dog", ["dog"], 0, 1, 0),
        ("dogs and a dog", ["dog", "dog"], 0, 1, 0),
        ("Dog", [], 0, 0, 0),  # not lower-cased: no relation word
        ("puppy", ["puppy"], 0, 1, 0),  # also one of cat's: the true list comes first
        ("kitten", ["kitten"], 1, 0, 1),
        ("cat kitten", ["cat", "kitten"], 2, 0, 1),  # both mark the word cat
        ("cat road", ["cat", "road"], 2, 0, 2),
        ("forest branches", ["forest", "branch"], 0, 1, 0),
        ("beach", ["beach"], 1, 0, 0),
        ("a picture", [], 0, 0, 0),
        ("", [], 0, 0, 0),
        ("Sky", ["Sky"], 1, 0, 0),
    ],
)
def test_a_description(tmp_path, response, nouns, hallucinated, covered, cog):
    [verdict], metrics, _ = judge(load(folder(tmp_path / "a")), response)
    assert verdict.detail == {"id": 1, "nouns": nouns}
    assert metrics["chair"] == (hallucinated / len(nouns) if nouns else None)
    assert metrics["cover"] == covered / 2 and metrics["cog"] == cog / 2
    assert metrics["hal"] == float(hallucinated > 0)


def test_a_safe_word_counts_as_a_noun_and_is_skipped(tmp_path):
    [verdict], metrics, _ = judge(load(folder(tmp_path / "a", safe="beach\r\ncat\n")), "cat beach road")
    assert verdict.detail["nouns"] == ["cat", "beach", "road"]
    assert metrics["chair"] == 1 / 3 and metrics["cog"] == 1 / 2


def test_a_safe_word_covers_nothing(tmp_path):
    _, metrics, _ = judge(load(folder(tmp_path / "a", safe="dog\n")), "dog")
    assert metrics["chair"] == 0 and metrics["cover"] == 0


def test_similar_words(tmp_path):
    (tmp_path / "vectors.txt").write_text(VECTORS)
    amber = load(folder(tmp_path / "a"), vectors=str(tmp_path / "vectors.txt"))
    # beach is like branch, of tree: covered. It is like nothing of the hallucinated list.
    _, metrics, _ = judge(amber, "beach")
    assert (metrics["chair"], metrics["cover"], metrics["cog"]) == (0, 0.5, 0)
    # road is equal to car's first association, and similar to it: one mark; nothing true is like it.
    _, metrics, _ = judge(amber, "road")
    assert (metrics["chair"], metrics["cover"], metrics["cog"]) == (1, 0, 0.5)


def test_equal_and_similar_entries_both_mark(tmp_path):
    """car equals the word itself, last in the list; similar to it, earlier, is sea's beach: both are Cog words."""
    annotation = GENERATIVE | {"truth": ["tree"], "hallu": ["sea", "car"]}
    (tmp_path / "vectors.txt").write_text("car 1 0\nbeach 0.9 0.1\nbranch 0 1\n")
    amber = load(folder(tmp_path / "a", [annotation]), vectors=str(tmp_path / "vectors.txt"))
    _, metrics, _ = judge(amber, "car")
    assert (metrics["chair"], metrics["cog"]) == (1, 1)


def test_a_word_like_a_hallucination_and_like_a_true_one_marks_both_and_is_none(tmp_path):
    (tmp_path / "vectors.txt").write_text("beach 1 0\nbranch 0.9 0.1\nroad 0.95 0.05\n")
    amber = load(folder(tmp_path / "a"), vectors=str(tmp_path / "vectors.txt"))
    _, metrics, _ = judge(amber, "beach")
    assert (metrics["chair"], metrics["cover"], metrics["cog"]) == (0, 0.5, 0.5)


@pytest.mark.parametrize(("cosine", "alike"), [(0.8, False), (0.81, True)])
def test_similar_is_above_four_fifths(tmp_path, cosine, alike):
    sine = math.sqrt(1 - cosine**2)
    (tmp_path / "vectors.txt").write_text(f"beach 1 0\nbranch {cosine} {sine}\n")
    _, metrics, _ = judge(load(folder(tmp_path / "a"), vectors=str(tmp_path / "vectors.txt")), "beach")
    assert metrics["chair"] == float(not alike)


def test_an_entry_of_two_truth_words_covers_the_first(tmp_path):
    annotation = GENERATIVE | {"truth": ["cat", "dog"]}
    _, metrics, _ = judge(load(folder(tmp_path / "a", [annotation])), "puppy")
    assert metrics["cover"] == 1 / 2
    _, metrics, _ = judge(load(folder(tmp_path / "b", [annotation])), "puppy cat")
    assert metrics["cover"] == 1 / 2  # puppy is of cat, the first


def test_a_truth_word_that_is_there_twice_is_covered_once(tmp_path):
    """As in the official annotations, which have "ship" twice of one picture: the second is never covered."""
    annotation = GENERATIVE | {"truth": ["dog", "dog", "tree"], "hallu": ["cat", "cat"]}
    _, metrics, _ = judge(load(folder(tmp_path / "a", [annotation])), "dog hound kitten cat")
    assert (metrics["cover"], metrics["cog"]) == (1 / 3, 1 / 2)


QUESTIONS = [
    {"id": 1, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-action", "truth": "yes"},
    {"id": 7, "type": "relation", "truth": "yes"},
    {"id": 8, "type": "discriminative-relation", "truth": "no"},
]
SAID = ("No", "Yes", "Yes", "No", "Yes", "No", "Yes", "No")


def test_no_is_the_positive_class(tmp_path):
    verdicts, metrics, official = judge(load(folder(tmp_path / "a", QUESTIONS)), *SAID)
    assert verdicts[0].detail == {"id": 1, "parsed": "no", "label": "no"}
    assert (metrics["accuracy"], metrics["precision"], metrics["recall"]) == (5 / 8, 3 / 4, 3 / 5)
    assert metrics["f1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert (metrics["existence_accuracy"], metrics["existence_precision"], metrics["existence_recall"]) == (0.5, 1, 0.5)
    assert (metrics["attribute_accuracy"], metrics["attribute_precision"], metrics["attribute_recall"]) == (
        0.5,
        0.5,
        0.5,
    )
    assert (metrics["state_accuracy"], metrics["state_f1"]) == (1, 1)
    assert (metrics["number_precision"], metrics["number_recall"], metrics["number_f1"]) == (None, 0, None)
    assert (metrics["action_precision"], metrics["action_recall"]) == (0, None)
    assert (metrics["relation_accuracy"], metrics["relation_f1"]) == (1, 1)
    assert metrics["chair"] is None and metrics["hal"] is None
    # What the script prints: 5/8.001 = 62.49..., 3/4.001 = 74.98..., 3/5.001 = 59.98...
    assert official["discriminative"] == {"Accuracy": 62.5, "Precision": 75.0, "Recall": 60.0, "F1": 66.7}
    # 1/2.001; F1 is 2 * 1 * 0.5 / (1.5 + 0.001) of the rounded figures: 66.62...
    assert official["existence"] == {"Accuracy": 50.0, "Precision": 99.9, "Recall": 50.0, "F1": 66.6}
    # 2/4.003 = 49.96..., 1/2.003 = 49.92...
    assert official["attribute"] == {"Accuracy": 50.0, "Precision": 49.9, "Recall": 49.9, "F1": 49.9}
    # 1/1.001 = 99.90
    assert official["state"] == {"Accuracy": 100.0, "Precision": 99.9, "Recall": 99.9, "F1": 99.9}
    assert official["number"] == {"Accuracy": 0.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}
    assert official["generative"] == {"CHAIR": 0.0, "Cover": 0.0, "Hal": 100.0, "Cog": 0.0}


def test_what_the_script_prints_of_descriptions(tmp_path):
    annotations = [GENERATIVE | {"id": number} for number in (1, 2, 3)]
    _, metrics, official = judge(load(folder(tmp_path / "a", annotations)), "dog cat", "dog", "tree")
    assert (metrics["chair"], metrics["cover"], metrics["hal"], metrics["cog"]) == (1 / 4, 3 / 6, 1 / 3, 1 / 6)
    # 1/4.001, 3/6.001, 100 - 2/3.001 = 33.36, 1/6.001 = 16.66
    assert official["generative"] == {"CHAIR": 25.0, "Cover": 50.0, "Hal": 33.4, "Cog": 16.7}


def test_the_rules_of_yes_and_no(tmp_path):
    answers = ["No, there is none.", "no", "Yes.", "No", "No", "Yes", "Yes", "Perhaps"]
    verdicts, metrics, official = judge(load(folder(tmp_path / "a", QUESTIONS)), *answers)
    assert metrics["accuracy"] == 7 / 8 and verdicts[7].unparsed and verdicts[7].detail["parsed"] is None
    assert metrics["relation_precision"] is None and metrics["relation_recall"] == 0
    _, strict, same = judge(load(folder(tmp_path / "b", QUESTIONS), rule="official"), *answers)
    assert strict["accuracy"] == 4 / 8
    assert official == same  # the script's own rule, whichever is asked for
    assert official["discriminative"]["Accuracy"] == 50.0


def test_answers_are_those_of_the_script_or_ours(tmp_path):
    amber = load(folder(tmp_path / "a", QUESTIONS))
    for record in ({"id": 2, "response": "No"}, {"id": 2, "answer": "No"}):
        path = tmp_path / "answers.json"
        path.write_text(json.dumps([record]))
        [(item, answer)] = read_answers(str(path), amber, "all")
        assert (item.id, item.image, answer.text) == (2, "AMBER_2.jpg", "No")


def test_queries_in_two_files(tmp_path):
    data = folder(tmp_path / "a", [GENERATIVE, QUESTIONS[1]])
    queries = json.loads((data / "query/query_all.json").read_text())
    (data / "query/query_all.json").unlink()
    (data / "query/query_generative.json").write_text(json.dumps(queries[:1]))
    (data / "query/query_discriminative.json").write_text(json.dumps(queries[1:]))
    assert [(item.id, item.label) for item in load(data).parts["all"]] == [(1, None), (2, "no")]


@pytest.mark.parametrize(
    ("annotations", "options", "error"),
    [
        ([GENERATIVE | {"truth": ["dragon"]}], {}, "record 1: 'dragon' is not in relation.json"),
        ([QUESTIONS[0] | {"truth": "maybe"}], {}, "truth must be yes or no, got 'maybe'"),
        ([QUESTIONS[0] | {"type": "other"}], {}, "type 'other' is none of"),
        ([GENERATIVE, GENERATIVE], {}, "id 1 twice"),
        ([{"id": 1, "type": "generative"}], {}, "record 1: 'truth' must be list, got None"),
        ([GENERATIVE | {"hallu": "cat"}], {}, "record 1: 'hallu' must be list, got 'cat'"),
        ([GENERATIVE | {"truth": [["dog"]]}], {}, r"record 1: \['dog'\] is not in relation.json"),
        ([GENERATIVE], {"rule": "opera"}, "--yes-no of amber must be official or first-word"),
        ([GENERATIVE], {"vectors": "nowhere.txt"}, "there is no file nowhere.txt"),
    ],
)
def test_data_that_do_not_fit(tmp_path, annotations, options, error):
    with pytest.raises(ValueError, match=error):
        load(folder(tmp_path / "a", annotations), **options)


@pytest.mark.parametrize("relation", [[], {"dog": "puppy"}, {"dog": None}, {"dog": [["puppy"]]}])
def test_relations_of_another_form(tmp_path, relation):
    data = folder(tmp_path / "a")
    (data / "relation.json").write_text(json.dumps(relation))
    with pytest.raises(ValueError, match=r"relation.json must be an object of lists of words"):
        load(data)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "is empty"),
        ("dog 1 2\ncat nan 1\n", "line 2 must be a word and finite numbers"),
        ("dog 1 x\n", "line 1 must be a word and finite numbers"),
        ("dog\n", "line 1 has 0 numbers"),
        ("a 1\nb 1 2\n", "line 2 has 2"),
    ],
)
def test_a_file_of_vectors(tmp_path, content, error):
    (tmp_path / "vectors.txt").write_text(content)
    with pytest.raises(ValueError, match=error):
        load(folder(tmp_path / "a"), vectors=str(tmp_path / "vectors.txt"))

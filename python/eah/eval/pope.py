"""POPE: questions whether an object is there, for each of several samplings of objects."""

from __future__ import annotations

from pathlib import Path

from eah.eval import yes_no
from eah.eval.benchmark import Benchmark, Item, Judged, f1, ratio
from eah.eval.files import by_key, field, read_records

PARSE = {"official": yes_no.pope_official, "opera": yes_no.opera, "first-word": yes_no.first_word}


class Pope(Benchmark):
    """data: question files, one a part, which is the last word of the file's stem (coco_pope_random.json: random)."""

    name = "pope"
    max_new_tokens = 10
    answer_keys = (("question_id", "answer"), ("id", "answer"))
    complete = True
    counted = ("n", "correct", "said_yes", "is_yes", "hit")

    def __init__(self, data: list[str], rule: str = "official"):
        self.parse = PARSE[rule]
        self.files = [Path(path) for path in data]
        self.parts = by_key(((Path(path).stem.split("_")[-1], _questions(path)) for path in data), "--data", "part")

    def judge(self, item: Item, answer: str) -> Judged:
        said = self.parse(answer)
        counts = {
            "n": 1,
            "correct": int(said == item.label),
            "said_yes": int(said == "yes"),
            "is_yes": int(item.label == "yes"),
            "hit": int(said == item.label == "yes"),
        }
        return Judged({"id": item.id, "parsed": said, "label": item.label}, counts, yes_no.unparsed(answer))

    def metrics(self, sums) -> dict:
        precision, recall = ratio(sums["hit"], sums["said_yes"]), ratio(sums["hit"], sums["is_yes"])
        return {
            "accuracy": ratio(sums["correct"], sums["n"]),
            "precision": precision,
            "recall": recall,
            "f1": f1(precision, recall),
            "yes_ratio": ratio(sums["said_yes"], sums["n"]),
        }

    def where(self, part: str) -> str:
        return f"part {part}"


def _questions(path: str) -> list[Item]:
    items = []
    for number, record in enumerate(read_records(path), 1):
        label = field(record, "label", path, number)
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, record {number}: label must be yes or no, got {label!r}")
        id = field(record, "question_id", path, number, (int, str)) if "question_id" in record else number
        image, text = (field(record, name, path, number) for name in ("image", "text"))
        items.append(Item(id, image, text.strip(), label))
    by_key(((item.id, item) for item in items), path, "question_id")
    return items

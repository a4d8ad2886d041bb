"""MMHal-Bench: answers that a judge rates. Here the judge's file is read; the rating is done elsewhere."""

from __future__ import annotations

from pathlib import Path

from eah.eval.benchmark import Answer, Benchmark, Item, Judged, ratio
from eah.eval.files import field, read_records

KINDS = 8  # of questions, which take turns in the file
HALLUCINATED_BELOW = 3


class Mmhal(Benchmark):
    """data: response_template.json. Its items are answered by `run`; `score` reads what a judge said of the answers."""

    name = "mmhal"
    max_new_tokens = 512
    answer_keys = ()
    complete = True
    counted = ("n", "rating", "hallucinated", *(f"{what}_{kind}" for kind in range(KINDS) for what in ("n", "rating")))

    def __init__(self, data: list[str]):
        if len(data) != 1:
            raise ValueError(f"--data of mmhal must be one file, the response template, got {' '.join(data)}")
        self.files = [Path(data[0])]
        self.template = read_records(data[0])
        pairs = ((number, record) for number, record in enumerate(self.template, 1))
        self.parts = {
            "all": [
                Item(
                    number - 1, Path(field(r, "image_src", data[0], number)).name, field(r, "question", data[0], number)
                )
                for number, r in pairs
            ]
        }

    def judge(self, item: Item, answer: str) -> Judged:
        """answer: what the judge said; without exactly one of "rating: 0" to "rating: 6" in it the rating is 0."""
        found = [score for score in range(7) if f"rating: {score}" in answer.lower()]
        rating = found[0] if len(found) == 1 else 0
        kind = item.id % KINDS
        counts = {"n": 1, "rating": rating, "hallucinated": int(rating < HALLUCINATED_BELOW)}
        counts |= {f"n_{kind}": 1, f"rating_{kind}": rating}
        return Judged({"id": item.id, "parsed": rating, "label": None}, counts, len(found) != 1)

    def metrics(self, sums) -> dict:
        return {
            "rating": ratio(sums["rating"], sums["n"]),
            "hallucination": ratio(sums["hallucinated"], sums["n"]),
            **{f"rating_{kind}": ratio(sums[f"rating_{kind}"], sums[f"n_{kind}"]) for kind in range(KINDS)},
        }

    def where(self, part: str) -> str:
        return "the response template"

    def responses(self, answers: list[tuple[Item, Answer]]) -> list[dict]:
        """The template's records of what was answered, with the answers, for the judge."""
        return [self.template[int(item.id)] | {"model_answer": answer.text} for item, answer in answers]

    def read_judged(self, path: str, part: str) -> list[tuple[Item, Answer]]:
        """A judge's file: what the API gave for every answer, in order (`choices[0].message.content`)."""
        records, items = read_records(path), self.parts[part]
        if len(records) != len(items):
            raise ValueError(f"{path} has {len(records)} ratings, and part {part} {len(items)} answers")
        texts = [_said(record, path, number) for number, record in enumerate(records, 1)]
        return [(item, Answer(text)) for item, text in zip(items, texts, strict=True)]


def _said(record: dict, path: str, number: int) -> str:
    try:
        said = record["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}, record {number} has no choices[0].message.content") from error
    if not isinstance(said, str):
        raise ValueError(f"{path}, record {number}: the judge's content must be text, got {said!r}")
    return said

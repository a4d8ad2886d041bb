"""Answer files: ours, and those of the official scripts."""

from __future__ import annotations

from collections.abc import Sequence

from eah.eval.benchmark import Answer, Benchmark, Item
from eah.eval.files import by_key, field, read_records
from eah.eval.mmhal import Mmhal


def read_answers(path: str, benchmark: Benchmark, part: str) -> list[tuple[Item, Answer]]:
    """The answers to a part's items, by their ids, or in the items' order where the file repeats the questions.

    Raises:
        ValueError: the file cannot be read, or does not answer these items: an id that is not there or is there twice,
            an item without an answer where the benchmark wants all, another question.
    """
    if isinstance(benchmark, Mmhal):
        return benchmark.read_judged(path, part)
    records, items = read_records(path), benchmark.parts[part]
    named = [keys for keys in benchmark.answer_keys if keys[0] in records[0]]
    keys = next((keys for keys in named if keys[1] in records[0]), named[0] if named else None)
    if keys is None and "question" not in records[0]:
        wanted = " or ".join(f"{id!r} and {text!r}" for id, text in benchmark.answer_keys)
        raise ValueError(f"{path}: a record must have {wanted}, got {', '.join(map(repr, records[0]))}")
    if keys is None:
        return _in_order(path, records, items, part)
    id, text = keys
    numbered = list(enumerate(records, 1))
    answers = [_answer(path, number, record, text) for number, record in numbered]
    ids = [field(record, id, path, number, (int, str)) for number, record in numbered]
    by_id = by_key(zip(ids, answers, strict=True), path, id)
    known = {item.id: item for item in items}
    for asked in by_id:
        if asked not in known:
            raise ValueError(f"{path} answers {id} {asked!r}, which {benchmark.where(part)} does not have")
    if benchmark.complete and len(by_id) < len(items):
        missing = next(item.id for item in items if item.id not in by_id)
        raise ValueError(
            f"{path} answers {len(by_id)} of the {len(items)} items of {benchmark.where(part)}: {missing!r} is missing"
        )
    return [(item, by_id[item.id]) for item in items if item.id in by_id]


def _in_order(path: str, records: Sequence[dict], items: Sequence[Item], part: str) -> list[tuple[Item, Answer]]:
    if len(records) != len(items):
        raise ValueError(f"{path} has {len(records)} answers, and part {part} has {len(items)} questions")
    for number, (record, item) in enumerate(zip(records, items, strict=True), 1):
        question = field(record, "question", path, number).strip()
        if question != item.prompt:
            raise ValueError(f"{path}, record {number} answers {question!r}, and the question is {item.prompt!r}")
    return [
        (item, _answer(path, number, record, "answer"))
        for number, (item, record) in enumerate(zip(items, records, strict=True), 1)
    ]


def _answer(path: str, number: int, record: dict, text: str) -> Answer:
    told = {name: record.get(name) for name in ("stopped", "heads")}
    for name, kind in (("stopped", str), ("heads", dict)):
        if told[name] is not None:
            field(record, name, path, number, kind)
    return Answer(field(record, text, path, number), **told)

"""AMBER: what a description mentions against what is annotated, and questions of existence, attributes, relations."""

from __future__ import annotations

from pathlib import Path

from eah.eval import yes_no
from eah.eval.benchmark import Benchmark, Item, Judged, f1, ratio
from eah.eval.files import by_key, field, read_json, read_records, read_text
from eah.eval.vectors import similarity_of
from eah.eval.words import words_of

GENERATIVE = ("nouns", "hallucinated", "truths", "covered", "hallus", "cog", "responses", "clean")
KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
LEAVES = ("existence", "state", "number", "action", "relation")
GROUPS = {  # what is told of the questions, and whose sums it is
    "discriminative": LEAVES,
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    **{leaf: (leaf,) for leaf in LEAVES[1:]},
}
SUMS = ("n", "correct", "said_no", "is_no", "hit")  # no is the positive class
SIMILAR = 0.8


class Amber(Benchmark):
    """data: the official data folder."""

    name = "amber"
    max_new_tokens = 512
    answer_keys = (("id", "response"), ("id", "answer"))
    complete = False
    # Once by the rule asked for, once by the official one.
    counted = (*GENERATIVE, *(f"{rule}{leaf}_{sum}" for rule in ("", "official_") for leaf in LEAVES for sum in SUMS))

    def __init__(
        self,
        data: list[str],
        words: str = "nltk",
        rule: str = "first-word",
        vectors: str = "spacy:en_core_web_lg",
    ):
        if len(data) != 1 or not Path(data[0]).is_dir():
            raise ValueError(f"--data of amber must be its data folder, got {' '.join(data)}")
        if rule == "opera":
            raise ValueError("--yes-no of amber must be official or first-word, got 'opera'")
        self.folder = Path(data[0])
        self.parse = {"official": yes_no.amber_official, "first-word": yes_no.first_word}[rule]
        self.associations = _associations(self.folder / "relation.json")
        self.vocabulary = {word for key, words in self.associations.items() for word in (key, *words)}
        self.safe = set(read_text(self.folder / "safe_words.txt").split("\n"))
        self.words = words_of(words, self.vocabulary)
        self.similarity = similarity_of(vectors)
        self.annotations = self._annotations()
        whole, kinds = self.folder / "query/query_all.json", ("generative", "discriminative")
        queries = [whole] if whole.exists() else [whole.with_name(f"query_{kind}.json") for kind in kinds]
        self.parts = {"all": self._queries(queries)}
        names = ("annotations.json", "relation.json", "safe_words.txt")
        self.files = [*(self.folder / name for name in names), *queries]

    def _annotations(self) -> dict[int | str, dict]:
        path = self.folder / "annotations.json"
        numbered = list(enumerate(read_records(path), 1))
        for number, record in numbered:
            kind = field(record, "type", path, number)
            if kind == "generative":
                for word in (word for name in ("truth", "hallu") for word in field(record, name, path, number, list)):
                    if not isinstance(word, str) or word not in self.associations:
                        raise ValueError(f"{path}, record {number}: {word!r} is not in relation.json")
            elif kind not in KINDS:
                raise ValueError(f"{path}, record {number}: type {kind!r} is none of {', '.join(KINDS)}, generative")
            elif record.get("truth") not in ("yes", "no"):
                raise ValueError(f"{path}, record {number}: truth must be yes or no, got {record.get('truth')!r}")
        return by_key(((field(record, "id", path, number, int), record) for number, record in numbered), path, "id")

    def _queries(self, paths: list[Path]) -> list[Item]:
        items = []
        for path in paths:
            for number, record in enumerate(read_records(path), 1):
                id = field(record, "id", path, number, int)
                image, query = (field(record, name, path, number) for name in ("image", "query"))
                if id not in self.annotations:
                    raise ValueError(f"{path}, record {number}: id {id} is not in annotations.json")
                items.append(Item(id, image, query, self.annotations[id]["truth"] if self._kind(id) else None))
        by_key(((item.id, item) for item in items), self.folder / "query", "id")
        return items

    def _kind(self, id: int | str) -> str | None:
        return KINDS.get(self.annotations[id]["type"])

    def judge(self, item: Item, answer: str) -> Judged:
        kind = self._kind(item.id)
        if kind is None:
            return self._described(item, answer)
        said = self.parse(answer)
        counts = _sums(kind, said, item.label) | _sums(f"official_{kind}", yes_no.amber_official(answer), item.label)
        return Judged({"id": item.id, "parsed": said, "label": item.label}, counts, yes_no.unparsed(answer))

    def _described(self, item: Item, response: str) -> Judged:
        """The official script's loop: what is in the picture's list counts before what is likely to be made up."""
        nouns = [noun for noun in self.words.nouns(response) if noun in self.vocabulary]
        annotation = self.annotations[item.id]
        truth, hallu = self._entries(annotation["truth"]), self._entries(annotation["hallu"])
        covered, cog, hallucinated = set(), set(), 0
        for noun in nouns:
            if noun in self.safe:
                continue
            equal = first(truth, noun.__eq__)
            if equal:
                covered |= equal
                continue
            similar = lambda entry, noun=noun: self.similarity(noun, entry) > SIMILAR  # noqa: E731
            cog |= first(hallu, noun.__eq__) | first(hallu, similar)
            alike = first(truth, similar)
            covered |= alike
            hallucinated += not alike
        counts = {
            "nouns": len(nouns),
            "hallucinated": hallucinated,
            "truths": len(annotation["truth"]),
            "covered": len(covered),
            "hallus": len(annotation["hallu"]),
            "cog": len(cog),
            "responses": 1,
            "clean": int(not hallucinated),
        }
        return Judged({"id": item.id, "nouns": nouns}, counts)

    def _entries(self, words: list[str]) -> list[tuple[str, int]]:
        """What may stand for the words, each with the position of its word: the associations in order, then they."""
        associated = [(entry, at) for at, word in enumerate(words) for entry in self.associations[word]]
        return [*associated, *((word, at) for at, word in enumerate(words))]

    def metrics(self, sums) -> dict:
        found = {
            "chair": ratio(sums["hallucinated"], sums["nouns"]),
            "cover": ratio(sums["covered"], sums["truths"]),
            "hal": ratio(sums["responses"] - sums["clean"], sums["responses"]),
            "cog": ratio(sums["cog"], sums["hallus"]),
        }
        for group, leaves in GROUPS.items():
            n, correct, said_no, is_no, hit = (sum(sums[f"{leaf}_{name}"] for leaf in leaves) for name in SUMS)
            precision, recall = ratio(hit, said_no), ratio(hit, is_no)
            prefix = "" if group == "discriminative" else f"{group}_"
            found |= {
                f"{prefix}accuracy": ratio(correct, n),
                f"{prefix}precision": precision,
                f"{prefix}recall": recall,
                f"{prefix}f1": f1(precision, recall),
            }
        return found

    def official(self, sums) -> dict:
        """In percent, as the official script prints them; its sums start at 0.001, not at 0."""
        found = {
            "generative": {
                "CHAIR": _percent(sums["hallucinated"], sums["nouns"]),
                "Cover": _percent(sums["covered"], sums["truths"]),
                "Hal": round(100 - 100 * sums["clean"] / (sums["responses"] + 0.001), 1),
                "Cog": _percent(sums["cog"], sums["hallus"]),
            }
        }
        for group, leaves in GROUPS.items():
            add = 0.003 if group == "attribute" else 0.001
            n, correct, said_no, is_no, hit = (sum(sums[f"official_{leaf}_{name}"] for leaf in leaves) for name in SUMS)
            precision, recall = _percent(hit, said_no, add), _percent(hit, is_no, add)
            p, r, below = precision / 100, recall / 100, 0.001 if group == "existence" else 0.0001
            found[group] = {
                "Accuracy": _percent(correct, n, add),
                "Precision": precision,
                "Recall": recall,
                "F1": round(2 * p * r / (p + r + below) * 100, 1),
            }
        return found

    def where(self, part: str) -> str:
        return str(self.folder)


def _associations(path: Path) -> dict[str, list[str]]:
    found = read_json(path)
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError(f"{path} must be an object of lists of words")
    return found


def first(entries: list[tuple[str, int]], matches) -> set[int]:
    """The position that the first matching entry stands for, if one matches."""
    return next(({at} for entry, at in entries if matches(entry)), set())


def _sums(prefix: str, said: str | None, truth: str | None) -> dict[str, int]:
    values = (1, said == truth, said == "no", truth == "no", said == truth == "no")
    return {f"{prefix}_{name}": int(value) for name, value in zip(SUMS, values, strict=True)}


def _percent(part: float, whole: float, add: float = 0.001) -> float:
    return round(part / (whole + add) * 100, 1)

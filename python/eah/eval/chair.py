"""CHAIR: the objects that a caption names against those that are in the picture."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from eah.eval.benchmark import Benchmark, Item, Judged, ratio
from eah.eval.files import field, objects, read_json, read_text
from eah.eval.words import words_of

PROMPT = "Please describe this image in detail."
PAIRS = [
    "motor bike",
    "motor cycle",
    "air plane",
    "traffic light",
    "street light",
    "traffic signal",
    "stop light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "suit case",
    "sports ball",
    "baseball bat",
    "baseball glove",
    "tennis racket",
    "wine glass",
    "hot dog",
    "cell phone",
    "mobile phone",
    "teddy bear",
    "hair drier",
    "potted plant",
    "laptop computer",
    "stove top oven",
    "home plate",
    "train track",
]
ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
MERGED = {
    **{pair: pair for pair in PAIRS},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


class Chair(Benchmark):
    """data: a folder with COCO's instances and captions, of val2014 and, where present, train2014.

    unfinished: "keep", or "drop" to cut a caption after its last full stop.
    """

    name = "chair"
    max_new_tokens = 512
    answer_keys = (("image_id", "caption"), ("id", "answer"))
    complete = False
    counted = ("captions", "hallucinated_captions", "mentions", "hallucinated", "true", "named", "length")

    def __init__(
        self,
        data: list[str],
        words: str = "nltk",
        synonyms: str | None = None,
        unfinished: str = "keep",
        prompt: str | None = None,
    ):
        if len(data) != 1 or not Path(data[0]).is_dir():
            raise ValueError(f"--data of chair must be one folder with COCO's annotations, got {' '.join(data)}")
        self.folder, self.unfinished = Path(data[0]), unfinished
        table = Path(synonyms) if synonyms else self.folder / "synonyms.txt"
        self.objects = synonym_table(table)
        vocabulary = {word for phrase in [*self.objects, *MERGED, *MERGED.values()] for word in phrase.split()}
        self.words = words_of(words, vocabulary)
        splits = [split for split in ("val2014", "train2014") if split == "val2014" or self._has(split)]
        self._instances = [(path, read_json(path)) for path in (self._file("instances", split) for split in splits)]
        self._captions = [(path, read_json(path)) for path in (self._file("captions", split) for split in splits)]
        self.files = [table, *(path for path, _ in (*self._instances, *self._captions))]
        images: dict[int | str, str] = {}
        for path, content in self._instances:
            where = f"{path}, images"
            for number, image in enumerate(objects(content, "images", path), 1):
                images[field(image, "id", where, number, (int, str))] = field(image, "file_name", where, number)
        self.parts = {"all": [Item(id, file, PROMPT if prompt is None else prompt) for id, file in images.items()]}
        self._truth: dict[int | str, frozenset[str]] = {}

    def _file(self, kind: str, split: str) -> Path:
        return self.folder / f"{kind}_{split}.json"

    def _has(self, split: str) -> bool:
        return any(self._file(kind, split).exists() for kind in ("instances", "captions"))

    @cached_property
    def _segmented(self) -> dict[int | str, set[str]]:
        """The objects of each image by its instances."""
        found: dict[int | str, set[str]] = {}
        for path, content in self._instances:
            where, names = f"{path}, annotations", {}
            for number, category in enumerate(objects(content, "categories", path), 1):
                id = field(category, "id", f"{path}, categories", number, (int, str))
                names[id] = field(category, "name", f"{path}, categories", number)
            for number, annotation in enumerate(objects(content, "annotations", path), 1):
                image, id = (field(annotation, key, where, number, (int, str)) for key in ("image_id", "category_id"))
                if id not in names:
                    raise ValueError(f"{where}, record {number}: category_id {id!r} is of no category")
                if names[id] not in self.objects:
                    raise ValueError(
                        f"{path} has the category {names[id]!r}, which the table of synonyms does not have"
                    )
                found.setdefault(image, set()).add(self.objects[names[id]])
        return found

    @cached_property
    def _described(self) -> dict[int | str, list[str]]:
        """The human captions of each image."""
        found: dict[int | str, list[str]] = {}
        for path, content in self._captions:
            where = f"{path}, annotations"
            for number, annotation in enumerate(objects(content, "annotations", path), 1):
                image = field(annotation, "image_id", where, number, (int, str))
                found.setdefault(image, []).append(field(annotation, "caption", where, number))
        return found

    def truth(self, image: int | str) -> frozenset[str]:
        """The objects of an image's instances and of its human captions."""
        if image not in self._truth:
            named = (self.parse(caption)[0] for caption in self._described.get(image, []))
            self._truth[image] = frozenset(self._segmented.get(image, set()).union(*named))
        return self._truth[image]

    def parse(self, caption: str) -> tuple[list[str], int]:
        """The objects that a caption names, in order and with repeats, and its length in tokens, pairs merged."""
        tokens = merge(self.words.words(caption.lower()))
        seen = [token for token in tokens if token != "seat"] if "toilet" in tokens else tokens
        return [self.objects[token] for token in seen if token in self.objects], len(tokens)

    def judge(self, item: Item, answer: str) -> Judged:
        answer = answer[: answer.rfind(".") + 1] if self.unfinished == "drop" else answer
        objects, length = self.parse(answer)
        truth = self.truth(item.id)
        hallucinated = [name for name in objects if name not in truth]
        counts = {
            "captions": 1,
            "hallucinated_captions": int(bool(hallucinated)),
            "mentions": len(objects),
            "hallucinated": len(hallucinated),
            "true": len(truth),
            "named": len(truth.intersection(objects)),
            "length": length,
        }
        return Judged({"image_id": item.id, "objects": objects, "hallucinated": hallucinated}, counts)

    def metrics(self, sums) -> dict:
        return {
            "chair_s": ratio(sums["hallucinated_captions"], sums["captions"]),
            "chair_i": ratio(sums["hallucinated"], sums["mentions"]),
            "recall": ratio(sums["named"], sums["true"]),
            "length": ratio(sums["length"], sums["captions"]),
        }

    def where(self, part: str) -> str:
        return f"{self.folder}"


def synonym_table(path: Path) -> dict[str, str]:
    """Each word or phrase and the object it stands for, the first of its line.

    Only the line is stripped: what has two spaces before it keeps one and matches nothing, as in the official scripts.
    """
    if not path.exists():
        raise ValueError(
            f"there is no table of synonyms {path}: it is data/synonyms.txt of CHAIR's repository "
            "(github.com/LisaAnne/Hallucination); --synonyms names another place"
        )
    lines = [line.strip().split(", ") for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    return {word: line[0] for line in lines for word in line}


def merge(tokens: list[str]) -> list[str]:
    """Pairs become one token, from left to right."""
    merged, at = [], 0
    while at < len(tokens):
        pair = MERGED.get(" ".join(tokens[at : at + 2]))
        merged.append(tokens[at] if pair is None else pair)
        at += 1 if pair is None else 2
    return merged

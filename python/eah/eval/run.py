"""`eah eval run`: a model answers a benchmark, as it is and with EAH; interrupted, it goes on where it was."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import eah
from eah.eval.benchmark import Answer, Item
from eah.eval.files import read_json
from eah.eval.generation import answer_batch, generating_by, seed_batch
from eah.eval.journal import Journal
from eah.eval.variants import BASE, Variant
from eah.pictures import read_picture
from eah.transformers.inputs import Prompts

VERSIONS = ("eah-kernels", "torch", "transformers", "triton", "numpy", "pillow", "nltk", "spacy")
NOT_COMPARED = ("images", "device_name", "versions.nltk", "versions.spacy")  # another machine, and what scores


@dataclass(frozen=True)
class Task:
    """A part for one variant; variant None: the model as it is. seed: of the sampling."""

    name: str
    variant: Variant | None
    part: str
    items: list[Item]
    seed: int

    def batches(self, size: int) -> Iterator[tuple[int, list[Item]]]:
        for number, begin in enumerate(range(0, len(self.items), size)):
            yield number, self.items[begin : begin + size]


def tasks(variants: Mapping[str, Variant], base: bool, parts: Mapping[str, list[Item]], seeds: list[int]) -> list[Task]:
    """Every variant's parts; with several seeds each is a part of its own."""
    named = [(part if len(seeds) == 1 else f"{part}-seed{s}", items, s) for part, items in parts.items() for s in seeds]
    compared = {**({BASE: None} if base else {}), **variants}
    return [Task(name, knobs, *part_and_more) for name, knobs in compared.items() for part_and_more in named]


def check_settings(out: Path, settings: dict) -> None:
    """Refuses a folder that holds answers made with other settings, naming them; the settings may be some of them."""
    if any(file.stat().st_size for file in (out / "answers").glob("*.jsonl")):
        refuse_other_settings(out, settings)


def refuse_other_settings(out: Path, settings: dict) -> None:
    """Raises ValueError where they are not those of run.json, or nothing says what those were."""
    if not (out / "run.json").exists():
        raise ValueError(f"{out} has results, and no run.json that says how they were made: name another --out")
    before = read_json(out / "run.json")
    was, now = _flat({name: before.get(name) for name in settings}), _flat(settings)
    names = [name for name in {**now, **was} if name not in NOT_COMPARED and was.get(name) != now.get(name)]
    other = [f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names]
    if other:
        raise ValueError(
            f"{out} was begun with other settings: {'; '.join(other)}; go on with those, or name another --out"
        )


def _flat(settings: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_pictures(folder: str, todo: list[Task]) -> None:
    for image in dict.fromkeys(item.image for task in todo for item in task.items):
        if not (Path(folder) / image).is_file():
            raise ValueError(f"there is no picture {Path(folder) / image}")


def check_variants(model, todo: list[Task]) -> None:
    """Raises what `eah.enable` raises for the first variant that the model does not take."""
    for variant in {task.name: task.variant for task in todo}.values():
        if variant is not None:
            eah.enable(model, **asdict(variant)).disable()


def answer(model, prompts: Prompts, config, todo: list[Task], images: str, batch_size: int, out: Path) -> dict:
    """Makes the answers that are not in out/answers yet; all of them, by variant and part.

    A batch is of the same items whether or not some of its answers are there, so that those that are made again are the
    same.
    """
    from tqdm import tqdm

    journals = [Journal(out / "answers" / f"{task.name}.{task.part}.jsonl") for task in todo]
    there = sum(
        sum(item.id in journal.records for item in task.items) for task, journal in zip(todo, journals, strict=True)
    )
    tty = sys.stderr.isatty()
    with (
        generating_by(model, config),
        tqdm(
            total=sum(len(task.items) for task in todo),
            initial=there,
            unit=" answers",
            file=sys.stderr,
            mininterval=0.5 if tty else 60,
            bar_format=None if tty else "{desc}{n_fmt} of {total_fmt} answers, {rate_fmt}, {remaining} left\n",
        ) as progress,
    ):
        for task, journal in zip(todo, journals, strict=True):
            progress.set_description(f"{task.name} {task.part}", refresh=False)
            for number, items in task.batches(batch_size):
                if all(item.id in journal.records for item in items):
                    continue
                # As the official scripts read them: an orientation in the file is not applied.
                pictures = [read_picture(Path(images) / item.image, upright=False) for item in items]
                seed_batch(task.seed, number)
                records = answer_batch(model, prompts, config, task.variant, items, pictures)
                new = [record for record in records if record["id"] not in journal.records]
                journal.append(new)
                progress.update(len(new))
    return {
        (task.name, task.part): [(item, _answer(journal.records[item.id])) for item in task.items]
        for task, journal in zip(todo, journals, strict=True)
    }


def _answer(record: dict) -> Answer:
    return Answer(record["answer"], record.get("stopped"), record.get("heads"))

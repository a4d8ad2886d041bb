"""The benchmarks by name, with the options of scoring that concern each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eah.eval.benchmark import Benchmark


@dataclass(frozen=True)
class Scoring:
    """None: the benchmark's own default. Which benchmark takes which: `OPTIONS`."""

    words: str | None = None
    yes_no: str | None = None
    unfinished: str | None = None
    vectors: str | None = None
    synonyms: str | None = None
    prompt: str | None = None


OPTIONS: dict[str, dict[str, str | None]] = {
    "pope": {"yes_no": "official"},
    "chair": {"words": "nltk", "unfinished": "keep", "synonyms": None, "prompt": None},
    "amber": {"words": "nltk", "yes_no": "first-word", "vectors": "spacy:en_core_web_lg"},
    "mmhal": {},
}


def load(name: str, data: list[str], scoring: Scoring) -> tuple[Benchmark, dict]:
    """A benchmark and the settings of its scoring, as result.json has them.

    Raises:
        ImportError, ValueError: the data cannot be read, an option is of another benchmark, word data are missing.
    """
    options = dict(OPTIONS[name])
    for option, value in vars(scoring).items():
        if value is None:
            continue
        if option not in options:
            raise ValueError(f"--{option.replace('_', '-')} has no meaning for {name}")
        options[option] = value
    benchmark = _construct(name, data, options)
    settings: dict[str, Any] = {option: value for option, value in options.items() if option != "prompt"}
    words = getattr(benchmark, "words", None)
    if words is not None:
        settings |= {"words": words.name, "words_data": words.about}
    return benchmark, settings


def _construct(name: str, data: list[str], options: dict) -> Benchmark:
    if name == "pope":
        from eah.eval.pope import Pope

        return Pope(data, rule=options["yes_no"])
    if name == "chair":
        from eah.eval.chair import Chair

        return Chair(data, **options)
    if name == "amber":
        from eah.eval.amber import Amber

        return Amber(data, words=options["words"], rule=options["yes_no"], vectors=options["vectors"])
    from eah.eval.mmhal import Mmhal

    return Mmhal(data)

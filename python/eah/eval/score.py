"""From answers to result.json: every variant's metrics, their spread over parts, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eah.eval.benchmark import Answer, Benchmark, Item, Judged
from eah.eval.bootstrap import LEVEL, interval, resampled
from eah.eval.files import read_json, write_json, write_records

SCHEMA = "eah-eval/1"
HELD = ("bench", "rows", "summary")  # what no result.json of a run or score is without
Answered = Mapping[tuple[str, str], list[tuple[Item, Answer]]]  # by variant and part, the first variant first


def score(benchmark: Benchmark, answered: Answered, settings: dict, resamples: int, out: Path) -> dict:
    """Judges every answer, writes details/ and result.json, and returns what is in the latter.

    Raises:
        ValueError: the variants did not answer the same items, so that they cannot be compared.
    """
    check_same_items(answered)
    judged = {
        (variant, part): [(item, answer, benchmark.judge(item, answer.text)) for item, answer in pairs]
        for (variant, part), pairs in answered.items()
    }
    for (variant, part), answers in judged.items():
        write_records(out / "details" / f"{variant}.{part}.jsonl", (verdict.detail for *_, verdict in answers))
    rows = [_row(benchmark, variant, part, judged[variant, part]) for variant, part in judged]
    result = {
        "schema": SCHEMA,
        "bench": benchmark.name,
        "settings": settings,
        "rows": rows,
        "summary": summary(rows),
        "differences": differences(benchmark, judged, resamples),
    }
    write_json(out / "result.json", result)
    return result


def read_result(folder: Path) -> dict:
    """The result.json of a run or a score.

    Raises:
        ValueError: there is none in the folder, or something else.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no result.json: eah eval run or score writes it at its end")
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not all(map(result.get, HELD)):
        raise ValueError(f"{path} is not of the schema {SCHEMA}, or is a report's")
    return result


def check_same_items(answered: Answered) -> None:
    variants = list(dict.fromkeys(variant for variant, _ in answered))
    for part in dict.fromkeys(part for _, part in answered):
        first, *others = variants
        for variant in variants:
            if (variant, part) not in answered:
                raise ValueError(f"{variant} has no answers to part {part}: every variant must answer the same parts")
        ids = {item.id for item, _ in answered[first, part]}
        for variant in others:
            differing = ids.symmetric_difference(item.id for item, _ in answered[variant, part])
            if differing:
                example = min(differing, key=str)
                raise ValueError(
                    f"{first} and {variant} did not answer the same items of part {part}: {example!r} is of one"
                )


def _row(benchmark: Benchmark, variant: str, part: str, judged: list[tuple[Item, Answer, Judged]]) -> dict:
    sums = {name: sum(verdict.counts.get(name, 0) for *_, verdict in judged) for name in benchmark.counted}
    stopped = [answer.stopped for _, answer, _ in judged if answer.stopped is not None]
    heads = [answer.heads for _, answer, _ in judged if answer.heads is not None]
    acted = [any(head is not None for head in chosen.values()) for chosen in heads]
    row = {
        "variant": variant,
        "part": part,
        "n": len(judged),
        "metrics": {name: plain(value) for name, value in benchmark.metrics(sums).items()},
        "unparsed": sum(verdict.unparsed for *_, verdict in judged),
        "truncated": stopped.count("length") if stopped else None,
        "acted": sum(acted) / len(acted) if acted else None,
    }
    official = benchmark.official(sums)
    return row if official is None else row | {"official": official}


def summary(rows: list[dict]) -> list[dict]:
    """Mean and spread over the parts; undefined where a part's metric is, and the spread of one part."""
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row["metrics"] for row in rows if row["variant"] == variant]
        for metric in own[0]:
            values = [metrics[metric] for metrics in own]
            known = None not in values
            mean = float(np.mean(values)) if known else None
            std = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
            found.append({"variant": variant, "metric": metric, "mean": mean, "std": std, "parts": len(values)})
    return found


def differences(benchmark: Benchmark, judged, resamples: int) -> list[dict]:
    """Of every other variant from the first: in each part and, where there are several, of the parts' mean."""
    first, *others = dict.fromkeys(variant for variant, _ in judged)
    parts = list(dict.fromkeys(part for _, part in judged))
    compared = [*((part, [part]) for part in parts), *([("mean", parts)] if len(parts) > 1 else [])]
    found = []
    for name, of in compared if others else []:
        images = sorted({item.image for part in of for item, *_ in judged[first, part]})
        keys = [(variant, part) for variant in (first, *others) for part in of]
        sums = np.concatenate([by_image(benchmark, judged[key], images) for key in keys], axis=1)
        once, drawn = (_metrics(benchmark, s, keys) for s in (sums.sum(0, keepdims=True), resampled(sums, resamples)))
        for variant in others:
            for metric in once[first]:
                difference = plain(once[variant][metric][0] - once[first][metric][0])
                low, high = interval(drawn[variant][metric] - drawn[first][metric])
                found.append(
                    {
                        "variant": variant,
                        "against": first,
                        "part": name,
                        "metric": metric,
                        "difference": difference,
                        "low": None if difference is None else low,
                        "high": None if difference is None else high,
                        "level": LEVEL,
                        "resamples": resamples,
                        "unit": "image",
                        "units": len(images),
                    }
                )
    return found


def by_image(benchmark: Benchmark, judged: list[tuple[Item, Answer, Judged]], images: list[str]) -> np.ndarray:
    """(images, sums) what each image adds to the benchmark's sums."""
    rows, columns = ({key: at for at, key in enumerate(keys)} for keys in (images, benchmark.counted))
    sums = np.zeros((len(rows), len(columns)))
    for item, _, verdict in judged:
        for name, count in verdict.counts.items():
            sums[rows[item.image], columns[name]] += count
    return sums


def _metrics(benchmark: Benchmark, sums: np.ndarray, keys: list[tuple[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Each variant's metrics, averaged over its parts, from (n, sums) with the keys' sums side by side."""
    width = len(benchmark.counted)
    per_variant: dict[str, list[dict]] = {}
    for at, (variant, _) in enumerate(keys):
        block = sums[:, at * width : (at + 1) * width]
        metrics = benchmark.metrics(dict(zip(benchmark.counted, block.T, strict=True)))
        per_variant.setdefault(variant, []).append(metrics)
    return {
        variant: {metric: np.mean([metrics[metric] for metrics in parts], axis=0) for metric in parts[0]}
        for variant, parts in per_variant.items()
    }


def plain(value) -> float | None:
    """A Python float; None where undefined."""
    return None if np.isnan(value) else float(value)

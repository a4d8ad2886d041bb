"""`make eval-demo`: `eah eval` from end to end on a model with learned weights, trained on the spot and kept in build/.

It asserts what has to hold of the pipeline; of the method its figures say nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import time
from pathlib import Path

import torch

from eah import cli

from . import learned, scenes

BUILD = Path("build/eval-demo")
IMAGES = 60
NOISES = (0, 30)  # standard deviation, of 255
THRESHOLDS = ("0.002", "0.01", "0.02", "0.03", "0.05")
SHOWN = {"pope": ("accuracy", "f1", "yes_ratio"), "chair": ("chair_s", "chair_i", "recall", "length")}
SAYING = (
    "This shows the pipeline, not the method: what EAH does to a model of 0.8 million parameters that sees glyphs on a "
    "grey ground says nothing on what it does to a vision-language model."
)


def main() -> None:
    begin = time.monotonic()
    model = learned.cached(BUILD / "models")
    torch.set_num_threads(1)  # so small products gain nothing from a second
    results = {}
    for noise in NOISES:
        data = BUILD / f"scenes-noise{noise}"
        chance = random.Random(2024)
        scenes.write(data, [scenes.scene(chance) for _ in range(IMAGES)], noise, seed=noise)
        for bench in SHOWN:
            results[bench, noise] = evaluate(bench, model, data, BUILD / f"{bench}-noise{noise}")
    for (bench, noise), result in results.items():
        print(f"\n{bench}, noise {noise}: {IMAGES} pictures; in brackets the 95 % interval of the difference from base")
        print(table(bench, result))
    print(f"\nresult.json, result.md, answers and plots: {BUILD}/*; {time.monotonic() - begin:.0f} s in all")
    check(results)
    print(SAYING)


def evaluate(bench: str, model: Path, data: Path, out: Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    of = [data] if bench == "chair" else sorted(data.glob("scenes_pope_*.json"), reverse=True)
    more = ["--words", "builtin", "--prompt", scenes.DESCRIBE, "--max-new-tokens", 40] if bench == "chair" else []
    common = ["--model", model, "--images", data / "images", "--out", out, "--device", "cpu", "--batch-size", 50]
    arguments = ["eval", "run", bench, "--data", *of, *common, "--threshold", *THRESHOLDS, *more]
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([*map(str, arguments)])
    if status:
        sys.exit(status)
    return json.loads((out / "result.json").read_text())


def table(bench: str, result: dict) -> str:
    mean = {(entry["variant"], entry["metric"]): entry["mean"] for entry in result["summary"]}
    part = "mean" if len({row["part"] for row in result["rows"]}) > 1 else result["rows"][0]["part"]
    differ = {(d["variant"], d["metric"]): d for d in result["differences"] if d["part"] == part}
    lines = [f"{'variant':16}" + "".join(f"{metric:>26}" for metric in SHOWN[bench])]
    for variant in dict.fromkeys(variant for variant, _ in mean):
        cells = [_cell(mean[variant, metric], differ.get((variant, metric))) for metric in SHOWN[bench]]
        lines.append(f"{variant:16}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, differ: dict | None) -> str:
    text = "-" if value is None else f"{value:.3f}"
    known = differ is not None and differ["low"] is not None
    return f"{text} [{differ['low']:+.3f}, {differ['high']:+.3f}]" if known else text


def check(results: dict) -> None:
    """The plain model has learnt, noise makes it err, and the knob is felt."""
    base = {
        (noise, row["part"]): row["metrics"]["accuracy"]
        for noise in NOISES
        for row in results["pope", noise]["rows"]
        if row["variant"] == "base"
    }
    clean = min(base[0, part] for part in ("random", "popular", "adversarial"))
    assert clean >= 0.95, f"accuracy on clean scenes: {clean}"
    assert base[30, "random"] >= 0.70, f"accuracy under noise, random questions: {base[30, 'random']}"
    assert all(row["acted"] in (None, 1.0) for row in results["pope", 0]["rows"] if "t0.002" in row["variant"])
    changed = [t for t in THRESHOLDS if answers("pope", 30, f"eah-l1-t{t}") != answers("pope", 30, "base")]
    assert changed, "no threshold of the sweep changes an answer"


def answers(bench: str, noise: int, variant: str) -> list[str]:
    folder = BUILD / f"{bench}-noise{noise}" / "answers"
    lines = [line for path in sorted(folder.glob(f"{variant}.*.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


if __name__ == "__main__":
    main()
